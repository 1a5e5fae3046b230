#include "services/decode/decode_rpc.h"

#include <grpcpp/grpcpp.h>

#include <utility>

#include "services/common/grpc_status.h"
#include "services/worker/event_stream.h"
#include "zeroc/v1/worker.grpc.pb.h"

namespace zeroc {
namespace {

class DecodeRpc final : public v1::Decode::CallbackService {
 public:
  explicit DecodeRpc(DecodeCore& core) : core_(core) {}

  grpc::ServerUnaryReactor* Reserve(grpc::CallbackServerContext* context, const v1::ReserveRequest* request,
                                    v1::ReserveResponse* response) override {
    grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
    core_.Reserve(*request, [this, context, reactor, response](Result<v1::ReserveResponse> reserved) {
      // A grant that nobody waits for any more would hold its blocks until it expires.
      if (reserved.ok() && context->IsCancelled()) {
        core_.Release({reserved->lease().lease_id(), reserved->lease().generation()}, "the caller has gone");
      }
      if (reserved.ok()) *response = std::move(*reserved);
      reactor->Finish(ToGrpc(reserved.status()));
    });
    return reactor;
  }

  grpc::ServerWriteReactor<v1::DecodeEvent>* Generate(grpc::CallbackServerContext* context,
                                                      const v1::DecodeRequest* request) override {
    using Stream = EventStream<v1::DecodeEvent>;
    auto stream = std::make_shared<Stream>();
    const LeaseKey key{request->lease_id(), request->generation()};
    auto* reactor = new Stream::Reactor(stream, [this, key] { core_.Release(key, "the caller has gone"); });
    core_.Generate(*request, stream, MonotonicDeadlineNs(*context));
    stream->Attach(reactor);
    return reactor;
  }

  grpc::ServerUnaryReactor* Release(grpc::CallbackServerContext* context, const v1::ReleaseRequest* request,
                                    v1::ReleaseResponse*) override {
    core_.Release({request->lease_id(), request->generation()}, request->reason());
    grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
    reactor->Finish(grpc::Status::OK);
    return reactor;
  }

 private:
  DecodeCore& core_;
};

class DecodeService final : public WorkerService {
 public:
  explicit DecodeService(std::unique_ptr<DecodeCore> core) : core_(std::move(core)), rpc_(*core_) {}
  grpc::Service* service() override { return &rpc_; }
  void FillLoad(v1::WorkerLoad* load) override { core_->FillLoad(load); }
  void UpdateGauges(Metrics& metrics) override { core_->UpdateGauges(metrics); }
  std::string Describe() const override { return core_->Describe(); }
  std::uint64_t kv_bytes_total() const override { return core_->kv_bytes_total(); }
  std::size_t in_flight() const override { return core_->in_flight(); }
  void StopAccepting() override { core_->StopAccepting(); }
  void CancelAll(const Status& why) override { core_->CancelAll(why); }

 private:
  std::unique_ptr<DecodeCore> core_;
  DecodeRpc rpc_;
};

}  // namespace

std::unique_ptr<WorkerService> MakeDecodeService(std::unique_ptr<DecodeCore> core) {
  return std::make_unique<DecodeService>(std::move(core));
}

}  // namespace zeroc
