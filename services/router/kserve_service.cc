#include "services/router/kserve_service.h"

#include <grpcpp/grpcpp.h>

#include <algorithm>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "inference/grpc_service.grpc.pb.h"
#include "libzeroc/tokenizer/utf8.h"
#include "services/common/grpc_status.h"
#include "services/router/grpc_access.h"
#include "services/router/kserve_convert.h"
#include "services/router/response_queue.h"
#include "services/router/unary_call.h"

namespace zeroc {
namespace {

using inference::ModelInferRequest;
using inference::ModelInferResponse;
using inference::ModelStreamInferResponse;

Result<KserveRequest> Parse(const Router& router, const ModelInferRequest& message) {
  if (message.model_name() != router.model().name) {
    // Cutting may split a character, which no message of ours may hold.
    return NotFound("model '" + ReplaceInvalidUtf8(message.model_name().substr(0, 128)) +
                    "' is not served here; this is " + router.model().name);
  }
  return ParseKserveRequest(message);
}

Deadline DeadlineOf(Deadline call, const KserveRequest& request) {
  if (!request.timeout.has_value()) return call;
  return std::min(call, std::chrono::system_clock::now() + *request.timeout);
}

// Collects an answer, or passes its pieces on: what both calls do with a flow.
class Collector {
 public:
  explicit Collector(KserveRequest request) : request_(std::move(request)) {}
  const KserveRequest& request() const { return request_; }
  void SetStarted(const v1::Started& started) { started_ = started; }
  // The piece to send now; nothing while the answer is collected, or when it has no text yet.
  std::optional<ModelInferResponse> Add(const v1::Delta& delta) {
    if (!request_.streaming) {
      text_ += delta.text();
      return std::nullopt;
    }
    if (delta.text().empty()) return std::nullopt;
    return KserveAnswer(request_, delta.text(), started_, nullptr);
  }
  ModelInferResponse End(const v1::Final& final) const { return KserveAnswer(request_, text_, started_, &final); }

 private:
  const KserveRequest request_;
  v1::Started started_;
  std::string text_;
};

// --- ModelInfer ---

class InferCall : public UnaryCall<ModelInferResponse> {
 public:
  explicit InferCall(KserveRequest request) : collector_(std::move(request)) {}

  void OnStarted(const v1::Started& started) override {
    MutexLock lock(mu_);
    collector_.SetStarted(started);
  }
  void OnDelta(const v1::Delta& delta) override {
    MutexLock lock(mu_);
    collector_.Add(delta);
  }
  void OnFinal(const v1::Final& final) override {
    MutexLock lock(mu_);
    response_ = collector_.End(final);
    End(OkStatus());
  }

 private:
  Collector collector_ ZEROC_GUARDED_BY(mu_);
};

// --- ModelStreamInfer ---

// One call and its requests. Ends when the client has closed its side and no request runs, or by a refused key.
class InferStream : public std::enable_shared_from_this<InferStream> {
 public:
  class Reactor;
  class Sink;

  InferStream(Router& router, AccessControl* access, grpc::CallbackServerContext* context, std::size_t queued_bytes_max)
      : queue(queued_bytes_max), router_(router), access_(access), context_(context), deadline_(context->deadline()) {}

  // On gRPC's thread, while the reactor lives.
  void Start(const ModelInferRequest& message);
  void ReadsDone() {
    MutexLock lock(mu_);
    reads_done_ = true;
    EndIfIdle();
  }
  void ClientGone() {
    std::vector<std::shared_ptr<RequestFlow>> flows;
    {
      MutexLock lock(mu_);
      cancelled_ = true;
      for (const auto& entry : flows_) {
        if (auto flow = entry.second.lock()) flows.push_back(std::move(flow));
      }
    }
    const Status why = Cancelled(queue.too_slow() ? "the client reads too slowly" : "the client has gone");
    for (const auto& flow : flows) flow->Cancel(why);
  }
  void PushError(const KserveRequest& request, const Status& status) {
    ModelStreamInferResponse response;
    response.set_error_message(std::string(StatusCodeName(status.code())) + ": " + std::string(status.message()));
    *response.mutable_infer_response() = KserveEmptyFinal(request);
    queue.Push(std::move(response));
  }
  // With the flow's lock held.
  void Ended(std::uint64_t number) {
    MutexLock lock(mu_);
    flows_.erase(number);
    EndIfIdle();
  }

  ResponseQueue<Reactor, ModelStreamInferResponse> queue;

 private:
  void EndIfIdle() ZEROC_REQUIRES(mu_) {
    if (reads_done_ && flows_.empty()) queue.End(OkStatus());
  }

  Router& router_;
  AccessControl* const access_;
  grpc::CallbackServerContext* const context_;  // only in Start
  const Deadline deadline_;
  Mutex mu_;
  std::uint64_t next_ ZEROC_GUARDED_BY(mu_) = 0;
  std::map<std::uint64_t, std::weak_ptr<RequestFlow>> flows_ ZEROC_GUARDED_BY(mu_);  // those that run
  bool reads_done_ ZEROC_GUARDED_BY(mu_) = false;
  bool cancelled_ ZEROC_GUARDED_BY(mu_) = false;
};

class InferStream::Sink : public ResponseSink {
 public:
  Sink(std::shared_ptr<InferStream> stream, std::uint64_t number, KserveRequest request,
       std::shared_ptr<const void> pass)
      : stream_(std::move(stream)), number_(number), collector_(std::move(request)), pass_(std::move(pass)) {}

  void OnStarted(const v1::Started& started) override { collector_.SetStarted(started); }
  void OnDelta(const v1::Delta& delta) override {
    if (auto answer = collector_.Add(delta)) Push(std::move(*answer));
  }
  void OnFinal(const v1::Final& final) override {
    Push(collector_.End(final));
    if (collector_.request().empty_final) Push(KserveEmptyFinal(collector_.request()));
    stream_->Ended(number_);
  }
  void OnError(const Status& status, ErrorOrigin) override {
    stream_->PushError(collector_.request(), status);
    stream_->Ended(number_);
  }

 private:
  void Push(ModelInferResponse answer) {
    ModelStreamInferResponse response;
    *response.mutable_infer_response() = std::move(answer);
    stream_->queue.Push(std::move(response));
  }

  const std::shared_ptr<InferStream> stream_;
  const std::uint64_t number_;
  Collector collector_;  // a flow's calls come one at a time
  const std::shared_ptr<const void> pass_;
};

void InferStream::Start(const ModelInferRequest& message) {
  KserveRequest unread;
  unread.id = message.id();
  unread.model = message.model_name();
  AccessControl::Decision decision = AdmitCall(access_, *context_);
  if (decision.status.code() == StatusCode::kUnauthenticated) return queue.End(decision.status);
  if (!decision.status.ok()) return PushError(unread, decision.status);
  Result<KserveRequest> request = Parse(router_, message);
  if (!request.ok()) return PushError(unread, request.status());
  std::uint64_t number = 0;
  {
    MutexLock lock(mu_);
    if (cancelled_) return;
    number = next_++;
    flows_[number];  // counts as running before it can end
  }
  const Deadline deadline = DeadlineOf(deadline_, *request);
  v1::GenerateRequest generate = request->generate;
  const auto flow = router_.Generate(
      std::move(generate), deadline,
      std::make_shared<Sink>(shared_from_this(), number, std::move(*request), std::move(decision.pass)));
  bool cancelled = false;
  {
    MutexLock lock(mu_);
    if (const auto entry = flows_.find(number); entry != flows_.end()) entry->second = flow;
    cancelled = cancelled_;
  }
  if (cancelled) ClientGone();
}

class InferStream::Reactor : public grpc::ServerBidiReactor<ModelInferRequest, ModelStreamInferResponse> {
 public:
  explicit Reactor(std::shared_ptr<InferStream> stream) : stream_(std::move(stream)) {}
  void Begin() { StartRead(&message_); }
  void OnReadDone(bool ok) override {
    if (!ok) return stream_->ReadsDone();
    stream_->Start(message_);
    StartRead(&message_);
  }
  void OnWriteDone(bool ok) override { stream_->queue.OnWritten(ok); }
  void OnCancel() override { stream_->ClientGone(); }
  void OnDone() override {
    stream_->queue.Detach();
    delete this;
  }

 private:
  const std::shared_ptr<InferStream> stream_;
  ModelInferRequest message_;
};

// --- the service ---

class KserveService : public inference::GRPCInferenceService::CallbackService {
 public:
  KserveService(Router& router, std::size_t queued_bytes_max, AccessControl* access)
      : router_(router), queued_bytes_max_(queued_bytes_max), access_(access) {}

  grpc::ServerUnaryReactor* ServerLive(grpc::CallbackServerContext* context, const inference::ServerLiveRequest*,
                                       inference::ServerLiveResponse* response) override {
    response->set_live(true);
    return End(context, OkStatus());
  }
  grpc::ServerUnaryReactor* ServerReady(grpc::CallbackServerContext* context, const inference::ServerReadyRequest*,
                                        inference::ServerReadyResponse* response) override {
    response->set_ready(router_.Ready().ok());
    return End(context, OkStatus());
  }
  grpc::ServerUnaryReactor* ModelReady(grpc::CallbackServerContext* context,
                                       const inference::ModelReadyRequest* request,
                                       inference::ModelReadyResponse* response) override {
    response->set_ready(IsServed(request->name(), request->version()) && router_.Ready().ok());
    return End(context, OkStatus());
  }
  grpc::ServerUnaryReactor* ServerMetadata(grpc::CallbackServerContext* context,
                                           const inference::ServerMetadataRequest*,
                                           inference::ServerMetadataResponse* response) override {
    response->set_name("zeroc");
    response->set_version(ZEROC_VERSION);
    response->add_extensions("parameters");
    return End(context, AdmitCall(access_, *context).status);
  }
  grpc::ServerUnaryReactor* ModelMetadata(grpc::CallbackServerContext* context,
                                          const inference::ModelMetadataRequest* request,
                                          inference::ModelMetadataResponse* response) override {
    const Status status = Check(*context, *request);
    if (status.ok()) *response = KserveModelMetadata(router_.model().name);
    return End(context, status);
  }
  grpc::ServerUnaryReactor* ModelConfig(grpc::CallbackServerContext* context,
                                        const inference::ModelConfigRequest* request,
                                        inference::ModelConfigResponse* response) override {
    const Status status = Check(*context, *request);
    if (status.ok()) *response->mutable_config() = KserveModelConfig(router_.model().name);
    return End(context, status);
  }

  grpc::ServerUnaryReactor* ModelInfer(grpc::CallbackServerContext* context, const ModelInferRequest* message,
                                       ModelInferResponse* response) override {
    AccessControl::Decision decision = AdmitCall(access_, *context);
    if (!decision.status.ok()) return End(context, decision.status);
    Result<KserveRequest> request = Parse(router_, *message);
    if (!request.ok()) return End(context, request.status());
    if (request->streaming) {
      return End(context, InvalidArgument("input streaming: one answer only here, ModelStreamInfer gives more"));
    }
    const Deadline deadline = DeadlineOf(context->deadline(), *request);
    v1::GenerateRequest generate = request->generate;
    auto call = std::make_shared<InferCall>(std::move(*request));
    auto* reactor = new InferCall::Reactor(call, response, std::move(decision.pass));  // OnDone deletes it
    call->client.Bind(router_.Generate(std::move(generate), deadline, call));
    call->Attach(reactor);
    return reactor;
  }

  grpc::ServerBidiReactor<ModelInferRequest, ModelStreamInferResponse>* ModelStreamInfer(
      grpc::CallbackServerContext* context) override {
    auto stream = std::make_shared<InferStream>(router_, access_, context, queued_bytes_max_);
    auto* reactor = new InferStream::Reactor(stream);  // OnDone deletes it
    reactor->Begin();
    stream->queue.Attach(reactor, context);
    return reactor;
  }

 private:
  bool IsServed(const std::string& name, const std::string& version) const {
    return name == router_.model().name && (version.empty() || version == kKserveModelVersion);
  }
  template <typename Request>
  Status Check(const grpc::CallbackServerContext& context, const Request& request) const {
    ZEROC_RETURN_IF_ERROR(AdmitCall(access_, context).status);
    if (IsServed(request.name(), request.version())) return OkStatus();
    return NotFound("this model or version is not served here; this is " + router_.model().name);
  }
  static grpc::ServerUnaryReactor* End(grpc::CallbackServerContext* context, const Status& status) {
    grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
    reactor->Finish(ToGrpc(status));
    return reactor;
  }

  Router& router_;
  const std::size_t queued_bytes_max_;
  AccessControl* const access_;
};

}  // namespace

std::unique_ptr<grpc::Service> MakeKserveService(Router& router, std::size_t queued_bytes_max, AccessControl* access) {
  return std::make_unique<KserveService>(router, queued_bytes_max, access);
}

}  // namespace zeroc
