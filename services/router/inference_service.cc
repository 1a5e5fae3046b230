#include "services/router/inference_service.h"

#include <grpcpp/grpcpp.h>

#include <algorithm>
#include <deque>
#include <optional>
#include <utility>

#include "services/common/grpc_status.h"
#include "services/common/logging.h"
#include "services/router/score_call.h"
#include "zeroc/v1/inference.grpc.pb.h"

namespace zeroc {
namespace {

// One Generate call. The reactor lives until gRPC's OnDone, the sink's end of it as long as the flow holds the sink;
// the two share this queue.
class GenerateStream : public std::enable_shared_from_this<GenerateStream> {
 public:
  class Reactor;

  explicit GenerateStream(std::size_t queued_bytes_max) : queued_bytes_max_(queued_bytes_max) {}

  // `context` is used only while the reactor is attached.
  void Attach(Reactor* reactor, grpc::CallbackServerContext* context) {
    MutexLock lock(mu_);
    reactor_ = reactor;
    context_ = context;
    Pump();
  }
  // Lives as long as this stream.
  void Hold(std::shared_ptr<const void> pass) { pass_ = std::move(pass); }
  // From here on gRPC may delete the reactor at any time.
  void Detach() {
    MutexLock lock(mu_);
    reactor_ = nullptr;
  }
  void Bind(const std::shared_ptr<RequestFlow>& flow) {
    bool cancelled = false;
    {
      MutexLock lock(mu_);
      flow_ = flow;
      cancelled = cancelled_;
    }
    if (cancelled) ClientGone();
  }
  void ClientGone() {
    std::shared_ptr<RequestFlow> flow;
    bool too_slow = false;
    {
      MutexLock lock(mu_);
      cancelled_ = true;
      too_slow = too_slow_;
      flow = flow_.lock();
    }
    if (flow != nullptr) flow->Cancel(Cancelled(too_slow ? "the client reads too slowly" : "the client has gone"));
  }

  void Push(v1::GenerateResponse response) {
    MutexLock lock(mu_);
    queued_bytes_ += response.ByteSizeLong();
    queue_.push_back(std::move(response));
    // The flow may not be called from here; cancelling the call comes back through OnCancel.
    if (queued_bytes_ > queued_bytes_max_ && reactor_ != nullptr && !too_slow_) {
      too_slow_ = true;
      context_->TryCancel();
    }
    Pump();
  }
  // The status comes after the queue.
  void End(const Status& status) {
    MutexLock lock(mu_);
    end_ = status;
    Pump();
  }
  void OnWritten(bool ok) {
    MutexLock lock(mu_);
    writing_ = false;
    if (!ok) queue_.clear();
    Pump();
  }

 private:
  void Pump() ZEROC_REQUIRES(mu_);

  const std::size_t queued_bytes_max_;
  std::shared_ptr<const void> pass_;
  Mutex mu_;
  Reactor* reactor_ ZEROC_GUARDED_BY(mu_) = nullptr;
  grpc::CallbackServerContext* context_ ZEROC_GUARDED_BY(mu_) = nullptr;
  std::deque<v1::GenerateResponse> queue_ ZEROC_GUARDED_BY(mu_);
  v1::GenerateResponse sending_ ZEROC_GUARDED_BY(mu_);
  std::size_t queued_bytes_ ZEROC_GUARDED_BY(mu_) = 0;
  bool writing_ ZEROC_GUARDED_BY(mu_) = false;
  bool cancelled_ ZEROC_GUARDED_BY(mu_) = false;
  bool too_slow_ ZEROC_GUARDED_BY(mu_) = false;
  std::optional<Status> end_ ZEROC_GUARDED_BY(mu_);
  std::weak_ptr<RequestFlow> flow_ ZEROC_GUARDED_BY(mu_);
};

class GenerateStream::Reactor : public grpc::ServerWriteReactor<v1::GenerateResponse> {
 public:
  explicit Reactor(std::shared_ptr<GenerateStream> stream) : stream_(std::move(stream)) {}
  void OnWriteDone(bool ok) override { stream_->OnWritten(ok); }
  void OnCancel() override { stream_->ClientGone(); }
  void OnDone() override {
    stream_->Detach();
    delete this;
  }

 private:
  const std::shared_ptr<GenerateStream> stream_;
};

// StartWrite and Finish do not run reactions inline, so the lock may be held.
void GenerateStream::Pump() {
  if (reactor_ == nullptr || writing_) return;
  if (!queue_.empty()) {
    sending_ = std::move(queue_.front());
    queue_.pop_front();
    queued_bytes_ -= std::min(queued_bytes_, sending_.ByteSizeLong());
    writing_ = true;
    reactor_->StartWrite(&sending_);
    return;
  }
  if (!end_.has_value()) return;
  reactor_->Finish(ToGrpc(*end_));
  reactor_ = nullptr;
}

class StreamSink : public ResponseSink {
 public:
  explicit StreamSink(std::shared_ptr<GenerateStream> stream) : stream_(std::move(stream)) {}

  void OnStarted(const v1::Started& started) override {
    v1::GenerateResponse response;
    *response.mutable_started() = started;
    stream_->Push(std::move(response));
  }
  void OnDelta(const v1::Delta& delta) override {
    v1::GenerateResponse response;
    *response.mutable_delta() = delta;
    stream_->Push(std::move(response));
  }
  void OnFinal(const v1::Final& final) override {
    v1::GenerateResponse response;
    *response.mutable_final() = final;
    stream_->Push(std::move(response));
    stream_->End(OkStatus());
  }
  void OnError(const Status& status, ErrorOrigin) override { stream_->End(status); }

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
      stream->End(decision.status);
    } else {
      stream->Hold(std::move(decision.pass));
      stream->Bind(router_.Generate(*request, deadline, std::make_shared<StreamSink>(stream)));
    }
    // Only now: a Finish before this returns would be legal too, but OnDone could then race with the lines above.
    stream->Attach(reactor, context);
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
  // The metadata `authorization` is what the header is in HTTP.
  AccessControl::Decision Admit(const grpc::CallbackServerContext& context) const {
    if (access_ == nullptr) return {};
    const auto found = context.client_metadata().find("authorization");
    AccessControl::Decision decision = found == context.client_metadata().end()
                                           ? access_->Admit({})
                                           : access_->Admit({found->second.data(), found->second.size()});
    if (!decision.status.ok()) {
      LogWarning("refused peer=" + context.peer() + " because=\"" + std::string(decision.status.message()) + "\"");
    }
    return decision;
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
