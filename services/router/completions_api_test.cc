#include "services/router/completions_api.h"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <nlohmann/json.hpp>

#include "services/router/request_check.h"
#include "services/router/test_router.h"

namespace zeroc {
namespace {

using Json = nlohmann::json;

TEST(CompletionsParse, ReadsEveryField) {
  const Result<CompletionRequest> parsed = ParseCompletionRequest(R"({
    "model": "m", "prompt": "hello", "max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.1,
    "seed": -1, "stop": ["a", "b"], "n": 1, "best_of": 1, "logprobs": 3, "echo": false, "presence_penalty": 0.25,
    "frequency_penalty": -0.5, "repetition_penalty": 1.5, "logit_bias": {"5": -100, "6": 2.5}, "ignore_eos": true,
    "max_ppl_increase": 0.2, "profile": "q4", "stream": true, "stream_options": {"include_usage": true}, "user": "u",
    "priority": -2, "ttft_slo_ms": 500, "stop_token_ids": [1, 2], "suffix": null})");
  ASSERT_TRUE(parsed.ok()) << parsed.status().ToString();
  EXPECT_EQ(parsed->model, "m");
  EXPECT_TRUE(parsed->stream && parsed->include_usage);
  const v1::GenerateRequest& g = parsed->generate;
  EXPECT_EQ(g.text(), "hello");
  EXPECT_EQ(g.kv().profile(), "q4");
  EXPECT_EQ(g.kv().max_ppl_increase(), 0.2);
  EXPECT_EQ(g.priority(), -2);
  EXPECT_EQ(g.ttft_slo_ms(), 500);
  const v1::SamplingParams& s = g.sampling();
  EXPECT_EQ(s.max_tokens(), 7U);
  EXPECT_EQ(s.temperature(), 0.5F);
  EXPECT_EQ(s.top_k(), 40U);
  EXPECT_EQ(s.seed(), ~std::uint64_t{0});
  EXPECT_EQ(s.stop_size(), 2);
  EXPECT_EQ(s.stop_token_ids_size(), 2);
  EXPECT_EQ(s.logprobs(), 3U);
  EXPECT_EQ(s.repetition_penalty(), 1.5F);
  EXPECT_EQ(s.logit_bias().at(5), -100);
  EXPECT_TRUE(s.ignore_eos());
}

TEST(CompletionsParse, PromptForms) {
  const auto ids = [](const char* body) { return ParseCompletionRequest(body)->generate.token_ids().ids_size(); };
  EXPECT_EQ(ids(R"({"prompt": [1, 2, 3]})"), 3);
  EXPECT_EQ(ids(R"({"prompt": [[1, 2, 3, 4]]})"), 4);
  EXPECT_EQ(ParseCompletionRequest(R"({"prompt": ["one"]})")->generate.text(), "one");
  EXPECT_EQ(ParseCompletionRequest(R"({"prompt": "x", "stop": "s", "max_completion_tokens": 3, "top_k": -1})")
                ->generate.sampling()
                .max_tokens(),
            3U);
}

TEST(CompletionsParse, ErrorsNameTheField) {
  const std::pair<const char*, const char*> cases[] = {
      {"", "the body is not JSON"},
      {"[1]", "the body is not a JSON object"},
      {R"({"prompt": "x")", "the body is not JSON"},
      {"{\"prompt\": \"\xff\"}", "the body is not JSON"},
      {"{}", "prompt: is missing"},
      {R"({"prompt": null})", "prompt: is missing"},
      {R"({"prompt": 5})", "prompt: is neither"},
      {R"({"prompt": [1, -2]})", "prompt: is neither"},
      {R"({"prompt": [1, 5000000000]})", "prompt: is neither"},
      {R"({"prompt": [1, 2.5]})", "prompt: is neither"},
      {R"({"prompt": ["a", "b"]})", "prompt: one prompt"},
      {R"({"prompt": "x", "max_tokens": -1})", "max_tokens: is not a whole number"},
      {R"({"prompt": "x", "max_tokens": 1e10})", "max_tokens: is not a whole number"},
      {R"({"prompt": "x", "max_tokens": "5"})", "max_tokens: is not a whole number"},
      {R"({"prompt": "x", "temperature": "hot"})", "temperature: is not a number"},
      {R"({"prompt": "x", "stream": 1})", "stream: is neither true nor false"},
      {R"({"prompt": "x", "n": 2})", "n: only 1 is supported"},
      {R"({"prompt": "x", "echo": true})", "echo: only false is supported"},
      {R"({"prompt": "x", "suffix": "s"})", "suffix: only \"\" is supported"},
      {R"({"prompt": "x", "stop": [1]})", "stop: is neither"},
      {R"({"prompt": "x", "logit_bias": {"abc": 1}})", "logit_bias: is not an object"},
      {R"({"prompt": "x", "logit_bias": {"99999999999": 1}})", "logit_bias: is not an object"},
      {R"({"prompt": "x", "seed": 1.5})", "seed: is not a whole number"},
      {R"({"prompt": "x", "frobnicate": 1})", "frobnicate: unknown field"},
      {R"({"prompt": "x", "stream_options": {"include_usage": true}})", "stream_options: needs stream = true"},
      {R"({"prompt": "x", "stream": true, "stream_options": {"x": 1}})", "stream_options.x: unknown field"},
  };
  for (const auto& [body, expected] : cases) {
    const Result<CompletionRequest> parsed = ParseCompletionRequest(body);
    ASSERT_FALSE(parsed.ok()) << body;
    EXPECT_EQ(parsed.status().code(), StatusCode::kInvalidArgument) << body;
    EXPECT_TRUE(parsed.status().message().starts_with(expected)) << body << " gave " << parsed.status().ToString();
  }
  EXPECT_FALSE(ParseCompletionRequest(R"({"prompt": )" + std::string(1 << 20, '[')).ok());
}

TEST(RequestCheck, RangesOfEveryField) {
  RequestLimits limits;
  limits.vocab_size = 100;
  limits.max_positions = 50;
  const auto check = [&](const std::function<void(v1::GenerateRequest*)>& change) {
    v1::GenerateRequest request = TestRequest("x", 5);
    change(&request);
    return std::string(CheckRequest(request, limits).message());
  };
  const auto sampling = [&](const std::function<void(v1::SamplingParams*)>& change) {
    return check([&](v1::GenerateRequest* r) { change(r->mutable_sampling()); });
  };
  EXPECT_EQ(check([](auto*) {}), "");
  EXPECT_EQ(check([](auto* r) { r->set_request_id("has space"); }).substr(0, 10), "request_id");
  EXPECT_EQ(check([](auto* r) { r->mutable_token_ids()->add_ids(100); }).substr(0, 6), "prompt");
  EXPECT_EQ(check([](auto* r) { r->set_ttft_slo_ms(-1); }).substr(0, 11), "ttft_slo_ms");
  EXPECT_EQ(sampling([](auto* s) { s->set_max_tokens(0); }), "max_tokens is 0");
  EXPECT_EQ(sampling([](auto* s) { s->set_temperature(2.5F); }), "temperature 2.5 is not in [0, 2]");
  EXPECT_EQ(sampling([](auto* s) { s->set_temperature(std::nanf("")); }).substr(0, 11), "temperature");
  EXPECT_EQ(sampling([](auto* s) { s->set_top_p(0); }), "top_p 0 is not in (0, 1]");
  EXPECT_EQ(sampling([](auto* s) { s->set_min_p(1.5F); }).substr(0, 5), "min_p");
  EXPECT_EQ(sampling([](auto* s) { s->set_repetition_penalty(0); }).substr(0, 18), "repetition_penalty");
  EXPECT_EQ(sampling([](auto* s) { s->set_presence_penalty(-3); }).substr(0, 16), "presence_penalty");
  EXPECT_EQ(sampling([](auto* s) { s->set_frequency_penalty(3); }).substr(0, 17), "frequency_penalty");
  EXPECT_EQ(sampling([](auto* s) { s->set_logprobs(21); }), "logprobs 21 is more than 20");
  EXPECT_EQ(sampling([](auto* s) { s->add_stop(std::string()); }).substr(0, 13), "a stop string");
  EXPECT_EQ(sampling([](auto* s) { s->add_stop_token_ids(100); }).substr(0, 14), "stop_token_ids");
  EXPECT_EQ(sampling([](auto* s) { (*s->mutable_logit_bias())[5] = 101; }).substr(0, 10), "logit_bias");
  EXPECT_EQ(sampling([](auto* s) {
              for (int i = 0; i < 17; ++i) s->add_stop(std::string("x"));
            }),
            "stop has more than 16 strings");
}

TEST(RequestCheck, MaxTokensAgainstPositions) {
  RequestLimits limits;
  limits.vocab_size = 100;
  limits.max_positions = 50;
  v1::GenerateRequest request = TestRequest("x", 10);
  EXPECT_TRUE(ResolveSampling(request, limits, 40, 1).ok());
  EXPECT_EQ(ResolveSampling(request, limits, 41, 1).status().message(),
            "the prompt's 41 tokens and max_tokens 10 exceed the model's 50 positions");
  request.mutable_sampling()->clear_max_tokens();
  EXPECT_EQ(ResolveSampling(request, limits, 41, 1)->max_tokens(), 9U) << "the default is cut to what is left";
  EXPECT_FALSE(ResolveSampling(request, limits, 50, 1).ok());
  EXPECT_FALSE(ResolveSampling(request, limits, 1'000'000, 1).ok());
  EXPECT_FALSE(ResolveSampling(request, limits, 0, 1).ok());
  EXPECT_EQ(ResolveSampling(request, limits, 5, 123)->seed(), 123U);
}

class CompletionsFormat : public testing::Test {
 protected:
  static v1::Delta MakeDelta(const std::string& text, bool logprobs) {
    v1::Delta delta;
    delta.set_text(text);
    for (const char c : text) {
      delta.add_token_ids(static_cast<unsigned char>(c));
      if (!logprobs) continue;
      v1::TokenLogprobs* token = delta.add_logprobs();
      token->set_token_id(static_cast<unsigned char>(c));
      token->set_logprob(-0.5);
      token->add_top()->set_token_id(static_cast<unsigned char>(c));
    }
    return delta;
  }
  static v1::Final MakeFinal() {
    v1::Final final;
    final.set_finish_reason(v1::FINISH_REASON_LENGTH);
    final.mutable_usage()->set_prompt_tokens(4);
    final.mutable_usage()->set_completion_tokens(3);
    final.mutable_stats()->mutable_phases()->set_decode(0.5);
    final.mutable_stats()->mutable_kv_bytes()->set_wire(77);
    return final;
  }
  // The JSON of each "data:" event; [DONE] as a string.
  static std::vector<Json> Events(const std::string& text) {
    std::vector<Json> events;
    std::size_t at = 0;
    while (at < text.size()) {
      const std::size_t end = text.find("\n\n", at);
      if (end == std::string::npos) ADD_FAILURE() << "an event does not end: " << text;
      const std::string line = text.substr(at, end - at);
      EXPECT_TRUE(line.starts_with("data: ")) << line;
      EXPECT_EQ(line.find('\n'), std::string::npos) << line;
      events.push_back(line == "data: [DONE]" ? Json("[DONE]") : Json::parse(line.substr(6)));
      at = end + 2;
    }
    return events;
  }
  static v1::Started MakeStarted() {
    v1::Started started;
    started.set_model("m");
    started.set_profile("q4");
    started.set_reason("budget");
    return started;
  }
  ByteCodec codec_;
};

TEST_F(CompletionsFormat, StreamedEventsAreOpenAis) {
  CompletionFormatter formatter("id1", 1700000000, codec_, true);
  formatter.SetStarted(MakeStarted());
  const auto deltas = Events(formatter.DeltaEvent(MakeDelta("line\n\"quoted\"", false)));
  ASSERT_EQ(deltas.size(), 1U);
  EXPECT_EQ(deltas[0]["id"], "cmpl-id1");
  EXPECT_EQ(deltas[0]["object"], "text_completion");
  EXPECT_EQ(deltas[0]["choices"][0]["text"], "line\n\"quoted\"");
  EXPECT_TRUE(deltas[0]["choices"][0]["finish_reason"].is_null());
  EXPECT_TRUE(deltas[0]["usage"].is_null());
  const auto last = Events(formatter.FinalEvents(MakeFinal()));
  ASSERT_EQ(last.size(), 3U);
  EXPECT_EQ(last[0]["choices"][0]["finish_reason"], "length");
  EXPECT_EQ(last[0]["zeroc"]["profile"], "q4");
  EXPECT_EQ(last[0]["zeroc"]["kv_bytes"]["wire"], 77);
  EXPECT_EQ(last[0]["zeroc"]["phases"]["decode"], 0.5);
  EXPECT_TRUE(last[1]["choices"].empty());
  EXPECT_EQ(last[1]["usage"]["total_tokens"], 7);
  EXPECT_EQ(last[2], "[DONE]");
}

TEST_F(CompletionsFormat, WithoutUsageThereIsNoUsageChunk) {
  CompletionFormatter formatter("id1", 1, codec_, false);
  EXPECT_FALSE(Events(formatter.DeltaEvent(MakeDelta("x", false)))[0].contains("usage"));
  EXPECT_EQ(Events(formatter.FinalEvents(MakeFinal())).size(), 2U);
}

TEST_F(CompletionsFormat, WholeBodyWithLogprobs) {
  CompletionFormatter formatter("id1", 1, codec_, false);
  formatter.SetStarted(MakeStarted());
  formatter.AddDelta(MakeDelta("ab", true));
  formatter.AddDelta(MakeDelta("c", true));
  const Json body = Json::parse(formatter.Body(MakeFinal()));
  const Json& choice = body["choices"][0];
  EXPECT_EQ(choice["text"], "abc");
  EXPECT_EQ(choice["logprobs"]["tokens"], Json({"a", "b", "c"}));
  EXPECT_EQ(choice["logprobs"]["text_offset"], Json({0, 1, 2}));
  EXPECT_EQ(choice["logprobs"]["token_logprobs"][2], -0.5);
  EXPECT_EQ(choice["logprobs"]["top_logprobs"][1]["b"], 0.0);
  EXPECT_EQ(body["usage"]["completion_tokens"], 3);
}

TEST_F(CompletionsFormat, ErrorsAndTheirStatus) {
  const auto status_of = [](StatusCode code) { return HttpStatusOf({code, "x"}, ErrorOrigin::kRequest); };
  EXPECT_EQ(status_of(StatusCode::kInvalidArgument), 400);
  EXPECT_EQ(status_of(StatusCode::kNotFound), 404);
  EXPECT_EQ(status_of(StatusCode::kResourceExhausted), 429);
  EXPECT_EQ(status_of(StatusCode::kCancelled), 499);
  EXPECT_EQ(status_of(StatusCode::kInternal), 500);
  EXPECT_EQ(status_of(StatusCode::kUnavailable), 503);
  EXPECT_EQ(status_of(StatusCode::kDeadlineExceeded), 504);
  EXPECT_EQ(HttpStatusOf(Unavailable("x"), ErrorOrigin::kWorker), 502);
  EXPECT_EQ(HttpStatusOf(Internal("x"), ErrorOrigin::kWorker), 502);
  EXPECT_EQ(HttpStatusOf(ResourceExhausted("x"), ErrorOrigin::kWorker), 429);
  const Json error = Json::parse(ErrorBody(400, "prompt: \xff is \"bad\"", "INVALID_ARGUMENT"))["error"];
  EXPECT_EQ(error["type"], "invalid_request_error");
  EXPECT_EQ(error["code"], "INVALID_ARGUMENT");
  const std::string event = ErrorEvent(Unavailable("lost"), ErrorOrigin::kWorker);
  EXPECT_TRUE(event.starts_with("event: error\ndata: {\"error\":{\"message\":\"lost\"")) << event;
  EXPECT_TRUE(event.ends_with("\n\n"));
}

TEST(Tokenize, Bodies) {
  EXPECT_EQ(*ParseTokenizeRequest(R"({"text": "a"})"), "a");
  EXPECT_EQ(*ParseTokenizeRequest(R"({"model": "m", "prompt": "b"})"), "b");
  EXPECT_FALSE(ParseTokenizeRequest(R"({"model": "m"})").ok());
  EXPECT_EQ(ParseDetokenizeRequest(R"({"tokens": [1, 2]})")->size(), 2U);
  EXPECT_FALSE(ParseDetokenizeRequest(R"({"tokens": [-1]})").ok());
  EXPECT_EQ(Json::parse(TokenizeBody({5, 6}, 100))["count"], 2);
}

}  // namespace
}  // namespace zeroc
