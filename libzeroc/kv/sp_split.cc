#include "libzeroc/kv/sp_split.h"

#include <algorithm>

#include "libzeroc/base/check.h"

namespace zeroc {
namespace {

using kernels::kBlockTokens;

int BlocksFor(int n_tokens) { return (n_tokens + kBlockTokens - 1) / kBlockTokens; }

// Blocks that queries at [tokens.begin, tokens.end) see in one form.
BlockRange SeenIn(const KvFormat& format, int tier, const TokenRange& tokens) {
  const int n_tiers = static_cast<int>(format.tiers.size());
  if (tier == BlockForm::kExact) return {format.PackedBlocksAt(tokens.begin), BlocksFor(tokens.end)};
  const int begin = tier + 1 < n_tiers ? format.BlocksAt(tier + 1, tokens.begin) : 0;
  return {begin, format.BlocksAt(tier, tokens.end - 1)};
}

}  // namespace

SpSplit::SpSplit(int n_tokens, int n_ranks) : n_tokens_(n_tokens), n_ranks_(n_ranks), n_blocks_(BlocksFor(n_tokens)) {
  ZEROC_CHECK(n_tokens >= 1 && n_ranks >= 1, n_tokens, n_ranks);
}

BlockRange SpSplit::Chunk(int chunk_idx) const {
  const auto border = [this](int i) {
    return static_cast<int>(static_cast<std::int64_t>(n_blocks_) * i / (2 * n_ranks_));
  };
  return {border(chunk_idx), border(chunk_idx + 1)};
}

int SpSplit::OwnerOf(int block_idx) const {
  for (int rank = 0; rank < n_ranks_; ++rank) {
    for (const BlockRange& range : Blocks(rank)) {
      if (range.begin <= block_idx && block_idx < range.end) return rank;
    }
  }
  ZEROC_CHECK(false, block_idx, n_blocks_);
  return -1;
}

std::vector<BlockRange> SpSplit::Blocks(int rank) const {
  const BlockRange first = Chunk(rank), second = Chunk(2 * n_ranks_ - 1 - rank);
  if (first.end == second.begin && first.begin < second.end) return {{first.begin, second.end}};
  std::vector<BlockRange> blocks;
  for (const BlockRange& range : {first, second}) {
    if (range.begin < range.end) blocks.push_back(range);
  }
  return blocks;
}

std::vector<TokenRange> SpSplit::Tokens(int rank) const {
  std::vector<TokenRange> tokens;
  for (const BlockRange& range : Blocks(rank)) {
    tokens.push_back({range.begin * kBlockTokens, std::min(range.end * kBlockTokens, n_tokens_)});
  }
  return tokens;
}

int SpSplit::CountTokens(int rank) const {
  int n = 0;
  for (const TokenRange& range : Tokens(rank)) n += range.size();
  return n;
}

int CountLastingBlocks(const KvFormat& format, int n_tokens) {
  return format.packs ? format.LastingBlocksAt(n_tokens) : BlocksFor(n_tokens);
}

std::vector<BlockForm> WindowBlocks(const KvFormat& format, const SpSplit& split, int owner, int viewer) {
  std::vector<BlockForm> windows;
  if (owner == viewer || !format.packs) return windows;
  const auto n_young = static_cast<int>(format.tiers.size()) - 1;
  for (int tier = BlockForm::kExact; tier < n_young; ++tier) {
    for (const BlockRange& owned : split.Blocks(owner)) {
      std::vector<bool> seen(static_cast<std::size_t>(owned.end - owned.begin));
      for (const TokenRange& tokens : split.Tokens(viewer)) {
        const BlockRange range = SeenIn(format, tier, tokens);
        for (int b = std::max(range.begin, owned.begin); b < std::min(range.end, owned.end); ++b) {
          seen[static_cast<std::size_t>(b - owned.begin)] = true;
        }
      }
      for (std::size_t i = 0; i < seen.size(); ++i) {
        if (seen[i]) windows.push_back({tier, owned.begin + static_cast<int>(i)});
      }
    }
  }
  return windows;
}

HeldForms FormsHeldBy(const KvFormat& format, const SpSplit& split, int rank) {
  const auto n_tiers = static_cast<int>(format.tiers.size());
  HeldForms held;
  held.exact.resize(static_cast<std::size_t>(split.n_blocks()), !format.packs);
  for (int tier = 0; tier < n_tiers; ++tier) {
    held.tiers.emplace_back(static_cast<std::size_t>(format.BlocksAt(tier, split.n_tokens())), tier + 1 == n_tiers);
  }
  const auto hold = [&](const BlockForm& form) {
    std::vector<bool>& of =
        form.tier == BlockForm::kExact ? held.exact : held.tiers[static_cast<std::size_t>(form.tier)];
    if (static_cast<std::size_t>(form.block_idx) < of.size()) of[static_cast<std::size_t>(form.block_idx)] = true;
  };
  for (const BlockRange& range : split.Blocks(rank)) {
    for (int b = range.begin; b < range.end; ++b) {
      for (int tier = BlockForm::kExact; tier < n_tiers; ++tier) hold({tier, b});
    }
  }
  for (int owner = 0; owner < split.n_ranks(); ++owner) {
    for (const BlockForm& form : WindowBlocks(format, split, owner, rank)) hold(form);
  }
  return held;
}

}  // namespace zeroc
