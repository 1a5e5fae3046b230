#include "services/router/inference_service.h"

#include <grpcpp/grpcpp.h>

#include <utility>

#include "services/common/grpc_status.h"
#include "services/router/client_link.h"
#include "services/router/grpc_access.h"
#include "services/router/response_queue.h"
#include "services/router/score_call.h"
#include "zeroc/v1/inference.grpc.pb.h"

namespace zeroc {
namespace {

// One Generate call. The reactor lives until gRPC's OnDone, the sink's end of it as long as the flow holds the sink.
class GenerateStream {
 public:
  class Reactor;

  explicit GenerateStream(std::size_t queued_bytes_max) : queue(queued_bytes_max) {}

  // Lives as long as this stream.
  void Hold(std::shared_ptr<const void> pass) { pass_ = std::move(pass); }
  void ClientGone() {
    client.ClientGone(Cancelled(queue.too_slow() ? "the client reads too slowly" : "the client has gone"));
  }

  ClientLink client;
  ResponseQueue<Reactor, v1::GenerateResponse> queue;

 private:
  std::shared_ptr<const void> pass_;
};

class GenerateStream::Reactor : public grpc::ServerWriteReactor<v1::GenerateResponse> {
 public:
  explicit Reactor(std::shared_ptr<GenerateStream> stream) : stream_(std::move(stream)) {}
  void OnWriteDone(bool ok) override { stream_->queue.OnWritten(ok); }
  void OnCancel() override { stream_->ClientGone(); }
  void OnDone() override {
    stream_->queue.Detach();
    delete this;
  }

 private:
  const std::shared_ptr<GenerateStream> stream_;
};

class StreamSink : public ResponseSink {
 public:
  explicit StreamSink(std::shared_ptr<GenerateStream> stream) : stream_(std::move(stream)) {}

  void OnStarted(const v1::Started& started) override {
    v1::GenerateResponse response;
    *response.mutable_started() = started;
    stream_->queue.Push(std::move(response));
  }
  void OnDelta(const v1::Delta& delta) override {
    v1::GenerateResponse response;
    *response.mutable_delta() = delta;
    stream_->queue.Push(std::move(response));
  }
  void OnFinal(const v1::Final& final) override {
    v1::GenerateResponse response;
    *response.mutable_final() = final;
    stream_->queue.Push(std::move(response));
    stream_->queue.End(OkStatus());
  }
  void OnError(const Status& status, ErrorOrigin) override { stream_->queue.End(status); }

 private:
  const std::shared_ptr<GenerateStream> stream_;
};

class InferenceService : public v1::Inference::CallbackService {
 public:
  InferenceService(Router& router, std::size_t queued_bytes_max, AccessControl* access)
      : router_(router), queued_bytes_max_(queued_bytes_max), access_(access) {}

  grpc::ServerWriteReactor<v1::GenerateResponse>* Generate(grpc::CallbackServerContext* context,
                                                           const v1::GenerateRequest* request) override {
    auto stream = std::make_shared<GenerateStream>(queued_bytes_max_);
    auto* reactor = new GenerateStream::Reactor(stream);  // OnDone deletes it
    const auto deadline = context->deadline();            // max() without one
    if (AccessControl::Decision decision = Admit(*context); !decision.status.ok()) {
      stream->queue.End(decision.status);
    } else {
      stream->Hold(std::move(decision.pass));
      stream->client.Bind(router_.Generate(*request, deadline, std::make_shared<StreamSink>(stream)));
    }
    // Only now: a Finish before this returns would be legal too, but OnDone could then race with the lines above.
    stream->queue.Attach(reactor, context);
    return reactor;
  }

  grpc::ServerUnaryReactor* Score(grpc::CallbackServerContext* context, const v1::ScoreRequest* request,
                                  v1::ScoreResponse* response) override {
    AccessControl::Decision decision = Admit(*context);
    if (!decision.status.ok()) return Refuse(context, decision.status);
    return StartScore(router_, context, *request, response, std::move(decision.pass));
  }

  grpc::ServerUnaryReactor* Abort(grpc::CallbackServerContext* context, const v1::AbortRequest* request,
                                  v1::AbortResponse*) override {
    if (const Status status = Admit(*context).status; !status.ok()) return Refuse(context, status);
    grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
    reactor->Finish(ToGrpc(router_.Abort(request->request_id())));
    return reactor;
  }

  grpc::ServerUnaryReactor* GetModelInfo(grpc::CallbackServerContext* context, const v1::GetModelInfoRequest*,
                                         v1::GetModelInfoResponse* response) override {
    if (const Status status = Admit(*context).status; !status.ok()) return Refuse(context, status);
    *response = router_.ModelInfo();
    grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
    reactor->Finish(grpc::Status::OK);
    return reactor;
  }

 private:
  AccessControl::Decision Admit(const grpc::CallbackServerContext& context) const {
    return AdmitCall(access_, context);
  }
  static grpc::ServerUnaryReactor* Refuse(grpc::CallbackServerContext* context, const Status& status) {
    grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
    reactor->Finish(ToGrpc(status));
    return reactor;
  }

  Router& router_;
  const std::size_t queued_bytes_max_;
  AccessControl* const access_;
};

}  // namespace

std::unique_ptr<grpc::Service> MakeInferenceService(Router& router, std::size_t queued_bytes_max,
                                                    AccessControl* access) {
  return std::make_unique<InferenceService>(router, queued_bytes_max, access);
}

}  // namespace zeroc
