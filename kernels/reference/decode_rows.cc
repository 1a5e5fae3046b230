#include "kernels/hadamard.h"
#include "kernels/reference/reference.h"
#include "kernels/tile_codec.h"

namespace zeroc::kernels::reference {

void DecodeKeyRow(const KvBlockLayout& layout, const std::uint8_t* head, int token, float* out) {
  for (int r = 0; r < layout.k.n_runs; ++r) {
    const KvRun& run = layout.k.runs[r];
    float* x = out + layout.k.first_coord[r];
    const KvScale scale = IsQuantised(run.bits) ? ScaleOf(layout.k, r, head, layout.n_tokens, token) : KvScale{};
    for (int i = 0; i < run.width; ++i) {
      const std::uint8_t* tile = head + KTileOffset(layout, r, token, i);
      const int lane = token % kTileLanes;
      const int depth = i % kTileDepth;
      if (run.bits == 0) {
        x[i] = 0.0f;
      } else if (IsQuantised(run.bits)) {
        x[i] = scale.base + scale.step * static_cast<float>(GetCode(tile, run.bits, lane, depth));
      } else {
        x[i] = GetExact(tile, run.bits, lane, depth);
      }
    }
  }
}

void DecodeValueRow(const KvBlockLayout& layout, const std::uint8_t* head, int token, float* out) {
  for (int r = 0; r < layout.v.n_runs; ++r) {
    const KvRun& run = layout.v.runs[r];
    float* x = out + layout.v.first_coord[r];
    const KvScale scale = IsQuantised(run.bits) ? ScaleOf(layout.v, r, head, layout.n_tokens, token) : KvScale{};
    for (int i = 0; i < run.width; ++i) {
      const std::uint8_t* tile = head + VTileOffset(layout, r, token, i);
      const int lane = i % kTileLanes;
      const int depth = token % kTileDepth;
      if (run.bits == 0) {
        x[i] = 0.0f;
      } else if (IsQuantised(run.bits)) {
        x[i] = scale.base + scale.step * static_cast<float>(GetCode(tile, run.bits, lane, depth));
      } else {
        x[i] = GetExact(tile, run.bits, lane, depth);
      }
    }
    if (layout.rotate_v && IsQuantised(run.bits)) HadamardRun(x, run.width);
  }
}

}  // namespace zeroc::kernels::reference
