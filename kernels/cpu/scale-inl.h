// The choice of scales for kv_pack.cc: the rule of scale_search.h with tokens as SIMD lanes, the same codes as the
// reference on every instruction set. A group of 16 tokens is x[coordinate][16].
#include <cstddef>
#include <cstdint>
#include <span>

#if defined(ZEROC_KERNELS_CPU_SCALE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ZEROC_KERNELS_CPU_SCALE_INL_H_
#undef ZEROC_KERNELS_CPU_SCALE_INL_H_
#else
#define ZEROC_KERNELS_CPU_SCALE_INL_H_
#endif

#include "kernels/cpu/simd-inl.h"
#include "kernels/scale_search.h"
#include "kernels/tile_codec.h"

HWY_BEFORE_NAMESPACE();
namespace zeroc::kernels::cpu::HWY_NAMESPACE {

using VI = hn::Vec<DI>;

HWY_INLINE VF Floats(float value) { return hn::Set(DF(), value); }
HWY_INLINE VI Ints(int value) { return hn::Set(DI(), value); }

// How kLanes tokens are quantised: code = (x - base) * inverse, rounded; inverse is 0 for a zero step.
struct Scale {
  VF base, inverse;
};

// LogStep of scale_search.h.
template <int n>
HWY_INLINE VI LogStep(VF x, const float (&bounds)[n]) {
  const VI bits = hn::BitCast(DI(), x);
  const VF fraction = hn::BitCast(DF(), hn::Or(hn::And(bits, Ints(0x7fffff)), Ints(0x3f800000)));
  VI step = hn::Mul(hn::Sub(hn::And(hn::ShiftRight<23>(bits), Ints(0xff)), Ints(127)), Ints(n));
  for (const float bound : bounds) {
    step = hn::Add(step, hn::IfThenElseZero(hn::RebindMask(DI(), hn::Gt(fraction, Floats(bound))), Ints(1)));
  }
  return step;
}

HWY_INLINE VI Clamp(VI x, int low, int high) { return hn::Max(hn::Min(x, Ints(high)), Ints(low)); }

HWY_INLINE VF HalfOfCode(VI code) { return hn::GatherIndex(DF(), kHalfOfScaleCode.data(), code); }

// What one pass over the run gives an affine choice.
struct Moments {
  VF lo, hi, sum, squares;

  HWY_INLINE Moments(const float* x, int width) : lo(hn::LoadU(DF(), x)), hi(lo), sum(hn::Zero(DF())), squares(sum) {
    for (int i = 0; i < width; ++i) {
      const VF value = hn::LoadU(DF(), x + 16 * i);
      lo = hn::Min(lo, value);
      hi = hn::Max(hi, value);
      sum = hn::Add(sum, value);
      squares = hn::Add(squares, hn::Mul(value, value));
    }
  }
  HWY_INLINE VF Peak() const { return hn::Max(hi, hn::Neg(lo)); }
};

HWY_INLINE VF Larger(VF a, VF b) { return hn::Max(a, b); }

// ---- Affine ----

struct AffineChoice {
  VI code, center_code;
  VF base, step, inverse;
};

HWY_INLINE AffineChoice MakeAffine(VI code, VF center, float per_half) {
  AffineChoice choice;
  const VF half = HalfOfCode(code);
  const VF rounded = hn::Round(hn::Mul(center, hn::Div(Floats(kCenterSteps), half)));
  const VF center_code = hn::Max(hn::Min(rounded, Floats(127.0f)), Floats(-128.0f));
  choice.code = code;
  choice.center_code = hn::ConvertTo(DI(), center_code);
  choice.base = hn::Sub(hn::Mul(half, hn::Mul(center_code, Floats(1.0f / kCenterSteps))), half);
  choice.step = hn::Mul(half, Floats(per_half));
  choice.inverse = hn::Div(Floats(1.0f), choice.step);
  return choice;
}

// Squared errors of several candidates in one pass.
template <std::size_t n>
HWY_INLINE void AffineErrors(const float* x, int width, const AffineChoice (&choices)[n], VF top, VF (&errors)[n]) {
  for (VF& error : errors) error = hn::Zero(DF());
  for (int i = 0; i < width; ++i) {
    const VF value = hn::LoadU(DF(), x + 16 * i);
    for (std::size_t c = 0; c < n; ++c) {
      const VF y = hn::Mul(hn::Sub(value, choices[c].base), choices[c].inverse);
      const VF error = hn::Sub(y, hn::Max(hn::Min(hn::Round(y), top), hn::Zero(DF())));
      errors[c] = hn::Add(errors[c], hn::Mul(error, error));
    }
  }
  for (std::size_t c = 0; c < n; ++c) {
    errors[c] = hn::Mul(errors[c], hn::Mul(choices[c].step, choices[c].step));
  }
}

template <std::size_t n>
HWY_INLINE AffineChoice BestAffine(const float* x, int width, int bits, const AffineCandidate (&candidates)[n]) {
  const Moments moments(x, width);
  const VF count = Floats(static_cast<float>(width));
  const VF mid = hn::Mul(Floats(0.5f), hn::Add(moments.lo, moments.hi));
  const VF mean = hn::Div(moments.sum, count);
  const VF centers[] = {mid, mean, hn::Mul(Floats(0.5f), hn::Add(mid, mean))};
  const VF mid_reach = hn::Mul(hn::Abs(mid), Floats(kCenterSteps / 127.0f));
  const VF mean_reach = hn::Mul(hn::Abs(mean), Floats(kCenterSteps / 127.0f));
  const VF radius = hn::Mul(hn::Mul(Floats(0.5f), hn::Sub(moments.hi, moments.lo)), Floats(128.0f / 127.0f));
  const VF variance = Larger(hn::Sub(hn::Div(moments.squares, count), hn::Mul(mean, mean)), hn::Zero(DF()));
  const VF spread = hn::Min(Larger(hn::Sub(moments.hi, mean), hn::Sub(mean, moments.lo)),
                            hn::Mul(Floats(BestHalfOverDeviation(bits)), hn::Sqrt(variance)));
  const VI starts[] = {
      hn::Add(LogStep(Larger(radius, mid_reach), scale_internal::kEighths), Ints(kScaleBias)),
      Clamp(hn::Add(LogStep(Larger(spread, Larger(mid_reach, mean_reach)), scale_internal::kEighthMiddles),
                    Ints(kScaleBias)),
            1, kMaxScaleCode)};
  const auto top = static_cast<float>((1 << bits) - 1);
  AffineChoice choices[n];
  VF errors[n];
  for (std::size_t c = 0; c < n; ++c) {
    const VI start = hn::Min(starts[static_cast<int>(candidates[c].start)], Ints(kMaxScaleCode));
    choices[c] = MakeAffine(Clamp(hn::Add(start, Ints(candidates[c].shift)), 1, kMaxScaleCode),
                            centers[static_cast<int>(candidates[c].center)], 2.0f / top);
  }
  AffineErrors(x, width, choices, Floats(top), errors);
  AffineChoice best = choices[0];
  for (std::size_t c = 1; c < n; ++c) {
    const auto better = hn::Lt(errors[c], errors[0]);
    const auto better_int = hn::RebindMask(DI(), better);
    best.code = hn::IfThenElse(better_int, choices[c].code, best.code);
    best.center_code = hn::IfThenElse(better_int, choices[c].center_code, best.center_code);
    best.base = hn::IfThenElse(better, choices[c].base, best.base);
    best.inverse = hn::IfThenElse(better, choices[c].inverse, best.inverse);
    errors[0] = hn::IfThenElse(better, errors[c], errors[0]);
  }
  const auto empty = hn::Eq(moments.Peak(), hn::Zero(DF()));
  const auto empty_int = hn::RebindMask(DI(), empty);
  best.code = hn::IfThenZeroElse(empty_int, best.code);
  best.center_code = hn::IfThenZeroElse(empty_int, best.center_code);
  best.base = hn::IfThenZeroElse(empty, best.base);
  best.inverse = hn::IfThenZeroElse(empty, best.inverse);
  return best;
}

HWY_INLINE AffineChoice ChooseAffine(const float* x, int width, int bits) {
  if (bits == 8) return BestAffine(x, width, bits, kAffine8);
  if (bits == 4) return BestAffine(x, width, bits, kAffine4);
  if (bits == 3) return BestAffine(x, width, bits, kAffine3);
  if (bits == 2) return BestAffine(x, width, bits, kAffine2);
  return BestAffine(x, width, bits, kAffine1);
}

// x is [group][stride]; scales [n_groups * kParts].
void ChooseAffineScales(const float* x, std::size_t stride, const KvRun& run, int n_groups, std::uint8_t* meta,
                        Scale* scales) {
  const hn::Rebind<std::uint8_t, DF> du8;
  const hn::Rebind<std::int8_t, DF> di8;
  for (int g = 0; g < n_groups; ++g, x += stride) {
    for (std::size_t part = 0; part < kParts; ++part, meta += kLanes, ++scales) {
      const AffineChoice choice = ChooseAffine(x + kLanes * part, run.width, run.bits);
      hn::StoreU(hn::DemoteTo(du8, choice.code), du8, meta);
      hn::StoreU(hn::DemoteTo(di8, choice.center_code), di8, reinterpret_cast<std::int8_t*>(meta) + 16 * n_groups);
      *scales = {choice.base, choice.inverse};
    }
  }
}

// ---- Shared ----

// The half range of an even code given in steps of two from code 160; the floats of kHalfOfScaleCode.
HWY_INLINE VF HalfOfEvenStep(VI step) {
  const VI quarter = hn::And(step, Ints(3));
  VF mantissa = Floats(scale_internal::kQuarters[0]);
  for (int j = 1; j < 4; ++j) {
    const auto is_j = hn::RebindMask(DF(), hn::Eq(quarter, Ints(j)));
    mantissa = hn::IfThenElse(is_j, Floats(scale_internal::kQuarters[j]), mantissa);
  }
  return hn::BitCast(DF(), hn::Add(hn::BitCast(DI(), mantissa), hn::ShiftLeft<23>(hn::ShiftRight<2>(step))));
}

constexpr int kFirstEvenStep = (kSmallestEvenCode - kScaleBias) / kNibbleStep;
constexpr int kLastEvenStep = (kLargestEvenCode - kScaleBias) / kNibbleStep;

HWY_INLINE VI BoundedStep(VI step) { return Clamp(step, kFirstEvenStep, kLastEvenStep); }

// The largest magnitude, and the sum of magnitudes or squares.
struct Magnitudes {
  VF peak, sum;

  HWY_INLINE Magnitudes(const float* x, int width, bool square) : peak(hn::Zero(DF())), sum(peak) {
    for (int i = 0; i < width; ++i) {
      const VF value = hn::Abs(hn::LoadU(DF(), x + 16 * i));
      peak = hn::Max(peak, value);
      sum = hn::Add(sum, square ? hn::Mul(value, value) : value);
    }
  }
};

// The best of n codes from the one nearest to the peak downwards, in steps.
template <int n>
HWY_INLINE VI BestBelowPeak(const float* x, int width, int bits, VF peak) {
  const VI nearest = LogStep(peak, scale_internal::kQuarterMiddles);
  const VF per_half = Floats(2.0f / static_cast<float>((1 << bits) - 1));
  const VF last = Floats(static_cast<float>((1 << (bits - 1)) - 1));
  VI steps[n];
  VF inverse[n], errors[n], size[n];
  for (int c = 0; c < n; ++c) {
    steps[c] = BoundedStep(hn::Sub(nearest, Ints(c)));
    size[c] = hn::Mul(HalfOfEvenStep(steps[c]), per_half);
    inverse[c] = hn::Div(Floats(1.0f), size[c]);
    errors[c] = hn::Zero(DF());
  }
  for (int i = 0; i < width; ++i) {
    const VF value = hn::Abs(hn::LoadU(DF(), x + 16 * i));
    for (int c = 0; c < n; ++c) {
      const VF y = hn::Mul(value, inverse[c]);
      const VF error = hn::Sub(hn::Sub(y, Floats(0.5f)), hn::Min(hn::Floor(y), last));
      errors[c] = hn::Add(errors[c], hn::Mul(error, error));
    }
  }
  for (int c = 0; c < n; ++c) errors[c] = hn::Mul(errors[c], hn::Mul(size[c], size[c]));
  for (int c = 1; c < n; ++c) {
    const auto better = hn::Lt(errors[c], errors[0]);
    steps[0] = hn::IfThenElse(hn::RebindMask(DI(), better), steps[c], steps[0]);
    errors[0] = hn::IfThenElse(better, errors[c], errors[0]);
  }
  return steps[0];
}

// One step of Lloyd's iteration for two bits.
HWY_INLINE VF LloydStep(const float* x, int width, VF fit) {
  const VF step = hn::Mul(fit, Floats(2.0f / 3.0f));
  VF products = hn::Zero(DF()), squares = products;
  for (int i = 0; i < width; ++i) {
    const VF value = hn::Abs(hn::LoadU(DF(), x + 16 * i));
    const auto outer = hn::Ge(value, step);
    products = hn::Add(products, hn::Mul(value, hn::IfThenElse(outer, Floats(1.5f), Floats(0.5f))));
    squares = hn::Add(squares, hn::IfThenElse(outer, Floats(2.25f), Floats(0.25f)));
  }
  return hn::Mul(Floats(1.5f), hn::Div(products, squares));
}

HWY_INLINE VI SharedStep(const float* x, int width, int bits, VF* peak) {
  const Magnitudes of(x, width, bits == 2);
  *peak = of.peak;
  if (bits == 8) return LogStep(of.peak, scale_internal::kQuarters);
  if (bits == 4) return BestBelowPeak<kSharedCandidates4>(x, width, bits, of.peak);
  if (bits == 3) return BestBelowPeak<kSharedCandidates3>(x, width, bits, of.peak);
  const VF mean = hn::Div(of.sum, Floats(static_cast<float>(width)));
  if (bits == 1) return LogStep(mean, scale_internal::kQuarterMiddles);
  const VF fit = hn::Min(of.peak, hn::Mul(Floats(BestHalfOverDeviation(2)), hn::Sqrt(mean)));
  const VF better = LloydStep(x, width, hn::Max(fit, Floats(kSmallestFit)));
  return LogStep(hn::Min(better, of.peak), scale_internal::kQuarterMiddles);
}

// The even code of each token, 0 for a run of zeros.
HWY_INLINE VI ChooseSharedCode(const float* x, int width, int bits) {
  VF peak;
  const VI step = BoundedStep(SharedStep(x, width, bits, &peak));
  const VI code = hn::Add(hn::Add(step, step), Ints(kScaleBias));
  return hn::IfThenZeroElse(hn::RebindMask(DI(), hn::Eq(peak, hn::Zero(DF()))), code);
}

void ChooseSharedScales(const float* x, std::size_t stride, const KvRun& run, int n_groups, std::uint8_t* base_code,
                        std::uint8_t* meta, Scale* scales) {
  alignas(64) std::int32_t codes[kBlockTokens];
  VI largest = hn::Zero(DI());
  for (int g = 0; g < n_groups; ++g, x += stride) {
    for (std::size_t at = 0; at < 16; at += kLanes) {
      const VI code = ChooseSharedCode(x + at, run.width, run.bits);
      largest = hn::Max(largest, code);
      hn::Store(code, DI(), codes + 16 * g + at);
    }
  }
  const int base = SharedBaseCode(hn::GetLane(hn::MaxOfLanes(DI(), largest)));
  *base_code = static_cast<std::uint8_t>(base);
  const VF per_half = Floats(2.0f / static_cast<float>((1 << run.bits) - 1));
  for (int g = 0; g < n_groups; ++g) {
    std::int32_t* group = codes + 16 * g;
    for (std::size_t at = 0; at < 16; at += kLanes, ++scales) {
      VI nibble = hn::ShiftRight<1>(hn::Sub(hn::Load(DI(), group + at), Ints(base)));
      nibble = base == 0 ? hn::Zero(DI()) : Clamp(nibble, 0, kNibbleSpan / kNibbleStep);
      hn::Store(nibble, DI(), group + at);
      const VF half = HalfOfEvenStep(hn::Add(nibble, Ints((base - kScaleBias) / kNibbleStep)));
      const VF inverse = hn::Div(Floats(1.0f), hn::Mul(half, per_half));
      *scales = {hn::Neg(half), base == 0 ? hn::Zero(DF()) : inverse};
    }
    for (int i = 0; i < 8; ++i) meta[8 * g + i] = static_cast<std::uint8_t>(group[i] | group[i + 8] << 4);
  }
}

}  // namespace zeroc::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
