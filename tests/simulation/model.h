// The model of the simulation: tokens are a pure function of (content, position), the bytes of KV blocks one of
// (content, prompt length, block). Decode knows the content from the bytes alone, so a stale, foreign or torn block
// gives a wrong token. Plain functions, any thread.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <vector>

#include "libzeroc/handoff/block_table.h"

namespace zeroc::simulation {

inline std::uint64_t Mix(std::uint64_t z) {  // splitmix64
  z += 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

inline std::int32_t TokenAt(std::uint64_t content, int position) {
  return static_cast<std::int32_t>(Mix(content ^ Mix(static_cast<std::uint64_t>(position))) >> 33);
}

// bytes: a multiple of 8. Every word depends on the seed.
inline void FillWords(std::uint64_t seed, std::span<std::byte> bytes) {
  for (std::size_t at = 0; at + 8 <= bytes.size(); at += 8) {
    const std::uint64_t word = seed + at * 0x9e3779b97f4a7c15u;
    std::memcpy(bytes.data() + at, &word, 8);
  }
}
inline bool HoldsWords(std::uint64_t seed, std::span<const std::byte> bytes, std::size_t from) {
  std::uint64_t different = 0;
  for (std::size_t at = from; at + 8 <= bytes.size(); at += 8) {
    std::uint64_t word = 0;
    std::memcpy(&word, bytes.data() + at, 8);
    different |= word ^ (seed + at * 0x9e3779b97f4a7c15u);
  }
  return different == 0;
}

inline bool HoldsOnly(std::byte value, std::span<const std::byte> bytes) {
  return bytes.empty() || (bytes[0] == value && std::memcmp(bytes.data(), bytes.data() + 1, bytes.size() - 1) == 0);
}

inline std::uint64_t BlockSeed(std::uint64_t content, int n_prompt_tokens, std::size_t block_idx) {
  return Mix(content ^ Mix(static_cast<std::uint64_t>(n_prompt_tokens) << 32 | block_idx));
}
// The first word of block 0 is the content itself.
inline void FillBlock(std::uint64_t content, int n_prompt_tokens, std::size_t block_idx, std::span<std::byte> bytes) {
  FillWords(BlockSeed(content, n_prompt_tokens, block_idx), bytes);
  if (block_idx == 0) std::memcpy(bytes.data(), &content, 8);
}

// A sequence in decode's arena: the prompt's blocks, and the rows that decode itself wrote into the last exact block of
// each layer for the tokens it generated.
class AttendedKv {
 public:
  AttendedKv() = default;
  explicit AttendedKv(const BlockTable& table) : extents_(table.Extents()), n_prompt_tokens_(table.n_prompt_tokens()) {
    if (n_prompt_tokens_ % kBlockTokens == 0) return;  // the prompt's last block is full
    for (int l = 0; l < table.n_layers(); ++l) {
      const BlockTable::Layer& layer = table.layer(l);
      const std::size_t before = layer.blocks.n_packed() + (layer.blocks.sink.valid() ? 1 : 0);
      if (!layer.blocks.exact.empty()) tails_.push_back(layer.first_block + before + layer.blocks.exact.size() - 1);
    }
  }

  const std::vector<BlockExtent>& extents() const { return extents_; }

  // One step of decode at `position`, which is not before the prompt's end: writes the row of the token before it where
  // that was generated here and its place is in the prompt's last block, attends to every byte, and returns the token.
  std::int32_t Step(std::span<std::byte> arena, int position) {
    std::uint64_t content = 0;
    std::memcpy(&content, arena.data() + extents_.at(0).offset, 8);
    WriteRow(arena, content, position - 1);
    for (std::size_t i = 0; i < extents_.size(); ++i) {
      if (!HoldsBlock(arena, content, i)) return TokenAt(~content, static_cast<int>(i));
    }
    return TokenAt(content, position);
  }

 private:
  static constexpr int kBlockTokens = 64;

  std::span<std::byte> Row(std::span<std::byte> arena, std::size_t block_idx, int row) const {
    const BlockExtent& extent = extents_[block_idx];
    const std::size_t row_bytes = extent.bytes / kBlockTokens / 8 * 8;
    return arena.subspan(extent.offset + static_cast<std::size_t>(row) * row_bytes, row_bytes);
  }
  static std::uint64_t RowSeed(std::uint64_t content, std::size_t block_idx, int row) {
    return Mix(content + Mix(block_idx * 64 + static_cast<std::size_t>(row)));
  }
  void WriteRow(std::span<std::byte> arena, std::uint64_t content, int position) {
    if (position < n_prompt_tokens_ || position / kBlockTokens != n_prompt_tokens_ / kBlockTokens) return;
    const int row = position % kBlockTokens;
    for (const std::size_t tail : tails_) FillWords(RowSeed(content, tail, row), Row(arena, tail, row));
    rows_end_ = row + 1;
  }
  bool HoldsBlock(std::span<std::byte> arena, std::uint64_t content, std::size_t block_idx) const {
    const BlockExtent& extent = extents_[block_idx];
    const std::span<std::byte> block = arena.subspan(extent.offset, extent.bytes);
    const std::uint64_t seed = BlockSeed(content, n_prompt_tokens_, block_idx);
    const std::size_t skip = block_idx == 0 ? 8 : 0;
    if (rows_end_ == 0 || std::find(tails_.begin(), tails_.end(), block_idx) == tails_.end()) {
      return HoldsWords(seed, block, skip);
    }
    const int first = n_prompt_tokens_ % kBlockTokens;
    for (int row = first; row < rows_end_; ++row) {
      if (!HoldsWords(RowSeed(content, block_idx, row), Row(arena, block_idx, row), 0)) return false;
    }
    const std::size_t row_bytes = extent.bytes / kBlockTokens / 8 * 8;
    return HoldsWords(seed, block.first(static_cast<std::size_t>(first) * row_bytes), skip) &&
           HoldsWords(seed, block, static_cast<std::size_t>(rows_end_) * row_bytes);
  }

  std::vector<BlockExtent> extents_;
  int n_prompt_tokens_ = 0;
  std::vector<std::size_t> tails_;
  int rows_end_ = 0;  // of the last block; rows from the prompt's end up to here are decode's
};

}  // namespace zeroc::simulation
