// No float copy of packed history exists: while a long prompt is prefilled and decoded under a packing profile, the
// process's peak resident memory grows by the packed bytes and the exact windows, and by little else. A bf16 copy of
// one layer's history would already break the bound.
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdio>
#include <fstream>
#include <random>
#include <string>

#include "libzeroc/kv/owned_pool.h"
#include "libzeroc/model/transformer.h"

namespace zeroc {
namespace {

constexpr char kModel[] = "models/zeroc-demo";
constexpr int kChunk = 512;

// VmHWM or VmRSS of this process, bytes.
std::int64_t Status(const std::string& field) {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.rfind(field + ":", 0) == 0) return std::stoll(line.substr(field.size() + 1)) * 1024;
  }
  return -1;
}

// Starts a new peak. False where the kernel does not allow it.
bool ResetPeak() {
  std::ofstream clear("/proc/self/clear_refs");
  clear << "5" << std::flush;
  return clear.good();
}

std::vector<std::int32_t> RandomIds(int n) {
  std::mt19937 rng(1);
  std::vector<std::int32_t> ids(static_cast<std::size_t>(n));
  for (auto& id : ids) id = static_cast<std::int32_t>(rng() % 4000);
  return ids;
}

void Prefill(Transformer& model, SequenceKv& kv, std::span<const std::int32_t> ids, float* logits) {
  for (std::size_t begin = 0; begin < ids.size(); begin += kChunk) {
    const std::size_t n = std::min<std::size_t>(kChunk, ids.size() - begin);
    const ForwardSequence sequence{&kv, ids.subspan(begin, n), begin + n == ids.size() ? 1 : 0};
    ASSERT_TRUE(model.Forward({&sequence, 1}, logits).ok());
  }
}

TEST(PackedHistoryMemoryTest, PeakIsPackedBytesAndWindows) {
  std::shared_ptr<const Checkpoint> checkpoint = std::move(Checkpoint::Open(kModel)).value();
  auto opened = Plan::Open(std::string(kModel) + "/zeroc.plan", *checkpoint);
  ASSERT_TRUE(opened.ok()) << opened.status().ToString();
  const auto plan = std::make_shared<const Plan>(std::move(opened).value());
  ThreadPool threads(2);
  const auto model = Transformer::Open(checkpoint, plan, kernels::CpuOps(), threads).value();
  const int n = static_cast<int>(model->config().max_positions);
  const auto ids = RandomIds(n);
  std::vector<float> logits(static_cast<std::size_t>(model->config().vocab_size));
  const auto bf16 = model->Format("bf16").value();
  for (const char* profile : {"q8", "q4", "q3", "q2"}) {
    const auto format = model->Format(profile).value();
    const auto pool = OwnedPool::Create(*format, 1, n, kChunk).value();
    {
      // Every buffer of the engine grows to its size for this chunk length; the caches of short prompts are a few
      // blocks.
      const auto warm = SequenceKv::Create(pool->pool(), format, n, kChunk).value();
      Prefill(*model, *warm, std::span(ids).first(2 * kChunk + 100), logits.data());
      const ForwardSequence step{warm.get(), {ids.data(), 1}, 1};
      ASSERT_TRUE(model->Forward({&step, 1}, logits.data()).ok());
    }
    const auto kv = SequenceKv::Create(pool->pool(), format, n, kChunk).value();
    if (!ResetPeak()) GTEST_SKIP() << "/proc/self/clear_refs is not writable here";
    const std::int64_t before = Status("VmRSS");
    Prefill(*model, *kv, std::span(ids).first(static_cast<std::size_t>(n - 64)), logits.data());
    for (int i = n - 64; i < n; ++i) {
      const ForwardSequence step{kv.get(), {&ids[static_cast<std::size_t>(i)], 1}, 1};
      ASSERT_TRUE(model->Forward({&step, 1}, logits.data()).ok());
    }
    const std::int64_t grown = Status("VmHWM") - before;
    const auto reserved = static_cast<std::int64_t>(SequenceKv::BytesNeeded(*format, n, kChunk));
    const auto one_layer_bf16 =
        static_cast<std::int64_t>(SequenceKv::BytesNeeded(*bf16, n, kChunk)) / model->config().n_layers;
    std::printf("%s: peak grew by %ld KiB, reserved %ld KiB, one layer's history in bf16 %ld KiB\n", profile,
                static_cast<long>(grown / 1024), static_cast<long>(reserved / 1024),
                static_cast<long>(one_layer_bf16 / 1024));
    // Blocks may touch pages beside them: allow a quarter of one layer's bf16 history, less than any copy would take.
    EXPECT_LT(grown, reserved + one_layer_bf16 / 4) << profile;
    EXPECT_GT(grown, static_cast<std::int64_t>(kv->HeldBytes()) / 4) << "the cache itself must show in the measurement";
  }
}

}  // namespace
}  // namespace zeroc
