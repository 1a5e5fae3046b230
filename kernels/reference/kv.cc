// Queries and keys into the packed coordinates, and the cache write.
#include <algorithm>

#include "kernels/checks.h"
#include "kernels/hadamard.h"
#include "kernels/reference/reference.h"
#include "kernels/tile_codec.h"

namespace zeroc::kernels::reference {

void RotateHead(const float* x, const float* cos, const float* sin, const float* map, float scale, int head_dim,
                float* out) {
  float turned[kMaxHeadDim];
  std::copy_n(x, head_dim, turned);
  const int half = head_dim / 2;
  for (int i = 0; cos != nullptr && i < half; ++i) {
    turned[i] = x[i] * cos[i] - x[i + half] * sin[i];
    turned[i + half] = x[i + half] * cos[i] + x[i] * sin[i];
  }
  for (int j = 0; j < head_dim; ++j) out[j] = map == nullptr ? scale * turned[j] : 0.0f;
  if (map == nullptr) return;
  for (int i = 0; i < head_dim; ++i) {
    for (int j = 0; j < head_dim; ++j) out[j] += map[i * head_dim + j] * turned[i];
  }
  for (int j = 0; j < head_dim; ++j) out[j] *= scale;
}

KernelStatus QueryPrep(const QueryPrepArgs& args) {
  if (!IsGood(args)) return KernelStatus::kBadShape;
  const std::int64_t d = args.head_dim;
  const std::int64_t group = args.n_heads / args.n_kv_heads;
  for (std::int64_t g = args.kv_head_begin; g < args.kv_head_end; ++g) {
    const float* map = args.q_map == nullptr ? nullptr : args.q_map + g * d * d;
    for (std::int64_t t = 0; t < args.n_tokens; ++t) {
      const float* cos = args.rope.cos == nullptr ? nullptr : args.rope.cos + t * (d / 2);
      const float* sin = args.rope.sin == nullptr ? nullptr : args.rope.sin + t * (d / 2);
      for (std::int64_t j = 0; j < group; ++j) {
        float* out = args.out + ((g * args.n_tokens + t) * group + j) * d;
        RotateHead(args.q + t * args.q_stride + (g * group + j) * d, cos, sin, map, args.scale, args.head_dim, out);
        HadamardRuns(out, args.rotation);
      }
    }
  }
  return KernelStatus::kOk;
}

KernelStatus KvWrite(const KvWriteArgs& args) {
  if (!IsGood(args)) return KernelStatus::kBadShape;
  const KvBlockLayout& layout = *args.layout;
  const std::int64_t d = layout.head_dim;
  const int k_bits = layout.k.runs[0].bits;
  const int v_bits = layout.v.runs[0].bits;
  float key[kMaxHeadDim];
  for (std::int64_t t = 0; t < args.n_tokens; ++t) {
    const std::int64_t pos = args.first_pos + t;
    const auto row = static_cast<int>(pos % kBlockTokens);
    std::uint8_t* block = args.blocks[pos / kBlockTokens - args.first_pos / kBlockTokens];
    const float* cos = args.rope.cos == nullptr ? nullptr : args.rope.cos + t * (d / 2);
    const float* sin = args.rope.sin == nullptr ? nullptr : args.rope.sin + t * (d / 2);
    for (std::int64_t g = args.kv_head_begin; g < args.kv_head_end; ++g) {
      std::uint8_t* head = block + g * layout.head_bytes;
      const float* map = args.k_map == nullptr ? nullptr : args.k_map + g * d * d;
      const float* value = args.v + t * args.kv_stride + g * d;
      RotateHead(args.k + t * args.kv_stride + g * d, cos, sin, map, 1.0f, layout.head_dim, key);
      HadamardRuns(key, args.rotation);
      for (int i = 0; i < layout.head_dim; ++i) {
        SetExact(head + KTileOffset(layout, 0, row, i), k_bits, row % kTileLanes, i % kTileDepth, key[i]);
        SetExact(head + VTileOffset(layout, 0, row, i), v_bits, i % kTileLanes, row % kTileDepth, value[i]);
      }
    }
  }
  return KernelStatus::kOk;
}

}  // namespace zeroc::kernels::reference
