// Yardsticks and data shared by the kernel benches: what this machine can do, measured in the same process.
#pragma once

#include <time.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#include "hwy/aligned_allocator.h"
#include "kernels/bf16.h"
#include "kernels/cpu/cpu.h"
#include "kernels/ops.h"

namespace zeroc::kernels {

// Processor time of this thread, as the benches' own rates use: neighbours on a shared machine do not count.
inline double Seconds(const std::function<void()>& body) {
  const auto now = [] {
    timespec time;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
    return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
  };
  const double start = now();
  body();
  return now() - start;
}

// Fastest of `n` runs: a peak is a limit, so the best run is the honest one.
inline double BestSeconds(int n, const std::function<void()>& body) {
  double best = 1e30;
  for (int i = 0; i < n; ++i) best = std::min(best, Seconds(body));
  return best;
}

inline std::vector<Bf16> RandomBf16(std::size_t n, float scale, unsigned seed) {
  std::mt19937 engine(seed);
  std::uniform_real_distribution<float> uniform(-scale, scale);
  std::vector<Bf16> pattern(4099), out(n);  // a prime length, so that rows differ
  for (Bf16& value : pattern) value = FloatToBf16(uniform(engine));
  for (std::size_t i = 0; i < n; ++i) out[i] = pattern[i % pattern.size()];
  return out;
}

inline std::vector<float> RandomFloats(std::size_t n, float scale, unsigned seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal(0.0f, scale);
  std::vector<float> out(n);
  for (float& value : out) value = normal(engine);
  return out;
}

// GB/s of one thread summing a buffer larger than the caches, four streams at once.
double ReadGigabytesPerSecond();
// GFLOP/s of one thread's float32 FMA in registers.
double FmaGigaflops();
// GFLOP/s of one thread's bf16 tile products in registers, 0 without AMX. The operands are random: zeros draw less
// power and ran a fifth faster.
double AmxGigaflops();

}  // namespace zeroc::kernels
