#include "libzeroc/baselines/cache_attention.h"

#include <algorithm>
#include <cmath>

#include "kernels/bf16.h"
#include "libzeroc/base/check.h"

namespace zeroc {
namespace {

// Query rows per pass over the keys: their probabilities (rows times 4,096 tokens times 4 bytes) stay in the
// second-level cache.
constexpr int kTileRows = 48;

// Half-split rotary embedding of one head, as the engine's kernels do it; `row` is the token's row of the tables.
void Rotate(const kernels::RopeRows& rope, int row, int head_dim, const float* x, float scale, float* out) {
  const int half = head_dim / 2;
  if (rope.cos == nullptr) {
    for (int i = 0; i < head_dim; ++i) out[i] = scale * x[i];
    return;
  }
  const float* c = rope.cos + static_cast<std::ptrdiff_t>(row) * half;
  const float* s = rope.sin + static_cast<std::ptrdiff_t>(row) * half;
  for (int i = 0; i < half; ++i) {
    const float a = x[i], b = x[i + half];
    out[i] = scale * (a * c[i] - b * s[i]);
    out[i + half] = scale * (b * c[i] + a * s[i]);
  }
}

}  // namespace

CacheShape CacheShape::Of(const Transformer& model) {
  const ModelConfig& config = model.config();
  return {static_cast<int>(config.n_layers), static_cast<int>(config.n_heads), static_cast<int>(config.n_kv_heads),
          static_cast<int>(config.head_dim), model.ops().act_bytes == 4 ? 4 : 2};
}

void RoundExact(int exact_bytes, std::span<float> values) {
  if (exact_bytes == 4) return;
  for (float& value : values) value = kernels::Bf16ToFloat(kernels::FloatToBf16(value));
}

CacheAttention::CacheAttention(const CacheShape& shape, int max_tokens) : shape_(shape), max_tokens_(max_tokens) {
  for (int layer = 0; layer < shape.n_layers; ++layer) {
    for (int g = 0; g < shape.n_kv_heads; ++g) {
      heads_.push_back({heads_.size(), layer, g, HeadStore(shape.head_dim, max_tokens)});
    }
  }
}

std::uint64_t CacheAttention::HostBytes(const CacheShape& shape, int max_tokens) {
  return static_cast<std::uint64_t>(shape.n_layers * shape.n_kv_heads) * HeadStore::Bytes(shape.head_dim, max_tokens);
}

void CacheAttention::BeginStep(int n_new) {
  ZEROC_CHECK(n_new_ == 0 && n_new >= 1 && n_new <= max_tokens_ - n_tokens_, n_new, n_tokens_, max_tokens_);
  n_new_ = n_new;
}

void CacheAttention::EndStep() {
  n_tokens_ += n_new_;
  n_new_ = 0;
}

void CacheAttention::EndPrompt() {
  ZEROC_CHECK(in_prompt_ && n_new_ == 0, in_prompt_, n_new_);
  OnPromptEnd();
  in_prompt_ = false;
}

std::uint64_t CacheAttention::HeldBytes() const {
  std::uint64_t bytes = 0;
  for (const Head& head : heads_) bytes += HeadBytes(head);
  return bytes;
}

void CacheAttention::AppendRows(Head& head, const AttentionRows& rows, int begin, int n, Scratch& scratch) {
  const auto d = static_cast<std::size_t>(shape_.head_dim);
  const int first_slot = head.store.size();
  scratch.k.resize(d);
  for (int t = begin; t < begin + n; ++t) {
    const std::size_t at = static_cast<std::size_t>(t * shape_.kv_width()) + static_cast<std::size_t>(head.kv_head) * d;
    Rotate(rows.rope, t, shape_.head_dim, k_rows_.data() + at, 1.0f, scratch.k.data());
    RoundExact(shape_.exact_bytes, scratch.k);
    RoundExact(shape_.exact_bytes, {v_rows_.data() + at, d});
    head.store.Append(scratch.k.data(), v_rows_.data() + at);
  }
  OnAppended(head, first_slot);
}

void CacheAttention::PrepareQueries(Head& head, const AttentionRows& rows, int begin, int n, Scratch& scratch) {
  const int group = shape_.group();
  const int d = shape_.head_dim;
  const float scale = 1.0f / std::sqrt(static_cast<float>(d));
  scratch.q.resize(static_cast<std::size_t>(n * group * d));
  for (int t = 0; t < n; ++t) {
    for (int j = 0; j < group; ++j) {
      const float* q = rows.q + (begin + t) * rows.stride + (head.kv_head * group + j) * d;
      Rotate(rows.rope, begin + t, d, q, scale, scratch.q.data() + static_cast<std::ptrdiff_t>(t * group + j) * d);
    }
  }
  MapQueries(head, n, scratch.q.data());
}

// The n tokens whose queries are prepared attend to the first first_visible, first_visible + 1, .. slots. out is the
// first token's row of the whole output.
void CacheAttention::AttendTokens(Head& head, int n, int first_visible, Scratch& scratch, float* out) {
  const int group = shape_.group();
  const int d = shape_.head_dim;
  const int tile = std::max(1, kTileRows / group);
  std::vector<float> tile_out(static_cast<std::size_t>(tile * group * d));
  for (int begin = 0; begin < n; begin += tile) {
    const int n_tile = std::min(tile, n - begin);
    scratch.n_visible.clear();
    for (int t = 0; t < n_tile; ++t) {
      scratch.n_visible.insert(scratch.n_visible.end(), static_cast<std::size_t>(group), first_visible + begin + t);
    }
    const int n_rows = n_tile * group;
    const int n_slots = scratch.n_visible.back();
    const std::int64_t stride = (n_slots + HeadStore::kBlock - 1) / HeadStore::kBlock * HeadStore::kBlock;
    if (scratch.p.size() < static_cast<std::size_t>(n_rows * stride)) {
      scratch.p.resize(static_cast<std::size_t>(n_rows * stride));
    }
    head.store.Probabilities(scratch.q.data() + static_cast<std::ptrdiff_t>(begin * group) * d, scratch.n_visible,
                             scratch.p.data(), stride);
    MapProbabilities(head, scratch.n_visible, scratch.p.data(), stride);
    head.store.WeightedValues(scratch.p.data(), stride, n_rows, n_slots, tile_out.data());
    for (int r = 0; r < n_rows; ++r) {
      std::copy_n(tile_out.data() + static_cast<std::ptrdiff_t>(r) * d, d,
                  out + static_cast<std::ptrdiff_t>(begin + r / group) * shape_.n_heads * d +
                      (head.kv_head * group + r % group) * d);
    }
    OnAttended(head, n_rows, scratch.p.data(), stride, n_slots);
  }
}

void CacheAttention::Attend(int layer, const AttentionRows& rows, ThreadPool& threads, float* out) {
  ZEROC_CHECK(rows.n_tokens == n_new_ && layer >= 0 && layer < shape_.n_layers, rows.n_tokens, n_new_, layer);
  const std::ptrdiff_t width = shape_.kv_width();
  k_rows_.resize(static_cast<std::size_t>(n_new_ * width));
  v_rows_.resize(k_rows_.size());
  for (int t = 0; t < n_new_; ++t) {
    std::copy_n(rows.k + t * rows.stride, width, k_rows_.data() + t * width);
    std::copy_n(rows.v + t * rows.stride, width, v_rows_.data() + t * width);
  }
  MapRows(layer, n_new_, k_rows_.data(), v_rows_.data());
  scratch_.resize(static_cast<std::size_t>(threads.size()));
  threads.ParallelFor(static_cast<std::size_t>(shape_.n_kv_heads), [&](std::size_t g, int thread_idx) {
    Head& head = heads_[static_cast<std::size_t>(layer * shape_.n_kv_heads) + g];
    Scratch& scratch = scratch_[static_cast<std::size_t>(thread_idx)];
    const int step = in_prompt_ ? n_new_ : 1;
    for (int begin = 0; begin < n_new_; begin += step) {
      AppendRows(head, rows, begin, step, scratch);
      PrepareQueries(head, rows, begin, step, scratch);
      AttendTokens(head, step, head.store.size() - step + 1, scratch,
                   out + static_cast<std::ptrdiff_t>(begin) * shape_.n_heads * shape_.head_dim);
    }
  });
}

}  // namespace zeroc
