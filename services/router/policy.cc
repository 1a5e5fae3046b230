#include "services/router/policy.h"

#include <cmath>

namespace zeroc {
namespace {

std::optional<std::size_t> FindRung(std::span<const Rung> ladder, std::string_view name) {
  for (std::size_t i = 0; i < ladder.size(); ++i) {
    if (ladder[i].name == name) return i;
  }
  return std::nullopt;
}

}  // namespace

Result<PolicyDecision> ChooseProfile(const PolicyInput& input) {
  const double budget = input.max_ppl_increase.value_or(input.default_max_ppl_increase);
  if (!std::isfinite(budget) || budget < 0) {
    return InvalidArgument("max_ppl_increase " + std::to_string(budget) + " is not a number of 0 or more");
  }
  if (input.requested_profile.has_value()) {
    const auto rung = FindRung(input.ladder, *input.requested_profile);
    if (!rung.has_value()) return NotFound("profile '" + *input.requested_profile + "' is not in the plan");
    return PolicyDecision{*rung, "requested", budget};
  }
  std::optional<std::size_t> best = FindRung(input.ladder, kUncompressedProfile);
  for (std::size_t i = 0; i < input.ladder.size(); ++i) {
    const Rung& rung = input.ladder[i];
    const bool inside = rung.measured && rung.ppl_increase <= budget;  // false for NaN
    if (inside && (!best.has_value() || rung.kv_bytes_per_token < input.ladder[*best].kv_bytes_per_token)) best = i;
  }
  if (!best.has_value()) return FailedPrecondition("the plan has neither a profile within the budget nor bf16");
  return PolicyDecision{*best, "budget", budget};
}

}  // namespace zeroc
