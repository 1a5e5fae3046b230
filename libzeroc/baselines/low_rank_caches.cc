#include "libzeroc/baselines/low_rank_caches.h"

#include <algorithm>
#include <cmath>

#include "libzeroc/base/check.h"
#include "libzeroc/baselines/evicting_caches.h"
#include "libzeroc/baselines/quantizers.h"

namespace zeroc {
namespace {

class PaluCache final : public CacheAttention {
 public:
  PaluCache(const CacheShape& shape, int max_tokens, std::shared_ptr<const PaluBases> bases)
      : CacheAttention(shape, max_tokens), bases_(std::move(bases)) {}

 protected:
  void MapRows(int layer, int n_tokens, float* k, float* v) override {
    const int n_groups = shape().n_kv_heads / bases_->group;
    for (int g = 0; g < n_groups; ++g) {
      const auto basis = static_cast<std::size_t>(layer * n_groups + g);
      for (int t = 0; t < n_tokens; ++t) {
        const std::ptrdiff_t at =
            static_cast<std::ptrdiff_t>(t) * shape().kv_width() + g * bases_->group * shape().head_dim;
        Apply(bases_->k[basis], k + at);
        Apply(bases_->v[basis], v + at);
      }
    }
  }
  // A group's coordinates belong to its first head.
  std::uint64_t HeadBytes(const Head& head) const override {
    if (head.kv_head % bases_->group != 0) return 0;
    const int n_groups = shape().n_kv_heads / bases_->group;
    const auto basis = static_cast<std::size_t>(head.layer * n_groups + head.kv_head / bases_->group);
    return static_cast<std::uint64_t>(head.store.size()) *
           static_cast<std::uint64_t>(RowBytes(bases_->k[basis].rank) + RowBytes(bases_->v[basis].rank));
  }

 private:
  void Apply(const Projection& projection, float* x) const {
    if (bases_->code_bits == 0) {
      projection.ApplyExact(x, projection.rank, shape().exact_bytes);
    } else {
      projection.ApplyCodes(x, bases_->code_bits);
    }
  }
  // Codes with scale and zero in half precision, or exact numbers.
  int RowBytes(int rank) const {
    return bases_->code_bits == 0 ? rank * shape().exact_bytes : (rank * bases_->code_bits + 7) / 8 + 4;
  }

  std::shared_ptr<const PaluBases> bases_;
};

class PaperCache final : public CacheAttention {
 public:
  PaperCache(const CacheShape& shape, int max_tokens, std::shared_ptr<const PaperBases> bases)
      : CacheAttention(shape, max_tokens),
        bases_(std::move(bases)),
        window_(static_cast<std::size_t>(shape.n_kv_heads), kSnapKvWindow, shape.group(), shape.head_dim) {}

 protected:
  void OnAppended(Head& head, int first_slot) override {
    for (int slot = first_slot; slot < head.store.size(); ++slot) Truncate(head, slot, /*cold=*/false);
  }
  void MapQueries(Head& head, int n_tokens, float* q) override {
    if (in_prompt() && head.layer == 0) window_.Add(head.idx, n_tokens, q);
  }
  void OnPromptEnd() override {
    const int n = n_tokens();
    std::vector<float> coldness(static_cast<std::size_t>(n));
    for (Head& head : heads().first(static_cast<std::size_t>(shape().n_kv_heads))) {
      const std::vector<float> votes = window_.Votes(head.idx, head.store);
      for (std::size_t t = 0; t < votes.size(); ++t) coldness[t] -= votes[t];
    }
    n_cold_ = static_cast<int>(kColdShare * n);
    const std::vector<int> cold = LargestIndices(coldness, n_cold_);
    for (Head& head : heads()) {
      for (const int slot : cold) Truncate(head, slot, /*cold=*/true);
    }
  }
  // One bit per token for its tier, kept once: with head 0.
  std::uint64_t HeadBytes(const Head& head) const override {
    const int n = head.store.size();
    const int rank_k = bases_->k[head.idx].rank, rank_v = bases_->v[head.idx].rank;
    const std::int64_t numbers = static_cast<std::int64_t>(n - n_cold_) * (rank_k + rank_v) +
                                 static_cast<std::int64_t>(n_cold_) * (ColdRank(rank_k) + ColdRank(rank_v));
    const int tier_bytes = head.idx == 0 ? (n + 7) / 8 : 0;
    return static_cast<std::uint64_t>(numbers * shape().exact_bytes + tier_bytes);
  }

 private:
  void Truncate(Head& head, int slot, bool cold) {
    const auto apply = [&](const Projection& projection, float* x) {
      projection.ApplyExact(x, cold ? ColdRank(projection.rank) : projection.rank, shape().exact_bytes);
    };
    std::vector<float> k(static_cast<std::size_t>(shape().head_dim));
    head.store.GetKey(slot, k.data());
    apply(bases_->k[head.idx], k.data());
    head.store.SetKey(slot, k.data());
    apply(bases_->v[head.idx], head.store.Value(slot));
  }

  std::shared_ptr<const PaperBases> bases_;
  QueryWindow window_;
  int n_cold_ = 0;
};

}  // namespace

std::vector<float> Projection::Coordinates(const float* x, int n_kept) const {
  ZEROC_CHECK(n_kept >= 0 && n_kept <= rank, n_kept, rank);
  std::vector<float> c(static_cast<std::size_t>(n_kept));
  for (int i = 0; i < dim; ++i) {
    const float* row = basis.data() + static_cast<std::ptrdiff_t>(i) * rank;
    for (int j = 0; j < n_kept; ++j) c[static_cast<std::size_t>(j)] += x[i] * row[j];
  }
  return c;
}

void Projection::Rebuild(std::span<const float> c, float* x) const {
  for (int i = 0; i < dim; ++i) {
    const float* row = basis.data() + static_cast<std::ptrdiff_t>(i) * rank;
    float sum = 0;
    for (std::size_t j = 0; j < c.size(); ++j) sum += c[j] * row[j];
    x[i] = sum;
  }
}

void Projection::ApplyExact(float* x, int n_kept, int exact_bytes) const {
  std::vector<float> c = Coordinates(x, n_kept);
  RoundExact(exact_bytes, c);
  Rebuild(c, x);
}

void Projection::ApplyCodes(float* x, int bits) const {
  std::vector<float> c = Coordinates(x, rank);
  QuantizeAffine({c.data(), rank, 1}, bits);
  Rebuild(c, x);
}

std::unique_ptr<SequenceAttention> NewPaluCache(const CacheShape& shape, int max_tokens,
                                                std::shared_ptr<const PaluBases> bases) {
  return std::make_unique<PaluCache>(shape, max_tokens, std::move(bases));
}
std::unique_ptr<SequenceAttention> NewPaperCache(const CacheShape& shape, int max_tokens,
                                                 std::shared_ptr<const PaperBases> bases) {
  return std::make_unique<PaperCache>(shape, max_tokens, std::move(bases));
}

}  // namespace zeroc
