// Decode and prefill attention and packing at the shapes of Llama-3.1-8B (32 query heads, 8 KV heads, head dimension
// 128), against this card's own copy bandwidth. Prints a table and, with --json FILE, the same as JSON.
//
// The history is packed once from random rows by the op itself, and every sequence has blocks of its own, so that
// nothing is read twice out of the second-level cache. Times are medians over launches that fill at least 20 ms
// together.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "kernels/cuda/attention_tiles.h"
#include "kernels/cuda/cases/cases.h"
#include "kernels/cuda/cuda_ops.h"

namespace zeroc::kernels::cuda {
namespace {

constexpr int kHeads = 32, kKvHeads = 8, kDim = 128;

// Median seconds of one call of `body`, which enqueues and returns.
template <typename Body>
double Seconds(const Body& body) {
  body();
  Synchronize(nullptr);
  std::vector<double> times;
  int n_calls = 1;
  while (times.size() < 7) {
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < n_calls; ++i) body();
    Synchronize(nullptr);
    const double spent = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    if (spent < 0.02 && n_calls < 4096) {
      n_calls *= 2;
      continue;
    }
    times.push_back(spent / n_calls);
  }
  std::nth_element(times.begin(), times.begin() + 3, times.end());
  return times[3];
}

struct Row {
  std::string what;
  double microseconds, gigabytes_per_s, of_copy;
};

class Bench {
 public:
  // Reads and writes of a large buffer through the copy kernel.
  void MeasureCopy() {
    const std::int64_t bytes = std::int64_t{1} << 24;
    const int n = 64;
    const Buffer<std::uint8_t> from(static_cast<std::size_t>(n * bytes)), to(static_cast<std::size_t>(n * bytes));
    std::vector<std::uint8_t*> pointers;
    for (int i = 0; i < n; ++i) {
      for (std::int64_t at = 0; at < bytes; at += 1 << 16) pointers.push_back(from.data() + i * bytes + at);
    }
    const Buffer<std::uint8_t*> table(pointers);
    const BlockCopyArgs args = {table.data(), static_cast<std::int32_t>(pointers.size()), 1 << 16, to.data()};
    const double seconds = Seconds([&] { GatherBlocks(args, nullptr); });
    copy_bytes_per_s_ = 2.0 * static_cast<double>(n * bytes) / seconds;
    Add("copy, read and write", seconds, 2.0 * static_cast<double>(n * bytes));
  }

  void Decode(const char* profile, const std::vector<KvRun>& runs, int context, int batch) {
    const KvBlockLayout layout = LayoutOf(kKvHeads, kDim, 64, runs, runs, IsQuantised(runs[0].bits));
    const int n_blocks = context / 64;
    const double bytes = static_cast<double>(layout.block_bytes) * n_blocks * batch;
    Buffer<std::uint8_t> data(static_cast<std::size_t>(bytes));
    if (data.data() == nullptr) return Skip(profile, context, batch);
    FillBlocks(layout, n_blocks * batch, data.data());
    std::vector<const std::uint8_t*> pointers;
    for (int b = 0; b < n_blocks * batch; ++b) pointers.push_back(data.data() + std::int64_t{b} * layout.block_bytes);
    const Buffer<const std::uint8_t*> table(pointers);
    std::vector<KvSegment> segments;
    std::vector<AttentionSequence> sequences;
    for (int i = 0; i < batch; ++i) segments.push_back({table.data() + i * n_blocks, n_blocks, &layout, 0, 0, context});
    for (int i = 0; i < batch; ++i) {
      const auto at = static_cast<std::size_t>(i);
      sequences.push_back({{&segments[at], 1}, context - 1, 1, std::int64_t{i} * kHeads * kDim, i});
    }
    AttentionTiles plan;
    const int n_thread_blocks = 3 * MultiprocessorCount();
    if (MakeDecodeTiles(sequences, kHeads, kKvHeads, kDim, n_thread_blocks, &plan) != KernelStatus::kOk) return;
    const Buffer<DeviceQueryTile> tiles(plan.tiles);
    const Buffer<DeviceSegment> device_segments(plan.segments);
    const Buffer<DeviceItem> items(plan.items);
    const Buffer<std::int32_t> first_item(plan.first_item);
    const auto rows = static_cast<std::size_t>(plan.n_parts) * kDecodeTileRows;
    const Buffer<float> q(Random(1).Normals(std::int64_t{batch} * kHeads * kDim, 0.09f));
    const Buffer<float> out(rows * kDim), row_max(rows), row_sum(rows);
    const Buffer<Bf16> dst(static_cast<std::size_t>(batch * kHeads * kDim));
    const double seconds = Seconds([&] {
      DecodeAttention({q.data(), tiles.data(), device_segments.data(), items.data(), first_item.data(),
                       plan.layouts.data(), 1, n_thread_blocks, kDim, out.data(), row_max.data(), row_sum.data()},
                      nullptr);
      DecodeMerge({tiles.data(), static_cast<std::int32_t>(plan.tiles.size()), kDim, out.data(), row_max.data(),
                   row_sum.data(), dst.data(), kHeads * kDim},
                  nullptr);
    });
    Add(std::string("decode ") + profile + ", context " + std::to_string(context) + ", batch " + std::to_string(batch),
        seconds, bytes);
  }

  void Prefill(const char* profile, const std::vector<KvRun>& runs, int history, int chunk) {
    const KvBlockLayout packed = LayoutOf(kKvHeads, kDim, 64, runs, runs, IsQuantised(runs[0].bits));
    const KvBlockLayout exact = LayoutOf(kKvHeads, kDim, 64, {{16, kDim}}, {{16, kDim}}, false);
    const Buffer<std::uint8_t> old(static_cast<std::size_t>(std::max(1, history / 64)) *
                                   static_cast<std::size_t>(packed.block_bytes));
    const Buffer<std::uint8_t> fresh(static_cast<std::size_t>(chunk / 64) *
                                     static_cast<std::size_t>(exact.block_bytes));
    if (history > 0) FillBlocks(packed, history / 64, old.data());
    FillBlocks(exact, chunk / 64, fresh.data());
    std::vector<const std::uint8_t*> pointers;
    for (int b = 0; b < history / 64; ++b) pointers.push_back(old.data() + std::int64_t{b} * packed.block_bytes);
    for (int b = 0; b < chunk / 64; ++b) pointers.push_back(fresh.data() + std::int64_t{b} * exact.block_bytes);
    const Buffer<const std::uint8_t*> table(pointers);
    std::vector<KvSegment> segments;
    if (history > 0) segments.push_back({table.data(), history / 64, &packed, 0, 0, history});
    segments.push_back({table.data() + history / 64, chunk / 64, &exact, history, history, history + chunk});
    const std::vector<AttentionSequence> sequences = {{segments, history, chunk, 0, 0}};
    AttentionTiles plan;
    if (MakePrefillTiles(sequences, kHeads, kKvHeads, kDim, &plan) != KernelStatus::kOk) return;
    const Buffer<DeviceQueryTile> tiles(plan.tiles);
    const Buffer<DeviceSegment> device_segments(plan.segments);
    const Buffer<float> q(Random(2).Normals(std::int64_t{chunk} * kHeads * kDim, 0.09f));
    const Buffer<Bf16> dst(static_cast<std::size_t>(chunk * kHeads * kDim));
    const double seconds = Seconds([&] {
      PrefillAttention(
          {q.data(), tiles.data(), static_cast<std::int32_t>(plan.tiles.size()), device_segments.data(),
           plan.layouts.data(), static_cast<std::int32_t>(plan.layouts.size()), kDim, dst.data(), kHeads * kDim},
          nullptr);
    });
    const double flops = 4.0 * kDim * kHeads * chunk * (history + chunk / 2.0);
    std::printf("prefill %s, history %d, chunk %d: %.1f us, %.1f TFLOP/s\n", profile, history, chunk, 1e6 * seconds,
                1e-12 * flops / seconds);
    rows_.push_back({std::string("prefill ") + profile + ", history " + std::to_string(history) + ", chunk " +
                         std::to_string(chunk),
                     1e6 * seconds, 0, 0});
  }

  bool WriteJson(const char* path) const {
    char device[256];
    DescribeDevice(device, sizeof(device));
    std::FILE* file = std::fopen(path, "w");
    if (file == nullptr) return false;
    std::fprintf(file, "{\"device\": \"%s\", \"rows\": [", device);
    for (std::size_t i = 0; i < rows_.size(); ++i) {
      std::fprintf(file, "%s\n  {\"what\": \"%s\", \"us\": %.2f, \"gb_per_s\": %.1f, \"of_copy\": %.4f}",
                   i == 0 ? "" : ",", rows_[i].what.c_str(), rows_[i].microseconds, rows_[i].gigabytes_per_s,
                   rows_[i].of_copy);
    }
    std::fprintf(file, "\n]}\n");
    return std::fclose(file) == 0;
  }

 private:
  void Add(const std::string& what, double seconds, double bytes) {
    const double rate = bytes / seconds;
    rows_.push_back({what, 1e6 * seconds, 1e-9 * rate, rate / copy_bytes_per_s_});
    std::printf("%-44s %10.1f us %8.1f GB/s %6.1f %% of copy\n", what.c_str(), 1e6 * seconds, 1e-9 * rate,
                100.0 * rate / copy_bytes_per_s_);
  }
  static void Skip(const char* profile, int context, int batch) {
    std::printf("decode %s, context %d, batch %d: SKIPPED, more than this card's memory\n", profile, context, batch);
  }

  // Copies of one block of random rows, packed by the op.
  static void FillBlocks(const KvBlockLayout& layout, int n_blocks, std::uint8_t* data) {
    const KvBlockLayout exact = LayoutOf(kKvHeads, kDim, 64, {{16, kDim}}, {{16, kDim}}, false);
    const Buffer<float> rows(Random(7).Normals(64 * kKvHeads * kDim));
    const Buffer<std::uint8_t> block(static_cast<std::size_t>(exact.block_bytes));
    const Buffer<KvWriteBlock> place(std::vector<KvWriteBlock>{{block.data(), nullptr, 0, 0, 64}});
    KvWriteBatch({rows.data(), rows.data(), kKvHeads * kDim, place.data(), 1, {}, nullptr, &exact}, nullptr);
    std::vector<const std::uint8_t*> sources(static_cast<std::size_t>(n_blocks), block.data());
    std::vector<std::uint8_t*> targets;
    for (int b = 0; b < n_blocks; ++b) targets.push_back(data + std::int64_t{b} * layout.block_bytes);
    const Buffer<const std::uint8_t*> source_table(sources);
    const Buffer<std::uint8_t*> target_table(targets);
    KvPackBatch({source_table.data(), target_table.data(), n_blocks, &exact, &layout, 0, kKvHeads}, nullptr);
    if (const char* error = Synchronize(nullptr)) std::printf("packing: %s\n", error);
  }

  std::vector<Row> rows_;
  double copy_bytes_per_s_ = 1;
};

int Run(const char* json) {
  if (const char* why = WhyUnavailable()) {
    std::printf("SKIPPED: no GPU can be used: %s\n", why);
    return 77;
  }
  char device[256];
  DescribeDevice(device, sizeof(device));
  std::printf("%s\n", device);
  Bench bench;
  bench.MeasureCopy();
  struct Profile {
    const char* name;
    std::vector<KvRun> runs;
  };
  const std::vector<Profile> profiles = {
      {"bf16", {{16, kDim}}}, {"q4", {{4, kDim}}}, {"q3", {{3, kDim}}}, {"q2", {{2, kDim}}}};
  for (const Profile& profile : profiles) {
    for (const int context : {4096, 32768, 131072}) {
      for (const int batch : {1, 8, 64}) bench.Decode(profile.name, profile.runs, context, batch);
    }
    for (const int history : {0, 8192, 32768}) bench.Prefill(profile.name, profile.runs, history, 2048);
  }
  if (const char* error = Synchronize(nullptr)) {
    std::printf("FAILED: %s\n", error);
    return 1;
  }
  return json == nullptr || bench.WriteJson(json) ? 0 : 1;
}

}  // namespace
}  // namespace zeroc::kernels::cuda

int main(int argc, char** argv) {
  const bool with_json = argc == 3 && std::strcmp(argv[1], "--json") == 0;
  if (argc != 1 && !with_json) {
    std::fprintf(stderr, "usage: zeroc-gpu-bench [--json FILE]\n");
    return 2;
  }
  return zeroc::kernels::cuda::Run(with_json ? argv[2] : nullptr);
}
