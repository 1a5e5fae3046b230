// What the hand-off's tests share: a small KV format without a model, arenas, prompts with known bytes.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "libzeroc/compression/profile.h"
#include "libzeroc/handoff/block_table.h"
#include "libzeroc/kv/block_pool.h"
#include "libzeroc/kv/kv_memory.h"
#include "libzeroc/kv/sequence_kv.h"

namespace zeroc::handoff_test {

inline constexpr int kLayers = 3;
inline constexpr char kModel[] = "0123456789abcdef0123456789abcdef";
inline constexpr char kPlan[] = "plan-of-the-test";

// bits 16: nothing is packed. Below 4 bits the youngest packed blocks pass two tiers, of 8 and 4 bits.
inline std::shared_ptr<const KvFormat> MakeFormat(int bits) {
  constexpr int kHeadDim = 16;
  const ModelGeometry geometry{kLayers, 2, 1, kHeadDim, 32};
  Profile profile = UniformProfile("test", bits, kLayers, kHeadDim);
  if (bits < 4) {
    profile.recent_tokens = 0;
    profile.young = {{1, UniformProfile("8", 8, kLayers, kHeadDim).layers},
                     {2, UniformProfile("4", 4, kLayers, kHeadDim).layers}};
  }
  return KvFormat::FromProfile(geometry, profile, /*exact_bits=*/16).value();
}

class Arena {
 public:
  explicit Arena(std::size_t bytes) : data_(static_cast<std::byte*>(std::aligned_alloc(64, bytes))), bytes_(bytes) {
    std::memset(data_, 0, bytes);
  }
  ~Arena() { std::free(data_); }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  std::span<std::byte> span() const { return {data_, bytes_}; }

 private:
  std::byte* data_;
  std::size_t bytes_;
};

// A device as pools see one: its memory is reached by copies alone, and is no host's.
class FakeDevice final : public KvMemory {
 public:
  bool is_host() const override { return false; }
  Result<std::span<std::byte>> Allocate(std::size_t bytes) override {
    return std::span(static_cast<std::byte*>(std::aligned_alloc(64, bytes)), bytes);
  }
  void Free(std::span<std::byte> arena) override { std::free(arena.data()); }
  Status Copy(std::span<const KvCopy> copies) override { return Run(copies); }
  Status Read(std::span<const KvCopy> copies) override { return Run(copies); }
  Status Write(std::span<const KvCopy> copies) override { return Run(copies); }
  Status Pin(std::span<std::byte>) override {
    ++n_pinned;
    return OkStatus();
  }
  void Unpin(std::span<std::byte>) override { --n_pinned; }

  bool is_lost = false;
  int n_pinned = 0;
  std::size_t n_copies = 0;

 private:
  Status Run(std::span<const KvCopy> copies) {
    if (is_lost) return Internal("the device is lost");
    for (const KvCopy& copy : copies) std::memcpy(copy.to, copy.from, copy.bytes);
    n_copies += copies.size();
    return OkStatus();
  }
};

// The bytes of block block_idx of prompt `seed`; every one of them depends on both.
inline void FillBlock(std::uint64_t seed, std::size_t block_idx, std::span<std::byte> bytes) {
  std::minstd_rand rng(static_cast<std::uint32_t>(seed * 1000003 + block_idx * 7919 + 1));
  for (std::byte& b : bytes) b = static_cast<std::byte>(rng() >> 7);
}
inline bool HoldsBlock(std::uint64_t seed, std::size_t block_idx, std::span<const std::byte> bytes) {
  std::vector<std::byte> expected(bytes.size());
  FillBlock(seed, block_idx, expected);
  return std::memcmp(expected.data(), bytes.data(), bytes.size()) == 0;
}

}  // namespace zeroc::handoff_test
