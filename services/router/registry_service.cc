#include "services/router/registry_service.h"

#include <grpcpp/grpcpp.h>

#include <algorithm>
#include <set>
#include <string>
#include <utility>

#include "services/common/grpc_status.h"
#include "services/common/logging.h"
#include "zeroc/v1/worker.grpc.pb.h"

namespace zeroc {
namespace {

using Clock = std::chrono::steady_clock;

class Service;

// One worker's stream: first heartbeat -> check -> health check of its address -> in the pool -> heartbeats. Owns
// itself from Begin to OnDone; the health check's callback shares it.
class WorkerStream : public grpc::ServerBidiReactor<v1::WorkerHeartbeat, v1::RouterDirective>,
                     public std::enable_shared_from_this<WorkerStream> {
 public:
  explicit WorkerStream(Service& service) : service_(service) {}

  void Begin();
  void Close(const Status& status);

  void OnReadDone(bool ok) override;
  void OnWriteDone(bool) override {}
  void OnCancel() override { Leave("the stream broke"); }
  void OnDone() override;

 private:
  void OnFirst();
  void OnReached(const Status& status);
  void Refuse(const Status& status) ZEROC_REQUIRES(mu_);
  void FinishOnce(const Status& status) ZEROC_REQUIRES(mu_);
  void Leave(const char* why);

  Service& service_;
  std::shared_ptr<WorkerStream> self_;

  Mutex mu_;
  v1::WorkerHeartbeat incoming_;  // belongs to the read that is under way
  v1::WorkerInfo info_ ZEROC_GUARDED_BY(mu_);
  v1::WorkerLoad load_ ZEROC_GUARDED_BY(mu_);
  v1::RouterDirective directive_ ZEROC_GUARDED_BY(mu_);
  std::shared_ptr<WorkerConnection> connection_ ZEROC_GUARDED_BY(mu_);
  bool first_seen_ ZEROC_GUARDED_BY(mu_) = false;
  bool finished_ ZEROC_GUARDED_BY(mu_) = false;
  WorkerId id_ ZEROC_GUARDED_BY(mu_) = WorkerId::kNone;
};

class Service : public RegistryService, public v1::Registry::CallbackService {
 public:
  Service(const RegistryConfig& the_config, WorkerPool& the_pool, WorkerDialer the_dialer, Metrics& the_metrics,
          Timers& the_timers)
      : config(the_config),
        pool(the_pool),
        dialer(std::move(the_dialer)),
        metrics(the_metrics),
        timers_(the_timers),
        alive_(std::make_shared<Alive>()) {
    alive_->service = this;
    Sweep();
  }
  ~Service() override {
    MutexLock lock(alive_->mu);
    alive_->service = nullptr;
  }

  grpc::Service* service() override { return this; }

  grpc::ServerBidiReactor<v1::WorkerHeartbeat, v1::RouterDirective>* Register(grpc::CallbackServerContext*) override {
    auto stream = std::make_shared<WorkerStream>(*this);
    {
      MutexLock lock(mu_);
      streams_.insert(stream);
    }
    stream->Begin();
    return stream.get();
  }

  void CloseAll() override {
    std::set<std::shared_ptr<WorkerStream>> streams;
    {
      MutexLock lock(mu_);
      streams = streams_;
    }
    for (const auto& stream : streams) stream->Close(Unavailable("the router is stopping"));
  }

  void Forget(const std::shared_ptr<WorkerStream>& stream) {
    MutexLock lock(mu_);
    streams_.erase(stream);
  }
  void ShowWorkers() {
    metrics.SetWorkers("prefill", static_cast<double>(pool.Count(v1::WORKER_ROLE_PREFILL)));
    metrics.SetWorkers("decode", static_cast<double>(pool.Count(v1::WORKER_ROLE_DECODE)));
  }

  const RegistryConfig config;
  WorkerPool& pool;
  const WorkerDialer dialer;
  Metrics& metrics;

 private:
  // Outlives the service in the timer's callback.
  struct Alive {
    Mutex mu;
    Service* service ZEROC_GUARDED_BY(mu) = nullptr;
  };

  void Sweep() {
    const auto interval = std::max(config.expiry / 10, std::chrono::milliseconds(10));
    timers_.Schedule(Clock::now() + interval, [alive = alive_] {
      MutexLock lock(alive->mu);
      if (alive->service == nullptr) return;
      for (const std::string& name : alive->service->pool.Expire(Clock::now())) {
        LogWarning("worker lost name=" + name + " because=\"its heartbeats have stopped\"");
        alive->service->ShowWorkers();
      }
      alive->service->Sweep();
    });
  }

  Timers& timers_;
  const std::shared_ptr<Alive> alive_;
  Mutex mu_;
  std::set<std::shared_ptr<WorkerStream>> streams_ ZEROC_GUARDED_BY(mu_);
};

void WorkerStream::Begin() {
  self_ = shared_from_this();
  StartRead(&incoming_);
}

void WorkerStream::OnReadDone(bool ok) {
  if (!ok) {
    Leave("the worker ended it");
    return Close(OkStatus());
  }
  bool first = false;
  {
    MutexLock lock(mu_);
    if (finished_) return;
    load_ = incoming_.load();
    first = !std::exchange(first_seen_, true);
    if (first) info_ = incoming_.info();
    if (id_ != WorkerId::kNone && !service_.pool.Update(id_, load_, Clock::now())) {
      id_ = WorkerId::kNone;
      return FinishOnce(FailedPrecondition("no longer in the pool: register again"));
    }
  }
  if (first) OnFirst();
  MutexLock lock(mu_);
  if (!finished_) StartRead(&incoming_);
}

void WorkerStream::OnFirst() {
  std::shared_ptr<WorkerConnection> connection;
  {
    MutexLock lock(mu_);
    if (const Status status = service_.pool.CheckInfo(info_); !status.ok()) return Refuse(status);
    connection_ = service_.dialer(info_.grpc_address());
    connection = connection_;
  }
  connection->CheckHealth(std::chrono::system_clock::now() + service_.config.dial_timeout,
                          [self = shared_from_this()](const Status& status) { self->OnReached(status); });
}

void WorkerStream::OnReached(const Status& status) {
  MutexLock lock(mu_);
  if (finished_) return;
  if (!status.ok()) return Refuse(status.WithContext("the router cannot reach " + info_.grpc_address()));
  id_ = service_.pool.Add(info_, load_, std::move(connection_), Clock::now());
  service_.ShowWorkers();
  LogInfo("worker joined name=" + info_.name() + " role=" + v1::WorkerRole_Name(info_.role()) +
          " grpc=" + info_.grpc_address() + " http=" + info_.http_address());
  directive_.set_accepted(true);
  directive_.set_heartbeat_ms(static_cast<std::uint32_t>(service_.config.heartbeat.count()));
  directive_.set_expiry_ms(static_cast<std::uint32_t>(service_.config.expiry.count()));
  StartWrite(&directive_);
}

void WorkerStream::Refuse(const Status& status) {
  LogWarning("worker refused name=" + info_.name() + " because=\"" + status.ToString() + "\"");
  if (std::exchange(finished_, true)) return;
  directive_.set_accepted(false);
  directive_.set_message(std::string(status.message()));
  StartWriteAndFinish(&directive_, grpc::WriteOptions(), grpc::Status::OK);
}

void WorkerStream::FinishOnce(const Status& status) {
  if (!std::exchange(finished_, true)) Finish(ToGrpc(status));
}

void WorkerStream::Close(const Status& status) {
  MutexLock lock(mu_);
  FinishOnce(status);
}

void WorkerStream::Leave(const char* why) {
  MutexLock lock(mu_);
  const WorkerId id = std::exchange(id_, WorkerId::kNone);
  if (id == WorkerId::kNone) return;
  service_.pool.Remove(id);
  service_.ShowWorkers();
  LogInfo("worker left name=" + info_.name() + " because=\"" + why + "\"");
}

void WorkerStream::OnDone() {
  Leave("the stream ended");
  {
    MutexLock lock(mu_);
    finished_ = true;  // a health check that is still under way must not touch the service any more
  }
  const auto self = std::move(self_);
  service_.Forget(self);
}

}  // namespace

std::unique_ptr<RegistryService> MakeRegistryService(const RegistryConfig& config, WorkerPool& pool,
                                                     WorkerDialer dialer, Metrics& metrics, Timers& timers) {
  return std::make_unique<Service>(config, pool, std::move(dialer), metrics, timers);
}

}  // namespace zeroc
