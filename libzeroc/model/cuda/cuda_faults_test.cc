// How strong the checks of the forward pass on a device are: on the emulation, every launch is lost once.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>

#include "kernels/cuda/host_simt/queue.h"
#include "libzeroc/kv/kv_snapshot.h"
#include "libzeroc/model/cuda/cuda_testing.h"

namespace zeroc {
namespace {

namespace simt = kernels::cuda::simt;
using testing::Backends;
using testing::DeviceTestShape;
using testing::ExactRows;
using testing::Lane;
using testing::PackedTolerance;
using testing::PackWatcher;
using testing::RandomIds;
using testing::Rms;
using testing::RmsDifference;
using testing::RunChunks;
using testing::TinyModel;

// Of the tokens from n_before on that were not packed at once.
std::vector<float> NewRows(const SequenceKv& kv, int n_before) {
  return ExactRows(kv, std::max(n_before, 64 * kv.format().PackedBlocksAt(kv.n_tokens())), kv.n_tokens());
}

// A step from a state that is the same every time, in an arena whose other bytes are no numbers.
class LossyStep {
 public:
  LossyStep(Transformer& model, const std::string& profile, int n_before, int n_new)
      : model_(model),
        format_(model.Format(profile).value()),
        ids_(RandomIds(n_before + n_new, model.config().vocab_size, 6)),
        n_before_(n_before) {
    const auto bytes = SequenceKv::BytesNeeded(*format_, n_tokens(), n_tokens());
    arena_ = model.kv_memory().Allocate((bytes / kSlab + 20) * kSlab).value();
    pool_ = BlockPool::Create(arena_, kSlab, model.kv_memory()).value();
    const auto kv = NewSequence();
    const ForwardSequence before{kv.get(), std::span(ids_).first(static_cast<std::size_t>(n_before)), 0};
    EXPECT_TRUE(model.Forward({&before, 1}, nullptr).ok());
    state_ = KvSnapshot::Take(*kv).value();
  }
  ~LossyStep() {
    kv_.reset();
    pool_.reset();
    model_.kv_memory().Free(arena_);
  }

  // What the step should give, after the same tokens before: on a model in host memory.
  struct Expected {
    std::vector<float> logits;  // of the reference
    std::vector<float> exact;   // keys and values of the new tokens, of the CPU's table
  };

  // The step with one launch lost (-1: none). False if the logits, or the keys and values of the new tokens, are
  // further than `tolerance` from what is expected, or a block was not packed as the reference does.
  bool IsGood(std::int64_t lost, const Expected& expected, double tolerance) {
    // Other tokens first: what a lost launch leaves in the buffers must not be what it would have written.
    Run(RandomIds(n_tokens(), model_.config().vocab_size, 7), -1, nullptr);
    PackWatcher watcher({});
    const std::vector<float> logits = Run(ids_, lost, &watcher);
    const std::vector<float> exact = NewRows(*kv_, n_before_);
    return RmsDifference(logits, expected.logits) <= tolerance * Rms(expected.logits) &&
           RmsDifference(exact, expected.exact) <= tolerance * Rms(expected.exact) && watcher.CountWrong() == 0;
  }
  std::int64_t CountLaunches() {
    Run(ids_, -1, nullptr);
    return n_launches_;
  }
  const std::vector<std::int32_t>& ids() const { return ids_; }

 private:
  static constexpr std::size_t kSlab = 64 << 10;

  int n_tokens() const { return static_cast<int>(ids_.size()); }
  std::unique_ptr<SequenceKv> NewSequence() {
    return SequenceKv::Create(*pool_, format_, n_tokens(), n_tokens()).value();
  }

  std::vector<float> Run(const std::vector<std::int32_t>& ids, std::int64_t lost, PackWatcher* watcher) {
    const std::vector<std::byte> poison(arena_.size(), std::byte{0xff});
    const KvCopy all{arena_.data(), poison.data(), poison.size()};
    EXPECT_TRUE(model_.kv_memory().Write({&all, 1}).ok());
    kv_.reset();
    kv_ = NewSequence();
    EXPECT_TRUE(state_.Restore(*kv_).ok());
    const auto n_new = ids.size() - static_cast<std::size_t>(n_before_);
    std::vector<float> logits(n_new * static_cast<std::size_t>(model_.config().vocab_size), std::nanf(""));
    const ForwardSequence step{kv_.get(), std::span(ids).last(n_new), static_cast<int>(n_new)};
    if (watcher != nullptr) *watcher = PackWatcher({kv_.get()});
    simt::LoseWork(lost);
    const Status status = model_.Forward({&step, 1}, logits.data(), watcher);
    n_launches_ = simt::CountWork();
    simt::LoseWork(-1);
    EXPECT_TRUE(status.ok()) << status.ToString();
    return logits;
  }

  Transformer& model_;
  std::shared_ptr<const KvFormat> format_;
  std::vector<std::int32_t> ids_;
  int n_before_;
  std::span<std::byte> arena_;
  std::unique_ptr<BlockPool> pool_;
  KvSnapshot state_;
  std::unique_ptr<SequenceKv> kv_;
  std::int64_t n_launches_ = 0;
};

LossyStep::Expected Expect(const Backends& models, const std::string& profile, const std::vector<std::int32_t>& ids,
                           int n_before) {
  const int n_new = static_cast<int>(ids.size()) - n_before;
  LossyStep::Expected expected{RunChunks(*models.ref, profile, ids, {n_before, n_new}), {}};
  expected.logits.erase(expected.logits.begin(),
                        expected.logits.begin() + std::ptrdiff_t{n_before} * models.ref->config().vocab_size);
  const Lane lane(*models.cpu, profile, ids);
  for (const int n : {n_before, n_new}) {
    const ForwardSequence step = lane.Next(n, 0);
    EXPECT_TRUE(models.cpu->Forward({&step, 1}, nullptr).ok());
  }
  expected.exact = NewRows(*lane.kv, n_before);
  return expected;
}

// What the tests of the forward pass look at is enough: a step that loses any one of its launches fails. The steps
// move blocks into every tier, from what they write themselves and from earlier steps, and take the sink.
TEST(CudaFaultsTest, EveryLostLaunchIsNoticed) {
  const TinyModel tiny(DeviceTestShape(), 8);
  const Backends models(tiny.dir());
  const double tolerance = PackedTolerance(static_cast<int>(models.ref->config().n_layers), 2);
  std::int64_t n_all = 0;
  struct Case {
    const char* profile;
    int n_before, n_new;
  };
  for (const auto& [profile, n_before, n_new] : {Case{"z0", 62, 4}, {"z0", 190, 3}, {"z70", 133, 2}}) {
    LossyStep step(*models.device, profile, n_before, n_new);
    const LossyStep::Expected expected = Expect(models, profile, step.ids(), n_before);
    EXPECT_TRUE(step.IsGood(-1, expected, tolerance)) << profile << " at " << n_before;
    const std::int64_t n = step.CountLaunches();
    for (std::int64_t i = 0; i < n; ++i) {
      EXPECT_FALSE(step.IsGood(i, expected, tolerance)) << profile << " at " << n_before << ": launch " << i;
    }
    n_all += n;
  }
  std::printf("[   faults  ] %lld launches\n", static_cast<long long>(n_all));
}

}  // namespace
}  // namespace zeroc
