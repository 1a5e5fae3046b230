#include "services/router/policy.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>

namespace zeroc {
namespace {

// Profiles whose predictions are this close are equally fast: measurements are no better, and the one with the smaller
// perplexity increase costs nothing.
constexpr double kSameShare = 0.02;
constexpr double kSameSeconds = 0.001;

std::optional<std::size_t> FindRung(std::span<const Rung> ladder, std::string_view name) {
  for (std::size_t i = 0; i < ladder.size(); ++i) {
    if (ladder[i].name == name) return i;
  }
  return std::nullopt;
}

std::uint32_t CachedTokens(const std::vector<std::uint32_t>& cached, std::size_t rung) {
  return rung < cached.size() ? cached[rung] : 0;
}

struct Candidate {
  std::size_t rung = 0;
  std::size_t prefill = 0;
  std::size_t decode = 0;
  Prediction predicted;
  double room_seconds = 0;      // of queue: waiting for room
  double slo_miss_seconds = 0;  // over the whole request
};

// nullopt: the request does not fit the worker at all.
std::optional<Candidate> Predict(const PolicyInput& input, std::size_t rung, std::size_t p, std::size_t d) {
  const PrefillView& prefill = input.prefills[p];
  const DecodeView& decode = input.decodes[d];
  Candidate candidate{rung, p, d, {}, 0, 0};
  Prediction& predicted = candidate.predicted;
  const double per_token = input.ladder[rung].kv_bytes_per_token;
  const double prompt_bytes = per_token * input.n_prompt_tokens;
  const double all_bytes = prompt_bytes + per_token * input.n_output_tokens;
  const double n_computed = std::max(1.0, input.n_prompt_tokens - CachedTokens(prefill.cached_tokens, rung));
  const double n_sent = std::max(1.0, input.n_prompt_tokens - CachedTokens(decode.cached_tokens, rung));

  if (decode.kv_bytes_total > 0) {
    const auto total = static_cast<double>(decode.kv_bytes_total), free = static_cast<double>(decode.kv_bytes_free);
    const double held_max = prompt_bytes + per_token * std::max(input.n_output_max, input.n_output_tokens);
    if (held_max > total) return std::nullopt;
    // Room comes back as the requests that hold the rest end.
    const double share = std::max(0.0, all_bytes - free) / std::max(1.0, total - free);
    candidate.room_seconds = share * decode.request_decode_seconds.value_or(0);
  }
  if (prefill.seconds.has_value()) {
    predicted.prefill = prefill.seconds->At(n_computed);
    // A rank's seconds for a token of its own.
    const double rank_slope = prefill.seconds->slope * prefill.n_ranks;
    predicted.queue = rank_slope * static_cast<double>(prefill.waiting_tokens);
  }
  predicted.queue += candidate.room_seconds;
  if (const auto& link = input.links[p * input.decodes.size() + d]; link.has_value()) {
    const double wire = link->seconds.At(per_token * n_sent);
    predicted.wire = wire - std::min(wire, predicted.prefill) * std::clamp(link->hidden_share, 0.0, 1.0);
  }
  // On average a token attends to the prompt and half of the answer.
  const double token_seconds =
      decode.token_seconds.has_value() ? decode.token_seconds->At((prompt_bytes + all_bytes) / 2) : 0;
  predicted.decode = token_seconds * input.n_output_tokens;

  if (input.ttft_slo_seconds.has_value()) {
    candidate.slo_miss_seconds += std::max(0.0, predicted.queue + predicted.prefill - *input.ttft_slo_seconds);
  }
  if (input.tpot_slo_seconds.has_value()) {
    candidate.slo_miss_seconds += std::max(0.0, token_seconds - *input.tpot_slo_seconds) * input.n_output_tokens;
  }
  return candidate;
}

bool SameTime(double x, double best) { return x <= best * (1 + kSameShare) + kSameSeconds; }

double Increase(const PolicyInput& input, std::size_t rung) {
  return input.ladder[rung].name == kUncompressedProfile ? 0.0 : input.ladder[rung].ppl_increase;
}

// The fastest of `candidates`; of equally fast ones the best quality, then the decode worker with the fewest requests.
// With `slo`, those that miss it least.
const Candidate& Best(const PolicyInput& input, const std::vector<Candidate>& candidates, bool slo) {
  double miss = 0, jct = std::numeric_limits<double>::infinity();
  if (slo) {
    miss = std::numeric_limits<double>::infinity();
    for (const Candidate& c : candidates) miss = std::min(miss, c.slo_miss_seconds);
  }
  const auto allowed = [&](const Candidate& c) { return !slo || SameTime(c.slo_miss_seconds, miss); };
  for (const Candidate& c : candidates) {
    if (allowed(c)) jct = std::min(jct, c.predicted.jct());
  }
  const Candidate* best = nullptr;
  for (const Candidate& c : candidates) {
    if (!allowed(c) || !SameTime(c.predicted.jct(), jct)) continue;
    const auto rank = [&](const Candidate& x) {
      return std::tuple(Increase(input, x.rung), input.decodes[x.decode].n_requests, x.predicted.jct());
    };
    if (best == nullptr || rank(c) < rank(*best)) best = &c;
  }
  return *best;
}

// Where most of what `chosen` saves comes from, against no compression on the same workers.
std::string_view GainReason(const PolicyInput& input, std::size_t bf16, const Candidate& chosen) {
  const std::optional<Candidate> plain = Predict(input, bf16, chosen.prefill, chosen.decode);
  if (!plain.has_value()) return "kv_pressure";
  const double room = plain->room_seconds - chosen.room_seconds;
  const double wire = plain->predicted.wire - chosen.predicted.wire;
  const double decode = plain->predicted.decode - chosen.predicted.decode;
  if (room >= wire && room >= decode && room > 0) return "kv_pressure";
  return wire >= decode ? "wire" : "decode";
}

// The workers, where no time can be predicted but one has a beginning of the prompt: for prefill the fewest tokens to
// do with this prompt's own, for decode the most room, where cached bytes count as room.
void ChooseByCache(const PolicyInput& input, PolicyDecision* decision) {
  const std::size_t rung = decision->rung_idx;
  const auto has_some = [&](const auto& view) { return CachedTokens(view.cached_tokens, rung) > 0; };
  if (std::any_of(input.prefills.begin(), input.prefills.end(), has_some)) {
    const auto to_do = [&](const PrefillView& view) {
      return static_cast<double>(view.waiting_tokens) +
             (input.n_prompt_tokens - CachedTokens(view.cached_tokens, rung)) / view.n_ranks;
    };
    const auto best = std::min_element(input.prefills.begin(), input.prefills.end(),
                                       [&](const auto& x, const auto& y) { return to_do(x) < to_do(y); });
    decision->prefill_idx = static_cast<std::size_t>(best - input.prefills.begin());
  }
  if (std::any_of(input.decodes.begin(), input.decodes.end(), has_some)) {
    const auto room = [&](const DecodeView& view) {
      return static_cast<double>(view.kv_bytes_free) +
             input.ladder[rung].kv_bytes_per_token * CachedTokens(view.cached_tokens, rung);
    };
    const auto best = std::max_element(input.decodes.begin(), input.decodes.end(),
                                       [&](const auto& x, const auto& y) { return room(x) < room(y); });
    decision->decode_idx = static_cast<std::size_t>(best - input.decodes.begin());
  }
}

// Among `rungs`, not empty.
PolicyDecision Among(const PolicyInput& input, const std::vector<std::size_t>& rungs) {
  const auto bytes = [&](std::size_t rung) { return input.ladder[rung].kv_bytes_per_token; };
  PolicyDecision decision;
  decision.reason = "budget";
  decision.rung_idx =
      *std::min_element(rungs.begin(), rungs.end(), [&](std::size_t x, std::size_t y) { return bytes(x) < bytes(y); });
  const bool measured =
      std::any_of(input.links.begin(), input.links.end(), [](const auto& link) { return link.has_value(); });
  if (!measured) {
    ChooseByCache(input, &decision);
    return decision;
  }

  std::vector<Candidate> candidates;
  for (const std::size_t rung : rungs) {
    for (std::size_t p = 0; p < input.prefills.size(); ++p) {
      for (std::size_t d = 0; d < input.decodes.size(); ++d) {
        if (auto candidate = Predict(input, rung, p, d); candidate.has_value()) candidates.push_back(*candidate);
      }
    }
  }
  if (candidates.empty()) return decision;  // fits nowhere: the fewest bytes come nearest, and Reserve decides
  const bool slo = input.ttft_slo_seconds.has_value() || input.tpot_slo_seconds.has_value();
  const Candidate& best = Best(input, candidates, slo);
  decision.rung_idx = best.rung;
  decision.prefill_idx = best.prefill;
  decision.decode_idx = best.decode;
  decision.predicted = best.predicted;
  if (rungs.size() == 1) return decision;
  if (slo && Best(input, candidates, false).rung != best.rung) {
    decision.reason = "slo";
  } else if (input.ladder[best.rung].name == kUncompressedProfile) {
    decision.reason = "link_fast";
  } else if (const auto bf16 = FindRung(input.ladder, kUncompressedProfile); bf16.has_value()) {
    decision.reason = GainReason(input, *bf16, best);
  }
  return decision;
}

// What would have been chosen if no worker had anything of the prompt.
PolicyDecision AmongCold(PolicyInput input, const std::vector<std::size_t>& rungs) {
  std::vector<PrefillView> prefills(input.prefills.begin(), input.prefills.end());
  std::vector<DecodeView> decodes(input.decodes.begin(), input.decodes.end());
  for (PrefillView& view : prefills) view.cached_tokens.clear();
  for (DecodeView& view : decodes) view.cached_tokens.clear();
  input.prefills = prefills;
  input.decodes = decodes;
  return Among(input, rungs);
}

bool AnythingCached(const PolicyInput& input) {
  const auto cached = [](const auto& view) { return !view.cached_tokens.empty(); };
  return std::any_of(input.prefills.begin(), input.prefills.end(), cached) ||
         std::any_of(input.decodes.begin(), input.decodes.end(), cached);
}

}  // namespace

Result<PolicyDecision> Decide(const PolicyInput& input) {
  const double budget = input.max_ppl_increase.value_or(input.default_max_ppl_increase);
  if (!std::isfinite(budget) || budget < 0) {
    return InvalidArgument("max_ppl_increase " + std::to_string(budget) + " is not a number of 0 or more");
  }
  std::vector<std::size_t> promised, held;  // within the budget; and not found to be outside of it
  if (input.requested_profile.has_value()) {
    const auto rung = FindRung(input.ladder, *input.requested_profile);
    if (!rung.has_value()) return NotFound("profile '" + *input.requested_profile + "' is not in the plan");
    promised = held = {*rung};
  } else {
    for (std::size_t i = 0; i < input.ladder.size(); ++i) {
      const Rung& rung = input.ladder[i];
      const bool plain = rung.name == kUncompressedProfile;
      if (!plain && !(rung.measured && rung.ppl_increase <= budget)) continue;  // false for NaN
      promised.push_back(i);
      const bool failed = !plain && i < input.audited.size() && input.audited[i].value_or(0) > budget;
      if (!failed) held.push_back(i);
    }
  }
  if (held.empty()) return FailedPrecondition("the plan has neither a profile within the budget nor bf16");
  PolicyDecision decision = Among(input, held);
  if (input.requested_profile.has_value()) {
    decision.reason = "requested";
  } else if (held.size() < promised.size() && Among(input, promised).rung_idx != decision.rung_idx) {
    decision.reason = "audit";
  } else if (AnythingCached(input) && AmongCold(input, held).rung_idx != decision.rung_idx) {
    decision.reason = "prefix";
  }
  if (const auto p = decision.prefill_idx; p.has_value()) {
    decision.prefill_cached_tokens = CachedTokens(input.prefills[*p].cached_tokens, decision.rung_idx);
  }
  if (const auto d = decision.decode_idx; d.has_value()) {
    decision.decode_cached_tokens = CachedTokens(input.decodes[*d].cached_tokens, decision.rung_idx);
  }
  decision.budget = budget;
  return decision;
}

}  // namespace zeroc
