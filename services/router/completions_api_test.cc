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
    "seed": -1, "stop": ["a", "b"], "n": 2, "best_of": 2, "logprobs": 3, "echo": false,
    "min_tokens": 4, "presence_penalty": 0.25,
    "frequency_penalty": -0.5, "repetition_penalty": 1.5, "logit_bias": {"5": -100, "6": 2.5}, "ignore_eos": true,
    "max_ppl_increase": 0.2, "profile": "q4", "stream": true, "stream_options": {"include_usage": true}, "user": "u",
    "priority": -2, "ttft_slo_ms": 500, "stop_token_ids": [1, 2], "suffix": null})");
  ASSERT_TRUE(parsed.ok()) << parsed.status().ToString();
  EXPECT_EQ(parsed->model, "m");
  EXPECT_TRUE(parsed->stream && parsed->shape.usage);
  const v1::GenerateRequest& g = parsed->generate;
  EXPECT_EQ(std::get<std::string>(parsed->prompts.at(0)), "hello");
  EXPECT_EQ(g.kv().profile(), "q4");
  EXPECT_EQ(g.kv().max_ppl_increase(), 0.2);
  EXPECT_EQ(g.priority(), -2);
  EXPECT_EQ(g.ttft_slo_ms(), 500);
  const v1::SamplingParams& s = g.sampling();
  EXPECT_EQ(parsed->n, 2U);
  EXPECT_EQ(s.min_tokens(), 4U);
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
  using Ids = std::vector<std::uint32_t>;
  const auto prompts = [](const char* body) { return ParseCompletionRequest(body)->prompts; };
  EXPECT_EQ(prompts(R"({"prompt": [1, 2, 3]})"), (std::vector<Prompt>{Ids{1, 2, 3}}));
  EXPECT_EQ(prompts(R"({"prompt": [[1, 2], [3]]})"), (std::vector<Prompt>{Ids{1, 2}, Ids{3}}));
  EXPECT_EQ(prompts(R"({"prompt": ["one", "two"]})"), (std::vector<Prompt>{"one", "two"}));
  EXPECT_EQ(ParseCompletionRequest(R"({"prompt": "x", "stop": "s", "max_completion_tokens": 3, "top_k": -1})")
                ->generate.sampling()
                .max_tokens(),
            3U);
}

TEST(ChatParse, MessagesAndLogprobs) {
  const Result<CompletionRequest> parsed = ParseChatRequest(R"({"model": "m", "messages": [
    {"role": "developer", "content": "be kind"}, {"role": "user", "name": "u", "content": [
      {"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
    "logprobs": true, "top_logprobs": 2, "max_completion_tokens": 5, "n": 3, "tools": [], "tool_choice": "none",
    "response_format": {"type": "text"}, "store": false, "metadata": {}})");
  ASSERT_TRUE(parsed.ok()) << parsed.status().ToString();
  ASSERT_EQ(parsed->messages.size(), 2U);
  EXPECT_EQ(parsed->messages[0].role, "system");
  EXPECT_EQ(parsed->messages[1].content, "ab");
  EXPECT_EQ(parsed->generate.sampling().logprobs(), 2U);
  EXPECT_EQ(parsed->n, 3U);
  const std::pair<const char*, const char*> cases[] = {
      {R"({})", "messages: is missing"},
      {R"({"messages": []})", "messages: is not a list"},
      {R"({"messages": ["x"]})", "messages[0]: is not an object"},
      {R"({"messages": [{"role": "user", "content": "x"}, {"role": "tool", "content": "x"}]})", "messages[1].role: is"},
      {R"({"messages": [{"role": "user"}]})", "messages[0].content: is missing"},
      {R"({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]})", "messages[0].content: is neither"},
      {R"({"messages": [{"role": "user", "content": "x"}], "tools": [{}]})", "tools: only [] is supported"},
      {R"({"messages": [{"role": "user", "content": "x"}], "logprobs": 5})", "logprobs: is neither true nor"},
      {R"({"messages": [{"role": "user", "content": "x"}], "top_logprobs": 5})", "top_logprobs: needs logprobs"},
      {R"({"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json_object"}})",
       "response_format: only"},
      {R"({"messages": [{"role": "user", "content": "x"}], "prompt": "x"})", "prompt: unknown field"},
  };
  for (const auto& [body, expected] : cases) {
    const Result<CompletionRequest> refused = ParseChatRequest(body);
    ASSERT_FALSE(refused.ok()) << body;
    EXPECT_TRUE(refused.status().message().starts_with(expected)) << body << " gave " << refused.status().ToString();
  }
}

// What clients keep of an answer, and send back whole.
TEST(ChatParse, MessagesComeBackAsClientsDumpThem) {
  const Result<CompletionRequest> parsed = ParseChatRequest(R"({"messages": [
    {"role": "user", "content": "hi"},
    {"content": "hello", "refusal": null, "role": "assistant", "annotations": null, "audio": null,
     "function_call": null, "tool_calls": null, "reasoning_content": null},
    {"role": "assistant", "content": "you", "annotations": [], "tool_calls": []}], "verbosity": null})");
  ASSERT_TRUE(parsed.ok()) << parsed.status().ToString();
  EXPECT_EQ(parsed->messages.at(1).content, "hello");
  const auto audio = ParseChatRequest(R"({"messages": [{"role": "user", "content": "x", "audio": {"id": "a"}}]})");
  EXPECT_EQ(audio.status().message(), "messages[0].audio: unknown field");
}

std::vector<ChoicePlan> Plans(const std::string& body) {
  static const ByteCodec codec;
  const Result<CompletionRequest> request = ParseCompletionRequest(body);
  EXPECT_TRUE(request.ok()) << request.status().ToString();
  Result<std::vector<ChoicePlan>> plans = PlanChoices(*request, codec, 9);
  EXPECT_TRUE(plans.ok()) << plans.status().ToString();
  return plans.ok() ? *plans : std::vector<ChoicePlan>(1);
}

TEST(PlanChoices, EveryPromptTimesN) {
  const auto plans = Plans(R"({"prompt": ["a", "b"], "n": 2, "seed": 5, "echo": true, "max_tokens": 3})");
  ASSERT_EQ(plans.size(), 4U);
  EXPECT_EQ(plans[1].generate.text(), "a");
  EXPECT_EQ(plans[2].generate.text(), "b");
  EXPECT_EQ(plans[2].echo_text, "b");
  EXPECT_EQ(plans[1].generate.sampling().seed(), 6U) << "answers to one prompt differ";
  EXPECT_EQ(plans[2].generate.sampling().seed(), 5U);
  EXPECT_TRUE(plans[2].counts_prompt);
  EXPECT_FALSE(plans[1].counts_prompt);
}

TEST(PlanChoices, TextsWithoutBosTravelAsIds) {
  const ChoicePlan plan = Plans(R"({"prompt": "ab", "add_special_tokens": false, "return_token_ids": true})")[0];
  ASSERT_EQ(plan.generate.token_ids().ids_size(), 2);
  EXPECT_EQ(plan.shown_ids, (std::vector<std::uint32_t>{'a', 'b'}));
  EXPECT_TRUE(Plans(R"({"prompt": "ab"})")[0].shown_ids.empty());
}

TEST(PlanChoices, EchoWithLogprobsForcesThePrompt) {
  const ChoicePlan all = Plans(R"({"prompt": [7, 8, 9], "echo": true, "logprobs": 1, "max_tokens": 1})")[0];
  ASSERT_EQ(all.generate.token_ids().ids_size(), 1);
  EXPECT_EQ(all.generate.token_ids().ids(0), 7U);
  ASSERT_EQ(all.generate.sampling().forced_ids_size(), 2);
  EXPECT_EQ(all.generate.sampling().forced_ids(1), 9U);
  EXPECT_EQ(all.generate.sampling().max_tokens(), 3U) << "two forced, one drawn";
  EXPECT_EQ(all.n_forced, 2U);
  const ChoicePlan later = Plans(R"({"prompt": [7, 8, 9], "echo": true, "logprobs": 1, "score_from": 2})")[0];
  EXPECT_EQ(later.generate.token_ids().ids_size(), 2);
  EXPECT_EQ(later.generate.sampling().max_tokens(), 10U) << "one forced, the default of 9 drawn";
  EXPECT_FALSE(Plans(R"({"prompt": [7], "echo": true, "logprobs": 1, "max_tokens": 0})")[0].runs);
  EXPECT_FALSE(Plans(R"({"prompt": "ab", "echo": true, "max_tokens": 0})")[0].runs);
  const ByteCodec codec;
  EXPECT_FALSE(PlanChoices(*ParseCompletionRequest(R"({"prompt": "x", "max_tokens": 0})"), codec, 9).ok());
}

// The sum of both wrapped around: an empty answer, with success.
TEST(PlanChoices, CountsBehindAScoredPromptDoNotOverflow) {
  const ByteCodec codec;
  const auto refusal = [&](const std::string& counts) {
    const auto request =
        ParseCompletionRequest(R"({"prompt": "0123456789", "echo": true, "logprobs": 1, )" + counts + "}");
    return std::string(PlanChoices(*request, codec, 9).status().message());
  };
  EXPECT_EQ(refusal(R"("max_tokens": 4294967287)").substr(0, 11), "max_tokens:");
  EXPECT_EQ(refusal(R"("min_tokens": 4294967287)").substr(0, 11), "min_tokens:");
  EXPECT_EQ(refusal(R"("max_tokens": 2147483639)").substr(0, 11), "max_tokens:");
  EXPECT_EQ(refusal(R"("max_tokens": 2147483638)"), "");
}

TEST(PlanChoices, PromptLogprobsForceThePromptWithoutAnEcho) {
  const ChoicePlan plan = Plans(R"({"prompt": [7, 8, 9], "logprobs": 1, "prompt_logprobs": 4, "stop": "x",
                                    "include_stop_str_in_output": true})")[0];
  EXPECT_EQ(plan.n_forced, 2U);
  EXPECT_EQ(plan.echo_text, "");
  EXPECT_EQ(plan.generate.sampling().logprobs(), 4U) << "the more of both";
  EXPECT_TRUE(plan.generate.sampling().include_stop());
  EXPECT_EQ(Plans(R"({"prompt": [7, 8, 9], "logprobs": 1})")[0].n_forced, 0U);
  const auto chat = ParseChatRequest(R"({"messages": [{"role": "user", "content": "c"}], "prompt_logprobs": 0})");
  ASSERT_TRUE(chat.ok()) << chat.status().ToString();
  EXPECT_TRUE(chat->scores());
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
      {R"({"prompt": ["a", 5]})", "prompt: is neither"},
      {R"({"prompt": [["a"]]})", "prompt: is neither"},
      {R"({"prompt": [[1], [[2]]]})", "prompt: is neither"},
      {R"({"prompt": "x", "max_tokens": -1})", "max_tokens: is not a whole number"},
      {R"({"prompt": "x", "max_tokens": 1e10})", "max_tokens: is not a whole number"},
      {R"({"prompt": "x", "max_tokens": "5"})", "max_tokens: is not a whole number"},
      {R"({"prompt": "x", "temperature": "hot"})", "temperature: is not a number"},
      {R"({"prompt": "x", "stream": 1})", "stream: is neither true nor false"},
      {R"({"prompt": "x", "n": 0})", "n: is not in [1, 512]"},
      {R"({"prompt": "x", "n": 513})", "n: is not in [1, 512]"},
      {R"({"prompt": ["x", "y"], "n": 300})", "n: times the prompts"},
      {R"({"prompt": "x", "n": 2, "best_of": 3})", "best_of: only 2 is supported"},
      {R"({"prompt": "x", "echo": 1})", "echo: is neither true nor false"},
      {R"({"prompt": "x", "score_from": 5})", "score_from: needs prompt_logprobs"},
      {R"({"prompt": "x", "prompt_logprobs": 21})", "prompt_logprobs: is more than 20"},
      {R"({"prompt": "x", "prompt_logprobs": 1, "stream": true})", "prompt_logprobs: is not available"},
      {R"({"prompt": "x", "include_stop_str_in_output": 1})", "include_stop_str_in_output: is neither"},
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

TEST(RequestCheck, CountsBecomePositions) {
  RequestLimits limits;
  limits.vocab_size = 100;
  limits.max_positions = 50;
  limits.eos_ids = {3};
  v1::GenerateRequest request = TestRequest("x", 10);
  v1::SamplingParams* s = request.mutable_sampling();
  s->set_min_tokens(4);
  s->add_stop_token_ids(7);
  s->add_forced_ids(5);
  s->set_forced_from(1);  // not the client's to say
  s->add_suppress_ids(9);
  const auto resolved = ResolveSampling(request, limits, 20, 1);
  ASSERT_TRUE(resolved.ok());
  EXPECT_EQ(resolved->forced_from(), 20U);
  EXPECT_EQ(resolved->suppress_before(), 24U);
  EXPECT_EQ(std::vector<std::uint32_t>(resolved->suppress_ids().begin(), resolved->suppress_ids().end()),
            (std::vector<std::uint32_t>{7, 3}));
  s->set_ignore_eos(true);
  EXPECT_EQ(ResolveSampling(request, limits, 20, 1)->suppress_ids_size(), 1) << "EOS is no end then";
  s->set_min_tokens(11);
  EXPECT_EQ(ResolveSampling(request, limits, 20, 1).status().message(), "min_tokens 11 is more than max_tokens 10");
  s->set_min_tokens(0);
  s->mutable_forced_ids()->Resize(11, 5);
  EXPECT_EQ(ResolveSampling(request, limits, 20, 1).status().message(), "forced_ids 11 is more than max_tokens 10");
  s->set_forced_ids(0, 100);
  EXPECT_FALSE(CheckRequest(request, limits).ok());
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

TEST(Tokenize, Bodies) {
  EXPECT_EQ(ParseTokenizeRequest(R"({"text": "a"})")->text, "a");
  EXPECT_EQ(ParseTokenizeRequest(R"({"model": "m", "prompt": "b"})")->text, "b");
  EXPECT_EQ(ParseTokenizeRequest(R"({"messages": [{"role": "user", "content": "c"}]})")->messages.at(0).content, "c");
  EXPECT_FALSE(ParseTokenizeRequest(R"({"text": "a", "messages": [{"role": "user", "content": "c"}]})").ok());
  EXPECT_FALSE(ParseTokenizeRequest(R"({"model": "m"})").ok());
  EXPECT_EQ(ParseDetokenizeRequest(R"({"tokens": [1, 2]})")->size(), 2U);
  EXPECT_FALSE(ParseDetokenizeRequest(R"({"tokens": [-1]})").ok());
  EXPECT_EQ(Json::parse(TokenizeBody({5, 6}, 100))["count"], 2);
  EXPECT_FALSE(Json::parse(TokenizeBody({5, 6}, 100)).contains("token_strs"));
  const ByteCodec codec;
  EXPECT_EQ(Json::parse(TokenizeBody({'a', 'b'}, 100, &codec))["token_strs"], Json({"a", "b"}));
}

}  // namespace
}  // namespace zeroc
