// y = W x for one to eight rows of x: bound by the speed at which the weights stream in.
//
// Pairs of bf16 are split by a shift and a mask (one operation per 16 weights; vdpbf16ps has half the rate of a float32
// FMA on Sapphire Rapids), so even and odd elements are summed apart in the same accumulator. Several output rows run
// together: four streams read memory 6 % faster than one, and each x vector loaded serves all of them.
#include "kernels/bf16.h"
#include "kernels/cpu/cpu.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/linear_matvec.cc"
// clang-format off
#include "hwy/foreach_target.h"
#include "kernels/cpu/simd-inl.h"
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace zeroc::kernels::cpu::HWY_NAMESPACE {

// Output rows per pass: with kRows accumulators each they fit the register file (32 with AVX-512, else 16).
template <int kRows>
constexpr int OutputsPerPass() {
  constexpr int kRegisters = HWY_TARGET <= HWY_AVX3 ? 26 : 12;
  constexpr int kFit = kRegisters / kRows;
  return kFit >= 4 ? 4 : (kFit >= 1 ? kFit : 1);
}

template <int kRows, int kOuts>
HWY_INLINE void Pass(const LinearArgs& args, const Bf16* x, float* y, std::int64_t o) {
  const DF df;
  const auto k = static_cast<std::size_t>(args.k);
  const Bf16* w = args.w + o * args.k;
  VF sums[kOuts][kRows];
  for (auto& row : sums) {
    for (VF& sum : row) sum = hn::Zero(df);
  }
  std::size_t i = 0;
  for (; i + 2 * kLanes <= k; i += 2 * kLanes) {
    VU weights[kOuts];
    for (int j = 0; j < kOuts; ++j) {
      weights[j] = LoadWords(reinterpret_cast<const std::uint8_t*>(w + static_cast<std::size_t>(j) * k + i));
    }
    for (int r = 0; r < kRows; ++r) {
      const VU pairs = LoadWords(reinterpret_cast<const std::uint8_t*>(x + static_cast<std::size_t>(r) * k + i));
      const VF even = EvenBf16(pairs);
      const VF odd = OddBf16(pairs);
      for (int j = 0; j < kOuts; ++j) {
        sums[j][r] = hn::MulAdd(even, EvenBf16(weights[j]), sums[j][r]);
        sums[j][r] = hn::MulAdd(odd, OddBf16(weights[j]), sums[j][r]);
      }
    }
  }
  for (int j = 0; j < kOuts; ++j) {
    for (int r = 0; r < kRows; ++r) {
      float sum = Sum(sums[j][r]);
      for (std::size_t t = i; t < k; ++t) {
        sum +=
            Bf16ToFloat(x[static_cast<std::size_t>(r) * k + t]) * Bf16ToFloat(w[static_cast<std::size_t>(j) * k + t]);
      }
      if (args.bias != nullptr) sum += args.bias[o + j];
      float& out = y[r * args.y_stride + o + j];
      out = args.accumulate ? out + sum : sum;
    }
  }
}

template <int kRows>
void MatVec(const LinearArgs& args, const Bf16* x, float* y) {
  constexpr int kOuts = OutputsPerPass<kRows>();
  std::int64_t o = args.out_begin;
  for (; o + kOuts <= args.out_end; o += kOuts) Pass<kRows, kOuts>(args, x, y, o);
  for (; o < args.out_end; ++o) Pass<kRows, 1>(args, x, y, o);
}

void MatVecRows(const LinearArgs& args) {
  const auto* x = static_cast<const Bf16*>(args.x);
  switch (args.n_rows) {
    case 1:
      return MatVec<1>(args, x, args.y);
    case 2:
      return MatVec<2>(args, x, args.y);
    case 3:
      return MatVec<3>(args, x, args.y);
    case 4:
      return MatVec<4>(args, x, args.y);
    case 5:
      return MatVec<5>(args, x, args.y);
    case 6:
      return MatVec<6>(args, x, args.y);
    case 7:
      return MatVec<7>(args, x, args.y);
    case 8:
      return MatVec<8>(args, x, args.y);
    default:
      return;
  }
}

}  // namespace zeroc::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace zeroc::kernels::cpu {

HWY_EXPORT(MatVecRows);

void LinearMatVec(const LinearArgs& args) { HWY_DYNAMIC_DISPATCH(MatVecRows)(args); }

}  // namespace zeroc::kernels::cpu
#endif
