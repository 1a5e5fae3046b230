#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

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
  const auto top = static_cast<float>((1 << bits) - 1);
  const float inverse = 1.0f / scale.step;
  float sum = 0.0f;
  for (int i = 0; i < width; ++i) {
    const float y = (x[i] - scale.base) * inverse;
    const float error = y - std::max(std::min(std::nearbyint(y), top), 0.0f);
    sum += error * error;
  }
  return sum * (scale.step * scale.step);
}

// The same for a shared scale: by the magnitudes, since codes are symmetric.
float SharedError(const float* x, int width, float half, int bits) {
  const float step = half * (2.0f / static_cast<float>((1 << bits) - 1));
  const float inverse = 1.0f / step;
  const auto last = static_cast<float>((1 << (bits - 1)) - 1);
  float sum = 0.0f;
  for (int i = 0; i < width; ++i) {
    const float y = std::abs(x[i]) * inverse;
    const float error = (y - 0.5f) - std::min(std::floor(y), last);
    sum += error * error;
  }
  return sum * (step * step);
}

// What one pass over a token's run gives.
struct Moments {
  float lo, hi, sum = 0.0f, squares = 0.0f, magnitudes = 0.0f;

  Moments(const float* x, int width) : lo(x[0]), hi(x[0]) {
    for (int i = 0; i < width; ++i) {
      lo = std::min(lo, x[i]);
      hi = std::max(hi, x[i]);
      sum += x[i];
      squares += x[i] * x[i];
      magnitudes += std::abs(x[i]);
    }
  }
  float Peak() const { return std::max(hi, -lo); }
};

// Smallest code whose half range is at least `half`.
int CoveringCode(float half) {
  const auto found =
      std::find_if(kHalfOfScaleCode.begin(), kHalfOfScaleCode.end(), [half](float table) { return table >= half; });
  return static_cast<int>(std::min<std::ptrdiff_t>(found - kHalfOfScaleCode.begin(), kMaxScaleCode));
}

Choice ChooseAffine(const float* x, int width, int bits) {
  const Moments moments(x, width);
  if (moments.Peak() == 0.0f) return {};
  const float mid = 0.5f * (moments.lo + moments.hi);
  const float mean = moments.sum / static_cast<float>(width);
  const float centers[] = {mid, mean, 0.5f * (mid + mean)};  // in the order of ScaleCenter
  const float mid_reach = std::abs(mid) * (kCenterSteps / 127.0f);
  const float radius = 0.5f * (moments.hi - moments.lo) * (128.0f / 127.0f);
  const float variance = std::max(moments.squares / static_cast<float>(width) - mean * mean, 0.0f);
  const float spread =
      std::min(std::max(moments.hi - mean, mean - moments.lo), BestHalfOverDeviation(bits) * std::sqrt(variance));
  const float mean_reach = std::abs(mean) * (kCenterSteps / 127.0f);
  const int starts[] = {CoveringCode(std::max(radius, mid_reach)),
                        NearestScaleCode(std::max(spread, std::max(mid_reach, mean_reach)))};
  Choice best;
  float best_error = std::numeric_limits<float>::infinity();
  for (const AffineCandidate& candidate : AffineCandidates(bits)) {
    const int code = std::clamp(starts[static_cast<int>(candidate.start)] + candidate.shift, 1, kMaxScaleCode);
    const auto scale_code = static_cast<std::uint8_t>(code);
    const std::int8_t center_code =
        CenterCode(centers[static_cast<int>(candidate.center)], kHalfOfScaleCode[scale_code]);
    const float error = SquaredError(x, width, DecodeScale(bits, scale_code, center_code), bits);
    if (error < best_error || best.scale_code == 0) {
      best_error = error;
      best = {scale_code, center_code};
    }
  }
  return best;
}

// The best of n even codes from the one nearest to the peak downwards.
int BestBelowPeak(const float* x, const KvRun& run, float peak, int n) {
  int best = 0;
  float best_error = 0.0f;
  for (int c = 0; c < n; ++c) {
    const int code = EvenCode(NearestEvenStep(peak) - c);
    const float error = SharedError(x, run.width, kHalfOfScaleCode[static_cast<std::size_t>(code)], run.bits);
    if (c > 0 && !(error < best_error)) continue;
    best_error = error;
    best = code;
  }
  return best;
}

// One step of Lloyd's iteration for two bits.
float LloydStep(const float* x, int width, float fit) {
  const float step = fit * (2.0f / 3.0f);
  float products = 0.0f, squares = 0.0f;
  for (int i = 0; i < width; ++i) {
    const float level = std::abs(x[i]) >= step ? 1.5f : 0.5f;
    products += std::abs(x[i]) * level;
    squares += level * level;
  }
  return 1.5f * (products / squares);
}

// The even code that the rule gives one token of a shared run.
int ChooseSharedCode(const float* x, const KvRun& run) {
  const Moments moments(x, run.width);
  const float peak = moments.Peak();
  const auto n = static_cast<float>(run.width);
  if (peak == 0.0f) return 0;
  if (run.bits == 8) return EvenCode(CoveringEvenStep(peak));
  if (run.bits == 4) return BestBelowPeak(x, run, peak, kSharedCandidates4);
  if (run.bits == 3) return BestBelowPeak(x, run, peak, kSharedCandidates3);
  if (run.bits == 1) return EvenCode(NearestEvenStep(moments.magnitudes / n));
  const float fit = std::max(std::min(peak, BestHalfOverDeviation(2) * std::sqrt(moments.squares / n)), kSmallestFit);
  return EvenCode(NearestEvenStep(std::min(LloydStep(x, run.width, fit), peak)));
}

// rows: [n_tokens][kMaxHeadDim], the run's first coordinate first.
void ChooseSharedScales(const float* rows, const KvRun& run, int n_tokens, std::uint8_t* base_code,
                        std::uint8_t* meta) {
  int codes[kBlockTokens];
  for (int t = 0; t < n_tokens; ++t) codes[t] = ChooseSharedCode(rows + t * kMaxHeadDim, run);
  const int base = SharedBaseCode(*std::max_element(codes, codes + n_tokens));
  *base_code = static_cast<std::uint8_t>(base);
  for (int t = 0; t < n_tokens; ++t) SetNibble(meta, t, static_cast<std::uint32_t>(NibbleOf(codes[t], base)));
}

// rows: [n_tokens][kMaxHeadDim], the run's first coordinate first; V runs come rotated.
void ChooseScales(const KvBlockLayout& layout, const KvSideLayout& side, int r, const float* rows, std::uint8_t* head) {
  const KvRun& run = side.runs[r];
  std::uint8_t* meta = head + side.meta_offset[r];
  if (run.scale == KvScaleKind::kShared) {
    return ChooseSharedScales(rows, run, layout.n_tokens, head + side.base_offset[r], meta);
  }
  for (int t = 0; t < layout.n_tokens; ++t) {
    const Choice choice = ChooseAffine(rows + t * kMaxHeadDim, run.width, run.bits);
    meta[t] = choice.scale_code;
    meta[layout.n_tokens + t] = static_cast<std::uint8_t>(choice.center_code);
  }
}

void PackRun(const KvBlockLayout& layout, bool is_value, int r, float* rows, std::uint8_t* head) {
  const KvSideLayout& side = is_value ? layout.v : layout.k;
  const KvRun& run = side.runs[r];
  if (is_value && layout.rotate_v && IsQuantised(run.bits)) {
    for (int t = 0; t < layout.n_tokens; ++t) HadamardRun(rows + t * kMaxHeadDim, run.width);
  }
  if (IsQuantised(run.bits)) ChooseScales(layout, side, r, rows, head);
  for (int t = 0; t < layout.n_tokens && run.bits > 0; ++t) {
    const float* x = rows + t * kMaxHeadDim;
    const KvScale scale = IsQuantised(run.bits) ? ScaleOf(side, r, head, layout.n_tokens, t) : KvScale{};
    for (int i = 0; i < run.width; ++i) {
      std::uint8_t* tile = head + (is_value ? VTileOffset(layout, r, t, i) : KTileOffset(layout, r, t, i));
      const int lane = (is_value ? i : t) % kTileLanes;
      const int depth = (is_value ? t : i) % kTileDepth;
      if (IsQuantised(run.bits)) {
        SetCode(tile, run.bits, lane, depth, Quantise(x[i], scale, run.bits));
      } else {
        SetExact(tile, run.bits, lane, depth, x[i]);
      }
    }
  }
}

}  // namespace

KernelStatus KvPack(const KvPackArgs& args) {
  if (!IsGood(args)) return KernelStatus::kBadShape;
  if (*args.source_layout == *args.packed_layout) return CopyHeads(args);
  const KvBlockLayout& from = *args.source_layout;
  const KvBlockLayout& to = *args.packed_layout;
  std::vector<float> rows(static_cast<std::size_t>(kBlockTokens * kMaxHeadDim));
  for (int g = args.kv_head_begin; g < args.kv_head_end; ++g) {
    const std::uint8_t* source = args.source + std::int64_t{g} * from.head_bytes;
    std::uint8_t* head = args.packed + std::int64_t{g} * to.head_bytes;
    for (const bool is_value : {false, true}) {
      const auto decode = is_value ? DecodeValueRow : DecodeKeyRow;
      for (int t = 0; t < to.n_tokens; ++t) decode(from, source, t, rows.data() + t * kMaxHeadDim);
      const KvSideLayout& side = is_value ? to.v : to.k;
      for (int r = 0; r < side.n_runs; ++r) PackRun(to, is_value, r, rows.data() + side.first_coord[r], head);
    }
  }
  return KernelStatus::kOk;
}

}  // namespace zeroc::kernels::reference
