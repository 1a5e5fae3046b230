// Writing the answers of /v1/completions and /v1/chat/completions.
#include <algorithm>
#include <nlohmann/json.hpp>
#include <utility>

#include "libzeroc/tokenizer/utf8.h"
#include "services/router/completions_api.h"

namespace zeroc {
namespace {

// Field order is what people see in curl, so it is kept. Text that is not UTF-8 is our codec's bug, not a reason to
// throw.
using Json = nlohmann::ordered_json;

std::string Dump(const Json& json) { return json.dump(-1, ' ', false, Json::error_handler_t::replace); }
std::string Event(const Json& json) { return "data: " + Dump(json) + "\n\n"; }

// vLLM's: null where EOS or the limit ended the answer.
Json StopReason(const v1::Final& final) {
  if (final.has_stop_string()) return final.stop_string();
  return final.has_stop_token_id() ? Json(final.stop_token_id()) : Json();
}

const char* FinishName(v1::FinishReason reason) { return reason == v1::FINISH_REASON_LENGTH ? "length" : "stop"; }

Json UsageJson(const v1::Usage& usage) {
  return {{"prompt_tokens", usage.prompt_tokens()},
          {"completion_tokens", usage.completion_tokens()},
          {"total_tokens", usage.prompt_tokens() + usage.completion_tokens()},
          {"prompt_tokens_details", {{"cached_tokens", usage.cached_tokens()}}}};
}

Json ZerocJson(const v1::Started& started, const v1::RequestStats& stats) {
  const v1::PhaseSeconds& phases = stats.phases();
  return {{"profile", started.profile()},
          {"reason", started.reason()},
          {"ppl_increase", started.ppl_increase()},
          {"ppl_base", started.ppl_base()},
          {"kv_bytes",
           {{"raw", stats.kv_bytes().raw()}, {"packed", stats.kv_bytes().packed()}, {"wire", stats.kv_bytes().wire()}}},
          {"ttft_seconds", stats.ttft_seconds()},
          {"jct_seconds", stats.jct_seconds()},
          {"phases",
           {{"queue", phases.queue()},
            {"reserve", phases.reserve()},
            {"prefill", phases.prefill()},
            {"wire", phases.wire()},
            {"admit", phases.admit()},
            {"decode", phases.decode()}}},
          {"wire_seconds", stats.wire_total_seconds()},
          {"wire_hidden_share", stats.wire_hidden_share()},
          {"transport", stats.transport()},
          {"prefill_worker", stats.prefill_worker()},
          {"decode_worker", stats.decode_worker()},
          {"attempts", stats.attempts()},
          {"sp_ranks", stats.sp_ranks()}};
}

// OpenAI's way to write a token that is no whole text, so that no two of them look the same.
std::string TokenName(const TextCodec& codec, std::uint32_t id) {
  const std::string bytes = codec.TokenBytes(id);
  if (ReplaceInvalidUtf8(bytes) == bytes) return bytes;
  std::string name = "bytes:";
  for (const char c : bytes) {
    char hex[5];
    std::snprintf(hex, sizeof hex, "\\x%02x", static_cast<unsigned char>(c));
    name += hex;
  }
  return name;
}

std::size_t Characters(std::string_view text) {
  return static_cast<std::size_t>(
      std::count_if(text.begin(), text.end(), [](char c) { return (static_cast<unsigned char>(c) & 0xc0) != 0x80; }));
}

Json Bytes(const std::string& text) {
  Json bytes = Json::array();
  for (const char c : text) bytes.push_back(static_cast<unsigned char>(c));
  return bytes;
}

Json ChatToken(const TextCodec& codec, std::uint32_t id, float logprob) {
  return {{"token", TokenName(codec, id)}, {"logprob", logprob}, {"bytes", Bytes(codec.TokenBytes(id))}};
}

struct Head {
  ApiKind kind;
  const std::string& id;
  std::int64_t created;
  const std::string& model;
};

Json Envelope(const Head& head, bool chunk, Json choices) {
  const bool chat = head.kind == ApiKind::kChat;
  const char* chat_object = chunk ? "chat.completion.chunk" : "chat.completion";
  return {{"id", (chat ? "chatcmpl-" : "cmpl-") + head.id},
          {"object", chat ? chat_object : "text_completion"},
          {"created", head.created},
          {"model", head.model},
          {"choices", std::move(choices)}};
}

Json ChunkChoice(ApiKind kind, std::size_t index, const std::string& text, Json logprobs, Json finish_reason) {
  Json choice{{"index", index}};
  if (kind == ApiKind::kCompletions) choice["text"] = text;
  if (kind == ApiKind::kChat) choice["delta"] = text.empty() ? Json::object() : Json{{"content", text}};
  choice["logprobs"] = std::move(logprobs);
  choice["finish_reason"] = std::move(finish_reason);
  return choice;
}

// `usage` is used where the shape asks for one.
std::string ChunkEvent(const Head& head, Json choice, const AnswerShape& shape, const v1::Usage& usage,
                       Json zeroc = nullptr) {
  Json json = Envelope(head, true, Json::array({std::move(choice)}));
  if (!zeroc.is_null()) json["zeroc"] = std::move(zeroc);
  if (shape.usage) json["usage"] = shape.running_usage ? UsageJson(usage) : Json();
  return Event(json);
}

using TokenList = google::protobuf::RepeatedPtrField<v1::TokenLogprobs>;

// What the answer shows of the collected tokens: from the n-th on, with n_top of the best ones each.
TokenList Shown(const TokenList& collected, std::uint32_t from, std::uint32_t n_top) {
  TokenList shown;
  for (int i = static_cast<int>(from); i < collected.size(); ++i) {
    v1::TokenLogprobs* token = shown.Add();
    *token = collected[i];
    const int n_more = token->top_size() - static_cast<int>(n_top);
    if (n_more > 0) token->mutable_top()->DeleteSubrange(static_cast<int>(n_top), n_more);
  }
  return shown;
}

// vLLM's: for every token of the prompt null where it is not scored, else the token and the best ones by id. The rank
// of a token that is not among the best is not known.
Json PromptLogprobs(const ChoicePlan& plan, const TokenList& collected, std::uint32_t n_top, const TextCodec& codec) {
  Json list = Json::array();
  for (std::size_t i = plan.n_forced; i < plan.prompt_ids.size(); ++i) list.push_back(nullptr);
  const int n_scored = std::min(collected.size(), static_cast<int>(plan.n_forced));
  for (int i = 0; i < n_scored; ++i) {
    const v1::TokenLogprobs& token = collected[i];
    Json entry = Json::object();
    const auto add = [&](std::uint32_t id, float logprob, Json rank) {
      entry[std::to_string(id)] = {
          {"logprob", logprob}, {"rank", std::move(rank)}, {"decoded_token", codec.TokenText(id)}};
    };
    add(token.token_id(), token.logprob(), nullptr);
    for (int rank = 1; rank <= token.top_size(); ++rank) {
      const v1::TopLogprob& best = token.top(rank - 1);
      if (rank <= static_cast<int>(n_top) || best.token_id() == token.token_id()) {
        add(best.token_id(), best.logprob(), rank);
      }
    }
    list.push_back(std::move(entry));
  }
  return list;
}

Json ChatLogprobs(const TokenList& tokens, const TextCodec& codec) {
  if (tokens.empty()) return nullptr;
  Json content = Json::array();
  for (const v1::TokenLogprobs& token : tokens) {
    Json entry = ChatToken(codec, token.token_id(), token.logprob());
    entry["top_logprobs"] = Json::array();
    for (const v1::TopLogprob& best : token.top()) {
      entry["top_logprobs"].push_back(ChatToken(codec, best.token_id(), best.logprob()));
    }
    content.push_back(std::move(entry));
  }
  return {{"content", std::move(content)}, {"refusal", nullptr}};
}

}  // namespace

struct CompletionFormatter::Choice {
  ChoicePlan plan;
  v1::Started started;
  std::string text;                // collected, without the echo
  TokenList logprobs;              // collected
  std::vector<std::uint32_t> ids;  // collected, without the forced ones, if wanted
  std::uint32_t n_tokens = 0;      // seen, the forced ones included
  std::size_t text_offset = 0;     // of the next token, in characters
  v1::Final final;

  // OpenAI's parallel lists; without logprobs null. The first call also lists the prompt tokens that are not scored.
  Json Logprobs(const TokenList& scored, bool first, const TextCodec& codec);
};

Json CompletionFormatter::Choice::Logprobs(const TokenList& scored, bool first, const TextCodec& codec) {
  Json tokens = Json::array(), logprobs_list = Json::array(), tops = Json::array(), offsets = Json::array();
  const auto add = [&](std::uint32_t id, Json logprob, Json top) {
    const std::string bytes = codec.TokenBytes(id);
    tokens.push_back(TokenName(codec, id));
    logprobs_list.push_back(std::move(logprob));
    tops.push_back(std::move(top));
    offsets.push_back(text_offset);
    // BOS that was put before a text is no part of it.
    const bool added = text_offset == 0 && !plan.echo_text.empty() && !plan.echo_text.starts_with(bytes);
    if (!added) text_offset += Characters(bytes);
  };
  const std::size_t n_unscored = first ? plan.prompt_ids.size() - plan.n_forced : 0;
  for (std::size_t i = 0; i < n_unscored; ++i) add(plan.prompt_ids[i], nullptr, nullptr);
  for (const v1::TokenLogprobs& token : scored) {
    Json top = Json::object();
    for (const v1::TopLogprob& best : token.top()) top[TokenName(codec, best.token_id())] = best.logprob();
    add(token.token_id(), token.logprob(), std::move(top));
  }
  if (tokens.empty()) return nullptr;
  return {{"tokens", tokens}, {"token_logprobs", logprobs_list}, {"top_logprobs", tops}, {"text_offset", offsets}};
}

CompletionFormatter::CompletionFormatter(ApiKind kind, std::string id, std::int64_t created, std::string model,
                                         const TextCodec& codec, const AnswerShape& shape,
                                         std::vector<ChoicePlan> plans)
    : kind_(kind), id_(std::move(id)), created_(created), model_(std::move(model)), codec_(codec), shape_(shape) {
  for (ChoicePlan& plan : plans) {
    Choice& choice = choices_.emplace_back();
    choice.plan = std::move(plan);
    if (choice.plan.runs) continue;
    choice.final.set_finish_reason(v1::FINISH_REASON_LENGTH);
    choice.final.mutable_usage()->set_prompt_tokens(static_cast<std::uint32_t>(choice.plan.prompt_ids.size()));
  }
}

CompletionFormatter::~CompletionFormatter() = default;

void CompletionFormatter::SetStarted(std::size_t choice, const v1::Started& started) {
  choices_[choice].started = started;
}

void CompletionFormatter::CountTokens(Choice& choice, const v1::Delta& delta) const {
  for (const std::uint32_t id : delta.token_ids()) {
    if (choice.n_tokens++ >= choice.plan.n_forced && shape_.token_ids) choice.ids.push_back(id);
  }
}

std::string CompletionFormatter::BeginEvent(std::size_t index) {
  Choice& choice = choices_[index];
  const Head head{kind_, id_, created_, model_};
  if (kind_ == ApiKind::kChat) {
    Json json = ChunkChoice(kind_, index, "", nullptr, nullptr);
    json["delta"] = {{"role", "assistant"}, {"content", ""}};
    return ChunkEvent(head, std::move(json), shape_, UsageSoFar());
  }
  if (choice.plan.echo_text.empty() && !shape_.token_ids) return {};
  Json logprobs = choice.plan.echo_text.empty() ? Json() : choice.Logprobs({}, true, codec_);
  Json json = ChunkChoice(kind_, index, choice.plan.echo_text, std::move(logprobs), nullptr);
  if (shape_.token_ids) json["prompt_token_ids"] = choice.plan.shown_ids;
  return ChunkEvent(head, std::move(json), shape_, UsageSoFar());
}

std::string CompletionFormatter::DeltaEvent(std::size_t index, const v1::Delta& delta) {
  Choice& choice = choices_[index];
  CountTokens(choice, delta);
  Json logprobs = kind_ == ApiKind::kChat ? ChatLogprobs(delta.logprobs(), codec_)
                                          : choice.Logprobs(delta.logprobs(), false, codec_);
  Json json = ChunkChoice(kind_, index, delta.text(), std::move(logprobs), nullptr);
  if (shape_.token_ids) json["token_ids"] = std::exchange(choice.ids, {});
  return ChunkEvent({kind_, id_, created_, model_}, std::move(json), shape_, UsageSoFar());
}

std::string CompletionFormatter::FinishEvent(std::size_t index, const v1::Final& final) {
  AddFinal(index, final);
  Choice& choice = choices_[index];
  Json json = ChunkChoice(kind_, index, "", nullptr, FinishName(choice.final.finish_reason()));
  json["stop_reason"] = StopReason(choice.final);
  Json zeroc = choice.plan.runs ? ZerocJson(choice.started, choice.final.stats()) : Json();
  return ChunkEvent({kind_, id_, created_, model_}, std::move(json), shape_, UsageSoFar(), std::move(zeroc));
}

std::string CompletionFormatter::EndEvents() const {
  std::string events;
  if (shape_.usage) {
    Json usage = Envelope({kind_, id_, created_, model_}, true, Json::array());
    usage["usage"] = UsageJson(TotalUsage());
    events = Event(usage);
  }
  return events + "data: [DONE]\n\n";
}

void CompletionFormatter::AddDelta(std::size_t index, const v1::Delta& delta) {
  Choice& choice = choices_[index];
  CountTokens(choice, delta);
  choice.text += delta.text();
  choice.logprobs.MergeFrom(delta.logprobs());
}

// What was forced is prompt, not answer.
void CompletionFormatter::AddFinal(std::size_t index, const v1::Final& final) {
  Choice& choice = choices_[index];
  if (!choice.plan.runs) return;
  choice.final = final;
  v1::Usage* usage = choice.final.mutable_usage();
  usage->set_prompt_tokens(usage->prompt_tokens() + choice.plan.n_forced);
  usage->set_completion_tokens(usage->completion_tokens() - std::min(usage->completion_tokens(), choice.plan.n_forced));
}

v1::Usage CompletionFormatter::TotalUsage() const {
  v1::Usage total;
  for (const Choice& choice : choices_) {
    const v1::Usage& usage = choice.final.usage();
    total.set_completion_tokens(total.completion_tokens() + usage.completion_tokens());
    if (!choice.plan.counts_prompt) continue;
    total.set_prompt_tokens(total.prompt_tokens() + usage.prompt_tokens());
    total.set_cached_tokens(total.cached_tokens() + usage.cached_tokens());
  }
  return total;
}

v1::Usage CompletionFormatter::UsageSoFar() const {
  v1::Usage usage;
  for (const Choice& choice : choices_) {
    const std::uint32_t forced = choice.plan.n_forced;
    usage.set_completion_tokens(usage.completion_tokens() + choice.n_tokens - std::min(choice.n_tokens, forced));
    if (!choice.plan.counts_prompt || !choice.plan.runs) continue;
    usage.set_prompt_tokens(usage.prompt_tokens() + choice.started.prompt_tokens() + forced);
  }
  return usage;
}

std::string CompletionFormatter::Body() {
  Json choices = Json::array(), top_zeroc, chat_prompt_logprobs;
  for (std::size_t i = 0; i < choices_.size(); ++i) {
    Choice& choice = choices_[i];
    const std::uint32_t n_top = shape_.logprobs.value_or(0);
    Json json{{"index", i}};
    if (kind_ == ApiKind::kChat) {
      json["message"] = {{"role", "assistant"}, {"content", choice.text}, {"refusal", nullptr}};
      const TokenList shown = Shown(choice.logprobs, choice.plan.n_forced, n_top);
      json["logprobs"] = shape_.logprobs.has_value() ? ChatLogprobs(shown, codec_) : Json();
    } else {
      json["text"] = choice.plan.echo_text + choice.text;
      const bool echo = !choice.plan.echo_text.empty();
      const TokenList shown = Shown(choice.logprobs, echo ? 0 : choice.plan.n_forced, n_top);
      json["logprobs"] = shape_.logprobs.has_value() ? choice.Logprobs(shown, echo, codec_) : Json();
    }
    json["finish_reason"] = FinishName(choice.final.finish_reason());
    json["stop_reason"] = StopReason(choice.final);
    Json prompt_logprobs;
    if (const auto n = shape_.prompt_logprobs; n.has_value()) {
      prompt_logprobs = PromptLogprobs(choice.plan, choice.logprobs, *n, codec_);
    }
    if (kind_ == ApiKind::kCompletions) json["prompt_logprobs"] = std::move(prompt_logprobs);
    if (kind_ == ApiKind::kChat && i == 0) chat_prompt_logprobs = std::move(prompt_logprobs);
    if (shape_.token_ids) {
      json["token_ids"] = choice.ids;
      if (kind_ == ApiKind::kCompletions) json["prompt_token_ids"] = choice.plan.shown_ids;
    }
    // One answer's statistics stand at the top, where curl shows them; those of several with their choice.
    Json zeroc = choice.plan.runs ? ZerocJson(choice.started, choice.final.stats()) : Json();
    if (choices_.size() == 1) top_zeroc = zeroc;
    if (choices_.size() > 1) json["zeroc"] = std::move(zeroc);
    choices.push_back(std::move(json));
  }
  Json json = Envelope({kind_, id_, created_, model_}, false, std::move(choices));
  json["usage"] = UsageJson(TotalUsage());
  if (kind_ == ApiKind::kChat) json["prompt_logprobs"] = std::move(chat_prompt_logprobs);
  if (!top_zeroc.is_null()) json["zeroc"] = std::move(top_zeroc);
  return Dump(json);
}

}  // namespace zeroc
