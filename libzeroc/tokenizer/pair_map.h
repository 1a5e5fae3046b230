// A flat hash map from a pair of 32-bit numbers to 64 bits, for the two look-ups that tokenisation does per byte: BPE
// merges and trie edges. Filled once, then const and thread-safe.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

namespace zeroc {

class PairMap {
 public:
  // Room for n pairs without growing.
  explicit PairMap(std::size_t n = 0);

  // Replaces the value of a pair that is already there. (UINT32_MAX, UINT32_MAX) is not a valid pair.
  void Insert(std::uint32_t first, std::uint32_t second, std::uint64_t value);

  std::optional<std::uint64_t> Find(std::uint32_t first, std::uint32_t second) const {
    const std::uint64_t key = Key(first, second);
    for (std::size_t i = Home(key);; i = (i + 1) & mask_) {
      if (slots_[i].key == key) return slots_[i].value;
      if (slots_[i].key == kEmpty) return std::nullopt;
    }
  }

  std::size_t size() const { return size_; }

 private:
  static constexpr std::uint64_t kEmpty = ~std::uint64_t{0};
  struct Slot {
    std::uint64_t key = kEmpty;
    std::uint64_t value = 0;
  };
  static std::uint64_t Key(std::uint32_t first, std::uint32_t second) { return std::uint64_t{first} << 32 | second; }
  // Two rounds of multiply and fold (murmur3): keys are small dense numbers, which one round leaves clumped.
  std::size_t Home(std::uint64_t key) const {
    key = (key ^ key >> 33) * 0xff51afd7ed558ccdULL;
    key = (key ^ key >> 33) * 0xc4ceb9fe1a85ec53ULL;
    return static_cast<std::size_t>(key ^ key >> 33) & mask_;
  }
  void Grow();

  std::vector<Slot> slots_;  // a power of two, at most half full
  std::size_t mask_ = 0;
  std::size_t size_ = 0;
};

}  // namespace zeroc
