#include "tests/simulation/world.h"

#include <algorithm>
#include <utility>

#include "tests/simulation/decode_node.h"
#include "tests/simulation/prefill_node.h"
#include "tests/simulation/router_node.h"

namespace zeroc::simulation {
namespace {

constexpr double kHeartbeatExpiry = 3;  // of a worker
constexpr double kDetection = 1;        // of a dead process by its peers
constexpr std::size_t kLogLines = 400;

}  // namespace

WorldOptions::WorldOptions() {
  network.delay_min_seconds = 10e-6;
  network.delay_max_seconds = 1e-3;
  leases.expiry_ns = 2'000'000'000;
  leases.lifetime_max_ns = 60'000'000'000;
  leases.resend_ns = 500'000'000;
  sender.write_bytes_max = 16 << 10;
  sender.heartbeat_ns = 500'000'000;
  sender.resend_ns = 500'000'000;
  sender.answer_timeout_ns = 4'000'000'000;
  sender.stop_timeout_ns = 2'000'000'000;
}

void WorldReport::Add(const WorldReport& other) {
  n_requests += other.n_requests;
  n_ok += other.n_ok;
  n_cancelled += other.n_cancelled;
  n_failed += other.n_failed;
  n_attempts += other.n_attempts;
  n_migrations += other.n_migrations;
  n_refused += other.n_refused;
  n_local += other.n_local;
  n_lease_failures += other.n_lease_failures;
  n_lease_expiries += other.n_lease_expiries;
  n_bad_checksums += other.n_bad_checksums;
  n_quarantined += other.n_quarantined;
  n_steps_checked += other.n_steps_checked;
  seconds += other.seconds;
  if (!violation.has_value()) violation = other.violation;
}

World::World(const WorldOptions& options)
    : options_(options), rng_(options.seed), network_(options.seed, options.delivery) {
  network_.set_faults(options_.network);
  network_.set_failure_detection_seconds(kDetection);
  const auto add = [&](bool is_decode, int n, std::size_t bytes) {
    for (int i = 0; i < n; ++i) {
      std::string name(is_decode ? "d" : "p");
      name += std::to_string(i);
      Slot& slot = slots_[name];
      slot.is_decode = is_decode;
      slot.memory = std::make_unique<handoff_test::Arena>(bytes);
      Boot(name);
    }
  };
  add(true, options_.n_decode, options_.decode_arena_bytes);
  add(false, options_.n_prefill, options_.prefill_arena_bytes);
  router_ = std::make_unique<RouterNode>(*this);
  for (const auto& [name, slot] : slots_) Heartbeat(name);
}

World::~World() {
  router_.reset();
  for (const auto& [name, slot] : slots_) network_.Kill(name);  // transports that say farewell would call the nodes
  // What never ended, as after a violation, is held by its own handlers.
  for (const std::weak_ptr<Call>& weak : calls_) {
    if (const CallPtr call = weak.lock(); call != nullptr) call->ForgetAll();
  }
}

const std::vector<std::shared_ptr<const KvFormat>>& World::Formats() {
  static const std::vector<std::shared_ptr<const KvFormat>> formats = {
      handoff_test::MakeFormat(4), handoff_test::MakeFormat(16), handoff_test::MakeFormat(2)};
  return formats;
}

// --- nodes ---

void World::Boot(const std::string& name) {
  Slot& slot = slots_.at(name);
  ++slot.lives;
  slot.stalled = false;
  slot.clock_offset_ns = 0;
  const bool repeat = options_.mistake == Mistake::kRepeatLeaseKeys;
  const std::uint64_t seed = repeat ? std::hash<std::string>()(name) : rng_();
  if (slot.is_decode) {
    slot.decode = std::make_unique<DecodeNode>(*this, name, slot.memory->span(), seed);
  } else {
    slot.prefill = std::make_unique<PrefillNode>(*this, name, slot.memory->span());
  }
  if (router_ != nullptr) router_->StreamBroke(name);  // its own is a new one
  Heartbeat(name);
}

void World::Kill(const std::string& name) {
  Slot& slot = slots_.at(name);
  if (Dead(slot)) return;
  network_.Kill(name);
  slot.decode = nullptr;
  slot.prefill = nullptr;
  // Another process may have taken its place by then, and has a stream of its own.
  network_.At(Random(kDetection), {}, [this, name, lives = slot.lives] {
    if (slots_.at(name).lives == lives) router_->StreamBroke(name);
  });
  for (const std::weak_ptr<Call>& weak : calls_) {
    const CallPtr call = weak.lock();
    if (call == nullptr || call->over() || call->worker() != name) continue;
    network_.At(Random(kDetection), {}, [call] { call->Break(Unavailable("the worker died")); });
  }
}

DecodeNode* World::decode(const std::string& name) { return slots_.at(name).decode.get(); }
PrefillNode* World::prefill(const std::string& name) { return slots_.at(name).prefill.get(); }

std::vector<std::string> World::Names(bool decode) const {
  std::vector<std::string> names;
  for (const auto& [name, slot] : slots_) {
    if (slot.is_decode == decode) names.push_back(name);
  }
  return names;
}

std::int64_t World::NowNs(const std::string& node) const {
  return static_cast<std::int64_t>(network_.now_seconds() * 1e9) + 1 + slots_.at(node).clock_offset_ns;
}

void World::Heartbeat(const std::string& name) {
  slots_.at(name).last_heartbeat = network_.now_seconds();
  if (router_ != nullptr && Serves(name)) router_->Heartbeat(name);
}
bool World::Alive(const std::string& name) const {
  return network_.now_seconds() - slots_.at(name).last_heartbeat < kHeartbeatExpiry;
}

CallPtr World::NewCall(const std::string& worker) {
  auto call = std::make_shared<Call>(network_, worker, [this] { return Random(options_.rpc_delay_max_seconds); });
  if (calls_.size() > 1000) std::erase_if(calls_, [](const std::weak_ptr<Call>& weak) { return weak.expired(); });
  calls_.push_back(call);
  // A call to a dead process is refused.
  if (Dead(slots_.at(worker))) {
    network_.At(Random(kDetection), {}, [call] { call->Break(Unavailable("nobody listens there")); });
  }
  return call;
}

void World::BreakCalls() {
  for (const std::weak_ptr<Call>& weak : std::vector<std::weak_ptr<Call>>(calls_)) {
    if (const CallPtr call = weak.lock()) call->Break(Unavailable("the world has ended"));
  }
}

void World::Failed(const std::string& kind, const std::string& text) {
  if (logging()) Log("VIOLATION " + kind + ": " + text);
  if (!failed()) report_.violation = Violation{kind, text, network_.now_seconds()};
}

void World::Log(const std::string& text) {
  log_.push_back(std::to_string(network_.now_seconds()) + "  " + text);
  if (log_.size() > kLogLines) log_.pop_front();
}

// --- time and faults ---

bool World::RunUntil(const std::function<bool()>& condition, double seconds_max) {
  const double until = network_.now_seconds() + seconds_max;
  while (!condition()) {
    if (failed() || network_.now_seconds() >= until || !network_.Step()) return false;
  }
  return true;
}

void World::RunFor(double seconds) {
  const double until = network_.now_seconds() + seconds;
  while (!failed() && network_.now_seconds() < until && network_.Step()) {
  }
}

std::uint64_t World::Submit(RequestSpec spec) {
  if (spec.id == 0) spec.id = next_request_++;
  network_.At(0, {}, [this, spec] { router_->Begin(spec); });
  return spec.id;
}

RequestSpec World::RandomRequest() {
  RequestSpec spec;
  // Few different lengths: leases of the same shape are the ones that may be taken for each other.
  spec.n_prompt = Chance(0.5) ? 1 + static_cast<int>(Random(options_.prompt_tokens_max)) : 100;
  spec.n_output = 1 + static_cast<int>(Random(options_.output_tokens_max));
  spec.n_ranks = 1 + static_cast<int>(Random(options_.ranks_max));
  spec.format = static_cast<int>(Random(static_cast<double>(Formats().size())));
  if (Chance(options_.cancel_probability)) spec.cancel_after = Random(0.5);
  return spec;
}

void World::Apply(const FaultEvent& fault) {
  if (logging()) {
    Log("FAULT " + std::to_string(static_cast<int>(fault.fault)) + " " + fault.node + " " + fault.other + " " +
        std::to_string(fault.seconds));
  }
  switch (fault.fault) {
    case Fault::kKill:
      Kill(fault.node);
      network_.At(fault.seconds, {}, [this, name = fault.node] {
        if (Dead(slots_.at(name))) Boot(name);
      });
      break;
    case Fault::kStall:
      if (Dead(slots_.at(fault.node))) break;
      network_.Stall(fault.node);
      network_.At(fault.seconds, {}, [this, name = fault.node] { network_.Resume(name); });
      break;
    case Fault::kCut:
      network_.Cut(fault.node, fault.other);
      break;
    case Fault::kClockJump:
      slots_.at(fault.node).clock_offset_ns += static_cast<std::int64_t>(fault.seconds * 1e9);
      break;
    case Fault::kCancelStorm:
      for (const std::uint64_t id : router_->Running()) {
        if (Chance(fault.share)) router_->Cancel(id);
      }
      break;
    case Fault::kBreakCalls:
      for (const std::weak_ptr<Call>& weak : std::vector<std::weak_ptr<Call>>(calls_)) {
        const CallPtr call = weak.lock();
        if (call != nullptr && Chance(fault.share)) call->Break(Unavailable("the connection was reset"));
      }
      break;
    case Fault::kRouterRestart:
      router_->Restart();
      break;
  }
}

// --- a life ---

WorldReport World::Run() {
  double at = 0;
  for (int i = 0; i < options_.n_requests; ++i) {
    at += std::exponential_distribution<double>(1 / options_.arrival_seconds)(rng_);
    network_.At(at, {}, [this] {
      router_->Begin([this] {
        RequestSpec spec = RandomRequest();
        spec.id = next_request_++;
        return spec;
      }());
    });
  }
  for (const FaultEvent& fault : options_.faults) {
    network_.At(fault.at, {}, [this, fault] { Apply(fault); });
  }
  RunFor(at + 0.001);
  return Finish();
}

void World::Heal() {
  FakeFaults faults = options_.network;
  faults.drop_probability = faults.corrupt_probability = 0;
  network_.set_faults(faults);
  network_.set_script({});
  for (auto& [name, slot] : slots_) {
    if (Dead(slot)) Boot(name);
    network_.Resume(name);
  }
}

// Every pair of workers serves again, at the first try.
void World::Probe() {
  std::vector<std::uint64_t> probes;
  for (const std::string& d : Names(true)) {
    for (const std::string& p : Names(false)) {
      RequestSpec spec = RandomRequest();
      spec.cancel_after = -1;
      spec.n_ranks = 1;
      spec.decode = d;
      spec.prefill = p;
      spec.must_succeed = true;
      probes.push_back(Submit(spec));
    }
  }
  RunFor(0.001);
  const auto ended = [&] {
    return std::all_of(probes.begin(), probes.end(), [this](std::uint64_t id) { return router_->ended(id); });
  };
  RunUntil(ended, 120);
  if (!failed() && !ended()) Failed("probe", "a request does not end though all faults are over");
}

WorldReport World::Finish() {
  const auto all_ended = [this] { return router_->n_running() == 0; };
  double last_fault = network_.now_seconds();
  for (const FaultEvent& fault : options_.faults) last_fault = std::max(last_fault, fault.at + fault.seconds);
  if (last_fault > network_.now_seconds()) RunFor(last_fault - network_.now_seconds() + 0.001);
  Heal();
  RunFor(0.001);
  const double patience = 400;
  const double begin = network_.now_seconds();
  while (!failed() && !all_ended() && network_.now_seconds() - begin < patience) RunFor(0.05);
  if (!failed() && !all_ended()) {
    Failed("no end",
           std::to_string(router_->n_running()) + " requests, the first " + std::to_string(router_->Running().front()));
  }
  if (!failed() && !options_.calm) {
    RunFor(6);  // what the faults left behind is found meanwhile
    Probe();
  }
  if (!failed()) CheckNothingLeft();
  report_.seconds = network_.now_seconds();
  return report_;
}

std::string World::WhatIsLeft() {
  for (const auto& [name, slot] : slots_) {
    std::string left = slot.is_decode ? slot.decode->WhatIsLeft() : slot.prefill->WhatIsLeft();
    if (!left.empty()) return left;
  }
  return {};
}

void World::CheckNothingLeft() {
  const double begin = network_.now_seconds();
  while (!failed() && !WhatIsLeft().empty() && network_.now_seconds() - begin < 90) RunFor(0.05);
  if (failed()) return;
  if (const std::string left = WhatIsLeft(); !left.empty()) {
    return Failed(left.substr(0, left.find(':')), left + " " + std::to_string(90) + " s after the last request");
  }
  for (const auto& [name, slot] : slots_) {
    if (slot.decode != nullptr) slot.decode->CheckArena();
  }
  RunFor(1);  // what is under way arrives
  for (const std::weak_ptr<Call>& weak : calls_) {
    const CallPtr call = weak.lock();
    if (call != nullptr && !call->over() && !call->ended_by_worker()) {
      Failed("call left", "to " + call->worker());
      return;
    }
  }
}

}  // namespace zeroc::simulation
