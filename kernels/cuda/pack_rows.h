// Quantises 64 rows in shared memory into one side of a head of a packed block: the rule of scale_search.h, a token on
// a thread, so that every sum runs over the coordinates in the reference's order. With the order and single roundings
// (these files are compiled without contraction) the bytes are the reference's.
#pragma once

#include "kernels/cuda/rows_in_shared.h"
#include "kernels/scale_search.h"

namespace zeroc::kernels::cuda {

// Scales of the side's tokens, between choosing and coding.
struct PackScratch {
  float step[kMaxRuns][kRows];
  float base[kMaxRuns][kRows];
  int code[kMaxRuns][kRows];
};

// What one pass over a token's run gives.
struct RunMoments {
  float lo, hi, sum, squares, magnitudes;
  ZEROC_DEVICE float Peak() const { return Max(hi, -lo); }
};

// std::min and std::max of the reference: the first operand where the comparison fails.
ZEROC_DEVICE float Larger(float a, float b) { return a < b ? b : a; }
ZEROC_DEVICE float Smaller(float a, float b) { return b < a ? b : a; }
ZEROC_DEVICE float Magnitude(float x) { return BitsToFloat(FloatToBits(x) & 0x7fffffffu); }

// x: the token's column, kRowStride from coordinate to coordinate.
ZEROC_DEVICE RunMoments MomentsOf(const float* x, int width) {
  RunMoments m = {x[0], x[0], 0.0f, 0.0f, 0.0f};
  for (int i = 0; i < width; ++i) {
    const float value = x[i * kRowStride];
    m.lo = Smaller(m.lo, value);
    m.hi = Larger(m.hi, value);
    m.sum += value;
    m.squares += value * value;
    m.magnitudes += Magnitude(value);
  }
  return m;
}

// Smallest code whose half range is at least `half`; by bisection, the table ascends.
ZEROC_DEVICE int CoveringCode(float half) {
  int below = -1, covers = kMaxScaleCode;
  while (covers - below > 1) {
    const int middle = (below + covers) / 2;
    if (HalfOfScaleCode(middle) >= half) {
      covers = middle;
    } else {
      below = middle;
    }
  }
  return covers;
}

ZEROC_DEVICE int CenterCodeFor(float center, float half) {
  const float code = Round(center * (static_cast<float>(kCenterSteps) / half));
  return RoundToInt(Larger(-128.0f, Smaller(127.0f, code)));
}

ZEROC_DEVICE float SquaredError(const float* x, int width, const TokenScale& scale, int bits) {
  const float top = static_cast<float>((1 << bits) - 1);
  const float inverse = 1.0f / scale.step;
  float sum = 0.0f;
  for (int i = 0; i < width; ++i) {
    const float y = (x[i * kRowStride] - scale.base) * inverse;
    const float error = y - Larger(Smaller(Round(y), top), 0.0f);
    sum += error * error;
  }
  return sum * (scale.step * scale.step);
}

// The same for a shared scale: by the magnitudes, since codes are symmetric.
ZEROC_DEVICE float SharedError(const float* x, int width, float half, int bits) {
  const float step = half * (2.0f / static_cast<float>((1 << bits) - 1));
  const float inverse = 1.0f / step;
  const float last = static_cast<float>((1 << (bits - 1)) - 1);
  float sum = 0.0f;
  for (int i = 0; i < width; ++i) {
    const float y = Magnitude(x[i * kRowStride]) * inverse;
    const float error = (y - 0.5f) - Smaller(floorf(y), last);
    sum += error * error;
  }
  return sum * (step * step);
}

struct AffineChoice {
  int scale_code, center_code;
};

ZEROC_DEVICE AffineCandidate CandidateOf(int bits, int i) {
  // The arrays of scale_search.h live on the host; a copy each in the kernel's constants.
  constexpr AffineCandidate k8[] = {kAffine8[0], kAffine8[1]}, k4[] = {kAffine4[0], kAffine4[1]};
  constexpr AffineCandidate k3[] = {kAffine3[0], kAffine3[1]}, k2[] = {kAffine2[0], kAffine2[1], kAffine2[2]};
  constexpr AffineCandidate k1[] = {kAffine1[0], kAffine1[1]};
  return bits == 8 ? k8[i] : bits == 4 ? k4[i] : bits == 3 ? k3[i] : bits == 2 ? k2[i] : k1[i];
}
ZEROC_DEVICE int CandidateCount(int bits) { return bits == 2 ? 3 : 2; }

ZEROC_DEVICE AffineChoice ChooseAffine(const float* x, int width, int bits) {
  const RunMoments m = MomentsOf(x, width);
  if (m.Peak() == 0.0f) return {0, 0};
  const float mid = 0.5f * (m.lo + m.hi);
  const float mean = m.sum / static_cast<float>(width);
  const float between = 0.5f * (mid + mean);
  const float mid_reach = Magnitude(mid) * (kCenterSteps / 127.0f);
  const float radius = 0.5f * (m.hi - m.lo) * (128.0f / 127.0f);
  const float variance = Larger(m.squares / static_cast<float>(width) - mean * mean, 0.0f);
  const float spread = Smaller(Larger(m.hi - mean, mean - m.lo), BestHalfOverDeviation(bits) * Sqrt(variance));
  const float mean_reach = Magnitude(mean) * (kCenterSteps / 127.0f);
  const int cover = CoveringCode(Larger(radius, mid_reach));
  const int fit = NearestScaleCode(Larger(spread, Larger(mid_reach, mean_reach)));
  AffineChoice best = {0, 0};
  float best_error = kInfinity;
  for (int i = 0; i < CandidateCount(bits); ++i) {
    const AffineCandidate candidate = CandidateOf(bits, i);
    const int start = candidate.start == ScaleStart::kCover ? cover : fit;
    const int scale_code = Min(Max(start + candidate.shift, 1), kMaxScaleCode);
    const float center = candidate.center == ScaleCenter::kMid    ? mid
                         : candidate.center == ScaleCenter::kMean ? mean
                                                                  : between;
    const int center_code = CenterCodeFor(center, HalfOfScaleCode(scale_code));
    const float error = SquaredError(x, width, DecodeTokenScale(bits, scale_code, center_code), bits);
    if (error < best_error || best.scale_code == 0) {
      best_error = error;
      best = {scale_code, center_code};
    }
  }
  return best;
}

// The best of n even codes from the one nearest to the peak downwards.
ZEROC_DEVICE int BestBelowPeak(const float* x, int width, int bits, float peak, int n) {
  int best = 0;
  float best_error = 0.0f;
  for (int c = 0; c < n; ++c) {
    const int code = EvenCode(NearestEvenStep(peak) - c);
    const float error = SharedError(x, width, HalfOfScaleCode(code), bits);
    if (c > 0 && !(error < best_error)) continue;
    best_error = error;
    best = code;
  }
  return best;
}

// One step of Lloyd's iteration for two bits.
ZEROC_DEVICE float LloydStep(const float* x, int width, float fit) {
  const float step = fit * (2.0f / 3.0f);
  float products = 0.0f, squares = 0.0f;
  for (int i = 0; i < width; ++i) {
    const float size = Magnitude(x[i * kRowStride]);
    const float level = size >= step ? 1.5f : 0.5f;
    products += size * level;
    squares += level * level;
  }
  return 1.5f * (products / squares);
}

// The even code that the rule gives one token of a shared run.
ZEROC_DEVICE int ChooseSharedCode(const float* x, int width, int bits) {
  const RunMoments m = MomentsOf(x, width);
  const float peak = m.Peak(), n = static_cast<float>(width);
  if (peak == 0.0f) return 0;
  if (bits == 8) return EvenCode(CoveringEvenStep(peak));
  if (bits == 4) return BestBelowPeak(x, width, bits, peak, kSharedCandidates4);
  if (bits == 3) return BestBelowPeak(x, width, bits, peak, kSharedCandidates3);
  if (bits == 1) return EvenCode(NearestEvenStep(m.magnitudes / n));
  const float fit = Larger(Smaller(peak, BestHalfOverDeviation(2) * Sqrt(m.squares / n)), kSmallestFit);
  return EvenCode(NearestEvenStep(Smaller(LloydStep(x, width, fit), peak)));
}

// Scales of all quantised runs into the head's meta and into scratch.
ZEROC_DEVICE void ChooseScales(const KvSideLayout& side, int n_tokens, const float* x, std::uint8_t* head,
                               PackScratch* scratch) {
  for (int i = ThreadIdx(); i < side.n_runs * n_tokens; i += kKvThreads) {
    const int r = i / n_tokens, token = i % n_tokens;
    const KvRun& run = side.runs[r];
    const float* column = x + side.first_coord[r] * kRowStride + token;
    if (!IsQuantised(run.bits)) continue;
    if (run.scale == KvScaleKind::kShared) {
      scratch->code[r][token] = ChooseSharedCode(column, run.width, run.bits);
      continue;
    }
    const AffineChoice choice = ChooseAffine(column, run.width, run.bits);
    std::uint8_t* meta = head + side.meta_offset[r];
    meta[token] = static_cast<std::uint8_t>(choice.scale_code);
    meta[n_tokens + token] = static_cast<std::uint8_t>(choice.center_code);
    const TokenScale scale = DecodeTokenScale(run.bits, choice.scale_code, choice.center_code);
    scratch->step[r][token] = scale.step;
    scratch->base[r][token] = scale.base;
  }
  Sync();
  // Shared scales: a base for the block, then two tokens of a byte on each thread.
  for (int i = ThreadIdx(); i < side.n_runs * n_tokens / 2; i += kKvThreads) {
    const int r = i / (n_tokens / 2), byte = i % (n_tokens / 2);
    const KvRun& run = side.runs[r];
    if (!IsQuantised(run.bits) || run.scale != KvScaleKind::kShared) continue;
    int largest = 0;
    for (int token = 0; token < n_tokens; ++token) largest = Max(largest, scratch->code[r][token]);
    const int base_code = SharedBaseCode(largest);
    int nibbles = 0;
    for (int high = 0; high < 2; ++high) {
      const int token = 16 * (byte / 8) + byte % 8 + 8 * high;
      const int nibble = NibbleOf(scratch->code[r][token], base_code);
      const TokenScale scale = DecodeTokenScale(run.bits, SharedCodeOf(base_code, nibble), 0);
      scratch->step[r][token] = scale.step;
      scratch->base[r][token] = scale.base;
      nibbles |= nibble << 4 * high;
    }
    head[side.meta_offset[r] + byte] = static_cast<std::uint8_t>(nibbles);
    if (byte == 0) head[side.base_offset[r]] = static_cast<std::uint8_t>(base_code);
  }
  Sync();
}

ZEROC_DEVICE std::uint32_t Quantise(float x, float step, float base, int bits) {
  if (step == 0.0f) return 0;
  const float top = static_cast<float>((1 << bits) - 1);
  const float code = Round((x - base) * (1.0f / step));
  return static_cast<std::uint32_t>(Larger(0.0f, Smaller(top, code)));
}

// Codes of one run. A unit is a lane of a tile: it owns the lane's words, or for the one-bit plane those of two lanes.
template <bool kIsValue>
ZEROC_DEVICE void CodeRun(const KvSideLayout& side, int r, int n_tokens, const float* x, const PackScratch& scratch,
                          std::uint8_t* head) {
  const int bits = side.runs[r].bits, n_coord_tiles = side.runs[r].width / 16, n_groups = n_tokens / 16;
  const float* run = x + side.first_coord[r] * kRowStride;
  for (int i = ThreadIdx(); i < n_coord_tiles * n_groups * 16; i += kKvThreads) {
    const int tile = i / 16, lane = i % 16;
    const int coord_tile = kIsValue ? tile / n_groups : tile % n_coord_tiles;
    const int group = kIsValue ? tile % n_groups : tile / n_coord_tiles;
    std::uint8_t* to = head + side.codes_offset[r] + tile * TileBytes(bits);
    const auto at = [&](int of_lane, int depth) {
      const int token = 16 * group + (kIsValue ? depth : of_lane),
                coord = 16 * coord_tile + (kIsValue ? of_lane : depth);
      return run[coord * kRowStride + token];
    };
    const auto code = [&](int of_lane, int depth) {
      const int token = 16 * group + (kIsValue ? depth : of_lane);
      return Quantise(at(of_lane, depth), scratch.step[r][token], scratch.base[r][token], bits);
    };
    if (bits == 16) {
      for (int p = 0; p < 8; ++p) StoreWord(to + 64 * p + 4 * lane, PackBf16(at(lane, 2 * p), at(lane, 2 * p + 1)));
      continue;
    }
    // Words of the 8-, 4- and 2-bit planes: depth 4 s + j in byte j.
    const int plane_bits = bits == 3 ? 2 : bits;
    const int per_word = 8 / plane_bits;  // steps s in one word
    for (int first = 0; first < 4 && plane_bits > 1; first += per_word) {
      std::uint32_t word = 0;
      for (int s = first; s < first + per_word; ++s) {
        for (int j = 0; j < 4; ++j) {
          const std::uint32_t low = code(lane, 4 * s + j) & ((1u << plane_bits) - 1u);
          word |= low << (8 * j + plane_bits * (s - first));
        }
      }
      StoreWord(to + 64 * (first / per_word) + 4 * lane, word);
    }
    if ((bits != 1 && bits != 3) || lane >= 8) continue;
    std::uint32_t word = 0;
    for (int second = 0; second < 2; ++second) {
      for (int depth = 0; depth < 16; ++depth) {
        const std::uint32_t top = code(lane + 8 * second, depth) >> (bits - 1);
        word |= top << (8 * (depth % 4) + 2 * (depth / 4) + second);
      }
    }
    StoreWord(to + (bits == 3 ? 64 : 0) + 4 * lane, word);
  }
}

// x[coordinate][token] into one side of the head; V runs are rotated here, in x.
template <bool kIsValue>
ZEROC_DEVICE void PackRows(const KvBlockLayout& layout, float* x, PackScratch* scratch, std::uint8_t* head) {
  const KvSideLayout& side = kIsValue ? layout.v : layout.k;
  if (kIsValue && layout.rotate_v) HadamardQuantised(x, side);
  ChooseScales(side, layout.n_tokens, x, head, scratch);
  for (int r = 0; r < side.n_runs; ++r) {
    if (side.runs[r].bits > 0) CodeRun<kIsValue>(side, r, layout.n_tokens, x, *scratch, head);
  }
}

}  // namespace zeroc::kernels::cuda
