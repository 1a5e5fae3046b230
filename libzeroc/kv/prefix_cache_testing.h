// Sequences without a model, for the tests of the prefix cache: every byte of a block is a function of the tokens up to
// it, of the layer and of the tiers that it went through.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "libzeroc/compression/profile.h"
#include "libzeroc/kv/prefix_cache.h"

namespace zeroc::testing {

inline constexpr int kLayers = 2;
inline constexpr int kHeadDim = 32;
inline constexpr int kGrain = 128;
using Tokens = std::vector<std::int32_t>;

class Pool {
 public:
  explicit Pool(std::size_t bytes, std::size_t slab_bytes = 16 << 10)
      : data_(static_cast<std::byte*>(std::aligned_alloc(64, bytes))),
        pool_(BlockPool::Create({data_, bytes}, slab_bytes).value()) {
    std::memset(data_, 0x5a, bytes);
  }
  ~Pool() {
    pool_.reset();
    std::free(data_);
  }
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;
  BlockPool& operator*() { return *pool_; }
  BlockPool* operator->() { return pool_.get(); }

 private:
  std::byte* data_;
  std::unique_ptr<BlockPool> pool_;
};

// young: blocks of each younger tier, at 8 bits. bits 16: packs nothing.
inline std::shared_ptr<const KvFormat> Format(int bits, int recent_tokens, int sink_tokens,
                                              const std::vector<int>& young = {}) {
  const ModelGeometry geometry{kLayers, 2, 1, kHeadDim, 64};
  std::string name = "b";
  name += std::to_string(bits) + "r" + std::to_string(recent_tokens);
  Profile profile = UniformProfile(name, bits, kLayers, kHeadDim);
  profile.recent_tokens = recent_tokens;
  profile.sink_tokens = sink_tokens;
  for (const int n_blocks : young) {
    profile.young.push_back({n_blocks, UniformProfile("8", 8, kLayers, kHeadDim).layers});
  }
  return KvFormat::FromProfile(geometry, profile, /*exact_bits=*/16).value();
}

inline Tokens RandomTokens(std::mt19937& rng, int n) {
  Tokens tokens;
  for (int i = 0; i < n; ++i) tokens.push_back(static_cast<std::int32_t>(rng() % 1000));
  return tokens;
}

// Stands in for the forward pass: every byte of a block is a function of the tokens up to it, of the layer and of the
// tiers that the block went through.
inline void RunStep(SequenceKv& kv, const Tokens& tokens, int n_new) {
  const int begin = kv.n_tokens();
  std::uint64_t hash = 14695981039346656037u;
  for (int pos = 0; pos < begin; ++pos) hash = (hash ^ static_cast<std::uint64_t>(tokens[pos])) * 1099511628211u;
  kv.BeginStep(n_new);
  for (int pos = begin; pos < begin + n_new; ++pos) {
    hash = (hash ^ static_cast<std::uint64_t>(tokens[pos])) * 1099511628211u;
    for (int layer = 0; layer < kLayers; ++layer) {
      std::uint8_t* block = kv.WriteBlocks(layer)[pos / 64 - begin / 64];
      const int slot_bytes = kv.format().exact.block_bytes / 64;
      if (pos % 64 == 0) std::memset(block, 0, static_cast<std::size_t>(kv.format().exact.block_bytes));
      for (int i = 0; i < slot_bytes; ++i) {
        block[pos % 64 * slot_bytes + i] =
            static_cast<std::uint8_t>(hash >> (i % 7 * 8)) + static_cast<std::uint8_t>(layer);
      }
    }
  }
  for (int layer = 0; layer < kLayers; ++layer) {
    for (int tier = 0; tier < static_cast<int>(kv.format().tiers.size()); ++tier) {
      const int from_bytes = kv.SourceLayout(layer, tier).block_bytes;
      const int to_bytes =
          kv.format().tiers[static_cast<std::size_t>(tier)].layouts[static_cast<std::size_t>(layer)].block_bytes;
      for (int b = kv.pack_begin(tier); b < kv.pack_end(tier); ++b) {
        const std::uint8_t* from = kv.PackSource(layer, tier, b);
        std::uint8_t* to = kv.PackedBlock(layer, tier, b);
        for (int i = 0; i < to_bytes; ++i) to[i] = static_cast<std::uint8_t>(from[i * 3 % from_bytes] * 3 + tier);
      }
    }
    if (kv.takes_sink()) kv.CopySink(layer);
  }
  kv.EndStep();
}

template <typename Fn>
void ForEachPair(const LayerBlocks& a, const LayerBlocks& b, const KvFormat& format, Fn fn) {
  ASSERT_EQ(a.packed.size(), b.packed.size());
  for (std::size_t tier = 0; tier < a.packed.size(); ++tier) {
    ASSERT_EQ(a.packed[tier].refs.size(), b.packed[tier].refs.size());
    for (std::size_t i = 0; i < a.packed[tier].refs.size(); ++i) {
      fn(a.packed[tier].refs[i], b.packed[tier].refs[i], static_cast<std::size_t>(a.packed[tier].block_bytes));
    }
  }
  ASSERT_EQ(a.exact.size(), b.exact.size());
  for (std::size_t i = 0; i < a.exact.size(); ++i) {
    fn(a.exact[i], b.exact[i], static_cast<std::size_t>(format.exact.block_bytes));
  }
  ASSERT_EQ(a.sink.valid(), b.sink.valid());
  if (a.sink.valid()) fn(a.sink, b.sink, static_cast<std::size_t>(format.sink.block_bytes));
}

inline void ExpectSameBytes(const SequenceKv& got, const SequenceKv& want) {
  ASSERT_EQ(got.n_tokens(), want.n_tokens());
  for (int layer = 0; layer < kLayers; ++layer) {
    ForEachPair(got.BlocksAt(layer, got.n_tokens()), want.BlocksAt(layer, want.n_tokens()), got.format(),
                [&](BlockRef a, BlockRef b, std::size_t bytes) {
                  ASSERT_EQ(std::memcmp(got.pool().Data(a), want.pool().Data(b), bytes), 0)
                      << "layer " << layer << " at " << got.n_tokens() << " of " << got.format().profile;
                });
  }
}

// Computes tokens from where the sequence is, in steps that end at multiples of kGrain, keeping what `keep` wants.
inline void Compute(SequenceKv& kv, const Tokens& tokens, int end, PrefixCache* cache = nullptr) {
  while (kv.n_tokens() < end) {
    RunStep(kv, tokens, std::min(end, (kv.n_tokens() / kGrain + 1) * kGrain) - kv.n_tokens());
    if (cache != nullptr && kv.n_tokens() % kGrain == 0) cache->KeepState(kv, tokens, kv.n_tokens());
  }
}

inline std::vector<std::shared_ptr<const KvFormat>> Formats() {
  return {Format(16, 128, 0),        Format(4, 128, 16),    Format(4, 0, 0),
          Format(2, 20, 16, {1, 2}), Format(2, 64, 0, {2}), Format(3, 0, 16, {1})};
}

}  // namespace zeroc::testing
