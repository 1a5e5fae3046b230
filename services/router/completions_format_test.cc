#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "services/router/completions_api.h"
#include "services/router/test_router.h"

namespace zeroc {
namespace {

using Json = nlohmann::json;

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
  CompletionFormatter formatter(ApiKind::kCompletions, "id1", 1700000000, "m", codec_, {true}, {{}});
  formatter.SetStarted(0, MakeStarted());
  EXPECT_EQ(formatter.BeginEvent(0), "");
  const auto deltas = Events(formatter.DeltaEvent(0, MakeDelta("line\n\"quoted\"", false)));
  ASSERT_EQ(deltas.size(), 1U);
  EXPECT_EQ(deltas[0]["id"], "cmpl-id1");
  EXPECT_EQ(deltas[0]["object"], "text_completion");
  EXPECT_EQ(deltas[0]["choices"][0]["text"], "line\n\"quoted\"");
  EXPECT_TRUE(deltas[0]["choices"][0]["finish_reason"].is_null());
  EXPECT_TRUE(deltas[0]["usage"].is_null());
  std::string end = formatter.FinishEvent(0, MakeFinal());  // before EndEvents, which reports what it has summed
  end += formatter.EndEvents();
  const auto last = Events(end);
  ASSERT_EQ(last.size(), 3U);
  EXPECT_EQ(last[0]["choices"][0]["finish_reason"], "length");
  EXPECT_EQ(last[0]["zeroc"]["profile"], "q4");
  EXPECT_EQ(last[0]["zeroc"]["kv_bytes"]["wire"], 77);
  EXPECT_EQ(last[0]["zeroc"]["phases"]["decode"], 0.5);
  EXPECT_TRUE(last[1]["choices"].empty());
  EXPECT_EQ(last[1]["usage"]["total_tokens"], 7);
  EXPECT_EQ(last[2], "[DONE]");
}

TEST_F(CompletionsFormat, RunningUsageCountsWhatHasBeenSent) {
  CompletionFormatter formatter(ApiKind::kCompletions, "id1", 1, "m", codec_, {true, true}, {{}});
  v1::Started started = MakeStarted();
  started.set_prompt_tokens(4);
  formatter.SetStarted(0, started);
  EXPECT_EQ(Events(formatter.DeltaEvent(0, MakeDelta("ab", false)))[0]["usage"]["completion_tokens"], 2);
  const Json usage = Events(formatter.DeltaEvent(0, MakeDelta("c", false)))[0]["usage"];
  EXPECT_EQ(usage["completion_tokens"], 3);
  EXPECT_EQ(usage["prompt_tokens"], 4);
}

TEST_F(CompletionsFormat, TokenIdsBesideTheText) {
  ChoicePlan plan;
  plan.shown_ids = {7, 8};
  const AnswerShape shape{false, false, true};
  CompletionFormatter stream(ApiKind::kCompletions, "id1", 1, "m", codec_, shape, {plan});
  EXPECT_EQ(Events(stream.BeginEvent(0))[0]["choices"][0]["prompt_token_ids"], Json({7, 8}));
  EXPECT_EQ(Events(stream.DeltaEvent(0, MakeDelta("ab", false)))[0]["choices"][0]["token_ids"], Json({'a', 'b'}));
  EXPECT_EQ(Events(stream.DeltaEvent(0, MakeDelta("c", false)))[0]["choices"][0]["token_ids"], Json({'c'}));

  CompletionFormatter whole(ApiKind::kCompletions, "id1", 1, "m", codec_, shape, {plan});
  whole.AddDelta(0, MakeDelta("ab", false));
  whole.AddDelta(0, MakeDelta("c", false));
  whole.AddFinal(0, MakeFinal());
  const Json choice = Json::parse(whole.Body())["choices"][0];
  EXPECT_EQ(choice["token_ids"], Json({'a', 'b', 'c'}));
  EXPECT_EQ(choice["prompt_token_ids"], Json({7, 8}));
}

TEST_F(CompletionsFormat, WithoutUsageThereIsNoUsageChunk) {
  CompletionFormatter formatter(ApiKind::kCompletions, "id1", 1, "m", codec_, {false}, {{}});
  EXPECT_FALSE(Events(formatter.DeltaEvent(0, MakeDelta("x", false)))[0].contains("usage"));
  std::string end = formatter.FinishEvent(0, MakeFinal());
  end += formatter.EndEvents();
  EXPECT_EQ(Events(end).size(), 2U);
}

TEST_F(CompletionsFormat, WholeBodyWithLogprobs) {
  AnswerShape shape;
  shape.logprobs = 1;
  CompletionFormatter formatter(ApiKind::kCompletions, "id1", 1, "m", codec_, shape, {{}});
  formatter.SetStarted(0, MakeStarted());
  formatter.AddDelta(0, MakeDelta("ab", true));
  formatter.AddDelta(0, MakeDelta("c", true));
  formatter.AddFinal(0, MakeFinal());
  const Json body = Json::parse(formatter.Body());
  const Json& choice = body["choices"][0];
  EXPECT_EQ(choice["text"], "abc");
  EXPECT_EQ(choice["logprobs"]["tokens"], Json({"a", "b", "c"}));
  EXPECT_EQ(choice["logprobs"]["text_offset"], Json({0, 1, 2}));
  EXPECT_EQ(choice["logprobs"]["token_logprobs"][2], -0.5);
  EXPECT_EQ(choice["logprobs"]["top_logprobs"][1]["b"], 0.0);
  EXPECT_EQ(body["usage"]["completion_tokens"], 3);
  EXPECT_EQ(body["zeroc"]["kv_bytes"]["wire"], 77);
}

// The prompt "ab" scored, one token "c" drawn: the first token has no logprob, usage knows prompt from answer.
TEST_F(CompletionsFormat, EchoWithLogprobs) {
  ChoicePlan plan;
  plan.echo_text = "ab";
  plan.prompt_ids = {'a', 'b'};
  plan.n_forced = 1;
  v1::Final final = MakeFinal();
  final.mutable_usage()->set_prompt_tokens(1);
  final.mutable_usage()->set_completion_tokens(2);
  AnswerShape shape;
  shape.logprobs = 1;
  v1::Delta delta = MakeDelta("bc", true);
  delta.set_text("c");  // what is forced has no text
  CompletionFormatter formatter(ApiKind::kCompletions, "id1", 1, "m", codec_, shape, {plan});
  formatter.AddDelta(0, delta);
  formatter.AddFinal(0, final);
  const Json body = Json::parse(formatter.Body());
  const Json& choice = body["choices"][0];
  EXPECT_EQ(choice["text"], "abc");
  EXPECT_EQ(choice["logprobs"]["tokens"], Json({"a", "b", "c"}));
  EXPECT_EQ(choice["logprobs"]["text_offset"], Json({0, 1, 2}));
  EXPECT_EQ(choice["logprobs"]["token_logprobs"], Json({nullptr, -0.5, -0.5}));
  EXPECT_TRUE(choice["logprobs"]["top_logprobs"][0].is_null());
  EXPECT_EQ(body["usage"]["prompt_tokens"], 2);
  EXPECT_EQ(body["usage"]["completion_tokens"], 1);

  CompletionFormatter stream(ApiKind::kCompletions, "id1", 1, "m", codec_, shape, {plan});
  const Json echo = Events(stream.BeginEvent(0))[0]["choices"][0];
  EXPECT_EQ(echo["text"], "ab");
  EXPECT_EQ(echo["logprobs"]["tokens"], Json({"a"}));
  const Json rest = Events(stream.DeltaEvent(0, delta))[0]["choices"][0];
  EXPECT_EQ(rest["text"], "c") << "what was forced is in the echo";
  EXPECT_EQ(rest["logprobs"]["text_offset"], Json({1, 2}));
}

// The same without the echo: the prompt's own list, and the answer's with as many of the best as were asked for.
TEST_F(CompletionsFormat, PromptLogprobs) {
  ChoicePlan plan;
  plan.prompt_ids = {'a', 'b'};
  plan.n_forced = 1;
  v1::Delta delta;
  delta.set_text("c");
  for (const char c : {'b', 'c'}) {
    delta.add_token_ids(static_cast<unsigned char>(c));
    v1::TokenLogprobs* token = delta.add_logprobs();
    token->set_token_id(static_cast<unsigned char>(c));
    token->set_logprob(-2);
    for (const char best : {'x', 'y'}) {
      token->add_top()->set_token_id(static_cast<unsigned char>(best));
      token->mutable_top(token->top_size() - 1)->set_logprob(-1);
    }
  }
  AnswerShape shape;
  shape.prompt_logprobs = 2;
  CompletionFormatter alone(ApiKind::kCompletions, "id1", 1, "m", codec_, shape, {plan});
  alone.AddDelta(0, delta);
  alone.AddFinal(0, MakeFinal());
  Json choice = Json::parse(alone.Body())["choices"][0];
  EXPECT_EQ(choice["text"], "c");
  EXPECT_TRUE(choice["logprobs"].is_null());
  ASSERT_EQ(choice["prompt_logprobs"].size(), 2U);
  EXPECT_TRUE(choice["prompt_logprobs"][0].is_null()) << "nothing comes before the first token";
  const Json& b = choice["prompt_logprobs"][1];
  EXPECT_EQ(b["98"], Json({{"logprob", -2.0}, {"rank", nullptr}, {"decoded_token", "b"}}));
  EXPECT_EQ(b["121"], Json({{"logprob", -1.0}, {"rank", 2}, {"decoded_token", "y"}}));
  EXPECT_EQ(b.size(), 3U);

  shape.logprobs = 1;
  CompletionFormatter both(ApiKind::kCompletions, "id1", 1, "m", codec_, shape, {plan});
  both.AddDelta(0, delta);
  both.AddFinal(0, MakeFinal());
  choice = Json::parse(both.Body())["choices"][0];
  EXPECT_EQ(choice["logprobs"]["tokens"], Json({"c"}));
  EXPECT_EQ(choice["logprobs"]["top_logprobs"][0], Json({{"x", -1.0}}));
  EXPECT_EQ(choice["logprobs"]["text_offset"], Json({0}));

  CompletionFormatter chat(ApiKind::kChat, "id1", 1, "m", codec_, shape, {plan});
  chat.AddDelta(0, delta);
  chat.AddFinal(0, MakeFinal());
  const Json body = Json::parse(chat.Body());
  EXPECT_EQ(body["prompt_logprobs"][1].size(), 3U);
  EXPECT_EQ(body["choices"][0]["logprobs"]["content"].size(), 1U);
  EXPECT_EQ(body["choices"][0]["logprobs"]["content"][0]["top_logprobs"].size(), 1U);
}

TEST_F(CompletionsFormat, TheReasonToStopIsNamed) {
  const auto stop_reason = [&](const v1::Final& final, bool stream) {
    CompletionFormatter formatter(ApiKind::kChat, "id1", 1, "m", codec_, {}, {{}});
    if (stream) return Events(formatter.FinishEvent(0, final))[0]["choices"][0]["stop_reason"];
    formatter.AddFinal(0, final);
    return Json::parse(formatter.Body())["choices"][0]["stop_reason"];
  };
  for (const bool stream : {false, true}) {
    v1::Final final = MakeFinal();
    EXPECT_TRUE(stop_reason(final, stream).is_null());
    final.set_finish_reason(v1::FINISH_REASON_STOP);
    final.set_stop_token_id(0);
    EXPECT_EQ(stop_reason(final, stream), 0);
    final.set_stop_string("END");
    EXPECT_EQ(stop_reason(final, stream), "END");
  }
}

TEST_F(CompletionsFormat, SeveralChoicesCountAPromptOnce) {
  ChoicePlan again;
  again.counts_prompt = false;
  CompletionFormatter formatter(ApiKind::kCompletions, "id1", 1, "m", codec_, {false}, {{}, again});
  formatter.AddDelta(1, MakeDelta("second", false));
  formatter.AddDelta(0, MakeDelta("first", false));
  formatter.AddFinal(1, MakeFinal());
  formatter.AddFinal(0, MakeFinal());
  const Json body = Json::parse(formatter.Body());
  EXPECT_EQ(body["choices"][0]["text"], "first");
  EXPECT_EQ(body["choices"][1]["index"], 1);
  EXPECT_EQ(body["choices"][1]["text"], "second");
  EXPECT_TRUE(body["choices"][1].contains("zeroc"));
  EXPECT_EQ(body["usage"]["prompt_tokens"], 4);
  EXPECT_EQ(body["usage"]["completion_tokens"], 6);
}

TEST_F(CompletionsFormat, ChatShapes) {
  CompletionFormatter formatter(ApiKind::kChat, "id1", 1, "m", codec_, {false}, {{}});
  const Json first = Events(formatter.BeginEvent(0))[0];
  EXPECT_EQ(first["object"], "chat.completion.chunk");
  EXPECT_EQ(first["id"], "chatcmpl-id1");
  EXPECT_EQ(first["choices"][0]["delta"], Json({{"role", "assistant"}, {"content", ""}}));
  const Json delta = Events(formatter.DeltaEvent(0, MakeDelta("hi", true)))[0]["choices"][0];
  EXPECT_EQ(delta["delta"], Json({{"content", "hi"}}));
  const Json& token = delta["logprobs"]["content"][1];
  EXPECT_EQ(token["token"], "i");
  EXPECT_EQ(token["bytes"], Json({'i'}));
  EXPECT_EQ(token["top_logprobs"][0]["logprob"], 0.0);
  const Json last = Events(formatter.FinishEvent(0, MakeFinal()))[0]["choices"][0];
  EXPECT_EQ(last["delta"], Json::object());
  EXPECT_EQ(last["finish_reason"], "length");

  CompletionFormatter whole(ApiKind::kChat, "id1", 1, "m", codec_, {false}, {{}});
  whole.AddDelta(0, MakeDelta("hi", false));
  whole.AddFinal(0, MakeFinal());
  const Json body = Json::parse(whole.Body());
  EXPECT_EQ(body["object"], "chat.completion");
  EXPECT_EQ(body["choices"][0]["message"]["role"], "assistant");
  EXPECT_EQ(body["choices"][0]["message"]["content"], "hi");
  EXPECT_TRUE(body["choices"][0]["logprobs"].is_null());
}

TEST_F(CompletionsFormat, ErrorsAndTheirStatus) {
  const auto status_of = [](StatusCode code) { return HttpStatusOf({code, "x"}, ErrorOrigin::kRequest); };
  EXPECT_EQ(status_of(StatusCode::kInvalidArgument), 400);
  EXPECT_EQ(status_of(StatusCode::kOutOfRange), 400);
  EXPECT_EQ(status_of(StatusCode::kNotFound), 404);
  EXPECT_EQ(status_of(StatusCode::kResourceExhausted), 429);
  EXPECT_EQ(status_of(StatusCode::kCancelled), 499);
  EXPECT_EQ(status_of(StatusCode::kInternal), 500);
  EXPECT_EQ(status_of(StatusCode::kUnavailable), 503);
  EXPECT_EQ(status_of(StatusCode::kDeadlineExceeded), 504);
  EXPECT_EQ(HttpStatusOf(Unavailable("x"), ErrorOrigin::kWorker), 502);
  EXPECT_EQ(HttpStatusOf(Internal("x"), ErrorOrigin::kWorker), 502);
  EXPECT_EQ(HttpStatusOf(ResourceExhausted("x"), ErrorOrigin::kWorker), 429);
  EXPECT_EQ(HttpStatusOf(InvalidArgument("x"), ErrorOrigin::kWorker), 400);
  EXPECT_EQ(HttpStatusOf({StatusCode::kDeadlineExceeded, "x"}, ErrorOrigin::kWorker), 504);
  for (const StatusCode code : {StatusCode::kNotFound, StatusCode::kAborted, StatusCode::kAlreadyExists,
                                StatusCode::kCancelled, StatusCode::kUnimplemented, StatusCode::kPermissionDenied}) {
    EXPECT_EQ(HttpStatusOf({code, "x"}, ErrorOrigin::kWorker), 502) << StatusCodeName(code);
  }
  const Json error = Json::parse(ErrorBody(400, "prompt: \xff is \"bad\"", "INVALID_ARGUMENT"))["error"];
  EXPECT_EQ(error["type"], "invalid_request_error");
  EXPECT_EQ(error["code"], "INVALID_ARGUMENT");
  EXPECT_EQ(error["param"], "prompt");
  EXPECT_EQ(Json::parse(ErrorBody(400, "top_p 2 is not in (0, 1]"))["error"]["param"], "top_p");
  EXPECT_EQ(Json::parse(ErrorBody(400, "messages[0].role: is not"))["error"]["param"], "messages[0].role");
  EXPECT_TRUE(Json::parse(ErrorBody(400, "the body is not JSON: x"))["error"]["param"].is_null());
  EXPECT_TRUE(Json::parse(ErrorBody(500, "prompt: x"))["error"]["param"].is_null());
  const std::string event = ErrorEvent(Unavailable("lost"), ErrorOrigin::kWorker);
  EXPECT_TRUE(event.starts_with("event: error\ndata: {\"error\":{\"message\":\"lost\"")) << event;
  EXPECT_TRUE(event.ends_with("\n\n"));
}

}  // namespace
}  // namespace zeroc
