// Which profile a request gets, and why. Pure; the only place that decides it.
#pragma once

#include <cstddef>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "libzeroc/base/status.h"

namespace zeroc {

// One profile of the plan's ladder, as the policy sees it.
struct Rung {
  std::string name;
  double kv_bytes_per_token = 0;
  bool measured = false;    // false: ppl_increase says nothing, the profile is chosen only by name
  double ppl_increase = 0;  // absolute, the plan's promise
  std::optional<double> recall;
  std::uint64_t layout_hash = 0;  // of the profile's byte format; both workers check it
};

inline constexpr std::string_view kUncompressedProfile = "bf16";

struct PolicyInput {
  std::span<const Rung> ladder;
  std::optional<std::string> requested_profile;
  std::optional<double> max_ppl_increase;  // absolute
  double default_max_ppl_increase = 0;     // from the configuration
};

struct PolicyDecision {
  std::size_t rung_idx = 0;
  std::string_view reason;  // "requested": named by the client; "budget": fewest bytes within the budget
  double budget = 0;        // absolute; what it was held to, also when a profile was requested
};

// kNotFound naming the profile when the ladder has none of that name, kInvalidArgument for a budget that is negative or
// not finite. When nothing measured is within the budget, bf16: compressing nothing costs nothing.
Result<PolicyDecision> ChooseProfile(const PolicyInput& input);

}  // namespace zeroc
