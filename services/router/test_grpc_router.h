// The router's edges with real sockets, for tests: gRPC and HTTP servers on one side, fake workers that register
// themselves on the other. What the workers do is in the prompt.
#pragma once

#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <atomic>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "services/common/grpc_server.h"
#include "services/common/http_server.h"
#include "services/common/registration.h"
#include "services/common/timer_thread.h"
#include "services/router/grpc_worker_connection.h"
#include "services/router/http_front.h"
#include "services/router/inference_service.h"
#include "services/router/kserve_service.h"
#include "services/router/registry_service.h"
#include "services/router/test_router.h"
#include "zeroc/v1/inference.grpc.pb.h"
#include "zeroc/v1/worker.grpc.pb.h"

namespace zeroc {

template <typename Condition>
bool WaitFor(Condition condition, std::chrono::milliseconds limit = std::chrono::milliseconds(5000)) {
  const auto end = std::chrono::steady_clock::now() + limit;
  while (!condition()) {
    if (std::chrono::steady_clock::now() > end) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
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

inline bool SleepUnlessCancelled(grpc::ServerContext* context, std::chrono::milliseconds time) {
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
    std::this_thread::sleep_for(std::chrono::milliseconds(reserve_ms));
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
      if (slow && !SleepUnlessCancelled(context, std::chrono::milliseconds(5))) return grpc::Status::CANCELLED;
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
    router_.WaitIdle(std::chrono::milliseconds(6000));
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
    EXPECT_TRUE(router_.WaitIdle(std::chrono::milliseconds(5000)));
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
    config.queue_timeout = std::chrono::milliseconds(300);
    config.retry_delay = std::chrono::milliseconds(50);
    return config;
  }
  static RegistryConfig MakeRegistryConfig() {
    RegistryConfig config;
    config.heartbeat = std::chrono::milliseconds(50);
    config.expiry = std::chrono::milliseconds(500);
    config.dial_timeout = std::chrono::milliseconds(500);
    return config;
  }

  FakeLeases leases_;
  FakeDecode decode_service_{leases_};
  FakePrefill prefill_service_;
  ServedModel model_ = TestModel();
  Metrics metrics_{"test-model"};
  TimerThread timers_;
  WorkerPool pool_{"model", "plan", std::chrono::milliseconds(500)};
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

}  // namespace zeroc
