#include "services/router/grpc_worker_connection.h"

#include <grpcpp/grpcpp.h>

#include <utility>

#include "grpc/health/v1/health.grpc.pb.h"
#include "services/common/grpc_status.h"
#include "zeroc/v1/worker.grpc.pb.h"

namespace zeroc {
namespace {

// Every call object owns itself until gRPC's last reaction, and keeps the stub (and so the channel) alive. Requests are
// serialised when the call starts, so they need not outlive it.

template <typename Response>
class UnaryCall : public WorkerCall {
 public:
  UnaryCall(std::shared_ptr<void> keep, Deadline deadline, UnaryDone<Response> on_done)
      : keep_(std::move(keep)), done(std::move(on_done)) {
    context.set_deadline(deadline);
  }
  void Cancel() override { context.TryCancel(); }

 private:
  const std::shared_ptr<void> keep_;

 public:
  grpc::ClientContext context;
  Response response;
  UnaryDone<Response> done;
};

template <typename Event>
class StreamCall : public WorkerCall,
                   public grpc::ClientReadReactor<Event>,
                   public std::enable_shared_from_this<StreamCall<Event>> {
 public:
  StreamCall(std::shared_ptr<void> keep, Deadline deadline, OnEvent<Event> on_event, StreamDone on_done)
      : keep_(std::move(keep)), on_event_(std::move(on_event)), on_done_(std::move(on_done)) {
    context.set_deadline(deadline);
  }
  void Cancel() override { context.TryCancel(); }
  void Begin() {
    self_ = this->shared_from_this();
    this->StartRead(&event_);
    this->StartCall();
  }

  void OnReadDone(bool ok) override {
    if (!ok) return;  // OnDone follows
    on_event_(event_);
    this->StartRead(&event_);
  }
  void OnDone(const grpc::Status& status) override {
    const auto self = std::move(self_);
    const StreamDone done = std::move(on_done_);
    on_event_ = nullptr;
    done(FromGrpc(status));
  }

  grpc::ClientContext context;

 private:
  const std::shared_ptr<void> keep_;
  std::shared_ptr<StreamCall> self_;
  Event event_;
  OnEvent<Event> on_event_;
  StreamDone on_done_;
};

struct Stubs {
  explicit Stubs(const std::shared_ptr<grpc::Channel>& channel)
      : decode(v1::Decode::NewStub(channel)),
        prefill(v1::Prefill::NewStub(channel)),
        health(grpc::health::v1::Health::NewStub(channel)) {}
  std::unique_ptr<v1::Decode::Stub> decode;
  std::unique_ptr<v1::Prefill::Stub> prefill;
  const std::unique_ptr<grpc::health::v1::Health::Stub> health;
};

class GrpcWorkerConnection : public WorkerConnection {
 public:
  GrpcWorkerConnection(std::string address, const GrpcLimits& limits, const GrpcSecurity& security)
      : address_(std::move(address)), stubs_(std::make_shared<Stubs>(MakeGrpcChannel(address_, limits, security))) {}

  void CheckHealth(Deadline deadline, std::function<void(const Status&)> done) override {
    using Response = grpc::health::v1::HealthCheckResponse;
    auto call = std::make_shared<UnaryCall<Response>>(stubs_, deadline, nullptr);
    const grpc::health::v1::HealthCheckRequest whole_server;
    stubs_->health->async()->Check(
        &call->context, &whole_server, &call->response,
        [call, address = address_, done = std::move(done)](const grpc::Status& status) {
          if (!status.ok()) return done(FromGrpc(status).WithContext("health check of " + address));
          const bool serving = call->response.status() == Response::SERVING;
          done(serving ? OkStatus() : Unavailable("health check of " + address + ": not serving"));
        });
  }

  std::shared_ptr<WorkerCall> Reserve(const v1::ReserveRequest& request, Deadline deadline,
                                      UnaryDone<v1::ReserveResponse> done) override {
    auto call = std::make_shared<UnaryCall<v1::ReserveResponse>>(stubs_, deadline, std::move(done));
    stubs_->decode->async()->Reserve(&call->context, &request, &call->response, [call](const grpc::Status& status) {
      std::exchange(call->done, nullptr)(FromGrpc(status), call->response);
    });
    return call;
  }

  std::shared_ptr<WorkerCall> Generate(const v1::DecodeRequest& request, Deadline deadline,
                                       OnEvent<v1::DecodeEvent> on_event, StreamDone done) override {
    auto call = std::make_shared<StreamCall<v1::DecodeEvent>>(stubs_, deadline, std::move(on_event), std::move(done));
    stubs_->decode->async()->Generate(&call->context, &request, call.get());
    call->Begin();
    return call;
  }

  void Release(const v1::ReleaseRequest& request, Deadline deadline, StreamDone done) override {
    auto call = std::make_shared<UnaryCall<v1::ReleaseResponse>>(stubs_, deadline, nullptr);
    stubs_->decode->async()->Release(
        &call->context, &request, &call->response,
        [call, done = std::move(done)](const grpc::Status& status) { done(FromGrpc(status)); });
  }

  std::shared_ptr<WorkerCall> Prefill(const v1::PrefillRequest& request, Deadline deadline,
                                      OnEvent<v1::PrefillEvent> on_event, StreamDone done) override {
    auto call = std::make_shared<StreamCall<v1::PrefillEvent>>(stubs_, deadline, std::move(on_event), std::move(done));
    stubs_->prefill->async()->Run(&call->context, &request, call.get());
    call->Begin();
    return call;
  }

 private:
  const std::string address_;
  const std::shared_ptr<Stubs> stubs_;
};

}  // namespace

std::shared_ptr<WorkerConnection> DialWorker(const std::string& address, const GrpcLimits& limits,
                                             const GrpcSecurity& security) {
  return std::make_shared<GrpcWorkerConnection>(address, limits, security);
}

}  // namespace zeroc
