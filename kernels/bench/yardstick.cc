#include "kernels/bench/bench_util.h"
#include "kernels/cpu/amx.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/bench/yardstick.cc"
// clang-format off
#include "hwy/foreach_target.h"
#include "kernels/cpu/simd-inl.h"
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace zeroc::kernels::cpu::HWY_NAMESPACE {

// Sums of four quarters of `n` words (a multiple of 16 * 4 * 4).
std::uint32_t SumWords(const std::uint8_t* bytes, std::size_t n_bytes) {
  const std::size_t quarter = n_bytes / 4;
  VU sums[4] = {hn::Zero(DU()), hn::Zero(DU()), hn::Zero(DU()), hn::Zero(DU())};
  for (std::size_t i = 0; i < quarter; i += 4 * kLanes) {
    for (std::size_t s = 0; s < 4; ++s) sums[s] = hn::Add(sums[s], LoadWords(bytes + s * quarter + i));
  }
  return hn::GetLane(hn::SumOfLanes(DU(), hn::Add(hn::Add(sums[0], sums[1]), hn::Add(sums[2], sums[3]))));
}

// 12 independent chains cover latency 4 times two pipes.
float FmaChains(std::int64_t n) {
  const DF df;
  VF sums[12];
  for (VF& sum : sums) sum = hn::Zero(df);
  const VF a = hn::Set(df, 0.999f), b = hn::Set(df, 1e-3f);
  for (std::int64_t i = 0; i < n; ++i) {
    for (VF& sum : sums) sum = hn::MulAdd(sum, a, b);
  }
  for (int i = 1; i < 12; ++i) sums[0] = hn::Add(sums[0], sums[i]);
  return Sum(sums[0]);
}

std::int64_t FloatLanes() { return static_cast<std::int64_t>(kLanes); }

}  // namespace zeroc::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace zeroc::kernels {
namespace cpu {
HWY_EXPORT(SumWords);
HWY_EXPORT(FmaChains);
HWY_EXPORT(FloatLanes);
}  // namespace cpu

using namespace cpu;  // for the dispatch tables

double ReadGigabytesPerSecond() {
  static const double result = [] {
    constexpr std::size_t kBytes = std::size_t{1} << 30;
    std::vector<std::uint8_t> buffer(kBytes, 1);
    volatile std::uint32_t sink = 0;
    const double best = BestSeconds(5, [&] { sink = HWY_DYNAMIC_DISPATCH(SumWords)(buffer.data(), kBytes); });
    return static_cast<double>(kBytes) / best * 1e-9;
  }();
  return result;
}

double FmaGigaflops() {
  static const double result = [] {
    constexpr std::int64_t kSteps = 5'000'000;
    volatile float sink = 0;
    const double best = BestSeconds(5, [&] { sink = HWY_DYNAMIC_DISPATCH(FmaChains)(kSteps); });
    return 2.0 * 12 * static_cast<double>(kSteps * HWY_DYNAMIC_DISPATCH(FloatLanes)()) / best * 1e-9;
  }();
  return result;
}

#if defined(__x86_64__)
namespace {

// Four accumulators, as the kernels have.
ZEROC_AMX_TARGET void TileProducts(const Bf16* operands, std::int64_t n) {
  ConfigureTiles(16);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, operands, 64);
  _tile_loadd(5, operands + 512, 64);
  _tile_loadd(6, operands + 1024, 64);
  _tile_loadd(7, operands + 1536, 64);
  for (std::int64_t i = 0; i < n; ++i) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 5, 6);
    _tile_dpbf16ps(2, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  }
  ReleaseTiles();
}

}  // namespace

double AmxGigaflops() {
  static const double result = [] {
    if (!AmxReady()) return 0.0;
    constexpr std::int64_t kSteps = 500'000;
    const auto operands = RandomBf16(2048, 1.0f, 3);
    const double best = BestSeconds(5, [&] { TileProducts(operands.data(), kSteps); });
    return 2.0 * 16 * 16 * 32 * 4 * static_cast<double>(kSteps) / best * 1e-9;
  }();
  return result;
}
#else
double AmxGigaflops() { return 0; }
#endif

}  // namespace zeroc::kernels
#endif
