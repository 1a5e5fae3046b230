#include "services/decode/decode_core.h"

#include <algorithm>
#include <chrono>
#include <random>
#include <utility>

#include "libzeroc/compression/prefix_hash.h"
#include "libzeroc/handoff/byte_codec.h"
#include "services/common/logging.h"
#include "services/decode/decode_request.h"
#include "services/worker/proto_convert.h"

namespace zeroc {
namespace {

constexpr std::size_t kFailedKept = 1024;
constexpr std::chrono::milliseconds kTick(100);

std::uint64_t RandomSeed() {
  std::random_device device;
  return (std::uint64_t{device()} << 32) | device();
}

}  // namespace

// --- start and end ---

Result<std::unique_ptr<DecodeCore>> DecodeCore::Create(const Options& options, WorkerModel& model, Metrics& metrics,
                                                       const TransportFactory& transport) {
  std::unique_ptr<DecodeCore> core(new DecodeCore(options, model, metrics));
  ZEROC_RETURN_IF_ERROR(core->Open(transport));
  return core;
}

DecodeCore::DecodeCore(const Options& options, WorkerModel& model, Metrics& metrics)
    : options_(options),
      model_(model),
      metrics_(metrics),
      leases_({.expiry_ns = options.lease_expiry_ms * 1'000'000}, RandomSeed()) {}

Status DecodeCore::Open(const TransportFactory& transport) {
  ZEROC_ASSIGN_OR_RETURN(transport_, transport(*this));
  Result<std::span<std::byte>> arena = transport_->AllocateArena(options_.kv_bytes);
  if (!arena.ok())
    return arena.status().WithContext("KV memory of " + std::to_string(options_.kv_bytes >> 20) + " MiB");
  arena_ = *arena;
  ZEROC_ASSIGN_OR_RETURN(pool_, OwnedPool::Over(arena_, model_.SlabBytes(), model_.model().kv_memory()));
  if (options_.prefix_cache_share > 0) {
    cache_ = std::make_unique<PrefixCache>(pool_->pool(), model_.fingerprint(), model_.plan_id(),
                                           PrefixCache::Options{options_.prefix_cache_share});
  }
  engine_ = std::make_unique<DecodeEngine>(
      model_.model(), pool_->pool(),
      DecodeEngine::Options{.batch_max = options_.batch_max, .swap_bytes = options_.swap_bytes}, cache_.get());
  local_prefill_ = std::make_unique<PrefillEngine>(
      model_.model(), pool_->pool(),
      PrefillEngine::Options{options_.local_prefill_chunk_tokens, options_.local_prefill_queue_max});
  engine_thread_ = std::make_unique<EngineThread>("decode", [this] { return StepEngines(); });
  timers_ = std::make_unique<TimerThread>();
  ScheduleTick();
  metrics_.SetKvCacheUsage(0);
  metrics_.CountLeaseExpired(0);
  metrics_.CountChecksumFailure(0);
  metrics_.CountPreemption(0);
  return OkStatus();
}

DecodeCore::~DecodeCore() {
  timers_.reset();
  if (engine_thread_ != nullptr) engine_thread_->Stop();  // what the transport still posts is dropped
  // The pool lets go of the transport's arena before that goes; sequences before the pool.
  local_prefill_.reset();
  engine_.reset();
  cache_.reset();
  pool_.reset();
}

void DecodeCore::ScheduleTick() {
  timers_->Schedule(TimerThread::Clock::now() + kTick, [this] {
    LeaseActions actions;
    {
      MutexLock lock(mu_);
      actions = leases_.Tick(DecodeNowNs());
    }
    Do(std::move(actions));
    engine_thread_->Post([this] { local_prefill_->DropLate(DecodeNowNs()); });
    ScheduleTick();
  });
}

// --- Reserve ---

Status DecodeCore::CheckReserve(const v1::ReserveRequest& request, std::shared_ptr<const KvFormat>* format) const {
  if (draining_) return Unavailable("the decode worker is stopping");
  ZEROC_ASSIGN_OR_RETURN(*format, model_.FormatFor(request.model_fingerprint(), request.plan_id(), request.profile()));
  if (request.layout_hash() != 0 && request.layout_hash() != (*format)->layout_hash) {
    return FailedPrecondition("profile " + request.profile() + ": layout hash " +
                              std::to_string(request.layout_hash()) + " asked for, this worker has " +
                              std::to_string((*format)->layout_hash));
  }
  const std::uint64_t max = static_cast<std::uint64_t>(model_.config().max_positions);
  if (request.n_prompt_tokens() == 0 || request.max_tokens() == 0 ||
      std::uint64_t{request.n_prompt_tokens()} + request.max_tokens() > max) {
    return InvalidArgument("n_prompt_tokens " + std::to_string(request.n_prompt_tokens()) + " and max_tokens " +
                           std::to_string(request.max_tokens()) + " do not fit the model's " + std::to_string(max) +
                           " positions");
  }
  if (request.prompt_ids_size() != 0 &&
      static_cast<std::uint32_t>(request.prompt_ids_size()) != request.n_prompt_tokens()) {
    return InvalidArgument("prompt_ids holds " + std::to_string(request.prompt_ids_size()) + " of the prompt's " +
                           std::to_string(request.n_prompt_tokens()) + " tokens");
  }
  MutexLock lock(mu_);
  for (const auto& [id, other] : requests_) {
    if (other->request_id == request.request_id() && other->attempt == request.attempt()) {
      return Status(StatusCode::kAlreadyExists, "request " + request.request_id() + " attempt " +
                                                    std::to_string(request.attempt()) + " holds a lease already");
    }
  }
  return OkStatus();
}

void DecodeCore::Reserve(const v1::ReserveRequest& request, std::function<void(Result<v1::ReserveResponse>)> done) {
  std::shared_ptr<const KvFormat> format;
  if (Status status = CheckReserve(request, &format); !status.ok()) return done(status);
  const bool posted = engine_thread_->Post([this, request, format, done] {
    Result<v1::ReserveResponse> response = ReserveOnEngine(request, format);
    PublishUsage();
    done(std::move(response));
  });
  if (!posted) done(Unavailable("the decode worker is stopping"));
}

Result<v1::ReserveResponse> DecodeCore::ReserveOnEngine(const v1::ReserveRequest& request,
                                                        const std::shared_ptr<const KvFormat>& format) {
  const int n_prompt_tokens = static_cast<int>(request.n_prompt_tokens());
  std::vector<std::int32_t> prompt;
  if (cache_ != nullptr) prompt = IdsFromProto(request.prompt_ids());
  // A prompt that waits to be computed here holds all that it needs, so no two can wait for each other.
  const int local_step_tokens = request.local_prefill() ? options_.local_prefill_chunk_tokens : 0;
  ZEROC_ASSIGN_OR_RETURN(const SequenceId sequence,
                         engine_->Reserve(format, n_prompt_tokens, static_cast<int>(request.max_tokens()),
                                          request.priority(), prompt, local_step_tokens));
  const int n_present = engine_->kv(sequence)->n_shared_blocks();
  BlockTable table =
      BlockTable::Of(*engine_->kv(sequence), n_prompt_tokens, model_.fingerprint(), model_.plan_id(), n_present);
  if (!prompt.empty()) table.set_prompt_hash(PromptHash(prompt));
  if (!prompt.empty() && !request.local_prefill()) {
    metrics_.AddPrefixCacheLookup(prompt.size(), static_cast<std::uint64_t>(table.n_present_tokens()));
  }
  auto owned = std::make_shared<Request>();
  owned->core = this;
  owned->request_id = request.request_id();
  owned->attempt = request.attempt();
  owned->priority = request.priority();
  owned->sequence = sequence;
  owned->n_prompt_tokens = n_prompt_tokens;
  owned->local_prefill = request.local_prefill();
  owned->kv_bytes = table.n_bytes() + table.n_present_bytes();
  {
    MutexLock lock(mu_);
    Result<LeaseKey> key = leases_.Create(table, DecodeNowNs());
    if (!key.ok()) {
      engine_->Release(sequence);
      return key.status();
    }
    owned->key = *key;
    requests_[key->lease_id] = owned;
  }
  v1::ReserveResponse response;
  response.set_n_cached_tokens(static_cast<std::uint32_t>(table.n_present_tokens()));
  v1::Lease& lease = *response.mutable_lease();
  lease.set_lease_id(owned->key.lease_id);
  lease.set_generation(owned->key.generation);
  lease.set_kv_layout(table.Serialise());
  lease.set_transport_address(transport_->LocalAddress().bytes);
  const RemoteArena arena = transport_->LocalArena();
  lease.set_arena_key(arena.key);
  lease.set_arena_base(arena.base);
  lease.set_arena_bytes(arena.bytes);
  lease.set_expiry_ms(static_cast<std::uint64_t>(options_.lease_expiry_ms));
  return response;
}

// --- Generate ---

Status DecodeCore::CheckGenerate(const v1::DecodeRequest& request, const SamplingParams& sampling) const {
  const std::uint32_t n_prompt_tokens = request.n_prompt_tokens();
  if (n_prompt_tokens == 0 || request.n_streamed() >= n_prompt_tokens) {
    return InvalidArgument("n_streamed " + std::to_string(request.n_streamed()) + " leaves nothing of a prompt of " +
                           std::to_string(n_prompt_tokens) + " tokens");
  }
  const int n_streamed = static_cast<int>(request.n_streamed());
  const auto n_ids = static_cast<std::uint32_t>(request.prompt_ids_size());
  const bool needs_ids = request.local_prefill() || sampling.LooksAtPrompt(n_streamed);
  if (n_ids != n_prompt_tokens && (n_ids != 0 || needs_ids)) {
    return InvalidArgument("prompt_ids holds " + std::to_string(n_ids) + " of the prompt's " +
                           std::to_string(n_prompt_tokens) + " tokens");
  }
  return sampling.Validate(model_.config().vocab_size, n_streamed);
}

void DecodeCore::Generate(const v1::DecodeRequest& request, std::shared_ptr<EventSink<v1::DecodeEvent>> sink,
                          std::int64_t deadline_ns) {
  Result<SamplingParams> sampling = SamplingFromProto(request.sampling());
  if (!sampling.ok()) return sink->End(sampling.status());
  if (Status status = CheckGenerate(request, *sampling); !status.ok()) return sink->End(status);
  const std::string name = "lease " + std::to_string(request.lease_id());
  RequestPtr found;
  Status refused;
  {
    MutexLock lock(mu_);
    const auto it = requests_.find(request.lease_id());
    const auto failed = failed_.find(request.lease_id());
    if (it != requests_.end() && it->second->key.generation == request.generation()) found = it->second;
    if (failed != failed_.end()) {
      refused = failed->second;
    } else if (found == nullptr) {
      refused = NotFound(name + ": no such lease, or it is over");
    } else if (found->request_id != request.request_id() ||
               static_cast<std::uint32_t>(found->n_prompt_tokens) != request.n_prompt_tokens()) {
      refused = FailedPrecondition(name + " was reserved for another request or prompt length");
    } else if (found->local_prefill != request.local_prefill()) {
      refused = FailedPrecondition(name + " was reserved for a prompt that " +
                                   (found->local_prefill ? "this worker computes" : "a prefill worker sends"));
    } else if (found->sink != nullptr) {
      refused = Status(StatusCode::kAlreadyExists, name + ": another call waits for it already");
    } else if (request.local_prefill()) {
      refused = leases_.AdmitLocal(found->key);
    }
    if (refused.ok()) {
      found->sink = sink;
      found->started = request.local_prefill();
      found->arrived_ns = DecodeNowNs();
      found->sampling = *sampling;
      found->prompt = IdsFromProto(request.prompt_ids());
      found->n_streamed = static_cast<int>(request.n_streamed());
    }
  }
  if (!refused.ok()) return sink->End(refused);
  if (!request.local_prefill()) return StartIfComplete(found);
  engine_thread_->Post([this, found, deadline_ns] { PrefillOnEngine(found, deadline_ns); });
}

void DecodeCore::StartIfComplete(const RequestPtr& request) {
  {
    MutexLock lock(mu_);
    if (request->sink == nullptr || !request->ready.has_value() || request->started) return;
    if (!leases_.Admit(request->key).ok()) return;  // it ended meanwhile, which ends the stream
    request->started = true;
  }
  engine_thread_->Post([this, request] { AdmitOnEngine(request); });
}

// --- the end of a lease ---

void DecodeCore::Release(const LeaseKey& key, const std::string& reason) {
  EndLease(key, Cancelled("released by the router: " + EscapeControls(reason.substr(0, 128))));
}

void DecodeCore::EndLease(const LeaseKey& key, const Status& why) {
  LeaseActions actions;
  std::shared_ptr<EventSink<v1::DecodeEvent>> sink;
  {
    MutexLock lock(mu_);
    const auto it = requests_.find(key.lease_id);
    if (it != requests_.end() && it->second->key == key) sink = it->second->sink;
    actions = leases_.Release(key, why, DecodeNowNs());
  }
  if (sink != nullptr && !why.ok()) sink->End(why);
  Do(std::move(actions));
}

void DecodeCore::CancelAll(const Status& why) {
  std::vector<LeaseKey> keys;
  {
    MutexLock lock(mu_);
    for (const auto& [id, request] : requests_) keys.push_back(request->key);
  }
  for (const LeaseKey& key : keys) EndLease(key, why);
}

void DecodeCore::Do(LeaseActions actions) {
  for (LeaseAction& action : actions) {
    if (auto* send = std::get_if<SendMessage>(&action)) {
      // Lost messages are covered by resending; a dead peer is reported by itself.
      transport_->Send(send->peer, send->message.type, AsBytes(send->message.payload), [](const Status&) {});
    } else if (auto* verify = std::get_if<VerifyLease>(&action)) {
      engine_thread_->Post([this, one = std::move(*verify)] { Verify(one); });
    } else if (auto* ready = std::get_if<LeaseReady>(&action)) {
      OnReady(*ready);
    } else if (auto* failed = std::get_if<LeaseFailed>(&action)) {
      OnFailed(*failed);
    } else {
      OnReturn(std::get<ReturnBlocks>(action).lease);
    }
  }
}

void DecodeCore::OnReady(const LeaseReady& ready) {
  RequestPtr request;
  {
    MutexLock lock(mu_);
    const auto it = requests_.find(ready.lease.lease_id);
    if (it == requests_.end()) return;  // released meanwhile
    request = it->second;
    request->ready = ready;
  }
  StartIfComplete(request);
}

void DecodeCore::OnFailed(const LeaseFailed& failed) {
  RequestPtr request;
  std::shared_ptr<EventSink<v1::DecodeEvent>> sink;
  {
    MutexLock lock(mu_);
    const auto it = requests_.find(failed.lease.lease_id);
    if (it == requests_.end()) return;
    request = it->second;
    sink = request->sink;
    failed_[failed.lease.lease_id] = failed.status;
    failed_order_.push_back(failed.lease.lease_id);
    if (failed_order_.size() > kFailedKept) {
      failed_.erase(failed_order_.front());
      failed_order_.pop_front();
    }
  }
  if (failed.expired) metrics_.CountLeaseExpired();
  LogWarning("lease failed request=" + EscapeControls(request->request_id) + " error=\"" + failed.status.ToString() +
             "\"");
  if (sink != nullptr) sink->End(failed.status);
}

void DecodeCore::OnReturn(const LeaseKey& key) {
  RequestPtr request;
  std::shared_ptr<EventSink<v1::DecodeEvent>> sink;
  {
    MutexLock lock(mu_);
    const auto it = requests_.find(key.lease_id);
    if (it == requests_.end()) return;
    request = std::move(it->second);
    sink = request->sink;
    requests_.erase(it);
  }
  // A Generate that came between the lease's end and here has heard nothing yet; every other has.
  if (sink != nullptr) sink->End(Cancelled("lease " + std::to_string(key.lease_id) + " is over"));
  // The engine holds the request as a listener until then.
  engine_thread_->Post([this, request] {
    if (request->prefill_job.has_value()) local_prefill_->Release(*request->prefill_job);
    engine_->Release(request->sequence);
    PublishUsage();
  });
}

// --- the transport's thread ---

void DecodeCore::OnPeerUp(PeerId, const PeerInfo& info) {
  LogInfo("KV peer up name=" + EscapeControls(info.name) + " transport=\"" + EscapeControls(info.description) + "\"");
}

bool DecodeCore::AcceptWrite(PeerId peer, const WriteTag& tag, std::uint64_t offset, std::uint64_t bytes) {
  MutexLock lock(mu_);
  return leases_.AcceptWrite(peer, tag, offset, bytes, DecodeNowNs());
}

void DecodeCore::OnWriteDone(PeerId, const WriteTag& tag, std::uint64_t, std::uint64_t bytes, const Status& status) {
  LeaseActions actions;
  {
    MutexLock lock(mu_);
    actions = leases_.OnWriteDone(tag, bytes, status, DecodeNowNs());
  }
  Do(std::move(actions));
}

Status DecodeCore::OnMessage(PeerId peer, std::uint16_t type, std::span<const std::byte> payload) {
  ZEROC_ASSIGN_OR_RETURN(const Message message, ParseMessage(type, payload));
  LeaseActions actions;
  {
    MutexLock lock(mu_);
    ZEROC_ASSIGN_OR_RETURN(actions, leases_.OnMessage(peer, message, DecodeNowNs()));
  }
  Do(std::move(actions));
  return OkStatus();
}

void DecodeCore::OnProtocolError(PeerId, const Status& status) {
  LogWarning("KV transport: dropped a malformed frame: " + EscapeControls(status.ToString()));
}

void DecodeCore::OnPeerFailure(PeerId peer, const Status& status) {
  LeaseActions actions;
  {
    MutexLock lock(mu_);
    actions = leases_.OnPeerFailure(peer, status, DecodeNowNs());
  }
  LogInfo("KV peer down: " + EscapeControls(status.ToString()));
  Do(std::move(actions));
}

// --- what others see ---

BlockPool::Usage DecodeCore::usage() const {
  BlockPool::Usage usage;
  usage.bytes_total = arena_.size() / model_.SlabBytes() * model_.SlabBytes();
  usage.bytes_used = bytes_used_;
  usage.n_blocks_used = blocks_used_;
  return usage;
}

std::size_t DecodeCore::in_flight() const {
  MutexLock lock(mu_);
  return requests_.size();
}

void DecodeCore::FillLoad(v1::WorkerLoad* load) const {
  const BlockPool::Usage now = usage();
  const std::uint64_t wanted = now.bytes_used + swapped_bytes_;  // what is out comes back before anything new
  load->set_kv_bytes_free(now.bytes_total - std::min(now.bytes_total, wanted));
  load->set_running(static_cast<std::uint32_t>(n_running_.load()));
  const std::size_t all = in_flight();
  load->set_waiting(static_cast<std::uint32_t>(all - std::min<std::size_t>(all, load->running())));
  load->set_waiting_tokens(static_cast<std::uint64_t>(std::max<std::int64_t>(0, waiting_tokens_)));
  load->set_draining(draining_);
  hints_.FillLoad(load);
}

void DecodeCore::UpdateGauges(Metrics& metrics) const {
  if (cache_ != nullptr) hints_.UpdateGauges(metrics);
  const BlockPool::Usage now = usage();
  v1::WorkerLoad load;
  FillLoad(&load);
  metrics.SetRequestsRunning(load.running());
  metrics.SetRequestsWaiting(load.waiting());
  metrics.SetRequestsSwapped(n_preempted_);
  metrics.SetKvCacheUsage(
      now.bytes_total == 0 ? 0 : static_cast<double>(now.bytes_used) / static_cast<double>(now.bytes_total));
  metrics.SetKvBlocks("used", static_cast<double>(now.n_blocks_used));
  const KvFormat& any = *model_.formats().begin()->second;
  metrics.SetKvBlocks("free", static_cast<double>((now.bytes_total - std::min(now.bytes_total, now.bytes_used)) /
                                                  static_cast<std::uint64_t>(any.exact.block_bytes)));
  MutexLock lock(mu_);
  const auto blocks = [&](LeaseState state) { return static_cast<double>(leases_.blocks_in(state)); };
  metrics.SetKvBlocks("leased", blocks(LeaseState::kReserved) + blocks(LeaseState::kReceiving) +
                                    blocks(LeaseState::kVerifying) + blocks(LeaseState::kCommitted));
  metrics.SetKvBlocks("resident", blocks(LeaseState::kAdmitted));
  metrics.SetKvBlocks("quarantined", blocks(LeaseState::kQuarantined));
}

std::string DecodeCore::Describe() const {
  return "kv_memory_mib=" + std::to_string(arena_.size() >> 20) +
         " swap_memory_mib=" + std::to_string(options_.swap_bytes >> 20) +
         " batch_max=" + std::to_string(options_.batch_max) +
         " local_prefill_chunk_tokens=" + std::to_string(options_.local_prefill_chunk_tokens) +
         " lease_expiry_ms=" + std::to_string(options_.lease_expiry_ms) +
         " prefix_cache_share=" + std::to_string(options_.prefix_cache_share);
}

}  // namespace zeroc
