#include "tools/zeroc/machine_probe.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <memory>
#include <thread>
#include <vector>

#include "libzeroc/base/thread_pool.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace zeroc {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kRuns = 5;  // the best one counts: other work on the machine only makes a run slower

// Keeps a value that nobody reads from being optimised away.
template <typename T>
void Keep(const T& value) {
  asm volatile("" : : "g"(&value) : "memory");
}

// A register-only loop: runs `iterations` rounds and returns the floating-point operations done.
using FlopsLoop = double (*)(std::int64_t iterations);

// Sixteen vectors of four floats in flight cover the latency of multiply and add everywhere.
double PortableLoop(std::int64_t iterations) {
  using Vec = float __attribute__((vector_size(16)));
  Vec sum[16] = {};
  const Vec a = {1.0f, 1.0f, 1.0f, 1.0f};
  const Vec b = {1e-9f, 1e-9f, 1e-9f, 1e-9f};
  for (std::int64_t i = 0; i < iterations; ++i) {
    for (Vec& s : sum) s = s * a + b;
    Keep(sum);
  }
  return static_cast<double>(iterations) * 16 * 4 * 2;
}

#if defined(__x86_64__)

__attribute__((target("avx2,fma"))) double Avx2Loop(std::int64_t iterations) {
  const __m256 a = _mm256_set1_ps(1.0f);
  const __m256 b = _mm256_set1_ps(1e-9f);
  __m256 s0 = b, s1 = b, s2 = b, s3 = b, s4 = b, s5 = b, s6 = b, s7 = b, s8 = b, s9 = b;
  for (std::int64_t i = 0; i < iterations; ++i) {
    s0 = _mm256_fmadd_ps(s0, a, b), s1 = _mm256_fmadd_ps(s1, a, b), s2 = _mm256_fmadd_ps(s2, a, b);
    s3 = _mm256_fmadd_ps(s3, a, b), s4 = _mm256_fmadd_ps(s4, a, b), s5 = _mm256_fmadd_ps(s5, a, b);
    s6 = _mm256_fmadd_ps(s6, a, b), s7 = _mm256_fmadd_ps(s7, a, b), s8 = _mm256_fmadd_ps(s8, a, b);
    s9 = _mm256_fmadd_ps(s9, a, b);
  }
  const __m256 sums[10] = {s0, s1, s2, s3, s4, s5, s6, s7, s8, s9};
  Keep(sums);
  return static_cast<double>(iterations) * 10 * 8 * 2;
}

__attribute__((target("avx512f"))) double Avx512Loop(std::int64_t iterations) {
  const __m512 a = _mm512_set1_ps(1.0f);
  const __m512 b = _mm512_set1_ps(1e-9f);
  __m512 s0 = b, s1 = b, s2 = b, s3 = b, s4 = b, s5 = b, s6 = b, s7 = b, s8 = b, s9 = b;
  for (std::int64_t i = 0; i < iterations; ++i) {
    s0 = _mm512_fmadd_ps(s0, a, b), s1 = _mm512_fmadd_ps(s1, a, b), s2 = _mm512_fmadd_ps(s2, a, b);
    s3 = _mm512_fmadd_ps(s3, a, b), s4 = _mm512_fmadd_ps(s4, a, b), s5 = _mm512_fmadd_ps(s5, a, b);
    s6 = _mm512_fmadd_ps(s6, a, b), s7 = _mm512_fmadd_ps(s7, a, b), s8 = _mm512_fmadd_ps(s8, a, b);
    s9 = _mm512_fmadd_ps(s9, a, b);
  }
  const __m512 sums[10] = {s0, s1, s2, s3, s4, s5, s6, s7, s8, s9};
  Keep(sums);
  return static_cast<double>(iterations) * 10 * 16 * 2;
}

__attribute__((target("avx512f,avx512bf16"))) double Avx512Bf16Loop(std::int64_t iterations) {
  const __m512 start = _mm512_set1_ps(1e-9f);
  const __m512bh a = _mm512_cvtne2ps_pbh(start, start);
  const __m512bh b = a;
  __m512 s0 = start, s1 = start, s2 = start, s3 = start, s4 = start;
  __m512 s5 = start, s6 = start, s7 = start, s8 = start, s9 = start;
  for (std::int64_t i = 0; i < iterations; ++i) {
    s0 = _mm512_dpbf16_ps(s0, a, b), s1 = _mm512_dpbf16_ps(s1, a, b), s2 = _mm512_dpbf16_ps(s2, a, b);
    s3 = _mm512_dpbf16_ps(s3, a, b), s4 = _mm512_dpbf16_ps(s4, a, b), s5 = _mm512_dpbf16_ps(s5, a, b);
    s6 = _mm512_dpbf16_ps(s6, a, b), s7 = _mm512_dpbf16_ps(s7, a, b), s8 = _mm512_dpbf16_ps(s8, a, b);
    s9 = _mm512_dpbf16_ps(s9, a, b);
  }
  const __m512 sums[10] = {s0, s1, s2, s3, s4, s5, s6, s7, s8, s9};
  Keep(sums);
  return static_cast<double>(iterations) * 10 * 32 * 2;
}

// Eight tiles of 16 rows of 64 bytes: four sums, two left and two right sides, the blocking of a real matrix kernel.
__attribute__((target("amx-tile,amx-bf16"))) double AmxLoop(std::int64_t iterations) {
  struct alignas(64) TileConfig {
    std::uint8_t palette = 1;
    std::uint8_t start_row = 0;
    std::uint8_t reserved[14] = {};
    std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  Keep(config);  // g++ 12 takes only the first 8 bytes as read
  _tile_loadconfig(&config);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
  for (std::int64_t i = 0; i < iterations; ++i) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
  return static_cast<double>(iterations) * 4 * 16 * 16 * 32 * 2;
}

// The processor has AMX bf16 and the kernel lets this process use the tile registers.
bool AllowAmx() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
  constexpr unsigned kAmxBf16 = 1u << 22;
  constexpr unsigned kAmxTile = 1u << 24;
  if ((d & kAmxBf16) == 0 || (d & kAmxTile) == 0) return false;
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;               // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

FlopsLoop WidestLoop(std::string* kind) {
  if (AllowAmx()) return *kind = "AMX bf16", AmxLoop;
  if (__builtin_cpu_supports("avx512bf16")) return *kind = "AVX-512 bf16", Avx512Bf16Loop;
  if (__builtin_cpu_supports("avx512f")) return *kind = "AVX-512 f32", Avx512Loop;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return *kind = "AVX2 f32", Avx2Loop;
  return *kind = "SSE f32", PortableLoop;
}

#else

FlopsLoop WidestLoop(std::string* kind) { return *kind = "128-bit f32", PortableLoop; }

#endif

double Seconds(Clock::time_point since) { return std::chrono::duration<double>(Clock::now() - since).count(); }

double BestFlops(ThreadPool& threads, FlopsLoop loop) {
  const auto n = static_cast<std::size_t>(threads.size());
  std::vector<double> flops(n);
  std::int64_t iterations = 1000;
  constexpr double kRunSeconds = 0.03;
  double best = 0;
  for (int run = 0; run < kRuns;) {
    const Clock::time_point start = Clock::now();
    threads.ParallelFor(n, [&](std::size_t item, int) { flops[item] = loop(iterations); });
    const double seconds = Seconds(start);
    if (seconds < kRunSeconds && iterations < (std::int64_t{1} << 40)) {
      iterations *= 4;  // too short to time: this run does not count
      continue;
    }
    double total = 0;
    for (const double f : flops) total += f;
    best = std::max(best, total / seconds);
    ++run;
  }
  return best;
}

using Words = std::uint64_t __attribute__((vector_size(16)));

// Four streams, a cache line of each at a time: one stream alone waits for the prefetcher at every page.
void ReadAll(const Words* words, std::size_t n) {
  const std::size_t quarter = n / 4;
  Words sums[4] = {};
  for (std::size_t i = 0; i + 4 <= quarter; i += 4) {
    for (std::size_t stream = 0; stream < 4; ++stream) {
      const Words* at = words + stream * quarter + i;
      sums[stream] += (at[0] + at[1]) + (at[2] + at[3]);
    }
  }
  Keep(sums);
}

double BestRead(ThreadPool& threads) {
  // Beyond the last-level caches of present servers, all threads together.
  constexpr std::size_t kWords = (std::size_t{512} << 20) / sizeof(Words);
  const auto n = static_cast<std::size_t>(threads.size());
  const std::unique_ptr<Words[]> words(new Words[kWords]);
  const std::size_t piece = kWords / n / 16 * 16;
  threads.ParallelFor(n, [&](std::size_t item, int) {
    std::memset(static_cast<void*>(words.get() + item * piece), 1, piece * sizeof(Words));
  });
  double best = 0;
  for (int run = 0; run < kRuns; ++run) {
    const Clock::time_point start = Clock::now();
    threads.ParallelFor(n, [&](std::size_t item, int) { ReadAll(words.get() + item * piece, piece); });
    best = std::max(best, static_cast<double>(piece * n * sizeof(Words)) / Seconds(start));
  }
  return best;
}

std::string ProcessorName() {
  std::ifstream info("/proc/cpuinfo");
  std::string line;
  while (std::getline(info, line)) {
    if (line.starts_with("model name") && line.find(": ") != std::string::npos) return line.substr(line.find(": ") + 2);
  }
  return "unknown";
}

}  // namespace

MachinePeak MeasureMachinePeak(int n_threads) {
  MachinePeak peak;
  const FlopsLoop loop = WidestLoop(&peak.flops_kind);
  peak.processor = ProcessorName();
  // On threads of their own, started after the permission for tile registers was asked for. Those registers belong to a
  // thread, so nothing of them is left behind.
  std::thread([&] {
    ThreadPool threads(n_threads);
    peak.flops_per_s = BestFlops(threads, loop);
    peak.read_bytes_per_s = BestRead(threads);
  }).join();
  return peak;
}

}  // namespace zeroc
