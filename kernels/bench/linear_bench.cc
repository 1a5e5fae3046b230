// y = W x: GB/s of weights for few rows, GFLOP/s for many. Rates are per thread and second of processor time.
#include <benchmark/benchmark.h>

#include <cmath>

#include "kernels/bench/bench_util.h"

namespace zeroc::kernels {
namespace {

using Product = bool (*)(const LinearArgs&);

bool Dispatch(const LinearArgs& args) { return CpuOps().linear(args) == KernelStatus::kOk; }

// Args: rows, k, n_out. Enough distinct weights to leave the caches (512 MiB) when rows are few, a layer otherwise.
void RunLinear(benchmark::State& state, Product product) {
  const std::int64_t rows = state.range(0), k = state.range(1), n_out = state.range(2);
  const std::size_t matrix = static_cast<std::size_t>(k * n_out);
  const std::size_t n_matrices = std::max<std::size_t>(1, (std::size_t{1} << 28) / matrix);
  const auto w = RandomBf16(matrix * n_matrices, 0.05f, 1);
  const auto x = RandomBf16(static_cast<std::size_t>(rows * k), 1.0f, 2);
  std::vector<float> y(static_cast<std::size_t>(rows * n_out));
  LinearArgs args = {x.data(), rows, k, w.data(), nullptr, n_out, 0, n_out, y.data(), n_out, false};
  if (!product(args)) return state.SkipWithError("not available here");
  for (std::size_t i = 0; i < 64; ++i) {  // a sample against double sums
    const std::int64_t r = static_cast<std::int64_t>(i) * 7919 % rows,
                       o = static_cast<std::int64_t>(i) * 104729 % n_out;
    double expected = 0;
    for (std::int64_t j = 0; j < k; ++j) {
      expected += double{Bf16ToFloat(x[static_cast<std::size_t>(r * k + j)])} *
                  Bf16ToFloat(w[static_cast<std::size_t>(o * k + j)]);
    }
    if (!(std::abs(y[static_cast<std::size_t>(r * n_out + o)] - expected) < 1e-4 * std::sqrt(double(k)))) {
      return state.SkipWithError("wrong result");
    }
  }
  std::size_t at = 0;
  for (auto _ : state) {
    args.w = w.data() + at * matrix;
    at = (at + 1) % n_matrices;
    if (!product(args)) state.SkipWithError("failed");
  }
  const double n = static_cast<double>(state.iterations());
  const double gigabytes = n * 2e-9 * static_cast<double>(matrix);
  state.counters["GB/s"] = benchmark::Counter(gigabytes, benchmark::Counter::kIsRate);
  state.counters["of_read"] = benchmark::Counter(gigabytes / ReadGigabytesPerSecond(), benchmark::Counter::kIsRate);
  state.counters["GFLOP/s"] = benchmark::Counter(n * 2e-9 * static_cast<double>(rows) * static_cast<double>(matrix),
                                                 benchmark::Counter::kIsRate);
  if (AmxGigaflops() > 0) {
    state.counters["of_amx"] =
        benchmark::Counter(n * 2e-9 * static_cast<double>(rows) * static_cast<double>(matrix) / AmxGigaflops(),
                           benchmark::Counter::kIsRate);
  }
}

// The demo model (hidden 384, width 1024) and a 1B model (hidden 2048, width 5632).
void Shapes(benchmark::internal::Benchmark* bench, const std::vector<std::int64_t>& rows) {
  bench->ArgNames({"rows", "k", "n_out"})->MinTime(0.3);
  for (std::int64_t r : rows) {
    for (const auto& [k, n] : std::vector<std::pair<std::int64_t, std::int64_t>>{
             {384, 1024}, {1024, 384}, {2048, 2048}, {2048, 5632}, {5632, 2048}}) {
      bench->Args({r, k, n});
    }
  }
}

// The demo model again, and a 1B model with a width of 8192.
constexpr std::pair<std::int64_t, std::int64_t> kAmxShapes[] = {
    {384, 1024}, {1024, 384}, {2048, 2048}, {2048, 8192}, {8192, 2048}};

BENCHMARK_CAPTURE(RunLinear, dispatch, Dispatch)->Apply([](auto* bench) { Shapes(bench, {1, 4, 8, 16, 64, 512}); });
BENCHMARK_CAPTURE(RunLinear, sgemm, cpu::LinearSgemm)->Apply([](auto* bench) { Shapes(bench, {16, 64, 512}); });

BENCHMARK_CAPTURE(RunLinear, amx, cpu::LinearAmx)->Apply([](auto* bench) {
  bench->ArgNames({"rows", "k", "n_out"})->MinTime(0.3)->Threads(1)->Threads(2);
  for (std::int64_t rows : {64, 512, 2048}) {
    for (const auto& [k, n] : kAmxShapes) bench->Args({rows, k, n});
  }
});

}  // namespace
}  // namespace zeroc::kernels

BENCHMARK_MAIN();
