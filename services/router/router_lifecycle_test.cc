// Workers and routers that come and go, over real sockets.
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "services/common/test_http_client.h"
#include "services/router/test_grpc_router.h"

namespace zeroc {
namespace {

using std::chrono::milliseconds;
using Json = nlohmann::json;

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

// The batch is admitted once, and as a whole: not until it is over is the router idle, and no limit cuts it short.
TEST_F(RouterGrpcTest, AStoppingRouterFinishesABatchWithPromptsThatWait) {
  WaitReady();
  Json body = {{"prompt", std::vector<std::string>(20, "n")}, {"max_tokens", 900}, {"top_k", 7}, {"stop", "f"}};
  TestHttpClient client(http_->port());
  client.Post("/v1/completions", body.dump());
  ASSERT_TRUE(WaitFor([this] { return router_.in_flight() == 16; })) << router_.in_flight();
  router_.StopAccepting();
  EXPECT_TRUE(router_.WaitIdle(milliseconds(20'000)));
  const std::string answer = client.ReadResponse();
  ASSERT_TRUE(answer.starts_with("HTTP/1.1 200 ")) << answer;
  const Json json = Json::parse(answer.substr(answer.find("\r\n\r\n") + 4));
  ASSERT_EQ(json["choices"].size(), 20U);
  for (const Json& choice : json["choices"]) EXPECT_EQ(choice["text"], "Abcde");
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

}  // namespace
}  // namespace zeroc
