#include "libzeroc/engine/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "libzeroc/base/check.h"

namespace zeroc {
namespace {

constexpr int kLogprobsMax = 20;

// Bijective 64-bit mix (Steele et al. 2014, SplitMix64's finaliser).
std::uint64_t Mix(std::uint64_t x) {
  x ^= x >> 30;
  x *= 0xbf58476d1ce4e5b9ULL;
  x ^= x >> 27;
  x *= 0x94d049bb133111ebULL;
  return x ^ (x >> 31);
}

// Uniform in [0, 1), a pure function of seed and position.
double Uniform(std::uint64_t seed, int position) {
  const std::uint64_t bits = Mix(Mix(seed + 0x9e3779b97f4a7c15ULL) + static_cast<std::uint64_t>(position));
  return static_cast<double>(bits >> 11) * 0x1.0p-53;
}

struct Candidate {
  std::int32_t id;
  float logit;
};

bool Better(const Candidate& a, const Candidate& b) { return a.logit != b.logit ? a.logit > b.logit : a.id < b.id; }

double LogSumExp(std::span<const float> logits) {
  const float max = *std::max_element(logits.begin(), logits.end());
  if (!std::isfinite(max)) return max;
  double sum = 0;
  for (const float logit : logits) sum += std::exp(static_cast<double>(logit) - max);
  return max + std::log(sum);
}

// Keeps the candidates whose probability is at least min_p times the best one's. Sorted, best first.
void KeepMinP(float min_p, std::vector<Candidate>& candidates) {
  const float floor = candidates.front().logit + std::log(min_p);
  while (candidates.size() > 1 && candidates.back().logit < floor) candidates.pop_back();
}

// Keeps the smallest prefix whose probability reaches top_p. Sorted, best first.
void KeepTopP(float top_p, std::vector<Candidate>& candidates) {
  const double best = candidates.front().logit;
  double total = 0;
  for (const Candidate& c : candidates) total += std::exp(c.logit - best);
  double sum = 0;
  for (std::size_t i = 0; i < candidates.size(); ++i) {
    sum += std::exp(candidates[i].logit - best);
    if (sum >= top_p * total) {
      candidates.resize(i + 1);
      return;
    }
  }
}

std::int32_t Draw(const std::vector<Candidate>& candidates, double uniform) {
  const double best = candidates.front().logit;
  double total = 0;
  for (const Candidate& c : candidates) total += std::exp(c.logit - best);
  double left = uniform * total;
  for (const Candidate& c : candidates) {
    left -= std::exp(c.logit - best);
    if (left < 0) return c.id;
  }
  return candidates.back().id;
}

Status Field(bool ok, const char* message) { return ok ? OkStatus() : InvalidArgument(message); }

}  // namespace

Status SamplingParams::Validate(std::int64_t vocab_size, int n_streamed) const {
  // Written so that NaN fails every range.
  ZEROC_RETURN_IF_ERROR(Field(max_tokens >= 1, "max_tokens must be at least 1"));
  ZEROC_RETURN_IF_ERROR(Field(temperature >= 0 && temperature <= 2, "temperature must be in [0, 2]"));
  ZEROC_RETURN_IF_ERROR(Field(top_p > 0 && top_p <= 1, "top_p must be in (0, 1]"));
  ZEROC_RETURN_IF_ERROR(Field(top_k >= 0, "top_k must not be negative"));
  ZEROC_RETURN_IF_ERROR(Field(min_p >= 0 && min_p <= 1, "min_p must be in [0, 1]"));
  ZEROC_RETURN_IF_ERROR(
      Field(repetition_penalty > 0 && repetition_penalty <= 2, "repetition_penalty must be in (0, 2]"));
  ZEROC_RETURN_IF_ERROR(Field(presence_penalty >= -2 && presence_penalty <= 2, "presence_penalty must be in [-2, 2]"));
  ZEROC_RETURN_IF_ERROR(
      Field(frequency_penalty >= -2 && frequency_penalty <= 2, "frequency_penalty must be in [-2, 2]"));
  ZEROC_RETURN_IF_ERROR(Field(logprobs >= -1 && logprobs <= kLogprobsMax, "logprobs must be in [0, 20]"));
  for (const auto& [id, bias] : logit_bias) {
    ZEROC_RETURN_IF_ERROR(Field(id >= 0 && id < vocab_size, "logit_bias: token id out of range"));
    ZEROC_RETURN_IF_ERROR(Field(bias >= -100 && bias <= 100, "logit_bias must be in [-100, 100]"));
  }
  for (const std::int32_t id : stop_ids) {
    ZEROC_RETURN_IF_ERROR(Field(id >= 0 && id < vocab_size, "stop token id out of range"));
  }
  ZEROC_RETURN_IF_ERROR(Field(static_cast<std::int64_t>(forced_ids.size()) <= std::int64_t{max_tokens} + n_streamed,
                              "forced_ids are more than max_tokens"));
  for (const auto* ids : {&forced_ids, &suppress_ids}) {
    for (const std::int32_t id : *ids) {
      ZEROC_RETURN_IF_ERROR(Field(id >= 0 && id < vocab_size, "forced or suppressed token id out of range"));
    }
  }
  return OkStatus();
}

Sampler::Sampler(const SamplingParams& params, std::span<const std::int32_t> prompt, int n_streamed) : params_(params) {
  const auto n_after = static_cast<std::size_t>(n_streamed);
  if (!params_.LooksAtPrompt(n_streamed)) {
    n_accepted_ = n_after;
    return;
  }
  ZEROC_CHECK(n_streamed >= 0 && n_after <= prompt.size(), n_streamed, prompt.size());
  if (params_.repetition_penalty != 1.0f) {
    for (const std::int32_t id : prompt.first(prompt.size() - n_after)) seen_.insert(id);
  }
  for (const std::int32_t id : prompt.last(n_after)) Accept(id);
}

void Sampler::Adjust(std::vector<float>& logits, int position) const {
  for (const auto& [id, bias] : params_.logit_bias) logits[static_cast<std::size_t>(id)] += bias;
  if (params_.repetition_penalty != 1.0f) {
    for (const std::int32_t id : seen_) {
      float& logit = logits[static_cast<std::size_t>(id)];
      logit = logit > 0 ? logit / params_.repetition_penalty : logit * params_.repetition_penalty;
    }
  }
  for (const auto& [id, times] : generated_) {
    logits[static_cast<std::size_t>(id)] -=
        params_.presence_penalty + params_.frequency_penalty * static_cast<float>(times);
  }
  if (!Suppresses(position)) return;
  for (const std::int32_t id : params_.suppress_ids) {
    logits[static_cast<std::size_t>(id)] = std::numeric_limits<float>::lowest();
  }
}

std::int32_t Sampler::Choose(std::span<const float> logits, int position) const {
  if (params_.temperature == 0) {
    return static_cast<std::int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
  }
  std::vector<Candidate> candidates(logits.size());
  for (std::size_t i = 0; i < logits.size(); ++i) {
    candidates[i] = {static_cast<std::int32_t>(i), logits[i] / params_.temperature};
  }
  const bool top_k = params_.top_k > 0 && static_cast<std::size_t>(params_.top_k) < candidates.size();
  if (top_k) {
    std::partial_sort(candidates.begin(), candidates.begin() + params_.top_k, candidates.end(), Better);
    candidates.resize(static_cast<std::size_t>(params_.top_k));
  } else if (params_.min_p > 0 || params_.top_p < 1) {
    std::sort(candidates.begin(), candidates.end(), Better);
  } else {
    std::iter_swap(candidates.begin(), std::min_element(candidates.begin(), candidates.end(), Better));
  }
  if (params_.min_p > 0) KeepMinP(params_.min_p, candidates);
  if (params_.top_p < 1) KeepTopP(params_.top_p, candidates);
  return Draw(candidates, Uniform(params_.seed, position));
}

SampledToken Sampler::Sample(std::span<const float> logits, int position) const {
  SampledToken token;
  const bool adjusts = !params_.logit_bias.empty() || !generated_.empty() || !seen_.empty() || Suppresses(position);
  token.forced = params_.IsForced(position);
  if (token.forced) {
    token.id = params_.forced_ids[static_cast<std::size_t>(position - params_.forced_from)];
  } else if (adjusts) {
    std::vector<float> adjusted(logits.begin(), logits.end());
    Adjust(adjusted, position);
    token.id = Choose(adjusted, position);
  } else {
    token.id = Choose(logits, position);
  }
  if (params_.logprobs < 0) return token;
  const double lse = LogSumExp(logits);
  token.logprob = static_cast<float>(logits[static_cast<std::size_t>(token.id)] - lse);
  std::vector<Candidate> best(logits.size());
  for (std::size_t i = 0; i < logits.size(); ++i) best[i] = {static_cast<std::int32_t>(i), logits[i]};
  const auto n = std::min<std::size_t>(static_cast<std::size_t>(params_.logprobs), best.size());
  std::partial_sort(best.begin(), best.begin() + static_cast<std::ptrdiff_t>(n), best.end(), Better);
  for (std::size_t i = 0; i < n; ++i) token.top.emplace_back(best[i].id, static_cast<float>(best[i].logit - lse));
  return token;
}

void Sampler::Accept(std::int32_t id) {
  const bool forced = n_accepted_++ < params_.forced_ids.size();
  const bool counts = params_.presence_penalty != 0 || params_.frequency_penalty != 0;
  if (counts && !forced) ++generated_[id];
  if (params_.repetition_penalty != 1.0f) seen_.insert(id);
}

}  // namespace zeroc
