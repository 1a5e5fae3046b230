// What compression costs beside the attention: query_prep, kv_write and kv_pack of one thread, for a 1B model's layer
// (32 query heads, 8 KV heads, head_dim 64).
#include <benchmark/benchmark.h>

#include "kernels/bench/bench_util.h"

namespace zeroc::kernels {
namespace {

constexpr int kHeads = 32, kKvHeads = 8, kDim = 64;

KvBlockLayout UniformLayout(int bits) {
  const KvRun run = {bits, kDim};
  KvBlockLayout layout;
  if (!MakeKvBlockLayout(kKvHeads, kDim, kBlockTokens, &run, 1, &run, 1, bits < 16, &layout)) std::abort();
  return layout;
}

void PerToken(benchmark::State& state, double tokens_per_call) {
  state.counters["per_token"] = benchmark::Counter(tokens_per_call * static_cast<double>(state.iterations()),
                                                   benchmark::Counter::kIsRate | benchmark::Counter::kInvert);
}

struct Write {
  KvBlockLayout layout = UniformLayout(16);
  std::vector<float> k = RandomFloats(64 * kKvHeads * kDim, 1.0f, 1);
  std::vector<float> v = RandomFloats(64 * kKvHeads * kDim, 1.0f, 2);
  std::vector<float> map = RandomFloats(kHeads * kDim * kDim, 0.1f, 3);
  std::vector<float> angles = RandomFloats(64 * kDim, 0.5f, 4);
  std::vector<std::uint8_t> bytes = std::vector<std::uint8_t>(static_cast<std::size_t>(layout.block_bytes));
  std::uint8_t* block = bytes.data();
  RopeRows rope = {angles.data(), angles.data()};
  KvWriteArgs args = {k.data(), v.data(), kKvHeads* kDim, 0, 64, 0, kKvHeads, rope, map.data(), &layout, &block};
};

void WriteBlock(benchmark::State& state) {
  Write write;
  for (auto _ : state) benchmark::DoNotOptimize(CpuOps().kv_write(write.args));
  PerToken(state, 64);
}

void PackBlock(benchmark::State& state) {
  Write write;
  if (CpuOps().kv_write(write.args) != KernelStatus::kOk) return state.SkipWithError("kv_write failed");
  const KvBlockLayout packed = UniformLayout(static_cast<int>(state.range(0)));
  std::vector<std::uint8_t> out(static_cast<std::size_t>(packed.block_bytes));
  const KvPackArgs args = {write.block, &write.layout, out.data(), &packed, 0, kKvHeads};
  for (auto _ : state) benchmark::DoNotOptimize(CpuOps().kv_pack(args));
  PerToken(state, 64);
}

void PrepareQueries(benchmark::State& state) {
  const Write write;
  const auto q = RandomFloats(64 * kHeads * kDim, 1.0f, 5);
  std::vector<float> out(q.size());
  const QueryPrepArgs args = {q.data(),   kHeads * kDim,
                              64,         kHeads,
                              kKvHeads,   kDim,
                              0,          kKvHeads,
                              write.rope, state.range(0) != 0 ? write.map.data() : nullptr,
                              0.125f,     out.data()};
  for (auto _ : state) benchmark::DoNotOptimize(CpuOps().query_prep(args));
  PerToken(state, 64);
}

BENCHMARK(WriteBlock);
BENCHMARK(PackBlock)->ArgName("bits")->Arg(16)->Arg(8)->Arg(4)->Arg(3)->Arg(2)->Arg(1);
BENCHMARK(PrepareQueries)->ArgName("map")->Arg(0)->Arg(1);

}  // namespace
}  // namespace zeroc::kernels

BENCHMARK_MAIN();
