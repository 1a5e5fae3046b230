#include "services/prefill/prefill_rpc.h"

#include <grpcpp/grpcpp.h>

#include <utility>

#include "services/worker/event_stream.h"
#include "zeroc/v1/worker.grpc.pb.h"

namespace zeroc {
namespace {

class PrefillRpc final : public v1::Prefill::CallbackService {
 public:
  explicit PrefillRpc(PrefillCore& core) : core_(core) {}

  grpc::ServerWriteReactor<v1::PrefillEvent>* Run(grpc::CallbackServerContext* context,
                                                  const v1::PrefillRequest* request) override {
    using Stream = EventStream<v1::PrefillEvent>;
    auto stream = std::make_shared<Stream>();
    const PrefillCore::Key key{request->request_id(), request->attempt()};
    auto* reactor = new Stream::Reactor(stream, [this, key] { core_.Cancel(key, Cancelled("the caller has gone")); });
    core_.Run(*request, stream, MonotonicDeadlineNs(*context));
    stream->Attach(reactor);
    return reactor;
  }

  grpc::ServerUnaryReactor* Abort(grpc::CallbackServerContext* context, const v1::PrefillAbortRequest* request,
                                  v1::PrefillAbortResponse*) override {
    core_.Cancel({request->request_id(), request->attempt()}, Cancelled("aborted by the router"));
    grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
    reactor->Finish(grpc::Status::OK);
    return reactor;
  }

  grpc::ServerUnaryReactor* JoinGroup(grpc::CallbackServerContext* context, const v1::JoinGroupRequest* request,
                                      v1::JoinGroupResponse* response) override {
    return Answer(context, core_.JoinGroup(*request, response));
  }

  grpc::ServerWriteReactor<v1::GroupEvent>* ServeGroup(grpc::CallbackServerContext*,
                                                       const v1::ServeGroupRequest* request) override {
    using Stream = EventStream<v1::GroupEvent>;
    auto stream = std::make_shared<Stream>();
    auto* reactor = new Stream::Reactor(stream, [this, epoch = request->epoch()] {
      core_.LeaveGroup(epoch, Unavailable("the leader of the prefill group has gone"));
    });
    core_.ServeGroup(*request, stream);
    stream->Attach(reactor);
    return reactor;
  }

  grpc::ServerUnaryReactor* RunShare(grpc::CallbackServerContext* context, const v1::ShareRequest* request,
                                     v1::ShareResponse*) override {
    return Answer(context, core_.RunShare(*request));
  }

 private:
  static grpc::ServerUnaryReactor* Answer(grpc::CallbackServerContext* context, const Status& status) {
    grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
    reactor->Finish(ToGrpc(status));
    return reactor;
  }

  PrefillCore& core_;
};

class PrefillService final : public WorkerService {
 public:
  explicit PrefillService(std::unique_ptr<PrefillCore> core) : core_(std::move(core)), rpc_(*core_) {}
  grpc::Service* service() override { return &rpc_; }
  void FillLoad(v1::WorkerLoad* load) override { core_->FillLoad(load); }
  void UpdateGauges(Metrics& metrics) override { core_->UpdateGauges(metrics); }
  std::string Describe() const override { return core_->Describe(); }
  std::uint64_t kv_bytes_total() const override { return core_->kv_bytes_total(); }
  std::size_t in_flight() const override { return core_->in_flight(); }
  void StopAccepting() override { core_->StopAccepting(); }
  void CancelAll(const Status& why) override { core_->CancelAll(why); }

 private:
  std::unique_ptr<PrefillCore> core_;
  PrefillRpc rpc_;
};

}  // namespace

std::unique_ptr<WorkerService> MakePrefillService(std::unique_ptr<PrefillCore> core) {
  return std::make_unique<PrefillService>(std::move(core));
}

}  // namespace zeroc
