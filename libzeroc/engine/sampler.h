// Turns logits into tokens. Random numbers are indexed by (seed, token position), so a request that is replayed on
// another worker draws the same ones. One Sampler per request; not thread-safe.
#pragma once

#include <cstdint>
#include <span>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "libzeroc/base/status.h"

namespace zeroc {

// Defaults leave the distribution as the model gives it. Applied in this order: logit_bias, repetition penalty,
// presence and frequency penalties, temperature, top_k, min_p, top_p.
struct SamplingParams {
  int max_tokens = 16;       // >= 1
  float temperature = 1.0f;  // 0: greedy; [0, 2]
  float top_p = 1.0f;        // (0, 1]
  int top_k = 0;             // 0: off
  float min_p = 0.0f;        // [0, 1], relative to the most likely token
  float repetition_penalty =
      1.0f;                       // (0, 2]; divides positive and multiplies negative logits of tokens seen (prompt too)
  float presence_penalty = 0.0f;  // [-2, 2], generated tokens only
  float frequency_penalty = 0.0f;  // [-2, 2], generated tokens only
  std::uint64_t seed = 0;
  int logprobs = -1;  // -1: none; n: of the sampled token and the n best (0 to 20)
  std::vector<std::pair<std::int32_t, float>> logit_bias;
  std::vector<std::int32_t> stop_ids;
  bool ignore_eos = false;
  // Teacher forcing: the token at position forced_from + i is forced_ids[i], whatever the logits say. Its logprob is
  // the model's; it ends nothing and the presence and frequency penalties do not count it.
  std::vector<std::int32_t> forced_ids;
  int forced_from = 0;
  // Tokens that cannot be drawn at positions below suppress_before (EOS and stop tokens under min_tokens).
  std::vector<std::int32_t> suppress_ids;
  int suppress_before = 0;

  bool IsForced(int position) const {
    return position >= forced_from && position - forced_from < static_cast<int>(forced_ids.size());
  }
  // kInvalidArgument naming the field.
  Status Validate(std::int64_t vocab_size) const;
};

struct SampledToken {
  std::int32_t id = 0;
  float logprob = 0;  // natural log under the model's own distribution; 0 unless asked for
  std::vector<std::pair<std::int32_t, float>> top;  // best first, SamplingParams::logprobs entries
  bool forced = false;                              // given by forced_ids, not drawn
};

class Sampler {
 public:
  // prompt matters only to repetition_penalty.
  Sampler(const SamplingParams& params, std::span<const std::int32_t> prompt);

  // position: of the token being drawn (prompt length for the first). Does not record it: call Accept.
  SampledToken Sample(std::span<const float> logits, int position) const;

  // Records a token as generated, drawn here or elsewhere (the first token of a handed-off request). Every token of
  // the answer, in order, from its first one on: forced tokens are told by their number.
  void Accept(std::int32_t id);

 private:
  void Adjust(std::vector<float>& logits, int position) const;
  std::int32_t Choose(std::span<const float> logits, int position) const;
  bool Suppresses(int position) const { return !params_.suppress_ids.empty() && position < params_.suppress_before; }

  SamplingParams params_;
  std::size_t n_accepted_ = 0;
  std::unordered_map<std::int32_t, int> generated_;  // id -> times; only for presence and frequency penalties
  std::unordered_set<std::int32_t> seen_;            // prompt and generated; only for repetition_penalty
};

}  // namespace zeroc
