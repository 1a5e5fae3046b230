// The router's edges with real sockets: what clients send over gRPC and HTTP, and what they see of failures.
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <map>
#include <nlohmann/json.hpp>

#include "inference/grpc_service.grpc.pb.h"
#include "services/common/test_http_client.h"
#include "services/router/test_grpc_router.h"

namespace zeroc {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;
using Json = nlohmann::json;

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

// A name cut in the middle of a character made a message that no client could read.
TEST_F(RouterGrpcTest, KserveErrorsCanBeRead) {
  const auto kserve = inference::GRPCInferenceService::NewStub(channel_);
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(20));
  const auto stream = kserve->ModelStreamInfer(&context);
  inference::ModelInferRequest request = KserveMessage("n", 4, "mine");
  request.set_model_name(std::string(127, 'a') + "\xc3\xa9");
  ASSERT_TRUE(stream->Write(request));
  stream->WritesDone();
  inference::ModelStreamInferResponse response;
  EXPECT_TRUE(stream->Read(&response));
  EXPECT_TRUE(response.error_message().starts_with("NOT_FOUND: model 'aaa")) << response.error_message();
  EXPECT_TRUE(stream->Finish().ok());
}

TEST_F(RouterGrpcTest, AnAnswerMayBeLargerThanWhatAClientMayBeBehind) {
  WaitReady();
  const auto kserve = inference::GRPCInferenceService::NewStub(channel_);
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(60));
  const auto stream = kserve->ModelStreamInfer(&context);
  ASSERT_TRUE(stream->Write(KserveMessage("n", 70'000, "large")));  // 64 KiB in this test
  stream->WritesDone();
  inference::ModelStreamInferResponse response;
  ASSERT_TRUE(stream->Read(&response));
  EXPECT_EQ(response.infer_response().outputs(0).contents().bytes_contents(0).size(), 70'000U);
  while (stream->Read(&response)) {
  }
  EXPECT_TRUE(stream->Finish().ok());
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
  client.Get("/v1/models/test%2Dmodel");
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

TEST_F(RouterGrpcTest, APortInUseIsAClearError) {
  const auto second = GrpcServer::Start(Address(*grpc_), {}, {});
  ASSERT_FALSE(second.ok());
  EXPECT_NE(second.status().message().find(Address(*grpc_)), std::string_view::npos) << second.status().ToString();
}

}  // namespace
}  // namespace zeroc
