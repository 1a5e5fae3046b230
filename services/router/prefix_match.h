// How much of a prompt a worker is expected to have in its prefix cache, from the hashes of beginnings that it lists
// (WorkerLoad.prefix_hashes). Hints: what is used is what the workers' RPCs answer. docs/prefix_cache.md.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <unordered_set>
#include <vector>

#include "services/router/served_model.h"

namespace zeroc {

using PrefixHashSet = std::unordered_set<std::uint64_t>;

// The hashes of one prompt's beginnings, for the profiles that it may get. Immutable; any thread.
class PromptPrefixes {
 public:
  // profile: the only one that comes into question; nullopt: all of the model's ladder.
  PromptPrefixes(const ServedModel& model, std::span<const std::uint32_t> ids,
                 const std::optional<std::string>& profile);

  // By rung of the ladder: the tokens of the longest beginning that is in `known`, less than the whole prompt, for the
  // last token is always computed and its block always sent. Empty when nothing is known.
  std::vector<std::uint32_t> CachedTokens(const PrefixHashSet* known) const;

 private:
  std::vector<std::vector<std::uint64_t>> hashes_;  // [rung][i]: of the first 64 (i + 1) tokens
};

}  // namespace zeroc
