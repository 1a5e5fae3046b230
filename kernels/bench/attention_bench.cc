// Attention of one thread over packed history: decode in GB/s of packed bytes, prefill in GFLOP/s.
//
// Shapes: TinyLlama-1.1B and Llama-3.2-1B have head_dim 64 with 8 and 4 query heads to a KV head. Decode walks enough
// blocks to leave every cache (512 MiB); prefill stays on one 8k history, as a real chunk does.
#include <benchmark/benchmark.h>

#include <cmath>

#include "kernels/bench/bench_util.h"

namespace zeroc::kernels {
namespace {

constexpr int kDim = 64;

KvBlockLayout UniformLayout(int bits) {
  const KvRun run = {bits, kDim};
  KvBlockLayout layout;
  if (!MakeKvBlockLayout(1, kDim, kBlockTokens, &run, 1, &run, 1, bits < 16, &layout)) std::abort();
  return layout;
}

// n_blocks blocks with the content of eight distinct ones.
struct History {
  KvBlockLayout layout;
  std::vector<std::uint8_t> bytes;
  std::vector<const std::uint8_t*> blocks;

  History(int bits, std::size_t n_blocks) : layout(UniformLayout(bits)) {
    const KvBlockLayout exact = UniformLayout(16);
    bytes.resize(n_blocks * static_cast<std::size_t>(layout.block_bytes));
    std::vector<std::uint8_t> source(static_cast<std::size_t>(exact.block_bytes));
    std::uint8_t* source_block = source.data();
    for (std::size_t b = 0; b < n_blocks; ++b) {
      std::uint8_t* to = bytes.data() + b * static_cast<std::size_t>(layout.block_bytes);
      if (b < 8) {
        const auto k = RandomFloats(64 * kDim, 1.0f, static_cast<unsigned>(b));
        const auto v = RandomFloats(64 * kDim, 1.0f, static_cast<unsigned>(b + 100));
        const KvWriteArgs write = {k.data(), v.data(), kDim, 0, 64, 0, 1, {}, nullptr, &exact, &source_block};
        const KvPackArgs pack = {source.data(), &exact, to, &layout, 0, 1};
        if (CpuOps().kv_write(write) != KernelStatus::kOk || CpuOps().kv_pack(pack) != KernelStatus::kOk) std::abort();
      } else {
        std::copy_n(bytes.data() + b % 8 * static_cast<std::size_t>(layout.block_bytes), layout.block_bytes, to);
      }
      blocks.push_back(to);
    }
  }
};

struct Call {
  std::vector<float> q, out, row_max, row_sum;
  hwy::AlignedFreeUniquePtr<std::uint8_t[]> scratch;
  KvSegment segment;
  AttentionArgs args;

  Call(const History& history, std::size_t first_block, int n_blocks, int n_rows, int group)
      : q(RandomFloats(static_cast<std::size_t>(n_rows * kDim), 0.125f, 5)),
        out(q.size()),
        row_max(static_cast<std::size_t>(n_rows)),
        row_sum(static_cast<std::size_t>(n_rows)),
        scratch(hwy::AllocateAligned<std::uint8_t>(AttentionScratchBytes(n_rows, kDim))) {
    const std::int32_t end = 64 * n_blocks;
    segment = {history.blocks.data() + first_block, n_blocks, &history.layout, 0, 0, end};
    args = {q.data(), n_rows,     group,          kDim,           end,          0, &segment,
            1,        out.data(), row_max.data(), row_sum.data(), scratch.get()};
  }

  // Relative difference of the outputs from the reference's on the same blocks.
  double ErrorAgainstReference() {
    if (CpuOps().attention(args) != KernelStatus::kOk) return 1e9;
    const std::vector<float> got = out, sums = row_sum, tops = row_max;
    if (ReferenceOps().attention(args) != KernelStatus::kOk) return 1e9;
    double error = 0, norm = 0;
    for (std::size_t i = 0; i < got.size(); ++i) {
      const double expected = out[i] / row_sum[i / kDim];
      error += std::pow(got[i] / sums[i / kDim] - expected, 2);
      norm += expected * expected;
    }
    return std::sqrt(error / norm);
  }
};

bool Checked(benchmark::State& state, const History& history, int n_rows, int group) {
  Call call(history, 0, 8, n_rows, group);
  const double error = call.ErrorAgainstReference();
  state.counters["rel_error"] = error;
  if (error < 5e-3) return true;
  state.SkipWithError("differs from the reference");
  return false;
}

// Args: bits, group. 16k tokens per call.
void Decode(benchmark::State& state) {
  constexpr std::size_t kCallBlocks = 256;
  const int bits = static_cast<int>(state.range(0)), group = static_cast<int>(state.range(1));
  const std::size_t call_bytes = kCallBlocks * static_cast<std::size_t>(UniformLayout(bits).block_bytes);
  const std::size_t n_calls = ((std::size_t{512} << 20) + call_bytes - 1) / call_bytes;
  const History history(bits, n_calls * kCallBlocks);
  if (!Checked(state, history, group, group)) return;
  Call call(history, 0, kCallBlocks, group, group);
  std::size_t at = 0;
  for (auto _ : state) {
    call.segment.blocks = history.blocks.data() + at * kCallBlocks;
    at = (at + 1) % n_calls;
    if (CpuOps().attention(call.args) != KernelStatus::kOk) state.SkipWithError("attention failed");
  }
  const double bytes = static_cast<double>(call_bytes) * static_cast<double>(state.iterations());
  state.counters["GB/s"] = benchmark::Counter(bytes * 1e-9, benchmark::Counter::kIsRate);
  state.counters["of_read"] = benchmark::Counter(bytes * 1e-9 / ReadGigabytesPerSecond(), benchmark::Counter::kIsRate);
  const double tokens = 64.0 * kCallBlocks * static_cast<double>(state.iterations());
  state.counters["per_token"] = benchmark::Counter(tokens, benchmark::Counter::kIsRate | benchmark::Counter::kInvert);
}

// Args: bits, rows. Group 4, 8k tokens of history.
void Prefill(benchmark::State& state) {
  const int bits = static_cast<int>(state.range(0)), n_rows = static_cast<int>(state.range(1));
  const History history(bits, 128);
  if (!Checked(state, history, n_rows, 4)) return;
  Call call(history, 0, 128, n_rows, 4);
  for (auto _ : state) {
    if (CpuOps().attention(call.args) != KernelStatus::kOk) state.SkipWithError("attention failed");
  }
  const double gflop = 4e-9 * n_rows * kDim * 64 * 128 * static_cast<double>(state.iterations());
  state.counters["GFLOP/s"] = benchmark::Counter(gflop, benchmark::Counter::kIsRate);
  state.counters["of_fma"] = benchmark::Counter(gflop / FmaGigaflops(), benchmark::Counter::kIsRate);
}

BENCHMARK(Decode)->ArgNames({"bits", "group"})->ArgsProduct({{16, 8, 4, 3, 2, 1}, {1, 4, 8}})->MinTime(0.3);
BENCHMARK(Prefill)->ArgNames({"bits", "rows"})->ArgsProduct({{16, 8, 4, 3, 2, 1}, {16, 256}})->MinTime(0.3);

}  // namespace
}  // namespace zeroc::kernels

BENCHMARK_MAIN();
