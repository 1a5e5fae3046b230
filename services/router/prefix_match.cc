#include "services/router/prefix_match.h"

#include <algorithm>

#include "libzeroc/compression/prefix_hash.h"

namespace zeroc {

PromptPrefixes::PromptPrefixes(const ServedModel& model, std::span<const std::uint32_t> ids,
                               const std::optional<std::string>& profile)
    : hashes_(model.ladder.size()) {
  if (ids.size() <= kPrefixHashTokens) return;
  const std::vector<std::int32_t> beginning(ids.begin(), ids.end() - 1);
  for (std::size_t rung = 0; rung < hashes_.size(); ++rung) {
    const std::string& name = model.ladder[rung].name;
    if (profile.has_value() && name != *profile) continue;
    hashes_[rung] = PrefixHashes(PrefixHashRoot(model.fingerprint, model.plan_id, name), beginning);
  }
}

std::vector<std::uint32_t> PromptPrefixes::CachedTokens(const PrefixHashSet* known) const {
  if (known == nullptr || known->empty()) return {};
  std::vector<std::uint32_t> tokens(hashes_.size(), 0);
  for (std::size_t rung = 0; rung < hashes_.size(); ++rung) {
    // Not every place is listed, so an unknown one says nothing about the longer ones.
    for (std::size_t n = hashes_[rung].size(); n > 0 && tokens[rung] == 0; --n) {
      if (known->contains(hashes_[rung][n - 1])) tokens[rung] = static_cast<std::uint32_t>(n * kPrefixHashTokens);
    }
  }
  const bool any = std::any_of(tokens.begin(), tokens.end(), [](std::uint32_t n) { return n > 0; });
  return any ? tokens : std::vector<std::uint32_t>();
}

}  // namespace zeroc
