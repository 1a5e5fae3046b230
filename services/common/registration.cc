#include "services/common/registration.h"

#include <grpcpp/grpcpp.h>

#include <algorithm>
#include <chrono>
#include <thread>
#include <utility>

#include "libzeroc/base/mutex.h"
#include "services/common/grpc_server.h"
#include "services/common/grpc_status.h"
#include "services/common/logging.h"
#include "zeroc/v1/worker.grpc.pb.h"

namespace zeroc {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::int64_t kFirstBackoffMs = 100;
// A router that does not answer the first heartbeat within this time is as good as absent.
constexpr std::chrono::seconds kAcceptTimeout(10);

}  // namespace

struct Registration::Impl {
  Impl(RegistrationOptions the_options, const v1::WorkerInfo& the_info, std::function<void(v1::WorkerLoad*)> the_load)
      : options(std::move(the_options)), info(the_info), load(std::move(the_load)) {}

  class Stream;
  void Run();
  Status RunStream(v1::Registry::Stub& stub);

  const RegistrationOptions options;
  const v1::WorkerInfo info;
  const std::function<void(v1::WorkerLoad*)> load;

  mutable Mutex mu;
  CondVar wake;
  bool stopping ZEROC_GUARDED_BY(mu) = false;
  bool draining ZEROC_GUARDED_BY(mu) = false;
  bool send_now ZEROC_GUARDED_BY(mu) = false;
  bool registered ZEROC_GUARDED_BY(mu) = false;
  Status last_error ZEROC_GUARDED_BY(mu) = Unavailable("not yet registered");
  std::thread thread;
};

// One stream. The reactor's callbacks only set fields under Impl::mu and wake the thread, which does the talking.
class Registration::Impl::Stream : public grpc::ClientBidiReactor<v1::WorkerHeartbeat, v1::RouterDirective> {
 public:
  Stream(Impl& impl, v1::Registry::Stub& stub) : impl_(impl) {
    stub.async()->Register(&context_, this);
    StartRead(&incoming_);
    AddHold();  // writes come from outside the reactions
    StartCall();
  }

  void OnReadDone(bool ok) override {
    MutexLock lock(impl_.mu);
    if (!ok) {
      broken_ = true;
    } else {
      directive_ = incoming_;
      StartRead(&incoming_);
    }
    impl_.wake.NotifyAll();
  }
  void OnWriteDone(bool ok) override {
    MutexLock lock(impl_.mu);
    writing_ = false;
    if (!ok) broken_ = true;
    impl_.wake.NotifyAll();
  }
  void OnDone(const grpc::Status& status) override {
    MutexLock lock(impl_.mu);
    done_ = true;
    status_ = FromGrpc(status);
    impl_.wake.NotifyAll();
  }

  void Send() ZEROC_REQUIRES(impl_.mu) {
    outgoing_.Clear();
    if (sequence_ == 0) *outgoing_.mutable_info() = impl_.info;
    impl_.load(outgoing_.mutable_load());
    outgoing_.mutable_load()->set_draining(impl_.draining || outgoing_.load().draining());
    outgoing_.set_sequence(++sequence_);
    writing_ = true;
    StartWrite(&outgoing_);
  }
  // The stream is over for us; returns when gRPC has let go of this object.
  Status End() ZEROC_REQUIRES(impl_.mu) {
    context_.TryCancel();
    RemoveHold();
    while (!done_) impl_.wake.Wait(impl_.mu);
    return status_;
  }

  bool broken() const { return broken_ || done_; }
  bool writing() const { return writing_; }
  const v1::RouterDirective& directive() const { return directive_; }  // heartbeat_ms 0: none has come

 private:
  Impl& impl_;
  grpc::ClientContext context_;
  v1::RouterDirective incoming_, directive_;
  v1::WorkerHeartbeat outgoing_;
  std::uint64_t sequence_ = 0;
  bool writing_ = false, broken_ = false, done_ = false;
  Status status_;
};

Status Registration::Impl::RunStream(v1::Registry::Stub& stub) {
  Stream stream(*this, stub);
  MutexLock lock(mu);
  const Clock::time_point accept_by = Clock::now() + kAcceptTimeout;
  Clock::time_point last_sent{};  // long ago: the first heartbeat goes out at once
  Status refused;
  while (!stopping && !stream.broken()) {
    const v1::RouterDirective& directive = stream.directive();
    const bool answered = directive.accepted() || !directive.message().empty();
    if (answered && !directive.accepted()) break;
    if (directive.accepted() && !registered) {
      registered = true;
      last_error = OkStatus();
      LogInfo("registered router=" + options.router_address);
    }
    if (!answered && Clock::now() > accept_by) {
      refused = DeadlineExceeded("the router does not answer");
      break;
    }
    // The interval is the directive's as soon as there is one, also for the heartbeat that is already being waited for.
    const std::int64_t told = directive.heartbeat_ms();
    const std::int64_t interval_ms = told > 0 ? std::clamp<std::int64_t>(told, 10, 60'000) : options.heartbeat_ms;
    const Clock::time_point next = last_sent + std::chrono::milliseconds(interval_ms);
    if (!stream.writing() && (send_now || Clock::now() >= next)) {
      last_sent = Clock::now();
      send_now = false;
      stream.Send();
      continue;
    }
    wake.WaitUntil(mu, stream.writing() ? Clock::now() + std::chrono::seconds(1) : next);
  }
  registered = false;
  const Status ended = stream.End();
  if (!refused.ok()) return refused;
  // Asked after the end: the refusal and the end of the stream may have come together.
  if (const std::string& why = stream.directive().message(); !stream.directive().accepted() && !why.empty()) {
    return FailedPrecondition("the router refuses this worker: " + why);
  }
  return ended.ok() ? Unavailable("the router ended the stream") : ended;
}

void Registration::Impl::Run() {
  std::int64_t backoff_ms = kFirstBackoffMs;
  for (;;) {
    // A new channel each time: gRPC's own back-off would otherwise stand between a restarted router and us.
    const auto stub = v1::Registry::NewStub(MakeGrpcChannel(options.router_address, GrpcLimits{}, options.security));
    const Clock::time_point began = Clock::now();
    const Status ended = RunStream(*stub).WithContext("registration at " + options.router_address);
    MutexLock lock(mu);
    if (stopping) return;
    if (ended.ToString() != last_error.ToString()) LogWarning(ended.ToString());  // once per cause, not per attempt
    last_error = ended;
    // A stream that lived shows that the router is well: start from the short back-off again.
    if (Clock::now() - began > std::chrono::milliseconds(options.backoff_ms_max)) backoff_ms = kFirstBackoffMs;
    const Clock::time_point retry = Clock::now() + std::chrono::milliseconds(backoff_ms);
    backoff_ms = std::min(backoff_ms * 2, options.backoff_ms_max);
    while (!stopping && wake.WaitUntil(mu, retry)) {
    }
    if (stopping) return;
  }
}

std::unique_ptr<Registration> Registration::Start(RegistrationOptions options, const v1::WorkerInfo& info,
                                                  std::function<void(v1::WorkerLoad*)> load) {
  auto impl = std::make_unique<Impl>(std::move(options), info, std::move(load));
  Impl* raw = impl.get();
  raw->thread = std::thread([raw] { raw->Run(); });
  return std::unique_ptr<Registration>(new Registration(std::move(impl)));
}

Registration::Registration(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

Registration::~Registration() {
  {
    MutexLock lock(impl_->mu);
    impl_->stopping = true;
    impl_->wake.NotifyAll();
  }
  impl_->thread.join();
}

bool Registration::registered() const {
  MutexLock lock(impl_->mu);
  return impl_->registered;
}

Status Registration::last_error() const {
  MutexLock lock(impl_->mu);
  return impl_->last_error;
}

void Registration::SetDraining(bool draining) {
  MutexLock lock(impl_->mu);
  impl_->draining = draining;
  impl_->send_now = true;
  impl_->wake.NotifyAll();
}

}  // namespace zeroc
