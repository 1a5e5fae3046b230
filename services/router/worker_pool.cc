#include "services/router/worker_pool.h"

#include <algorithm>
#include <utility>

#include "services/common/options.h"

namespace zeroc {
namespace {

constexpr std::size_t kNameBytesMax = 128;

const char* RoleName(v1::WorkerRole role) { return role == v1::WORKER_ROLE_PREFILL ? "prefill" : "decode"; }

bool IsGoodName(const std::string& name) {
  return !name.empty() && name.size() <= kNameBytesMax &&
         std::all_of(name.begin(), name.end(), [](char c) { return c > ' ' && c < 0x7f; });
}

}  // namespace

WorkerPool::WorkerPool(std::string model_fingerprint, std::string plan_id, std::chrono::milliseconds expiry)
    : model_fingerprint_(std::move(model_fingerprint)), plan_id_(std::move(plan_id)), expiry_(expiry) {}

Status WorkerPool::CheckInfo(const v1::WorkerInfo& info) const {
  if (info.role() != v1::WORKER_ROLE_PREFILL && info.role() != v1::WORKER_ROLE_DECODE) {
    return InvalidArgument("role is neither prefill nor decode");
  }
  if (!IsGoodName(info.name())) return InvalidArgument("name is not 1 to 128 printable ASCII characters");
  const Result<HostPort> address = ParseHostPort(info.grpc_address());
  if (!address.ok()) return address.status().WithContext("grpc_address");
  if (address->port == 0) return InvalidArgument("grpc_address " + info.grpc_address() + " has port 0");
  if (info.model_fingerprint() != model_fingerprint_) {
    return FailedPrecondition("another model: the worker has " + info.model_fingerprint() + ", the router " +
                              model_fingerprint_);
  }
  if (info.plan_id() != plan_id_) {
    return FailedPrecondition("another plan: the worker has " + info.plan_id() + ", the router " + plan_id_);
  }
  return OkStatus();
}

void WorkerPool::SetLoad(const v1::WorkerLoad& load, Worker* worker) {
  worker->load = load;
  worker->load.clear_prefix_hashes();
  worker->prefixes = std::make_shared<const PrefixHashSet>(load.prefix_hashes().begin(), load.prefix_hashes().end());
}

WorkerId WorkerPool::Add(const v1::WorkerInfo& info, const v1::WorkerLoad& load,
                         std::shared_ptr<WorkerConnection> connection, Time now) {
  MutexLock lock(mu_);
  std::erase_if(workers_, [&](const auto& entry) {
    return entry.second.info.role() == info.role() && entry.second.info.name() == info.name();
  });
  const auto id = static_cast<WorkerId>(next_id_++);
  Worker& worker = workers_[id];
  worker.info = info;
  SetLoad(load, &worker);
  worker.connection = std::move(connection);
  worker.last_heartbeat = now;
  return id;
}

bool WorkerPool::Update(WorkerId id, const v1::WorkerLoad& load, Time now) {
  MutexLock lock(mu_);
  const auto found = workers_.find(id);
  if (found == workers_.end()) return false;
  SetLoad(load, &found->second);
  found->second.last_heartbeat = now;
  return true;
}

void WorkerPool::Remove(WorkerId id) {
  MutexLock lock(mu_);
  workers_.erase(id);
}

std::vector<std::string> WorkerPool::Expire(Time now) {
  std::vector<std::string> names;
  std::vector<std::function<void()>> lost;
  {
    MutexLock lock(mu_);
    for (auto it = workers_.begin(); it != workers_.end();) {
      Worker& worker = it->second;
      if (now - worker.last_heartbeat <= expiry_) {
        ++it;
        continue;
      }
      names.push_back(worker.info.name());
      for (auto& [ref, callback] : worker.on_lost) lost.push_back(std::move(callback));
      it = workers_.erase(it);
    }
  }
  for (const auto& callback : lost) callback();
  return names;
}

// Heartbeats are a second old, so what this router has assigned since counts too: as load for prefill, as a tie-breaker
// for decode, whose free bytes are what Reserve will check anyway.
bool WorkerPool::Better(const Worker& x, const Worker& y) {
  if (x.info.role() == v1::WORKER_ROLE_DECODE) {
    if (x.load.kv_bytes_free() != y.load.kv_bytes_free()) return x.load.kv_bytes_free() > y.load.kv_bytes_free();
    return x.n_assigned < y.n_assigned;
  }
  const std::uint64_t x_tokens = std::max<std::uint64_t>(x.load.waiting_tokens(), x.assigned_tokens);
  const std::uint64_t y_tokens = std::max<std::uint64_t>(y.load.waiting_tokens(), y.assigned_tokens);
  return x_tokens != y_tokens ? x_tokens < y_tokens : x.n_assigned < y.n_assigned;
}

Result<WorkerPool::Ref> WorkerPool::Pick(v1::WorkerRole role, Choice choice) {
  MutexLock lock(mu_);
  std::map<WorkerId, Worker>::iterator best = workers_.end();
  std::size_t n_role = 0, n_draining = 0, n_too_small = 0;
  for (auto it = workers_.begin(); it != workers_.end(); ++it) {
    const Worker& worker = it->second;
    if (worker.info.role() != role || choice.excluded.contains(worker.info.name())) continue;
    ++n_role;
    if (worker.load.draining()) {
      ++n_draining;
    } else if (worker.info.max_tokens() != 0 && worker.info.max_tokens() < choice.n_tokens) {
      ++n_too_small;
    } else if (best == workers_.end()) {
      best = it;
    } else {
      const bool avoided = choice.avoided.contains(worker.info.name());
      const bool best_avoided = choice.avoided.contains(best->second.info.name());
      const bool preferred = worker.info.name() == choice.preferred;
      const bool best_preferred = best->second.info.name() == choice.preferred;
      if (avoided != best_avoided       ? best_avoided
          : preferred != best_preferred ? preferred
                                        : Better(worker, best->second)) {
        best = it;
      }
    }
  }
  if (best == workers_.end()) {
    const std::string what = std::string("no ") + RoleName(role) + " worker";
    if (n_too_small > 0) return Unavailable(what + " can hold " + std::to_string(choice.n_tokens) + " tokens");
    if (n_draining > 0) return Unavailable(what + " takes requests: " + std::to_string(n_draining) + " draining");
    return Unavailable(what + (choice.excluded.empty() ? " is registered" : " is left to try"));
  }
  Worker& worker = best->second;
  Ref ref;
  if (choice.all_ranks) ref.n_ranks_ = std::max<std::uint32_t>(1, worker.load.sp_ranks());
  ref.n_tokens_ = choice.n_tokens / ref.n_ranks_;
  worker.assigned_tokens += ref.n_tokens_;
  ++worker.n_assigned;
  ref.pool_ = this;
  ref.id_ = best->first;
  ref.ref_ = next_id_++;
  ref.name_ = worker.info.name();
  ref.connection_ = worker.connection;
  if (choice.on_lost) worker.on_lost.emplace(ref.ref_, std::move(choice.on_lost));
  return ref;
}

std::vector<WorkerPool::View> WorkerPool::Candidates(v1::WorkerRole role, const Choice& choice) const {
  std::vector<View> views, avoided;
  MutexLock lock(mu_);
  for (const auto& [id, worker] : workers_) {
    const bool fits = worker.info.max_tokens() == 0 || worker.info.max_tokens() >= choice.n_tokens;
    if (worker.info.role() != role || worker.load.draining() || !fits) continue;
    const std::string& name = worker.info.name();
    if (choice.excluded.contains(name)) continue;
    (choice.avoided.contains(name) ? avoided : views)
        .push_back({name, worker.load, worker.info.kv_bytes_total(), worker.assigned_tokens,
                    std::max<std::uint64_t>(worker.load.running() + worker.load.waiting(), worker.n_assigned),
                    worker.prefixes});
  }
  return views.empty() ? avoided : views;
}

Result<WorkerPool::Ref> WorkerPool::PickDecode(Choice choice) {
  return Pick(v1::WORKER_ROLE_DECODE, std::move(choice));
}
Result<WorkerPool::Ref> WorkerPool::PickPrefill(Choice choice) {
  return Pick(v1::WORKER_ROLE_PREFILL, std::move(choice));
}

void WorkerPool::Return(WorkerId id, std::uint64_t ref, std::uint64_t n_tokens) {
  std::function<void()> dropped;  // destroyed after the lock: it may own the request that owns the Ref
  MutexLock lock(mu_);
  const auto found = workers_.find(id);
  if (found == workers_.end()) return;
  found->second.assigned_tokens -= n_tokens;
  --found->second.n_assigned;
  const auto callback = found->second.on_lost.find(ref);
  if (callback == found->second.on_lost.end()) return;
  dropped = std::move(callback->second);
  found->second.on_lost.erase(callback);
}

WorkerPool::Ref& WorkerPool::Ref::operator=(Ref&& other) noexcept {
  if (this == &other) return *this;
  Reset();
  pool_ = std::exchange(other.pool_, nullptr);
  id_ = other.id_;
  ref_ = other.ref_;
  n_tokens_ = other.n_tokens_;
  n_ranks_ = other.n_ranks_;
  name_ = std::move(other.name_);
  connection_ = std::move(other.connection_);
  return *this;
}

void WorkerPool::Ref::Reset() {
  if (pool_ == nullptr) return;
  std::exchange(pool_, nullptr)->Return(id_, ref_, n_tokens_);
  connection_.reset();
}

Status WorkerPool::Ready(bool local_prefill) const {
  MutexLock lock(mu_);
  std::string missing;
  for (const v1::WorkerRole role : {v1::WORKER_ROLE_PREFILL, v1::WORKER_ROLE_DECODE}) {
    if (local_prefill && role == v1::WORKER_ROLE_PREFILL) continue;
    const bool found = std::any_of(workers_.begin(), workers_.end(), [role](const auto& entry) {
      return entry.second.info.role() == role && !entry.second.load.draining();
    });
    if (!found) missing += std::string(missing.empty() ? "" : ", ") + "no " + RoleName(role) + " worker";
  }
  return missing.empty() ? OkStatus() : Unavailable("not ready: " + missing);
}

std::size_t WorkerPool::Count(v1::WorkerRole role) const {
  MutexLock lock(mu_);
  return static_cast<std::size_t>(
      std::count_if(workers_.begin(), workers_.end(), [role](const auto& e) { return e.second.info.role() == role; }));
}

}  // namespace zeroc
