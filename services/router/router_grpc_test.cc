// The router's edges with real sockets: gRPC and HTTP clients on one side, fake workers that register themselves on the
// other. What the workers do is in the prompt.
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <atomic>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <thread>

#include "inference/grpc_service.grpc.pb.h"
#include "services/common/grpc_server.h"
#include "services/common/http_server.h"
#include "services/common/registration.h"
#include "services/common/test_http_client.h"
#include "services/router/grpc_worker_connection.h"
#include "services/router/http_front.h"
#include "services/router/inference_service.h"
#include "services/router/kserve_service.h"
#include "services/router/registry_service.h"
#include "services/router/test_router.h"
#include "zeroc/v1/inference.grpc.pb.h"
#include "zeroc/v1/worker.grpc.pb.h"

namespace zeroc {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;
using Json = nlohmann::json;

template <typename Condition>
bool WaitFor(Condition condition, milliseconds limit = milliseconds(5000)) {
  const auto end = steady_clock::now() + limit;
  while (!condition()) {
    if (steady_clock::now() > end) return false;
    std::this_thread::sleep_for(milliseconds(2));
  }
  return true;
}

// Sync services are enough here. Leases are counted: none may be left. Behaviour by the first byte of the prompt:
// 'n' normal, 'w' waits before the first token until cancelled, 'f' prefill fails, 's' decode streams until cancelled.
class FakeLeases {
 public:
  std::atomic<bool> full{false};

  std::uint64_t Take() {
    MutexLock lock(mu_);
    held_.insert(++last_);
    return last_;
  }
  void End(std::uint64_t id) {  // idempotent, as Release is
    MutexLock lock(mu_);
    held_.erase(id);
  }
  std::size_t held() {
    MutexLock lock(mu_);
    return held_.size();
  }

 private:
  Mutex mu_;
  std::set<std::uint64_t> held_ ZEROC_GUARDED_BY(mu_);
  std::uint64_t last_ ZEROC_GUARDED_BY(mu_) = 0;
};

bool SleepUnlessCancelled(grpc::ServerContext* context, milliseconds time) {
  return !WaitFor([&] { return context->IsCancelled(); }, time);
}

class FakeDecode : public v1::Decode::Service {
 public:
  explicit FakeDecode(FakeLeases& leases) : leases_(leases) {}
  std::atomic<bool> die{false};
  std::atomic<int> reserve_ms{0};

  grpc::Status Reserve(grpc::ServerContext*, const v1::ReserveRequest*, v1::ReserveResponse* response) override {
    if (leases_.full) return {grpc::StatusCode::RESOURCE_EXHAUSTED, "no blocks"};
    response->mutable_lease()->set_lease_id(leases_.Take());
    std::this_thread::sleep_for(milliseconds(reserve_ms));
    return grpc::Status::OK;
  }
  grpc::Status Generate(grpc::ServerContext* context, const v1::DecodeRequest* request,
                        grpc::ServerWriter<v1::DecodeEvent>* writer) override {
    v1::DecodeEvent event;
    event.mutable_admitted()->mutable_kv_bytes()->set_packed(10);
    writer->Write(event);
    // Decode does not see the prompt: top_k stands for the slow stream (7) and for the fast one.
    const bool slow = request->sampling().top_k() == 7;
    for (std::uint32_t i = 1; i < request->sampling().max_tokens() || slow; ++i) {
      if (slow && !SleepUnlessCancelled(context, milliseconds(5))) return grpc::Status::CANCELLED;
      if (die) return {grpc::StatusCode::UNAVAILABLE, "killed"};
      event.mutable_tokens()->clear_ids();
      event.mutable_tokens()->add_ids('a' + i % 26);
      if (!writer->Write(event)) return grpc::Status::CANCELLED;
    }
    leases_.End(request->lease_id());  // Final ends the lease
    event.mutable_final()->set_finish_reason(v1::FINISH_REASON_LENGTH);
    writer->Write(event);
    return grpc::Status::OK;
  }
  grpc::Status Release(grpc::ServerContext*, const v1::ReleaseRequest* request, v1::ReleaseResponse*) override {
    leases_.End(request->lease_id());
    return grpc::Status::OK;
  }

 private:
  FakeLeases& leases_;
};

class FakePrefill : public v1::Prefill::Service {
 public:
  std::atomic<int> waiting{0};
  std::atomic<int> cancelled{0};

  grpc::Status Run(grpc::ServerContext* context, const v1::PrefillRequest* request,
                   grpc::ServerWriter<v1::PrefillEvent>* writer) override {
    const char what = static_cast<char>(request->token_ids(0));
    if (what == 'f') return {grpc::StatusCode::INTERNAL, "broken"};
    if (what == 'w') ++waiting;
    if (what == 'w' && !SleepUnlessCancelled(context, std::chrono::seconds(20))) {
      ++cancelled;
      return grpc::Status::CANCELLED;
    }
    v1::PrefillEvent event;
    event.mutable_first_token()->set_id('A');
    writer->Write(event);
    event.mutable_done()->mutable_kv_bytes()->set_raw(100);
    event.mutable_done()->mutable_kv_bytes()->set_wire(25);
    event.mutable_done()->set_transport("fake");
    writer->Write(event);
    return grpc::Status::OK;
  }
};

class RouterGrpcTest : public testing::Test {
 protected:
  RouterGrpcTest() {
    grpc_ = Take(GrpcServer::Start("127.0.0.1:0", {}, {inference_.get(), kserve_.get(), registry_->service()}));
    std::vector<HttpServer::Route> routes = ApiRoutes(router_);
    for (auto& route : StandardRoutes(metrics_, [this] { return router_.Ready(); })) routes.push_back(route);
    http_ = Take(HttpServer::Start("127.0.0.1:0", {}, std::move(routes), FormatHttpError));
    grpc_->SetServing(true);
    channel_ = MakeGrpcChannel(Address(*grpc_), {});
    client_ = v1::Inference::NewStub(channel_);
    decode_server_ = StartWorker(&decode_service_);
    prefill_server_ = StartWorker(&prefill_service_);
    decode_registration_ = Register(v1::WORKER_ROLE_DECODE, "d", Address(*decode_server_));
    prefill_registration_ = Register(v1::WORKER_ROLE_PREFILL, "p", Address(*prefill_server_));
  }
  ~RouterGrpcTest() override {
    http_.reset();
    router_.StopAccepting();
    router_.CancelAll(Unavailable("the test is over"));
    router_.WaitIdle(milliseconds(6000));
    prefill_registration_.reset();
    decode_registration_.reset();
    registry_->CloseAll();
  }

  template <typename T>
  static T Take(Result<T> result) {
    EXPECT_TRUE(result.ok()) << result.status().ToString();
    return std::move(*result);
  }
  static std::string Address(const GrpcServer& server) { return "127.0.0.1:" + std::to_string(server.port()); }
  static std::unique_ptr<GrpcServer> StartWorker(grpc::Service* service) {
    auto server = Take(GrpcServer::Start("127.0.0.1:0", {}, {service}));
    server->SetServing(true);
    return server;
  }
  std::unique_ptr<Registration> Register(v1::WorkerRole role, const std::string& name, const std::string& address,
                                         const std::string& plan = "plan") {
    v1::WorkerInfo info;
    info.set_role(role);
    info.set_name(name);
    info.set_grpc_address(address);
    info.set_model_fingerprint("model");
    info.set_plan_id(plan);
    RegistrationOptions options;
    options.router_address = Address(*grpc_);
    options.backoff_ms_max = 200;
    return Registration::Start(options, info, [](v1::WorkerLoad* load) { load->set_kv_bytes_free(1000); });
  }
  void WaitReady() {
    ASSERT_TRUE(WaitFor([this] { return router_.Ready().ok(); })) << router_.Ready().ToString();
  }
  void ExpectBaseline() {
    EXPECT_TRUE(WaitFor([this] { return leases_.held() == 0; })) << leases_.held() << " leases left";
    EXPECT_TRUE(router_.WaitIdle(milliseconds(5000)));
  }
  // Runs to the end; the text and the status.
  std::pair<std::string, grpc::Status> Generate(const v1::GenerateRequest& request, grpc::ClientContext* context,
                                                v1::Final* final = nullptr) {
    const auto reader = client_->Generate(context, request);
    v1::GenerateResponse response;
    std::string text;
    while (reader->Read(&response)) {
      text += response.delta().text();
      if (response.has_final() && final != nullptr) *final = response.final();
    }
    return {text, reader->Finish()};
  }
  static v1::GenerateRequest Endless() {
    v1::GenerateRequest request = TestRequest("s", 900);
    request.mutable_sampling()->set_top_k(7);
    return request;
  }
  static std::string Body(const std::string& prompt, int max_tokens, const std::string& more = "") {
    return R"({"prompt": ")" + prompt + R"(", "max_tokens": )" + std::to_string(max_tokens) + more + "}";
  }

  static FlowConfig MakeConfig() {
    FlowConfig config;
    config.limits.vocab_size = 300;
    config.limits.max_positions = 1'000'000;
    config.queue_timeout = milliseconds(300);
    config.retry_delay = milliseconds(50);
    return config;
  }
  static RegistryConfig MakeRegistryConfig() {
    RegistryConfig config;
    config.heartbeat = milliseconds(50);
    config.expiry = milliseconds(500);
    config.dial_timeout = milliseconds(500);
    return config;
  }

  FakeLeases leases_;
  FakeDecode decode_service_{leases_};
  FakePrefill prefill_service_;
  ServedModel model_ = TestModel();
  Metrics metrics_{"test-model"};
  TimerThread timers_;
  WorkerPool pool_{"model", "plan", milliseconds(500)};
  Estimates estimates_;
  std::shared_ptr<AdmissionQueue> queue_ =
      std::make_shared<AdmissionQueue>(AdmissionQueue::Config(), timers_, metrics_);
  Audit audit_{{/*share=*/0}, model_.ladder, model_.ppl_base, 1};
  FlowContext context_{model_, pool_, metrics_, timers_, estimates_, *queue_, audit_, MakeConfig()};
  Router router_{context_, 8};
  std::unique_ptr<grpc::Service> inference_ = MakeInferenceService(router_, 64 << 10);
  std::unique_ptr<grpc::Service> kserve_ = MakeKserveService(router_, 64 << 10);
  std::unique_ptr<RegistryService> registry_ = MakeRegistryService(
      MakeRegistryConfig(), pool_, [](const std::string& a) { return DialWorker(a, {}); }, metrics_, timers_);
  std::unique_ptr<GrpcServer> decode_server_, prefill_server_, grpc_;
  std::unique_ptr<HttpServer> http_;
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<v1::Inference::Stub> client_;
  std::unique_ptr<Registration> decode_registration_, prefill_registration_;
};

TEST_F(RouterGrpcTest, GenerateStreamsOverGrpc) {
  WaitReady();
  grpc::ClientContext context;
  v1::Final final;
  const auto [text, status] = Generate(TestRequest("n", 4), &context, &final);
  EXPECT_TRUE(status.ok()) << status.error_message();
  EXPECT_EQ(text, "Abcd");
  EXPECT_EQ(final.stats().kv_bytes().wire(), 25U);
  EXPECT_EQ(final.stats().decode_worker(), "d");
  EXPECT_GE(final.stats().jct_seconds(), final.stats().ttft_seconds());
  ExpectBaseline();

  grpc::ClientContext info_context;
  v1::GetModelInfoResponse info;
  EXPECT_TRUE(client_->GetModelInfo(&info_context, {}, &info).ok());
  EXPECT_EQ(info.model(), "test-model");
  EXPECT_EQ(info.profiles_size(), 3);
}

inference::ModelInferRequest KserveMessage(const std::string& prompt, int max_tokens, const std::string& id) {
  inference::ModelInferRequest request;
  request.set_model_name("test-model");
  request.set_id(id);
  auto* input = request.add_inputs();
  input->set_name("text_input");
  input->set_datatype("BYTES");
  input->add_shape(1);
  input->mutable_contents()->add_bytes_contents(prompt);
  (*request.mutable_parameters())["max_tokens"].set_int64_param(max_tokens);
  return request;
}

void SetStreaming(inference::ModelInferRequest* request) {
  auto* input = request->add_inputs();
  input->set_name("streaming");
  input->set_datatype("BOOL");
  input->add_shape(1);
  input->mutable_contents()->add_bool_contents(true);
}

TEST_F(RouterGrpcTest, KserveAnswersOneRequest) {
  WaitReady();
  const auto kserve = inference::GRPCInferenceService::NewStub(channel_);
  {
    grpc::ClientContext context;
    inference::ModelReadyRequest request;
    request.set_name("test-model");
    inference::ModelReadyResponse ready;
    ASSERT_TRUE(kserve->ModelReady(&context, request, &ready).ok());
    EXPECT_TRUE(ready.ready());
  }
  grpc::ClientContext context;
  inference::ModelInferResponse response;
  const grpc::Status status = kserve->ModelInfer(&context, KserveMessage("n", 4, "mine"), &response);
  ASSERT_TRUE(status.ok()) << status.error_message();
  EXPECT_EQ(response.id(), "mine");
  EXPECT_EQ(response.outputs(0).contents().bytes_contents(0), "Abcd");
  EXPECT_EQ(response.outputs(1).contents().bytes_contents(0), "length");
  EXPECT_EQ(response.parameters().at("kv_bytes_wire").int64_param(), 25);

  const auto code = [&](const inference::ModelInferRequest& request) {
    grpc::ClientContext call;
    call.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(10));
    return kserve->ModelInfer(&call, request, &response).error_code();
  };
  inference::ModelInferRequest other = KserveMessage("n", 4, "");
  other.set_model_name("other");
  EXPECT_EQ(code(other), grpc::StatusCode::NOT_FOUND);
  EXPECT_EQ(code(KserveMessage("n", 0, "")), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(code(KserveMessage("f", 4, "")), grpc::StatusCode::INTERNAL);
  inference::ModelInferRequest waits = KserveMessage("w", 4, "");
  (*waits.mutable_parameters())["timeout"].set_int64_param(200'000);
  EXPECT_EQ(code(waits), grpc::StatusCode::DEADLINE_EXCEEDED);
  ExpectBaseline();
}

TEST_F(RouterGrpcTest, KserveStreamsSeveralRequestsSideBySide) {
  WaitReady();
  const auto kserve = inference::GRPCInferenceService::NewStub(channel_);
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(20));
  const auto stream = kserve->ModelStreamInfer(&context);
  inference::ModelInferRequest pieces = KserveMessage("n", 4, "pieces");
  SetStreaming(&pieces);
  ASSERT_TRUE(stream->Write(pieces));
  ASSERT_TRUE(stream->Write(KserveMessage("n", 3, "whole")));
  ASSERT_TRUE(stream->Write(KserveMessage("n", 0, "bad")));
  stream->WritesDone();
  std::map<std::string, std::string> texts, errors;
  std::map<std::string, int> answers, finals;
  inference::ModelStreamInferResponse response;
  while (stream->Read(&response)) {
    const inference::ModelInferResponse& answer = response.infer_response();
    ++answers[answer.id()];
    finals[answer.id()] += answer.parameters().at("triton_final_response").bool_param();
    errors[answer.id()] += response.error_message();
    if (answer.outputs_size() > 0) texts[answer.id()] += answer.outputs(0).contents().bytes_contents(0);
  }
  EXPECT_TRUE(stream->Finish().ok());
  EXPECT_EQ(texts["pieces"], "Abcd");
  // One for the first token, one or more for the others (which may come together), and the end.
  EXPECT_GE(answers["pieces"], 3);
  EXPECT_EQ(texts["whole"], "Abc");
  EXPECT_EQ(answers["whole"], 1);
  EXPECT_TRUE(errors["bad"].starts_with("INVALID_ARGUMENT: max_tokens")) << errors["bad"];
  EXPECT_EQ(finals, (std::map<std::string, int>{{"bad", 1}, {"pieces", 1}, {"whole", 1}}));
  ExpectBaseline();
}

TEST_F(RouterGrpcTest, ACancelledKserveStreamFreesBothWorkers) {
  WaitReady();
  const auto kserve = inference::GRPCInferenceService::NewStub(channel_);
  grpc::ClientContext context;
  const auto stream = kserve->ModelStreamInfer(&context);
  ASSERT_TRUE(stream->Write(KserveMessage("w", 4, "1")));
  ASSERT_TRUE(stream->Write(KserveMessage("w", 4, "2")));
  ASSERT_TRUE(WaitFor([this] { return prefill_service_.waiting == 2; }));
  context.TryCancel();
  EXPECT_TRUE(WaitFor([this] { return prefill_service_.cancelled == 2; }));
  EXPECT_EQ(stream->Finish().error_code(), grpc::StatusCode::CANCELLED);
  ExpectBaseline();
}

TEST_F(RouterGrpcTest, CompletionsOverHttpWholeAndStreamed) {
  WaitReady();
  TestHttpClient client(http_->port());
  client.Get("/readyz");
  EXPECT_TRUE(client.ReadResponse().starts_with("HTTP/1.1 200 "));
  client.Post("/v1/completions", Body("n", 3), "X-Request-Id: mine\r\n");
  const std::string whole = client.ReadResponse();
  EXPECT_TRUE(whole.starts_with("HTTP/1.1 200 OK")) << whole;
  EXPECT_NE(whole.find("X-Request-Id: mine\r\n"), std::string::npos);
  const Json json = Json::parse(whole.substr(whole.find("\r\n\r\n") + 4));
  EXPECT_EQ(json["choices"][0]["text"], "Abc");
  EXPECT_EQ(json["usage"]["completion_tokens"], 3);
  EXPECT_EQ(json["zeroc"]["profile"], "q4");

  client.Post("/v1/completions", Body("n", 3, R"(, "stream": true, "stream_options": {"include_usage": true})"));
  const std::string stream = client.ReadUntil("0\r\n\r\n");
  EXPECT_NE(stream.find("Content-Type: text/event-stream"), std::string::npos);
  EXPECT_NE(stream.find("\"text\":\"A\""), std::string::npos) << stream;
  EXPECT_NE(stream.find("\"choices\":[],\"usage\":{\"prompt_tokens\":1,\"completion_tokens\":3"), std::string::npos);
  EXPECT_NE(stream.find("data: [DONE]\n\n"), std::string::npos);
  ExpectBaseline();
}

TEST_F(RouterGrpcTest, HttpErrorsHaveTheirStatus) {
  WaitReady();
  const auto answer = [this](const std::string& body) {
    TestHttpClient client(http_->port());
    client.Post("/v1/completions", body);
    return client.ReadResponse();
  };
  EXPECT_TRUE(answer("{").starts_with("HTTP/1.1 400 "));
  EXPECT_TRUE(answer(Body("n", 2'000'000)).starts_with("HTTP/1.1 400 "));
  EXPECT_TRUE(answer(Body("n", 2, R"(, "model": "other")")).starts_with("HTTP/1.1 404 "));
  EXPECT_TRUE(answer(Body("n", 2, R"(, "profile": "q9")")).starts_with("HTTP/1.1 404 "));
  const std::string broken = answer(Body("f", 2, R"(, "stream": true)"));
  EXPECT_TRUE(broken.starts_with("HTTP/1.1 502 ")) << "before the first text a stream still has its status: " << broken;
  EXPECT_NE(broken.find("prefill worker p in phase prefill: broken"), std::string::npos);
  leases_.full = true;
  const std::string full = answer(Body("n", 2));
  EXPECT_TRUE(full.starts_with("HTTP/1.1 429 ")) << full;
  EXPECT_NE(full.find("Retry-After: "), std::string::npos);
  ExpectBaseline();
}

TEST_F(RouterGrpcTest, ACancelledGrpcCallFreesBothWorkers) {
  WaitReady();
  for (const bool in_prefill : {true, false}) {
    grpc::ClientContext context;
    const auto reader = client_->Generate(&context, in_prefill ? TestRequest("w", 5) : Endless());
    v1::GenerateResponse response;
    ASSERT_TRUE(reader->Read(&response));  // Started
    if (in_prefill) {
      ASSERT_TRUE(WaitFor([this] { return prefill_service_.waiting == 1; }));
    } else {
      for (int i = 0; i < 5; ++i) ASSERT_TRUE(reader->Read(&response));
    }
    context.TryCancel();
    EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::CANCELLED);
    ExpectBaseline();
  }
  EXPECT_TRUE(WaitFor([this] { return prefill_service_.cancelled == 1; }));
}

TEST_F(RouterGrpcTest, AnHttpClientThatLeavesFreesBothWorkers) {
  WaitReady();
  TestHttpClient client(http_->port());
  client.Post("/v1/completions", Body("s", 900, R"(, "top_k": 7, "stream": true)"));
  client.ReadUntil("\"text\":\"c\"");
  EXPECT_EQ(router_.in_flight(), 1U);
  client.Close();
  ExpectBaseline();
}

TEST_F(RouterGrpcTest, TheGrpcDeadlineTravels) {
  WaitReady();
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + milliseconds(150));
  const auto before = steady_clock::now();
  EXPECT_EQ(Generate(TestRequest("w", 5), &context).second.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  EXPECT_LT(steady_clock::now() - before, milliseconds(2000));
  ExpectBaseline();
}

// The grant was lost with the deadline, and its blocks with it until the lease expired.
TEST_F(RouterGrpcTest, ADeadlineThatPassesInReserveGivesTheLeaseBack) {
  WaitReady();
  decode_service_.reserve_ms = 300;
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + milliseconds(100));
  EXPECT_EQ(Generate(TestRequest("n", 3), &context).second.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  ExpectBaseline();
}

TEST_F(RouterGrpcTest, DecodeDyingInMidStreamEndsBothKindsOfStream) {
  WaitReady();
  grpc::ClientContext context;
  const auto reader = client_->Generate(&context, Endless());
  TestHttpClient client(http_->port());
  client.Post("/v1/completions", Body("s", 900, R"(, "top_k": 7, "stream": true)"));
  client.ReadUntil("\"text\":\"b\"");
  v1::GenerateResponse response;
  for (int i = 0; i < 4; ++i) ASSERT_TRUE(reader->Read(&response));
  decode_service_.die = true;
  while (reader->Read(&response)) {
  }
  const grpc::Status status = reader->Finish();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_EQ(status.error_message(), "decode worker d in phase decode: killed");
  const std::string stream = client.ReadAll();
  EXPECT_TRUE(client.at_end());
  EXPECT_NE(stream.find("event: error\n"), std::string::npos);
  EXPECT_EQ(stream.find("[DONE]"), std::string::npos);
  EXPECT_FALSE(stream.ends_with("0\r\n\r\n")) << "the body is not whole and says so";
  EXPECT_TRUE(router_.WaitIdle(milliseconds(5000)));
}

TEST_F(RouterGrpcTest, AbortEndsARequestFromOutside) {
  WaitReady();
  v1::GenerateRequest request = Endless();
  request.set_request_id("victim");
  grpc::ClientContext context;
  const auto reader = client_->Generate(&context, request);
  v1::GenerateResponse response;
  ASSERT_TRUE(reader->Read(&response));
  v1::AbortRequest abort;
  abort.set_request_id("victim");
  v1::AbortResponse aborted;
  grpc::ClientContext abort_context;
  EXPECT_TRUE(client_->Abort(&abort_context, abort, &aborted).ok());
  while (reader->Read(&response)) {
  }
  EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::CANCELLED);
  grpc::ClientContext again;
  EXPECT_EQ(client_->Abort(&again, abort, &aborted).error_code(), grpc::StatusCode::NOT_FOUND);
  ExpectBaseline();
}

TEST_F(RouterGrpcTest, AClientThatReadsNothingIsCutOff) {
  WaitReady();
  // Without the bandwidth probe the client's window stays at 64 KiB, so that what it does not read piles up at the
  // router however slowly the tokens come.
  grpc::ChannelArguments args;
  args.SetInt(GRPC_ARG_HTTP2_BDP_PROBE, 0);
  args.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
  args.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  const auto channel = grpc::CreateCustomChannel(Address(*grpc_), grpc::InsecureChannelCredentials(), args);
  const auto client = v1::Inference::NewStub(channel);
  grpc::ClientContext context;
  const auto reader = client->Generate(&context, TestRequest("n", 900'000));
  ASSERT_TRUE(WaitFor([this] { return router_.in_flight() == 1; }));
  ExpectBaseline();  // long before 900,000 tokens are through
  v1::GenerateResponse response;
  while (reader->Read(&response)) {
  }
  const grpc::Status status = reader->Finish();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::CANCELLED) << status.error_message();
}

TEST_F(RouterGrpcTest, ALostWorkerLeavesThePoolAndComesBack) {
  WaitReady();
  decode_registration_.reset();
  EXPECT_TRUE(WaitFor([this] { return pool_.Count(v1::WORKER_ROLE_DECODE) == 0; }, milliseconds(400)))
      << "a broken stream does not wait for the expiry";
  TestHttpClient client(http_->port());
  client.Get("/readyz");
  EXPECT_NE(client.ReadResponse().find("no decode worker"), std::string::npos);
  client.Post("/v1/completions", Body("n", 2));
  EXPECT_TRUE(client.ReadResponse().starts_with("HTTP/1.1 503 "));
  decode_registration_ = Register(v1::WORKER_ROLE_DECODE, "d", Address(*decode_server_));
  WaitReady();
  client.Post("/v1/completions", Body("n", 2));
  EXPECT_TRUE(client.ReadResponse().starts_with("HTTP/1.1 200 "));
}

TEST_F(RouterGrpcTest, AStoppingRouterFinishesWhatRunsAndTakesNothingNew) {
  WaitReady();
  grpc::ClientContext context;
  v1::GenerateRequest running = Endless();
  running.mutable_sampling()->add_stop("z");
  const auto reader = client_->Generate(&context, running);
  v1::GenerateResponse response;
  ASSERT_TRUE(reader->Read(&response));
  router_.StopAccepting();
  TestHttpClient client(http_->port());
  client.Get("/readyz");
  EXPECT_TRUE(client.ReadResponse().starts_with("HTTP/1.1 503 "));
  TestHttpClient late(http_->port());
  late.Post("/v1/completions", Body("n", 2));
  const std::string refused = late.ReadResponse();
  EXPECT_TRUE(refused.starts_with("HTTP/1.1 503 ")) << refused;
  EXPECT_NE(refused.find("Retry-After: "), std::string::npos);
  grpc::ClientContext late_context;
  EXPECT_EQ(Generate(TestRequest("n", 2), &late_context).second.error_code(), grpc::StatusCode::UNAVAILABLE);
  std::string text;
  while (reader->Read(&response)) text += response.delta().text();
  EXPECT_TRUE(reader->Finish().ok());
  EXPECT_EQ(text, "Abcdefghijklmnopqrstuvwxy");
  EXPECT_TRUE(router_.WaitIdle(milliseconds(5000)));
  ExpectBaseline();
}

TEST_F(RouterGrpcTest, WorkersRegisterAgainWithARouterThatWasStartedAgain) {
  WaitReady();
  const int port = grpc_->port();
  registry_->CloseAll();
  grpc_->Shutdown(milliseconds(200));
  grpc_.reset();
  ASSERT_TRUE(WaitFor([this] { return pool_.Count(v1::WORKER_ROLE_DECODE) == 0; }));
  // What the next process would have: a pool, a registry and services of its own, on the same port.
  WorkerPool pool("model", "plan", milliseconds(500));
  FlowContext context{model_, pool, metrics_, timers_, estimates_, *queue_, audit_, MakeConfig()};
  Router router(context, 8);
  const auto registry = MakeRegistryService(
      MakeRegistryConfig(), pool, [](const std::string& a) { return DialWorker(a, {}); }, metrics_, timers_);
  const auto inference = MakeInferenceService(router, 1 << 20);
  Result<std::unique_ptr<GrpcServer>> server = Internal("not started");
  ASSERT_TRUE(WaitFor([&] {
    server = GrpcServer::Start("127.0.0.1:" + std::to_string(port), {}, {inference.get(), registry->service()});
    return server.ok();
  })) << server.status().ToString();
  (*server)->SetServing(true);
  EXPECT_TRUE(WaitFor([&] { return router.Ready().ok(); }, std::chrono::seconds(20))) << router.Ready().ToString();
  const auto client = v1::Inference::NewStub(MakeGrpcChannel("127.0.0.1:" + std::to_string(port), {}));
  grpc::ClientContext call;
  const auto reader = client->Generate(&call, TestRequest("n", 2));
  v1::GenerateResponse response;
  std::string text;
  while (reader->Read(&response)) text += response.delta().text();
  EXPECT_TRUE(reader->Finish().ok());
  EXPECT_EQ(text, "Ab");
  router.StopAccepting();
  EXPECT_TRUE(router.WaitIdle(milliseconds(5000)));
  prefill_registration_.reset();
  decode_registration_.reset();
  registry->CloseAll();
  (*server)->Shutdown(milliseconds(500));
}

TEST_F(RouterGrpcTest, DrainingWorkersGetNothingNew) {
  WaitReady();
  decode_registration_->SetDraining(true);
  EXPECT_TRUE(WaitFor([this] { return !router_.Ready().ok(); }));
  decode_registration_->SetDraining(false);
  WaitReady();
}

TEST_F(RouterGrpcTest, StrangersAndUnreachableWorkersAreRefusedAndTold) {
  const auto wrong_plan = Register(v1::WORKER_ROLE_DECODE, "x", Address(*decode_server_), "old plan");
  EXPECT_TRUE(WaitFor([&] {
    return wrong_plan->last_error().message().find("another plan") != std::string_view::npos;
  })) << wrong_plan->last_error().ToString();
  const auto unreachable = Register(v1::WORKER_ROLE_DECODE, "y", "127.0.0.1:1");
  EXPECT_TRUE(WaitFor([&] {
    return unreachable->last_error().message().find("cannot reach") != std::string_view::npos;
  })) << unreachable->last_error().ToString();
  EXPECT_FALSE(unreachable->registered());
  WaitReady();
  EXPECT_EQ(pool_.Count(v1::WORKER_ROLE_DECODE), 1U);
}

TEST_F(RouterGrpcTest, APortInUseIsAClearError) {
  const auto second = GrpcServer::Start(Address(*grpc_), {}, {});
  ASSERT_FALSE(second.ok());
  EXPECT_NE(second.status().message().find(Address(*grpc_)), std::string_view::npos) << second.status().ToString();
}

}  // namespace
}  // namespace zeroc
