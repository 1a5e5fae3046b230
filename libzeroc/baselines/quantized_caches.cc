#include "libzeroc/baselines/quantized_caches.h"

#include <algorithm>

#include "libzeroc/baselines/quantizers.h"

namespace zeroc {
namespace {

std::uint64_t Bytes(int n) { return static_cast<std::uint64_t>(n); }
int Groups(int n, int size) { return (n + size - 1) / size; }
// Of n codes, in whole bytes.
int CodeBytes(int n, int bits) { return (n * bits + 7) / 8; }

class ExactCache : public CacheAttention {
 public:
  using CacheAttention::CacheAttention;

 protected:
  std::uint64_t HeadBytes(const Head& head) const override {
    return Bytes(head.store.size()) * Bytes(2 * shape().head_dim * shape().exact_bytes);
  }
};

// Each token's key and value rounded on their own.
class TokenwiseCache : public CacheAttention {
 public:
  using CacheAttention::CacheAttention;

 protected:
  virtual void Quantize(std::span<float> row) const = 0;

  void QuantizeFrom(Head& head, int first_slot) {
    std::vector<float> k(static_cast<std::size_t>(shape().head_dim));
    for (int slot = first_slot; slot < head.store.size(); ++slot) {
      head.store.GetKey(slot, k.data());
      Quantize(k);
      head.store.SetKey(slot, k.data());
      Quantize({head.store.Value(slot), k.size()});
    }
  }
  void OnAppended(Head& head, int first_slot) override {
    if (!in_prompt()) QuantizeFrom(head, first_slot);
  }
  void OnPromptEnd() override {
    for (Head& head : heads()) QuantizeFrom(head, 0);
  }
};

class Fp8Cache final : public TokenwiseCache {
 public:
  using TokenwiseCache::TokenwiseCache;

 protected:
  void Quantize(std::span<float> row) const override {
    for (float& x : row) x = RoundToE4m3(x);
  }
  std::uint64_t HeadBytes(const Head& head) const override {
    return Bytes(head.store.size()) * Bytes(2 * shape().head_dim);
  }
};

class Int8Cache final : public TokenwiseCache {
 public:
  using TokenwiseCache::TokenwiseCache;

 protected:
  void Quantize(std::span<float> row) const override { QuantizeSymmetric8(row); }
  std::uint64_t HeadBytes(const Head& head) const override {
    return Bytes(head.store.size()) * Bytes(2 * (shape().head_dim + 2));
  }
};

class KiviCache final : public CacheAttention {
 public:
  KiviCache(const CacheShape& shape, int max_tokens, int bits)
      : CacheAttention(shape, max_tokens), bits_(bits), quantized_(n_heads_total()) {}

 protected:
  void OnPromptEnd() override {
    for (Head& head : heads()) Quantize(head);
  }
  // The step's token has been attended to exactly; then full residuals are quantised.
  void OnAttended(Head& head, int, const float*, std::int64_t, int) override {
    if (!in_prompt()) Quantize(head);
  }
  std::uint64_t HeadBytes(const Head& head) const override {
    const auto [n_keys, n_values] = quantized_[head.idx];
    const int d = shape().head_dim;
    const int n = head.store.size();
    const int key_group = CodeBytes(kKiviGroup, bits_) + 4;  // codes, scale, zero
    const int value_row = CodeBytes(d, bits_) + 4 * Groups(d, kKiviGroup);
    const int exact = (n - n_keys) + (n - n_values);
    return Bytes(n_keys / kKiviGroup * d) * Bytes(key_group) + Bytes(n_values) * Bytes(value_row) +
           Bytes(exact) * Bytes(d * shape().exact_bytes);
  }

 private:
  struct Quantized {
    int n_keys = 0, n_values = 0;
  };

  void Quantize(Head& head) {
    auto& [n_keys, n_values] = quantized_[head.idx];
    const int d = shape().head_dim;
    const int n = head.store.size();
    for (; n_keys < n / kKiviResidual * kKiviResidual; n_keys += kKiviGroup) {
      for (int i = 0; i < d; ++i) QuantizeAffine({&head.store.Key(n_keys, i), kKiviGroup, 1}, bits_);
    }
    for (; n_values < n - kKiviResidual; ++n_values) {
      for (int i = 0; i < d; i += kKiviGroup) {
        QuantizeAffine({head.store.Value(n_values) + i, std::min(kKiviGroup, d - i), 1}, bits_);
      }
    }
  }

  int bits_;
  std::vector<Quantized> quantized_;  // [heads]
};
static_assert(HeadStore::kBlock % kKiviGroup == 0 && kKiviResidual % kKiviGroup == 0,
              "a group of tokens lies in one key tile");

class HackCache final : public CacheAttention {
 public:
  using CacheAttention::CacheAttention;

 protected:
  static constexpr int kCacheBits = 2;
  static constexpr int kOperandBits = 8;  // queries and probabilities

  void OnAppended(Head& head, int first_slot) override {
    const int d = shape().head_dim;
    std::vector<float> k(static_cast<std::size_t>(d));
    for (int slot = first_slot; slot < head.store.size(); ++slot) {
      head.store.GetKey(slot, k.data());
      QuantizePartitions(k, kCacheBits, /*half=*/true);
      head.store.SetKey(slot, k.data());
    }
    const int full = head.store.size() / kHackPartition;
    for (int block = first_slot / kHackPartition; block < full; ++block) {
      for (int i = 0; i < d; ++i) {
        QuantizeAffine({head.store.Value(block * kHackPartition) + i, kHackPartition, d}, kCacheBits);
      }
    }
  }
  void MapQueries(Head&, int n_tokens, float* q) override {
    const auto d = static_cast<std::size_t>(shape().head_dim);
    for (int r = 0; r < n_tokens * shape().group(); ++r) {
      QuantizePartitions({q + static_cast<std::size_t>(r) * d, d}, kOperandBits, /*half=*/false);
    }
  }
  void MapProbabilities(const Head& head, std::span<const int> n_visible, float* p, std::int64_t stride) override {
    const int quantized = head.store.size() / kHackPartition * kHackPartition;
    for (std::size_t r = 0; r < n_visible.size(); ++r) {
      float* row = p + static_cast<std::int64_t>(r) * stride;
      const int end = std::min(n_visible[r], quantized);
      for (int t = 0; t < end; t += kHackPartition) {
        QuantizeAffine({row + t, std::min(kHackPartition, end - t), 1}, kOperandBits, /*half=*/false);
      }
    }
  }
  // Codes, scale, zero and the cached sum of codes (two bytes each) of every partition, and the exact values.
  std::uint64_t HeadBytes(const Head& head) const override {
    const int d = shape().head_dim;
    const int n = head.store.size();
    const int full = n / kHackPartition;
    const int key_row = CodeBytes(d, kCacheBits) + 6 * Groups(d, kHackPartition);
    const int value_column = CodeBytes(kHackPartition, kCacheBits) + 6;
    return Bytes(n) * Bytes(key_row) + Bytes(full * d) * Bytes(value_column) +
           Bytes(n - full * kHackPartition) * Bytes(d * shape().exact_bytes);
  }

 private:
  static void QuantizePartitions(std::span<float> row, int bits, bool half) {
    for (std::size_t i = 0; i < row.size(); i += kHackPartition) {
      const std::size_t n = std::min<std::size_t>(kHackPartition, row.size() - i);
      QuantizeAffine({row.data() + i, static_cast<int>(n), 1}, bits, half);
    }
  }
};

}  // namespace

std::unique_ptr<SequenceAttention> NewExactCache(const CacheShape& shape, int max_tokens) {
  return std::make_unique<ExactCache>(shape, max_tokens);
}
std::unique_ptr<SequenceAttention> NewFp8Cache(const CacheShape& shape, int max_tokens) {
  return std::make_unique<Fp8Cache>(shape, max_tokens);
}
std::unique_ptr<SequenceAttention> NewInt8Cache(const CacheShape& shape, int max_tokens) {
  return std::make_unique<Int8Cache>(shape, max_tokens);
}
std::unique_ptr<SequenceAttention> NewKiviCache(const CacheShape& shape, int max_tokens, int bits) {
  return std::make_unique<KiviCache>(shape, max_tokens, bits);
}
std::unique_ptr<SequenceAttention> NewHackCache(const CacheShape& shape, int max_tokens) {
  return std::make_unique<HackCache>(shape, max_tokens);
}

}  // namespace zeroc
