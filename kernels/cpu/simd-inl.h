// Small SIMD pieces shared by the CPU ops, compiled once per instruction set (Highway's -inl convention).
//
// Floats go in vectors of at most 16 lanes, so that a 64-byte row of a tile is kParts vectors on every target.
#include <cstddef>
#include <cstdint>

#if defined(ZEROC_KERNELS_CPU_SIMD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ZEROC_KERNELS_CPU_SIMD_INL_H_
#undef ZEROC_KERNELS_CPU_SIMD_INL_H_
#else
#define ZEROC_KERNELS_CPU_SIMD_INL_H_
#endif

#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace zeroc::kernels::cpu::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

using DF = hn::CappedTag<float, 16>;
using DU = hn::RebindToUnsigned<DF>;
using DI = hn::RebindToSigned<DF>;
using DU16 = hn::Rebind<std::uint16_t, DF>;
using VF = hn::Vec<DF>;
using VU = hn::Vec<DU>;

inline constexpr std::size_t kLanes = hn::MaxLanes(DF());
inline constexpr std::size_t kParts = 16 / kLanes;  // vectors in a 64-byte row of a tile

// Bytes at any alignment as u32 lanes.
#if HWY_TARGET == HWY_SCALAR  // one lane: no vector of its bytes
HWY_INLINE VU LoadWords(const std::uint8_t* bytes) {
  std::uint32_t word;
  __builtin_memcpy(&word, bytes, sizeof(word));
  return hn::Set(DU(), word);
}
HWY_INLINE void StoreWords(VU words, std::uint8_t* bytes) {
  const std::uint32_t word = hn::GetLane(words);
  __builtin_memcpy(bytes, &word, sizeof(word));
}
#else
using DBytes = hn::Repartition<std::uint8_t, DF>;
HWY_INLINE VU LoadWords(const std::uint8_t* bytes) { return hn::BitCast(DU(), hn::LoadU(DBytes(), bytes)); }
HWY_INLINE void StoreWords(VU words, std::uint8_t* bytes) { hn::StoreU(hn::BitCast(DBytes(), words), DBytes(), bytes); }
#endif

// A u32 lane holds two bf16: the even element in the low half.
HWY_INLINE VF EvenBf16(VU pairs) { return hn::BitCast(DF(), hn::ShiftLeft<16>(pairs)); }
HWY_INLINE VF OddBf16(VU pairs) { return hn::BitCast(DF(), hn::And(pairs, hn::Set(DU(), 0xffff0000u))); }

HWY_INLINE VF LoadBf16(const std::uint16_t* from) {
  return hn::BitCast(DF(), hn::ShiftLeft<16>(hn::PromoteTo(DU(), hn::LoadU(DU16(), from))));
}

// bf16 in the low half of each lane, rounded to nearest even; a NaN stays a quiet NaN.
HWY_INLINE VU RoundToBf16(VF value) {
  const DU du;
  const VU bits = hn::BitCast(du, value);
  const VU even = hn::And(hn::ShiftRight<16>(bits), hn::Set(du, 1u));
  const VU rounded = hn::ShiftRight<16>(hn::Add(bits, hn::Add(even, hn::Set(du, 0x7fffu))));
  const VU quiet = hn::Or(hn::ShiftRight<16>(bits), hn::Set(du, 0x40u));
  return hn::IfThenElse(hn::RebindMask(du, hn::IsNaN(value)), quiet, rounded);
}

HWY_INLINE void StoreBf16(VF value, std::uint16_t* to) {
  hn::StoreU(hn::TruncateTo(DU16(), RoundToBf16(value)), DU16(), to);
}

// e^x for x <= 0 (and a little above); relative error below 3e-7, 0 below -87.3, NaN for NaN.
// 2^n is made from the exponent bits, 2^f on [-0.5, 0.5] is a polynomial of degree 6 (Taylor in f ln 2).
HWY_INLINE VF ExpOfNegative(VF x) {
  const DF df;
  const DI di;
  const VF y = hn::Mul(x, hn::Set(df, 1.44269504f));
  // Max returns its second operand if either is NaN (x86), which keeps the NaN.
  const VF limited = hn::Max(hn::Set(df, -126.0f), y);
  const VF n = hn::Round(limited);
  // x - n ln 2 in two steps keeps the bits that the product above lost.
  const VF r = hn::NegMulAdd(n, hn::Set(df, -2.12194440e-4f), hn::NegMulAdd(n, hn::Set(df, 0.693359375f), x));
  VF p = hn::Set(df, 1.0f / 720);
  p = hn::MulAdd(p, r, hn::Set(df, 1.0f / 120));
  p = hn::MulAdd(p, r, hn::Set(df, 1.0f / 24));
  p = hn::MulAdd(p, r, hn::Set(df, 1.0f / 6));
  p = hn::MulAdd(p, r, hn::Set(df, 0.5f));
  p = hn::MulAdd(p, r, hn::Set(df, 1.0f));
  p = hn::MulAdd(p, r, hn::Set(df, 1.0f));
  const auto exponent = hn::ShiftLeft<23>(hn::Add(hn::ConvertTo(di, n), hn::Set(di, 127)));
  const VF value = hn::Mul(p, hn::BitCast(df, exponent));
  return hn::IfThenZeroElse(hn::Lt(y, hn::Set(df, -126.0f)), value);
}

HWY_INLINE float ExpOfNegative(float x) { return hn::GetLane(ExpOfNegative(hn::Set(DF(), x))); }

HWY_INLINE float Sum(VF v) { return hn::GetLane(hn::SumOfLanes(DF(), v)); }

}  // namespace zeroc::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
