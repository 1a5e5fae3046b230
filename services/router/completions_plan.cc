// From a parsed request to the choices that are to be computed.
#include <algorithm>
#include <limits>
#include <utility>

#include "services/router/completions_api.h"

namespace zeroc {
namespace {

Result<std::vector<std::uint32_t>> IdsOf(const Prompt& prompt, const TextCodec& codec, bool add_bos) {
  if (const auto* text = std::get_if<std::string>(&prompt)) {
    return add_bos ? codec.EncodePrompt(*text) : codec.EncodeText(*text);
  }
  return std::get<std::vector<std::uint32_t>>(prompt);
}

// A count that the forced tokens raise. kInvalidArgument naming the field when it is more than any model's positions.
Result<std::uint32_t> BehindForced(const char* field, std::uint64_t n_forced, std::uint32_t n_drawn) {
  constexpr std::uint64_t kPositionsMax = std::numeric_limits<std::int32_t>::max();
  if (n_forced + n_drawn <= kPositionsMax) return static_cast<std::uint32_t>(n_forced + n_drawn);
  return InvalidArgument(std::string(field) + ": " + std::to_string(n_drawn) + " behind the prompt's " +
                         std::to_string(n_forced) + " scored tokens is more than " + std::to_string(kPositionsMax));
}

// A prompt with log probabilities: its first score_from tokens are prefilled, the others are forced on the decode
// worker, which gives their log probabilities over the compressed cache.
Status PlanScoring(const CompletionRequest& request, std::uint32_t default_max_tokens,
                   std::vector<std::uint32_t> prompt_ids, ChoicePlan* plan) {
  if (prompt_ids.empty()) return InvalidArgument("prompt is empty");
  v1::SamplingParams* sampling = plan->generate.mutable_sampling();
  const std::uint32_t n_drawn = sampling->has_max_tokens() ? sampling->max_tokens() : default_max_tokens;
  const std::size_t from = std::min<std::size_t>(request.score_from, prompt_ids.size());
  const auto middle = prompt_ids.begin() + static_cast<std::ptrdiff_t>(from);
  plan->generate.mutable_token_ids()->mutable_ids()->Assign(prompt_ids.begin(), middle);
  sampling->mutable_forced_ids()->Assign(middle, prompt_ids.end());
  plan->n_forced = static_cast<std::uint32_t>(prompt_ids.size() - from);
  std::uint32_t n_tokens = 0;
  ZEROC_ASSIGN_OR_RETURN(n_tokens, BehindForced("max_tokens", plan->n_forced, n_drawn));
  sampling->set_max_tokens(n_tokens);
  if (sampling->has_min_tokens()) {
    ZEROC_ASSIGN_OR_RETURN(n_tokens, BehindForced("min_tokens", plan->n_forced, sampling->min_tokens()));
    sampling->set_min_tokens(n_tokens);
  }
  plan->runs = sampling->max_tokens() > 0;
  plan->prompt_ids = std::move(prompt_ids);
  return OkStatus();
}

Status PlanPrompt(const CompletionRequest& request, const Prompt& prompt, const TextCodec& codec,
                  std::uint32_t default_max_tokens, ChoicePlan* plan) {
  plan->generate = request.generate;
  const v1::SamplingParams& sampling = request.generate.sampling();
  const bool no_output = sampling.has_max_tokens() && sampling.max_tokens() == 0;
  if (no_output && !request.echo) return InvalidArgument("max_tokens is 0 (which only echo = true allows)");
  const auto* text = std::get_if<std::string>(&prompt);
  std::vector<std::uint32_t> ids;
  const bool encode = request.echo || request.scores() || request.shape.token_ids || !request.add_bos;
  if (encode) {
    ZEROC_ASSIGN_OR_RETURN(ids, IdsOf(prompt, codec, request.add_bos));
  }
  if (request.shape.token_ids) plan->shown_ids = ids;
  if (request.echo) {
    plan->echo_text = text != nullptr ? *text : codec.Decode(ids);
    plan->runs = !no_output;
  }
  if (request.scores()) return PlanScoring(request, default_max_tokens, std::move(ids), plan);
  if (text != nullptr && request.add_bos) {
    plan->generate.set_text(*text);
  } else {
    if (text == nullptr) ids = std::get<std::vector<std::uint32_t>>(prompt);
    plan->generate.mutable_token_ids()->mutable_ids()->Assign(ids.begin(), ids.end());
  }
  if (!plan->runs) plan->prompt_ids = std::move(ids);  // for the usage
  return OkStatus();
}

}  // namespace

Result<std::vector<ChoicePlan>> PlanChoices(const CompletionRequest& request, const TextCodec& codec,
                                            std::uint32_t default_max_tokens) {
  std::vector<ChoicePlan> plans;
  for (const Prompt& prompt : request.prompts) {
    ChoicePlan plan;
    ZEROC_RETURN_IF_ERROR(PlanPrompt(request, prompt, codec, default_max_tokens, &plan));
    for (std::uint32_t i = 0; i < request.n; ++i) {
      plans.push_back(plan);
      plans.back().counts_prompt = i == 0;
      v1::SamplingParams* sampling = plans.back().generate.mutable_sampling();
      if (sampling->has_seed()) sampling->set_seed(sampling->seed() + i);
    }
  }
  return plans;
}

}  // namespace zeroc
