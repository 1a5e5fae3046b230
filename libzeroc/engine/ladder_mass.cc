#include "libzeroc/engine/ladder_mass.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "kernels/reference/reference.h"
#include "kernels/tile_codec.h"
#include "libzeroc/base/check.h"
#include "libzeroc/compression/mass.h"
#include "libzeroc/kv/owned_pool.h"

namespace zeroc {
namespace {

constexpr int kChunk = 512;  // tokens per forward step

float Dot(const float* a, const float* b, int n) {
  float sum = 0;
  for (int i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

}  // namespace

class MassTable::Gatherer : public ForwardObserver {
 public:
  Gatherer(const ModelGeometry& geometry, int context, Window& window)
      : geometry_(geometry), context_(context), window_(window) {
    window_.keys.resize(static_cast<std::size_t>(geometry.n_layers));
    window_.queries.resize(static_cast<std::size_t>(geometry.n_layers));
  }
  bool WantsProjections() const override { return true; }

  void OnProjections(int layer, int first_pos, int n_tokens, const HeadRows& q, const HeadRows& k,
                     const HeadRows& /*v*/) override {
    const auto d = static_cast<std::ptrdiff_t>(geometry_.head_dim);
    const std::ptrdiff_t group = geometry_.n_heads / geometry_.n_kv_heads;
    std::vector<float>& keys = window_.keys[static_cast<std::size_t>(layer)];
    keys.resize(static_cast<std::size_t>(context_ * geometry_.n_kv_heads * d));
    std::vector<float>& queries = window_.queries[static_cast<std::size_t>(layer)];
    for (int t = 0; t < n_tokens; ++t) {
      for (int g = 0; g < geometry_.n_kv_heads; ++g) {
        std::copy_n(k.data + t * k.token_stride + g * k.kv_head_stride, d,
                    keys.begin() + (std::ptrdiff_t{first_pos + t} * geometry_.n_kv_heads + g) * d);
      }
      if (!std::binary_search(window_.positions.begin(), window_.positions.end(), first_pos + t)) continue;
      for (int g = 0; g < geometry_.n_kv_heads; ++g) {
        const float* from = q.data + t * q.token_stride + g * q.kv_head_stride;
        queries.insert(queries.end(), from, from + group * d);
      }
    }
  }

 private:
  const ModelGeometry& geometry_;
  int context_;
  Window& window_;
};

Result<std::unique_ptr<MassTable>> MassTable::Gather(Transformer& plain, const WindowedText& text, std::int32_t bos_id,
                                                     int context, const MassOptions& options) {
  std::unique_ptr<MassTable> table(new MassTable(plain.ops(), GeometryOf(plain.config()), context));
  ZEROC_ASSIGN_OR_RETURN(const auto format, plain.Format("none"));
  ZEROC_ASSIGN_OR_RETURN(const auto pool, OwnedPool::Create(*format, 1, context, kChunk, plain.kv_memory()));
  const std::size_t n_windows = std::min(text.begins.size(), static_cast<std::size_t>(options.windows));
  for (std::size_t w = 0; w < n_windows; ++w) {
    Window& window = table->windows_.emplace_back();
    for (int i = 0; i < options.queries_per_window; ++i) {
      const int position = context / 2 + i * (context - context / 2) / options.queries_per_window;
      if (window.positions.empty() || window.positions.back() != position) window.positions.push_back(position);
    }
    Gatherer gatherer(table->geometry_, context, window);
    std::vector<std::int32_t> input{bos_id};
    // Windows spread over the text, not its first ones.
    const auto begin = text.tokens.begin() + text.begins[w * text.begins.size() / n_windows];
    input.insert(input.end(), begin, begin + context - 1);
    ZEROC_ASSIGN_OR_RETURN(const auto cache, SequenceKv::Create(pool->pool(), format, context, kChunk));
    for (int first = 0; first < context; first += kChunk) {
      const auto n = static_cast<std::size_t>(std::min(kChunk, context - first));
      ForwardSequence sequence;
      sequence.kv = cache.get();
      sequence.tokens = std::span(input).subspan(static_cast<std::size_t>(first), n);
      ZEROC_RETURN_IF_ERROR(plain.Forward({&sequence, 1}, nullptr, &gatherer));
    }
  }
  return table;
}

// The window's full blocks in the profile's coordinates.
struct MassTable::PackedKeys {
  int n_tokens = 0;           // in whole blocks
  std::vector<float> exact;   // [n_kv_heads, n_tokens, head_dim], as the exact blocks hold them
  std::vector<float> packed;  // the same, as the packed blocks hold them
  std::vector<float> halves;  // [n_kv_heads, n_tokens, runs] half range squared, 0 for runs without
};

MassTable::PackedKeys MassTable::Pack(const TierShape& k_shape, const std::vector<float>& k_map,
                                      const std::vector<float>& keys) const {
  const int d = geometry_.head_dim;
  const int n_heads = geometry_.n_kv_heads;
  const kernels::KvRun whole{16, d};
  const std::vector<kernels::KvRun>& runs = k_shape.runs;
  kernels::KvBlockLayout exact_layout, layout;
  ZEROC_CHECK(
      kernels::MakeKvBlockLayout(n_heads, d, kernels::kBlockTokens, &whole, 1, &whole, 1, false, &exact_layout) &&
          kernels::MakeKvBlockLayout(n_heads, d, kernels::kBlockTokens, runs.data(), static_cast<int>(runs.size()),
                                     &whole, 1, true, &layout),
      n_heads, d, runs.size());
  const int n_runs = layout.k.n_runs;
  PackedKeys out;
  out.n_tokens = context_ / kernels::kBlockTokens * kernels::kBlockTokens;
  const auto n_rows = static_cast<std::size_t>(n_heads) * static_cast<std::size_t>(out.n_tokens);
  out.exact.resize(n_rows * static_cast<std::size_t>(d));
  out.packed.resize(out.exact.size());
  out.halves.assign(n_rows * static_cast<std::size_t>(n_runs), 0.0f);
  std::vector<std::uint8_t> exact(static_cast<std::size_t>(exact_layout.block_bytes));
  std::vector<std::uint8_t> packed(static_cast<std::size_t>(layout.block_bytes));
  const std::int64_t stride = std::int64_t{n_heads} * d;
  // Keys are rotated already: no RoPE tables. The values' side of a block does not matter here.
  for (int first = 0; first < out.n_tokens; first += kernels::kBlockTokens) {
    const float* rows = keys.data() + first * stride;
    std::uint8_t* block = exact.data();
    kernels::KernelStatus status = ops_.kv_write({rows,
                                                  rows,
                                                  stride,
                                                  first,
                                                  kernels::kBlockTokens,
                                                  0,
                                                  n_heads,
                                                  {nullptr, nullptr},
                                                  k_map.data(),
                                                  &exact_layout,
                                                  &block});
    ZEROC_CHECK(status == kernels::KernelStatus::kOk, static_cast<int>(status));
    status = ops_.kv_pack({exact.data(), &exact_layout, packed.data(), &layout, 0, n_heads});
    ZEROC_CHECK(status == kernels::KernelStatus::kOk, static_cast<int>(status));
    for (int g = 0; g < n_heads; ++g) {
      const std::uint8_t* exact_head = exact.data() + std::ptrdiff_t{g} * exact_layout.head_bytes;
      const std::uint8_t* packed_head = packed.data() + std::ptrdiff_t{g} * layout.head_bytes;
      for (int t = 0; t < kernels::kBlockTokens; ++t) {
        const std::ptrdiff_t row = std::ptrdiff_t{g} * out.n_tokens + first + t;
        kernels::reference::DecodeKeyRow(exact_layout, exact_head, t, out.exact.data() + row * d);
        kernels::reference::DecodeKeyRow(layout, packed_head, t, out.packed.data() + row * d);
        for (int r = 0; r < n_runs; ++r) {
          if (!kernels::IsQuantised(layout.k.runs[r].bits)) continue;
          const float half = kernels::HalfOf(layout.k, r, packed_head, t);
          out.halves[static_cast<std::size_t>(row * n_runs + r)] = half * half;
        }
      }
    }
  }
  return out;
}

Result<std::vector<float>> MassTable::Fit(const Plan& plan, int layer, const TierShape& k_shape, int sink_tokens,
                                          int recent_tokens) const {
  Profile profile;
  profile.name = "mass";
  profile.sink_tokens = sink_tokens;
  profile.recent_tokens = recent_tokens;
  const TierShape exact{{kernels::KvRun{16, geometry_.head_dim}}};
  profile.layers.assign(static_cast<std::size_t>(geometry_.n_layers), KvShape{k_shape, exact, {}});
  const KeyMaps maps = plan.KeyMapsOf(profile, layer);

  const int d = geometry_.head_dim;
  const int group = geometry_.n_heads / geometry_.n_kv_heads;
  const auto n_runs = static_cast<int>(k_shape.runs.size());
  std::vector<MassFit> fits(static_cast<std::size_t>(geometry_.n_kv_heads), MassFit(n_runs));
  std::vector<float> mapped(static_cast<std::size_t>(d)), seen, packed_scores;
  for (const Window& window : windows_) {
    const PackedKeys keys = Pack(k_shape, maps.b, window.keys[static_cast<std::size_t>(layer)]);
    const std::vector<float>& queries = window.queries[static_cast<std::size_t>(layer)];
    for (std::size_t i = 0; i < window.positions.size(); ++i) {
      const int position = std::min(window.positions[i], keys.n_tokens - 1);
      const int end = PackedBlocksAt(position, recent_tokens) * kernels::kBlockTokens;
      if (end <= sink_tokens) continue;
      for (int h = 0; h < geometry_.n_heads; ++h) {
        const int g = h / group;
        kernels::reference::RotateHead(queries.data() + (static_cast<std::ptrdiff_t>(i) * geometry_.n_heads + h) * d,
                                       nullptr, nullptr, maps.a.data() + std::ptrdiff_t{g} * d * d,
                                       1.0f / std::sqrt(static_cast<float>(d)), d, mapped.data());
        const float* exact_rows = keys.exact.data() + std::ptrdiff_t{g} * keys.n_tokens * d;
        const float* packed_rows = keys.packed.data() + std::ptrdiff_t{g} * keys.n_tokens * d;
        seen.clear();
        packed_scores.clear();
        for (int t = sink_tokens; t < end; ++t) {
          seen.push_back(Dot(mapped.data(), exact_rows + std::ptrdiff_t{t} * d, d));
          packed_scores.push_back(Dot(mapped.data(), packed_rows + std::ptrdiff_t{t} * d, d));
        }
        for (int t = 0; t < sink_tokens; ++t) seen.push_back(Dot(mapped.data(), exact_rows + std::ptrdiff_t{t} * d, d));
        for (int t = end; t <= position; ++t) seen.push_back(Dot(mapped.data(), exact_rows + std::ptrdiff_t{t} * d, d));
        const std::span<const float> features =
            std::span(keys.halves)
                .subspan(static_cast<std::size_t>((std::ptrdiff_t{g} * keys.n_tokens + sink_tokens) * n_runs),
                         packed_scores.size() * static_cast<std::size_t>(n_runs));
        fits[static_cast<std::size_t>(g)].Add({seen, packed_scores, features});
      }
    }
  }
  std::vector<float> mass;
  for (const MassFit& fit : fits) {
    Result<std::vector<float>> theta = fit.Solve();
    if (!theta.ok()) return theta.status().WithContext("layer " + std::to_string(layer));
    mass.insert(mass.end(), theta->begin(), theta->end());
  }
  for (std::size_t i = 0; i < mass.size(); ++i) {  // runs without a scale must have coefficient 0
    const std::size_t column = i % static_cast<std::size_t>(1 + n_runs);
    if (column > 0 && !kernels::IsQuantised(k_shape.runs[column - 1].bits)) mass[i] = 0.0f;
  }
  return mass;
}

}  // namespace zeroc
