#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/checks.h"
#include "kernels/hadamard.h"
#include "kernels/reference/reference.h"
#include "kernels/scale_search.h"
#include "kernels/tile_codec.h"

namespace zeroc::kernels::reference {
namespace {

struct Choice {
  std::uint8_t scale_code = 0;
  std::int8_t center_code = 0;
};

// Smallest scale code whose range around `mid` reaches both ends and whose centre is representable.
int CoveringCode(float lo, float hi) {
  const float mid = 0.5f * (lo + hi);
  // A rounded centre is off by up to half / 128, hence the factor on the radius.
  const float half = std::max(0.5f * (hi - lo) * (128.0f / 127.0f), std::abs(mid) * (kCenterSteps / 127.0f));
  const auto covers = [half](float table) { return table >= half; };
  return static_cast<int>(std::min<std::ptrdiff_t>(
      std::find_if(kHalfOfScaleCode.begin(), kHalfOfScaleCode.end(), covers) - kHalfOfScaleCode.begin(), 255));
}

std::int8_t CenterCode(float center, float half) {
  const float code = std::nearbyint(center * (static_cast<float>(kCenterSteps) / half));
  return static_cast<std::int8_t>(std::max(-128.0f, std::min(127.0f, code)));
}

std::uint32_t Quantise(float x, const KvScale& scale, int bits) {
  if (scale.step == 0.0f) return 0;
  const auto top = static_cast<float>((1 << bits) - 1);
  const float code = std::nearbyint((x - scale.base) * (1.0f / scale.step));
  return static_cast<std::uint32_t>(std::max(0.0f, std::min(top, code)));
}

float SquaredError(const float* x, int width, const KvScale& scale, int bits) {
  float sum = 0.0f;
  for (int i = 0; i < width; ++i) {
    const float back = scale.base + scale.step * static_cast<float>(Quantise(x[i], scale, bits));
    sum += (x[i] - back) * (x[i] - back);
  }
  return sum;
}

Choice ChooseScale(const float* x, int width, int bits) {
  float lo = x[0], hi = x[0], sum = 0.0f;
  for (int i = 0; i < width; ++i) {
    lo = std::min(lo, x[i]);
    hi = std::max(hi, x[i]);
    sum += x[i];
  }
  const float centers[2] = {0.5f * (lo + hi), sum / static_cast<float>(width)};
  const int cover = CoveringCode(lo, hi);
  Choice best;
  if (cover == 0) return best;  // all zero
  float best_error = std::numeric_limits<float>::infinity();
  for (int j = 0; j < ScaleCandidates(bits) && cover - j >= 1; ++j) {
    const auto scale_code = static_cast<std::uint8_t>(cover - j);
    for (int c = 0; c < (TriesMean(bits) ? 2 : 1); ++c) {
      const std::int8_t center_code = CenterCode(centers[c], kHalfOfScaleCode[scale_code]);
      const float error = SquaredError(x, width, DecodeScale(bits, scale_code, center_code), bits);
      if (error < best_error) {
        best_error = error;
        best = {scale_code, center_code};
      }
    }
  }
  return best;
}

void PackRun(const KvBlockLayout& layout, bool is_value, int r, int token, float* x, std::uint8_t* head) {
  const KvSideLayout& side = is_value ? layout.v : layout.k;
  const KvRun& run = side.runs[r];
  if (is_value && layout.rotate_v && IsQuantised(run.bits)) HadamardRun(x, run.width);
  KvScale scale = {};
  if (IsQuantised(run.bits)) {
    const Choice choice = ChooseScale(x, run.width, run.bits);
    std::uint8_t* meta = head + side.meta_offset[r];
    meta[token] = choice.scale_code;
    meta[layout.n_tokens + token] = static_cast<std::uint8_t>(choice.center_code);
    scale = DecodeScale(run.bits, choice.scale_code, choice.center_code);
  }
  for (int i = 0; i < run.width && run.bits > 0; ++i) {
    std::uint8_t* tile = head + (is_value ? VTileOffset(layout, r, token, i) : KTileOffset(layout, r, token, i));
    const int lane = (is_value ? i : token) % kTileLanes;
    const int depth = (is_value ? token : i) % kTileDepth;
    if (IsQuantised(run.bits)) {
      SetCode(tile, run.bits, lane, depth, Quantise(x[i], scale, run.bits));
    } else {
      SetExact(tile, run.bits, lane, depth, x[i]);
    }
  }
}

}  // namespace

KernelStatus KvPack(const KvPackArgs& args) {
  if (!IsGood(args)) return KernelStatus::kBadShape;
  const KvBlockLayout& from = *args.exact_layout;
  const KvBlockLayout& to = *args.packed_layout;
  float row[kMaxHeadDim];
  for (int g = args.kv_head_begin; g < args.kv_head_end; ++g) {
    const std::uint8_t* exact = args.exact + std::int64_t{g} * from.head_bytes;
    std::uint8_t* head = args.packed + std::int64_t{g} * to.head_bytes;
    for (int token = 0; token < to.n_tokens; ++token) {
      DecodeKeyRow(from, exact, token, row);
      for (int r = 0; r < to.k.n_runs; ++r) PackRun(to, false, r, token, row + to.k.first_coord[r], head);
      DecodeValueRow(from, exact, token, row);
      for (int r = 0; r < to.v.n_runs; ++r) PackRun(to, true, r, token, row + to.v.first_coord[r], head);
    }
  }
  return KernelStatus::kOk;
}

}  // namespace zeroc::kernels::reference
