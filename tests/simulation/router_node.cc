#include "tests/simulation/router_node.h"

#include <algorithm>
#include <utility>

#include "services/common/logging.h"
#include "services/router/router.h"
#include "tests/simulation/decode_node.h"
#include "tests/simulation/model.h"
#include "tests/simulation/prefill_node.h"
#include "tests/simulation/virtual_timers.h"
#include "tests/simulation/worker_connection.h"

namespace zeroc::simulation {
namespace {

constexpr std::chrono::milliseconds kExpiry(3000);  // of a worker without heartbeats
constexpr double kSweepSeconds = 0.5;
constexpr std::size_t kInFlightMax = 1 << 20;

std::string Name(std::uint64_t id) { return "request " + std::to_string(id); }

// Tokens are numbers here, and have no text.
class NumberCodec : public TextCodec {
 public:
  Result<std::vector<std::uint32_t>> EncodePrompt(std::string_view) const override {
    return InvalidArgument("prompts are token ids");
  }
  std::unique_ptr<TextStream> NewStream() const override { return std::make_unique<Stream>(); }
  std::string TokenText(std::uint32_t) const override { return {}; }
  std::string Decode(std::span<const std::uint32_t>) const override { return {}; }

 private:
  struct Stream : TextStream {
    std::string Push(std::uint32_t) override { return {}; }
    std::string Flush() override { return {}; }
  };
};

ServedModel MakeModel() {
  ServedModel model;
  model.name = "simulated";
  model.fingerprint = handoff_test::kModel;
  model.plan_id = handoff_test::kPlan;
  model.max_positions = 1 << 20;
  model.vocab_size = 0xffffffffu;
  for (std::size_t i = 0; i < World::Formats().size(); ++i) {
    Rung rung;
    rung.name = ProfileOf(static_cast<int>(i));
    rung.kv_bytes_per_token = 100;
    model.ladder.push_back(std::move(rung));
  }
  model.codec = std::make_shared<NumberCodec>();
  return model;
}

FlowConfig MakeConfig(const ServedModel& model, const WorldOptions& options) {
  FlowConfig config;
  config.limits.vocab_size = model.vocab_size;
  config.limits.max_positions = model.max_positions;
  config.request_timeout = std::chrono::seconds(300);
  config.queue_timeout = std::chrono::seconds(120);
  config.retries_max = 7;
  config.local_prefill_tokens = static_cast<std::uint32_t>(options.local_prefill_tokens);
  config.local_prefill_overload_factor = 1;
  return config;
}

}  // namespace

std::uint64_t ContentOf(const World& world, std::uint64_t request) { return Mix(world.options().seed ^ Mix(request)); }

// --- the process ---

class RouterNode::Process {
 public:
  Process(World& world, RouterNode& node)
      : world_(world),
        timers_(world.network()),
        life_(std::make_shared<RouterLife>(RouterLife{world, node, timers_})) {}
  // Nothing of it waits in real time: what runs is cancelled, and every open Reserve is answered.
  ~Process() { Die(); }

  void Die() {
    if (std::exchange(life_->over, true)) return;
    for (auto& [wish, face] : faces_) face->router.CancelAll(Unavailable("the router was lost"));
  }

  std::shared_ptr<RequestFlow> Generate(const RequestSpec& spec, v1::GenerateRequest request,
                                        std::shared_ptr<ResponseSink> sink) {
    return FaceFor({spec.decode, spec.prefill}).router.Generate(std::move(request), std::nullopt, std::move(sink));
  }
  void Heartbeat(const std::string& worker) {
    for (auto& [wish, face] : faces_) face->Heartbeat(*this, wish, worker);
  }
  void StreamBroke(const std::string& worker) {
    for (auto& [wish, face] : faces_) {
      const auto node = face->ids.extract(worker);
      if (!node.empty()) face->pool.Remove(node.mapped());
    }
  }
  void Sweep() {
    for (auto& [wish, face] : faces_) face->pool.Expire(timers_.Now());
  }

 private:
  // The workers that a script wants, decode and prefill; empty: the router's choice. A wish is told to the router as
  // the loads of the others, so it chooses, avoids and retries as ever.
  using Wish = std::pair<std::string, std::string>;
  struct Face {
    explicit Face(Process& process)
        : queue(std::make_shared<AdmissionQueue>(QueueConfig(), process.timers_, process.metrics_)),
          audit({/*share=*/0}, process.model_.ladder, /*ppl_base=*/10, /*seed=*/1),
          context{process.model_,
                  pool,
                  process.metrics_,
                  process.timers_,
                  process.estimates_,
                  *queue,
                  audit,
                  MakeConfig(process.model_, process.world_.options())},
          router(context, kInFlightMax) {}
    static AdmissionQueue::Config QueueConfig() {
      AdmissionQueue::Config config;
      config.waiting_max = 1000;
      return config;
    }
    void Heartbeat(Process& process, const Wish& wish, const std::string& worker) {
      const v1::WorkerLoad load = process.LoadOf(worker, wish);
      const auto known = ids.find(worker);
      if (known != ids.end() && pool.Update(known->second, load, process.timers_.Now())) return;
      v1::WorkerInfo info;
      info.set_role(worker[0] == 'd' ? v1::WORKER_ROLE_DECODE : v1::WORKER_ROLE_PREFILL);
      info.set_name(worker);
      ids[worker] = pool.Add(info, load, Connect(process.life_, worker), process.timers_.Now());
    }

    WorkerPool pool{handoff_test::kModel, handoff_test::kPlan, kExpiry};
    std::map<std::string, WorkerId> ids;
    std::shared_ptr<AdmissionQueue> queue;
    Audit audit;
    FlowContext context;
    zeroc::Router router;
  };

  v1::WorkerLoad LoadOf(const std::string& worker, const Wish& wish) const {
    v1::WorkerLoad load;
    if (const DecodeNode* node = world_.decode(worker); node != nullptr) {
      const bool unwanted = !wish.first.empty() && wish.first != worker;
      load.set_kv_bytes_free(unwanted ? 0 : node->bytes_free());
    } else if (const PrefillNode* prefill = world_.prefill(worker); prefill != nullptr) {
      const bool unwanted = !wish.second.empty() && wish.second != worker;
      load.set_waiting_tokens(unwanted ? 1 << 30 : prefill->waiting_tokens());
    }
    return load;
  }
  Face& FaceFor(const Wish& wish) {
    std::unique_ptr<Face>& face = faces_[wish];
    if (face == nullptr) {
      face = std::make_unique<Face>(*this);
      for (const bool decode : {true, false}) {
        for (const std::string& name : world_.Names(decode)) {
          if (world_.Alive(name) && world_.Serves(name)) face->Heartbeat(*this, wish, name);
        }
      }
    }
    return *face;
  }

  World& world_;
  VirtualTimers timers_;
  std::shared_ptr<RouterLife> life_;
  const ServedModel model_ = MakeModel();
  Metrics metrics_{"simulated"};
  Estimates estimates_;
  std::map<Wish, std::unique_ptr<Face>> faces_;
};

// --- a client ---

class RouterNode::Client : public ResponseSink {
 public:
  Client(RouterNode& node, const RequestSpec& spec)
      : node_(node), world_(node.world_), spec_(spec), content_(ContentOf(world_, spec.id)) {}

  void OnStarted(const v1::Started&) override {}
  void OnDelta(const v1::Delta& delta) override {
    for (const std::uint32_t id : delta.token_ids()) {
      const int position = spec_.n_prompt + static_cast<int>(n_tokens_);
      if (id != static_cast<std::uint32_t>(TokenAt(content_, position))) {
        return world_.Failed("wrong token", Name(spec_.id) + " position " + std::to_string(n_tokens_));
      }
      ++n_tokens_;
    }
  }
  void OnFinal(const v1::Final&) override { node_.End(spec_.id, OkStatus(), n_tokens_); }
  void OnError(const Status& status, ErrorOrigin) override {
    const bool own = status.code() == StatusCode::kCancelled && cancelled;
    node_.End(spec_.id, own || status.code() != StatusCode::kCancelled ? status : Internal(status.ToString()),
              n_tokens_);
  }

  std::weak_ptr<RequestFlow> flow;
  bool cancelled = false;

 private:
  RouterNode& node_;
  World& world_;
  const RequestSpec spec_;
  const std::uint64_t content_;
  std::size_t n_tokens_ = 0;
};

// --- the node ---

RouterNode::RouterNode(World& world) : world_(world), process_(std::make_unique<Process>(world, *this)) {
  [[maybe_unused]] static const bool quiet = (SetUpLogging("simulation", LogLevel::kError), true);
  Sweep();
}

// Flows that still wait for the answer to a Reserve are told that none will come.
RouterNode::~RouterNode() {
  process_->Die();
  world_.BreakCalls();
}

void RouterNode::Sweep() {
  process_->Sweep();
  world_.network().At(kSweepSeconds, {}, [this] { Sweep(); });
}

void RouterNode::Heartbeat(const std::string& worker) { process_->Heartbeat(worker); }
void RouterNode::StreamBroke(const std::string& worker) { process_->StreamBroke(worker); }

std::vector<std::uint64_t> RouterNode::Running() const {
  std::vector<std::uint64_t> ids;
  for (const auto& [id, client] : running_) ids.push_back(id);
  return ids;
}

const RequestSpec* RouterNode::spec(std::uint64_t request) const {
  const auto found = specs_.find(request);
  return found == specs_.end() ? nullptr : &found->second;
}

void RouterNode::Begin(const RequestSpec& spec) {
  specs_[spec.id] = spec;
  ++world_.report().n_requests;
  if (spec.cancel_after >= 0) world_.network().At(spec.cancel_after, {}, [this, id = spec.id] { Cancel(id); });
  v1::GenerateRequest request;
  request.set_request_id(std::to_string(spec.id));
  const std::uint64_t content = ContentOf(world_, spec.id);
  for (int i = 0; i < spec.n_prompt; ++i) {
    request.mutable_token_ids()->add_ids(static_cast<std::uint32_t>(TokenAt(content, i)));
  }
  request.mutable_sampling()->set_max_tokens(static_cast<std::uint32_t>(spec.n_output));
  request.mutable_kv()->set_profile(ProfileOf(spec.format));
  const auto client = std::make_shared<Client>(*this, spec);
  running_[spec.id] = client;
  client->flow = process_->Generate(spec, std::move(request), client);
}

void RouterNode::Cancel(std::uint64_t id) {
  const auto found = running_.find(id);
  if (found == running_.end()) return;
  const std::shared_ptr<Client> client = found->second;
  client->cancelled = true;
  if (const auto flow = client->flow.lock()) flow->Cancel(Cancelled("the client went away"));
}

void RouterNode::Restart() {
  process_->Die();
  dead_.push_back(std::exchange(process_, std::make_unique<Process>(world_, *this)));
}

void RouterNode::End(std::uint64_t id, const Status& status, std::size_t n_tokens) {
  if (world_.logging()) world_.Log(Name(id) + " ends: " + status.ToString());
  if (running_.erase(id) == 0 || !outcomes_.emplace(id, status).second) {
    return world_.Failed("ended twice", Name(id));
  }
  const RequestSpec& spec = specs_.at(id);
  WorldReport& report = world_.report();
  if (status.ok()) {
    ++report.n_ok;
    if (n_tokens != static_cast<std::size_t>(spec.n_output)) {
      world_.Failed("stream", Name(id) + " ends with " + std::to_string(n_tokens) + " of " +
                                  std::to_string(spec.n_output) + " tokens");
    }
    return;
  }
  if (status.code() == StatusCode::kCancelled) {
    ++report.n_cancelled;
    return;
  }
  ++report.n_failed;
  if (spec.must_succeed) world_.Failed("probe", Name(id) + ": " + status.ToString());
  // All may be full for longer than anybody waits; nothing else may go wrong when nothing happens.
  if (world_.options().calm && status.code() != StatusCode::kResourceExhausted) {
    world_.Failed("collateral", Name(id) + ": " + status.ToString());
  }
}

void RouterNode::AttemptLost(std::uint64_t id, const std::string& why) {
  if (world_.logging()) world_.Log(Name(id) + " lost an attempt: " + why);
  const RequestSpec* spec = this->spec(id);
  if (world_.options().calm || (spec != nullptr && spec->must_succeed))
    world_.Failed("collateral", Name(id) + ": " + why);
}

}  // namespace zeroc::simulation
