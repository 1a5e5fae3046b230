// Shared by the tests of prompts that a group shares, on the host and on a device: one rank's step and what it leaves,
// and the same of all ranks together, to be held against one rank's.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "libzeroc/comm/communicator.h"
#include "libzeroc/kv/owned_pool.h"
#include "libzeroc/kv/sp_split.h"
#include "libzeroc/model/sp_step.h"
#include "libzeroc/model/transformer.h"

namespace zeroc::testing {

// Blocks of one layer in their form at the prompt's end, and the sink's, by name.
using BlockBytes = std::map<std::string, std::vector<std::uint8_t>>;

// [layers]. Of blocks that `is_ours`, between steps.
inline std::vector<BlockBytes> ReadBlocks(const SequenceKv& kv, const std::function<bool(int)>& is_ours) {
  std::vector<BlockBytes> layers(static_cast<std::size_t>(kv.format().n_layers));
  for (int layer = 0; layer < kv.format().n_layers; ++layer) {
    BlockBytes& out = layers[static_cast<std::size_t>(layer)];
    const LayerBlocks blocks = kv.BlocksAt(layer, kv.n_tokens());
    const auto keep = [&](const std::string& name, BlockRef ref, std::size_t n) {
      out[name].resize(n);
      const KvCopy copy{reinterpret_cast<std::byte*>(out[name].data()), kv.pool().Data(ref), n};
      EXPECT_TRUE(kv.pool().memory().Read({&copy, 1}).ok());
    };
    int block_idx = 0;
    for (const TierBlocks& tier : blocks.packed) {
      for (const BlockRef ref : tier.refs) {
        if (is_ours(block_idx)) keep("packed " + std::to_string(block_idx), ref, tier.block_bytes);
        ++block_idx;
      }
    }
    if (blocks.sink.valid() && is_ours(0)) {
      keep("sink", blocks.sink, static_cast<std::size_t>(kv.format().sink.block_bytes));
    }
    for (std::size_t i = 0; i < blocks.exact.size(); ++i, ++block_idx) {
      // The rest of a last block that is not full is nobody's.
      if (!is_ours(block_idx) || (block_idx + 1) * 64 > kv.n_tokens()) continue;
      keep("exact " + std::to_string(block_idx), blocks.exact[i],
           static_cast<std::size_t>(kv.format().exact.block_bytes));
    }
  }
  return layers;
}

// What a rank has when its step is over.
struct RankOutcome {
  Status status;
  std::vector<TokenRange> logit_tokens;
  std::vector<float> logits;       // [logit tokens, vocab], range by range
  std::vector<BlockBytes> layers;  // its own blocks
  SpBytes sent;
  std::size_t n_blocks_left = 0;  // in the pool, when the sequence is gone
};

inline RankOutcome RunRank(Transformer& model, Communicator& comm, const SpOptions& options, const std::string& profile,
                           std::span<const std::int32_t> ids, ForwardObserver* observer = nullptr) {
  const int n = static_cast<int>(ids.size());
  const SpSplit split(n, comm.size());
  const auto format = model.Format(profile).value();
  const auto pool = OwnedPool::Create(*format, 1, n, n, model.kv_memory()).value();
  RankOutcome out;
  {
    const auto kv = SequenceKv::CreateShare(pool->pool(), format, split, comm.rank()).value();
    SpStep step(comm, options, *kv, split);
    out.logit_tokens = step.LogitTokens(comm.rank());
    out.logits.resize(static_cast<std::size_t>(step.CountLogits() * model.config().vocab_size));
    const ForwardSequence sequence{kv.get(), ids, step.CountLogits(), nullptr, &step};
    out.status = model.Forward({&sequence, 1}, out.logits.data(), observer);
    out.sent = step.sent();
    if (out.status.ok()) {
      out.layers = ReadBlocks(*kv, [&](int block) { return split.OwnerOf(block) == comm.rank(); });
    }
  }
  out.n_blocks_left = pool->pool().usage().n_blocks_used;
  return out;
}

// [tokens from `first` on, vocab]
inline std::vector<float> JoinLogits(const std::vector<RankOutcome>& ranks, int first) {
  int n_logits = 0;
  std::size_t n_values = 0;
  for (const RankOutcome& rank : ranks) {
    for (const TokenRange& range : rank.logit_tokens) n_logits += range.size();
    n_values += rank.logits.size();
  }
  const auto vocab = static_cast<std::ptrdiff_t>(n_values / static_cast<std::size_t>(n_logits));
  std::vector<float> logits(n_values);
  for (const RankOutcome& rank : ranks) {
    auto from = rank.logits.begin();
    for (const TokenRange& range : rank.logit_tokens) {
      if (range.size() == 0) continue;
      std::copy_n(from, range.size() * vocab, logits.begin() + (range.begin - first) * vocab);
      from += range.size() * vocab;
    }
  }
  return logits;
}

inline std::vector<BlockBytes> JoinBlocks(const std::vector<RankOutcome>& ranks) {
  std::vector<BlockBytes> layers;
  for (const RankOutcome& rank : ranks) {
    layers.resize(std::max(layers.size(), rank.layers.size()));
    for (std::size_t l = 0; l < rank.layers.size(); ++l) layers[l].insert(rank.layers[l].begin(), rank.layers[l].end());
  }
  return layers;
}

// Of the blocks whose name begins with `kind`.
inline double ShareOfDifferentBytes(const BlockBytes& a, const BlockBytes& b, const std::string& kind = "") {
  EXPECT_EQ(a.size(), b.size());
  std::size_t n = 0, n_different = 0;
  for (const auto& [name, bytes] : a) {
    const auto other = b.find(name);
    if (other == b.end()) {
      ADD_FAILURE() << name << " is missing";
      continue;
    }
    EXPECT_EQ(bytes.size(), other->second.size()) << name;
    if (!name.starts_with(kind)) continue;
    n += bytes.size();
    for (std::size_t i = 0; i < std::min(bytes.size(), other->second.size()); ++i) {
      n_different += bytes[i] != other->second[i] ? 1 : 0;
    }
  }
  return n == 0 ? 0 : static_cast<double>(n_different) / static_cast<double>(n);
}

}  // namespace zeroc::testing
