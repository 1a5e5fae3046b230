#include "services/router/router.h"

#include <cstdio>
#include <random>
#include <utility>
#include <vector>

#include "services/common/logging.h"

namespace zeroc {

std::string NewRequestId() {
  thread_local std::mt19937_64 generator{std::random_device{}()};
  char text[17];
  std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(generator()));
  return text;
}

Router::Router(const FlowContext& context, std::size_t in_flight_max)
    : context_(context), in_flight_max_(in_flight_max) {}

Router::~Router() {
  StopAccepting();
  CancelAll(Unavailable("the router is stopping"));
  // What is left waits for the answer to a Reserve, which has a deadline of its own.
  WaitIdle(context_.config.reserve_timeout + std::chrono::seconds(1));
}

std::shared_ptr<RequestFlow> Router::Generate(v1::GenerateRequest request, std::optional<Deadline> client_deadline,
                                              std::shared_ptr<ResponseSink> sink, RequestKind kind) {
  return StartFlow(std::move(request), client_deadline, std::move(sink), kind, Part::kFirst);
}

std::shared_ptr<RequestFlow> Router::GenerateMore(v1::GenerateRequest request, std::shared_ptr<ResponseSink> sink) {
  return StartFlow(std::move(request), std::nullopt, std::move(sink), RequestKind::kClient, Part::kMore);
}

std::shared_ptr<const void> Router::Hold() {
  MutexLock lock(mu_);
  ++n_held_;
  return {this, [](Router* router) {
            MutexLock router_lock(router->mu_);
            --router->n_held_;
            if (router->idle()) router->idle_.NotifyAll();
          }};
}

std::shared_ptr<RequestFlow> Router::StartFlow(v1::GenerateRequest request, std::optional<Deadline> client_deadline,
                                               std::shared_ptr<ResponseSink> sink, RequestKind kind, Part part) {
  if (request.request_id().empty()) request.set_request_id(NewRequestId());
  const std::string id = request.request_id();
  ResponseSink& answer = *sink;
  // Callbacks of workers may keep a flow alive after the router; on_end has run by then.
  auto flow = std::make_shared<RequestFlow>(
      context_, std::move(request), client_deadline, std::move(sink), [this, id] { Forget(id); }, kind);
  if (const Status status = Admit(id, flow, part); !status.ok()) {
    LogWarning("refused request=" + id + " because=\"" + std::string(status.message()) + "\"");
    if (kind == RequestKind::kClient)
      context_.metrics.ObserveJct("none", status.code() == StatusCode::kUnavailable ? "draining" : "refused", 0);
    answer.OnError(status, ErrorOrigin::kRequest);
    return flow;
  }
  flow->Start();
  return flow;
}

Status Router::Admit(const std::string& id, const std::shared_ptr<RequestFlow>& flow, Part part) {
  MutexLock lock(mu_);
  if (closed_ || (draining_ && part == Part::kFirst)) return Unavailable("the router is stopping");
  if (running_.size() >= in_flight_max_ && part == Part::kFirst) {
    return ResourceExhausted("too many requests in flight: " + std::to_string(running_.size()));
  }
  if (!running_.emplace(id, flow).second) {
    return {StatusCode::kAlreadyExists, "a request with this request_id is running"};
  }
  context_.metrics.SetRequestsRunning(static_cast<double>(running_.size()));
  return OkStatus();
}

void Router::Forget(const std::string& id) {
  MutexLock lock(mu_);
  running_.erase(id);
  context_.metrics.SetRequestsRunning(static_cast<double>(running_.size()));
  if (idle()) idle_.NotifyAll();
}

Status Router::Abort(const std::string& request_id) {
  std::shared_ptr<RequestFlow> flow;
  {
    MutexLock lock(mu_);
    if (const auto found = running_.find(request_id); found != running_.end()) flow = found->second.lock();
  }
  if (flow == nullptr) return NotFound("no request " + request_id + " is running here");
  flow->Cancel(Cancelled("aborted"));
  return OkStatus();
}

v1::GetModelInfoResponse Router::ModelInfo() const {
  const ServedModel& served = context_.model;
  v1::GetModelInfoResponse info;
  info.set_model(served.name);
  info.set_model_fingerprint(served.fingerprint);
  info.set_plan_id(served.plan_id);
  info.set_max_positions(served.max_positions);
  info.set_vocab_size(served.vocab_size);
  info.set_ppl_base(served.ppl_base);
  info.set_default_max_ppl_increase(context_.config.default_max_ppl_increase);
  for (const Rung& rung : served.ladder) {
    v1::ProfileInfo* profile = info.add_profiles();
    profile->set_name(rung.name);
    profile->set_kv_bytes_per_token(rung.kv_bytes_per_token);
    profile->set_ppl_increase(rung.ppl_increase);
    if (rung.recall.has_value()) profile->set_recall(*rung.recall);
  }
  return info;
}

Status Router::Ready() const {
  {
    MutexLock lock(mu_);
    if (draining_) return Unavailable("not ready: the router is stopping");
  }
  return context_.pool.Ready(context_.config.local_prefill_tokens > 0);
}

void Router::StopAccepting() {
  MutexLock lock(mu_);
  draining_ = true;
}

bool Router::WaitIdle(std::chrono::milliseconds timeout) {
  const auto until = std::chrono::steady_clock::now() + timeout;
  MutexLock lock(mu_);
  while (!idle()) {
    if (!idle_.WaitUntil(mu_, until)) return idle();
  }
  return true;
}

void Router::CancelAll(const Status& why) {
  std::vector<std::shared_ptr<RequestFlow>> flows;
  {
    MutexLock lock(mu_);
    closed_ = draining_;
    for (const auto& entry : running_) {
      if (auto flow = entry.second.lock()) flows.push_back(std::move(flow));
    }
  }
  for (const auto& flow : flows) flow->Cancel(why);
}

std::size_t Router::in_flight() const {
  MutexLock lock(mu_);
  return running_.size();
}

bool Router::IsIdle(std::size_t others_max) const {
  return in_flight() <= others_max && context_.queue.n_waiting() == 0;
}

}  // namespace zeroc
