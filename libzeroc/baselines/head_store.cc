#include "libzeroc/baselines/head_store.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "libzeroc/base/check.h"

// One copy of the loops per instruction set, chosen when the program loads. Sanitizers and the resolver do not go
// together, and Clang names the architectures otherwise: both take the baseline.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__) && \
    !defined(__SANITIZE_THREAD__)
#define ZEROC_PER_ISA __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define ZEROC_PER_ISA
#endif
#define ZEROC_INLINE inline __attribute__((always_inline))

namespace zeroc {
namespace {

constexpr int kLanes = HeadStore::kLanes;
constexpr int kBlock = HeadStore::kBlock;
constexpr int kRows = 4;  // rows side by side: 4 x 4 accumulators of 16 lanes, half of the AVX-512 registers

using Vec = float __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

// acc[r][c] += sum over i of a[r * a_stride + i] * b[i * b_stride + 16 c ..]. Both products have this form: scores with
// a = queries and b = transposed keys, outputs with a = probabilities and b = values.
template <int R, int C>
ZEROC_INLINE void Product(const float* a, std::int64_t a_stride, const float* b, std::int64_t b_stride, int n,
                          float* out, std::int64_t out_stride, bool accumulate) {
  Vec acc[R][C];
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) {
      acc[r][c] = accumulate ? *reinterpret_cast<const Vec*>(out + r * out_stride + c * kLanes) : Vec{};
    }
  }
  for (int i = 0; i < n; ++i) {
    const Vec* row = reinterpret_cast<const Vec*>(b + i * b_stride);
    for (int r = 0; r < R; ++r) {
      const float x = a[r * a_stride + i];
      for (int c = 0; c < C; ++c) acc[r][c] += row[c] * x;
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) *reinterpret_cast<Vec*>(out + r * out_stride + c * kLanes) = acc[r][c];
  }
}

template <int C>
ZEROC_INLINE void ProductRows(int n_rows, const float* a, std::int64_t a_stride, const float* b, std::int64_t b_stride,
                              int n, float* out, std::int64_t out_stride, bool accumulate) {
  for (int r = 0; r < n_rows; r += kRows) {
    const float* x = a + r * a_stride;
    float* y = out + r * out_stride;
    switch (std::min(kRows, n_rows - r)) {
      case 1:
        Product<1, C>(x, a_stride, b, b_stride, n, y, out_stride, accumulate);
        break;
      case 2:
        Product<2, C>(x, a_stride, b, b_stride, n, y, out_stride, accumulate);
        break;
      case 3:
        Product<3, C>(x, a_stride, b, b_stride, n, y, out_stride, accumulate);
        break;
      default:
        Product<4, C>(x, a_stride, b, b_stride, n, y, out_stride, accumulate);
        break;
    }
  }
}

// s[r, t] = q[r] . k[t] for the 64 slots of one key block.
ZEROC_PER_ISA void ScoreBlock(const float* keys, int head_dim, const float* q, int n_rows, float* s,
                              std::int64_t stride) {
  ProductRows<kBlock / kLanes>(n_rows, q, head_dim, keys, kBlock, head_dim, s, stride, false);
}

// out[r] += sum over t < n of p[r, t] v[t].
ZEROC_PER_ISA void AddValues(const float* values, int head_dim, const float* p, std::int64_t stride, int n_rows, int n,
                             float* out) {
  int i = 0;
  for (; i + 4 * kLanes <= head_dim; i += 4 * kLanes) {
    ProductRows<4>(n_rows, p, stride, values + i, head_dim, n, out + i, head_dim, true);
  }
  for (; i < head_dim; i += kLanes) {
    ProductRows<1>(n_rows, p, stride, values + i, head_dim, n, out + i, head_dim, true);
  }
}

// e^x for x <= 0, relative error below 2e-7: 2^n times a polynomial on [-0.5, 0.5] / log2(e). Plain enough to
// vectorise.
ZEROC_INLINE float Exp(float x) {
  x = std::max(x, -87.0f);
  const float y = x * 1.44269504f;
  const float n = static_cast<float>(static_cast<int>(y - 0.5f));
  const float r = (x - n * 0.693145751953125f) - n * 1.42860682030941723e-6f;
  float e = 1.0f / 5040;
  e = e * r + 1.0f / 720;
  e = e * r + 1.0f / 120;
  e = e * r + 1.0f / 24;
  e = e * r + 1.0f / 6;
  e = e * r + 0.5f;
  e = e * r + 1.0f;
  e = e * r + 1.0f;
  return e * std::bit_cast<float>((static_cast<std::int32_t>(n) + 127) << 23);
}

// s becomes its softmax over [0, n).
ZEROC_PER_ISA void Softmax(float* s, int n) {
  float lane_max[kLanes], lane_sum[kLanes];
  for (int c = 0; c < kLanes; ++c) {
    lane_max[c] = s[0];
    lane_sum[c] = 0;
  }
  const int whole = n / kLanes * kLanes;
  for (int t = 0; t < whole; t += kLanes) {
    for (int c = 0; c < kLanes; ++c) lane_max[c] = lane_max[c] > s[t + c] ? lane_max[c] : s[t + c];
  }
  float max = s[0];
  for (int c = 0; c < kLanes; ++c) max = std::max(max, lane_max[c]);
  for (int t = whole; t < n; ++t) max = std::max(max, s[t]);
  for (int t = 0; t < whole; t += kLanes) {
    for (int c = 0; c < kLanes; ++c) {
      s[t + c] = Exp(s[t + c] - max);
      lane_sum[c] += s[t + c];
    }
  }
  float sum = 0;
  for (int c = 0; c < kLanes; ++c) sum += lane_sum[c];
  for (int t = whole; t < n; ++t) {
    s[t] = Exp(s[t] - max);
    sum += s[t];
  }
  const float scale = 1 / sum;
  for (int t = 0; t < n; ++t) s[t] *= scale;
}

std::size_t KeyFloats(int head_dim, int capacity) {
  const int blocks = (capacity + kBlock - 1) / kBlock;
  return static_cast<std::size_t>(blocks) * static_cast<std::size_t>(kBlock * head_dim);
}

}  // namespace

HeadStore::HeadStore(int head_dim, int capacity)
    : head_dim_(head_dim),
      capacity_(capacity),
      keys_(KeyFloats(head_dim, capacity)),
      values_(static_cast<std::size_t>(capacity) * static_cast<std::size_t>(head_dim)) {
  ZEROC_CHECK(head_dim > 0 && head_dim % kLanes == 0 && capacity > 0, head_dim, capacity);
}

std::uint64_t HeadStore::Bytes(int head_dim, int capacity) {
  return sizeof(float) *
         (KeyFloats(head_dim, capacity) + static_cast<std::uint64_t>(capacity) * static_cast<std::uint64_t>(head_dim));
}

void HeadStore::Append(const float* k, const float* v) {
  ZEROC_CHECK(size_ < capacity_, size_, capacity_);
  SetKey(size_, k);
  std::copy_n(v, head_dim_, Value(size_));
  ++size_;
}

void HeadStore::GetKey(int slot, float* k) const {
  for (int i = 0; i < head_dim_; ++i) k[i] = keys_[KeyIndex(slot, i)];
}

void HeadStore::SetKey(int slot, const float* k) {
  for (int i = 0; i < head_dim_; ++i) keys_[KeyIndex(slot, i)] = k[i];
}

void HeadStore::Copy(int from, int to) {
  for (int i = 0; i < head_dim_; ++i) keys_[KeyIndex(to, i)] = keys_[KeyIndex(from, i)];
  std::copy_n(Value(from), head_dim_, Value(to));
}

void HeadStore::Keep(std::span<const int> keep) {
  for (std::size_t i = 0; i < keep.size(); ++i) {
    const int to = static_cast<int>(i);
    ZEROC_CHECK(keep[i] >= to && keep[i] < size_, keep[i], to, size_);
    if (keep[i] != to) Copy(keep[i], to);
  }
  size_ = static_cast<int>(keep.size());
}

void HeadStore::ReplaceByLast(int slot) {
  ZEROC_CHECK(slot >= 0 && slot < size_, slot, size_);
  if (slot != size_ - 1) Copy(size_ - 1, slot);
  --size_;
}

void HeadStore::Probabilities(const float* q, std::span<const int> n_visible, float* p, std::int64_t stride) const {
  const int n_rows = static_cast<int>(n_visible.size());
  const int n_slots = *std::max_element(n_visible.begin(), n_visible.end());
  ZEROC_CHECK(n_slots <= size_ && stride % kBlock == 0 && n_slots <= stride, n_slots, size_, stride);
  for (int slot = 0; slot < n_slots; slot += kBlock) {
    ScoreBlock(keys_.data() + KeyIndex(slot, 0), head_dim_, q, n_rows, p + slot, stride);
  }
  for (int r = 0; r < n_rows; ++r) {
    const int n = n_visible[static_cast<std::size_t>(r)];
    Softmax(p + r * stride, n);
    std::fill(p + r * stride + n, p + (r + 1) * stride, 0.0f);
  }
}

void HeadStore::WeightedValues(const float* p, std::int64_t stride, int n_rows, int n_slots, float* out) const {
  ZEROC_CHECK(n_slots <= size_, n_slots, size_);
  std::fill_n(out, static_cast<std::size_t>(n_rows) * static_cast<std::size_t>(head_dim_), 0.0f);
  for (int slot = 0; slot < n_slots; slot += kBlock) {
    AddValues(Value(slot), head_dim_, p + slot, stride, n_rows, std::min(kBlock, n_slots - slot), out);
  }
}

}  // namespace zeroc
