// Which profile and which workers a request gets, and why. Pure; the only place that decides it.
// Formula and reasons: docs/policy.md.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

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

// y = base + slope * x, as measured; neither is negative.
struct Line {
  double base = 0;
  double slope = 0;
  double At(double x) const { return base + slope * x; }
};

// A worker alone, or all ranks of the group that it leads: a worker can stand there as both.
struct PrefillView {
  std::string name;
  std::uint64_t waiting_tokens = 0;  // in its queue and in work; of a group's prompts, the leader's share
  std::optional<Line> seconds;       // compute, by tokens computed
  // [ladder]: of the prompt, in its prefix cache, so not to be computed again; empty: none.
  std::vector<std::uint32_t> cached_tokens = {};
  std::uint32_t n_ranks = 1;
};
struct DecodeView {
  std::string name;
  std::uint64_t kv_bytes_free = 0;
  std::uint64_t kv_bytes_total = 0;               // 0: not known, and then room is no matter of the policy
  std::optional<Line> token_seconds;              // for one token, by KV bytes of the request
  std::optional<double> request_decode_seconds;   // how long its requests decode
  std::uint32_t n_requests = 0;                   // that it has
  std::vector<std::uint32_t> cached_tokens = {};  // as above: not to be sent again
};
struct LinkView {
  Line seconds;             // by bytes: latency and the inverse of the bandwidth
  double hidden_share = 0;  // of what prefill could hide (the shorter of wire and prefill), how much it did hide
};

struct PolicyInput {
  std::span<const Rung> ladder;
  std::optional<std::string> requested_profile;
  std::optional<double> max_ppl_increase;  // absolute
  double default_max_ppl_increase = 0;     // from the configuration
  // What audits measured for each rung where that is above the promise; empty: nothing.
  std::span<const std::optional<double>> audited = {};

  double n_prompt_tokens = 0;
  double n_output_tokens = 0;  // expected
  double n_output_max = 0;     // for which a worker must have memory; less than expected: no limit of its own
  std::optional<double> ttft_slo_seconds;
  std::optional<double> tpot_slo_seconds;

  // Those that may be chosen. links[p * decodes.size() + d]; nullopt: never measured, nor anything like it.
  std::span<const PrefillView> prefills = {};
  std::span<const DecodeView> decodes = {};
  std::span<const std::optional<LinkView>> links = {};
};

// Seconds. Parts that were never measured are 0, for every profile alike.
struct Prediction {
  double queue = 0;  // in front of prefill, and for room at decode
  double prefill = 0;
  double wire = 0;  // not hidden by prefill
  double decode = 0;
  double jct() const { return queue + prefill + wire + decode; }
};

struct PolicyDecision {
  std::size_t rung_idx = 0;
  std::string_view reason;
  double budget = 0;  // absolute; what it was held to, also when a profile was requested
  // Set when the links are measured, or a worker has a beginning of the prompt; else the pool chooses by load.
  std::optional<std::size_t> prefill_idx;
  std::optional<std::size_t> decode_idx;
  // Of the prompt, expected to be in the prefix caches of these two.
  std::uint32_t prefill_cached_tokens = 0;
  std::uint32_t decode_cached_tokens = 0;
  std::optional<Prediction> predicted;
};

// kNotFound naming the profile when the ladder has none of that name, kInvalidArgument for a budget that is negative or
// not finite. When nothing measured is within the budget, bf16: compressing nothing costs nothing.
//
//   requested    named by the client
//   budget       the fewest bytes within the budget: nothing was measured yet, or there is but one such profile
//   audit        as budget or as below, after an audit ruled out a profile that would have been chosen
//   prefix       without what workers have cached of the prompt another profile would have been chosen
//   link_fast    bf16: no profile within the budget makes the request noticeably faster
//   wire         most of what the profile saves against bf16 is visible time on the wire
//   decode       .. is decode time
//   kv_pressure  .. is waiting for room at decode, or bf16 has no room at all
//   slo          without the request's SLO another profile would have been chosen
Result<PolicyDecision> Decide(const PolicyInput& input);

}  // namespace zeroc
