// One prompt on several ranks, each with a model of its own on the emulated device, over NCCL's twin: the bytes and the
// logits of one rank; and what happens when one of them ends. On a GPU: cuda_group_processes_test.cc.
#include <gtest/gtest.h>

#include <chrono>
#include <cmath>
#include <cstdio>
#include <memory>
#include <thread>
#include <vector>

#include "libzeroc/comm/in_process_communicator.h"
#include "libzeroc/comm/nccl/nccl_communicator.h"
#include "libzeroc/model/cuda/cuda_testing.h"
#include "libzeroc/model/sp_testing.h"

namespace zeroc {
namespace {

using testing::BlockBytes;
using testing::DeviceTestShape;
using testing::MakePlan;
using testing::PackedTolerance;
using testing::RandomIds;
using testing::RankOutcome;
using testing::Rms;
using testing::RmsDifference;
using testing::RunChunks;
using testing::RunRank;
using testing::ShareOfDifferentBytes;
using testing::TinyModel;
using testing::ZProfile;

constexpr std::chrono::milliseconds kPatience(60'000);  // a bound against hanging, not a promise

class CudaSequenceParallel : public ::testing::Test {
 protected:
  CudaSequenceParallel() : tiny_(DeviceTestShape(), 11), checkpoint_(Checkpoint::Open(tiny_.dir()).value()) {
    ref_ = Transformer::Open(checkpoint_, nullptr, kernels::ReferenceOps(), threads_).value();
    plan_ = MakePlan(*ref_, {ZProfile(GeometryOf(checkpoint_->config()), 0)});
    ref_ = Transformer::Open(checkpoint_, plan_, kernels::ReferenceOps(), threads_).value();
  }

  std::unique_ptr<Transformer> OpenDevice() const { return OpenCudaTransformer(checkpoint_, plan_).value(); }
  std::vector<std::int32_t> Ids(int n) const { return RandomIds(n, checkpoint_->config().vocab_size, 3); }
  int n_layers() const { return static_cast<int>(checkpoint_->config().n_layers); }

  RankOutcome OneRank(const std::string& profile, const std::vector<std::int32_t>& ids) const {
    const auto model = OpenDevice();
    const auto format = model->Format(profile).value();
    const int n = static_cast<int>(ids.size());
    const auto pool = OwnedPool::Create(*format, 1, n, n, model->kv_memory()).value();
    const auto kv = SequenceKv::Create(pool->pool(), format, n, n).value();
    RankOutcome out;
    out.logits.resize(ids.size() * static_cast<std::size_t>(model->config().vocab_size));
    const ForwardSequence sequence{kv.get(), ids, n};
    out.status = model->Forward({&sequence, 1}, out.logits.data());
    out.layers = testing::ReadBlocks(*kv, [](int) { return true; });
    return out;
  }

  // Every rank on a thread. over_nccl: else over host memory, which the emulated device's is.
  std::vector<RankOutcome> Ranks(int n_ranks, const SpOptions& options, const std::string& profile,
                                 const std::vector<std::int32_t>& ids, bool over_nccl = true,
                                 const std::function<void(int rank, int layer, Communicator&)>& on_layer = {}) const {
    auto comms = MakeInProcessCommunicators(n_ranks);
    std::vector<RankOutcome> outcomes(static_cast<std::size_t>(n_ranks));
    std::vector<std::thread> ranks;
    for (std::size_t rank = 0; rank < outcomes.size(); ++rank) {
      ranks.emplace_back([&, rank] {
        std::unique_ptr<Communicator>& comm = comms[rank];  // goes when all are through: who leaves ends the group
        if (over_nccl) {
          comm = MakeNcclCommunicator(std::move(comm), std::chrono::steady_clock::now() + kPatience).value();
        }
        struct Observer : ForwardObserver {
          std::function<void(int)> call;
          void OnLayerWritten(int layer) override { call(layer); }
        } observer;
        if (on_layer) observer.call = [&](int layer) { on_layer(static_cast<int>(rank), layer, *comm); };
        const auto model = OpenDevice();
        outcomes[rank] = RunRank(*model, *comm, options, profile, ids, on_layer ? &observer : nullptr);
        EXPECT_EQ(outcomes[rank].n_blocks_left, 0U);
        const bool good = outcomes[rank].status.ok();
        if (good) {
          EXPECT_EQ(static_cast<double>(comm->bytes_sent()), outcomes[rank].sent.total());
        } else {  // the model is as good as new
          EXPECT_FALSE(RunChunks(*model, profile, {ids.begin(), ids.begin() + 5}, {5}).empty());
        }
      });
    }
    for (std::thread& rank : ranks) rank.join();
    return outcomes;
  }

  void ExpectOneRanks(const RankOutcome& one, const std::vector<RankOutcome>& many, const std::string& what) const {
    for (const RankOutcome& rank : many) ASSERT_TRUE(rank.status.ok()) << what << ": " << rank.status.ToString();
    const std::vector<BlockBytes> layers = testing::JoinBlocks(many);
    ASSERT_EQ(layers.size(), one.layers.size());
    EXPECT_EQ(layers[0].empty(), one.logits.size() < 64 * static_cast<std::size_t>(ref_->config().vocab_size)) << what;
    for (std::size_t l = 0; l < layers.size(); ++l) {
      EXPECT_EQ(ShareOfDifferentBytes(one.layers[l], layers[l]), 0) << what << ", layer " << l;
    }
    const std::vector<float> logits = testing::JoinLogits(many, 0);
    ASSERT_EQ(logits.size(), one.logits.size());
    EXPECT_LT(RmsDifference(one.logits, logits), PackedTolerance(n_layers(), 2) * Rms(one.logits)) << what;
  }

  const TinyModel tiny_;
  ThreadPool threads_{1};
  const std::shared_ptr<const Checkpoint> checkpoint_;
  std::shared_ptr<const Plan> plan_;
  std::unique_ptr<Transformer> ref_;
};

// Blocks in every form, chunks of different lengths, more chunks than blocks, a rank without tokens, one token.
TEST_F(CudaSequenceParallel, BlocksAndLogitsAreThoseOfOneRank) {
  struct Case {
    int n_tokens, n_ranks;
    SpScheme scheme;
    bool over_nccl = true;
  };
#ifdef __SANITIZE_ADDRESS__
  const std::vector<Case> cases = {{131, 3, SpScheme::kRing}, {1, 2, SpScheme::kAllGather}};  // a fiber costs it much
#else
  const std::vector<Case> cases = {{330, 1, SpScheme::kAllGather}, {330, 2, SpScheme::kAllGather},
                                   {330, 3, SpScheme::kRing},      {131, 3, SpScheme::kAllGather},
                                   {131, 2, SpScheme::kRing},      {131, 3, SpScheme::kRing, false},
                                   {1, 2, SpScheme::kAllGather}};
#endif
  int n_last = 0;
  RankOutcome one;
  for (const auto& [n_tokens, n_ranks, scheme, over_nccl] : cases) {
    const auto ids = Ids(n_tokens);
    if (n_tokens != std::exchange(n_last, n_tokens)) {
      one = OneRank("z0", ids);
      const auto want = RunChunks(*ref_, "z0", ids, {n_tokens});
      EXPECT_LT(RmsDifference(one.logits, want), PackedTolerance(n_layers(), 2) * Rms(want));
    }
    const auto many = Ranks(n_ranks, {scheme, 1, kPatience, /*all_logits=*/true}, "z0", ids, over_nccl);
    ExpectOneRanks(one, many,
                   std::string(SpSchemeName(scheme)) + " ranks " + std::to_string(n_ranks) + " tokens " +
                       std::to_string(n_tokens) + (over_nccl ? "" : " over host memory"));
  }
}

TEST_F(CudaSequenceParallel, OnlyTheLastTokensLogits) {
  const auto ids = Ids(200);
  const RankOutcome one = OneRank("q4", ids);
  const auto many = Ranks(2, {SpScheme::kRing, 1, kPatience}, "q4", ids);
  ASSERT_TRUE(many[0].status.ok() && many[1].status.ok());
  EXPECT_TRUE(many[1].logits.empty());
  const std::vector<float> last(one.logits.end() - std::ssize(many[0].logits), one.logits.end());
  EXPECT_LT(RmsDifference(last, many[0].logits), PackedTolerance(n_layers(), 4) * Rms(last));
  const std::vector<BlockBytes> layers = testing::JoinBlocks(many);
  for (std::size_t l = 0; l < layers.size(); ++l) EXPECT_EQ(ShareOfDifferentBytes(one.layers[l], layers[l]), 0);
}

TEST_F(CudaSequenceParallel, ARankThatFailsEndsThePassOfAll) {
#ifdef __SANITIZE_ADDRESS__
  const std::vector<SpScheme> schemes = {SpScheme::kRing};
#else
  const std::vector<SpScheme> schemes = {SpScheme::kAllGather, SpScheme::kRing};
#endif
  for (const SpScheme scheme : schemes) {
    const auto fail = [](int rank, int layer, Communicator& comm) {
      if (rank == 1 && layer == 0) comm.Abort(Internal("the disk is gone"));
    };
    for (const RankOutcome& rank : Ranks(3, {scheme, 1, kPatience}, "q4", Ids(140), true, fail)) {
      EXPECT_EQ(rank.status.code(), StatusCode::kInternal) << rank.status.ToString();
      EXPECT_NE(rank.status.ToString().find("the disk is gone"), std::string::npos) << rank.status.ToString();
    }
  }
}

// As a process that is stopped: it closes nothing, and says nothing.
TEST_F(CudaSequenceParallel, ARankThatSaysNothingEndsThePassOfAllInTime) {
  const auto stop = [](int rank, int layer, Communicator& comm) {
    while (rank == 1 && layer == 0 && comm.Check().ok()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  };
  constexpr std::chrono::milliseconds kShort(500);
  for (const RankOutcome& rank : Ranks(2, {SpScheme::kAllGather, 1, kShort}, "q4", Ids(140), true, stop)) {
    EXPECT_EQ(rank.status.code(), StatusCode::kDeadlineExceeded) << rank.status.ToString();
  }
}

TEST_F(CudaSequenceParallel, WhatItDoesNotTakeIsAnError) {
  const auto outcomes = Ranks(1, {SpScheme::kUlysses, 1, kPatience}, "q4", Ids(20));
  EXPECT_EQ(outcomes[0].status.code(), StatusCode::kUnimplemented);
  EXPECT_NE(outcomes[0].status.ToString().find("ulysses"), std::string::npos) << outcomes[0].status.ToString();
  const auto comm =
      MakeNcclCommunicator(std::move(MakeInProcessCommunicators(1)[0]), std::chrono::steady_clock::now() + kPatience)
          .value();
  const auto on_host = RunRank(*ref_, *comm, {SpScheme::kAllGather, 1, kPatience}, "q4", Ids(20));
  EXPECT_EQ(on_host.status.code(), StatusCode::kFailedPrecondition) << on_host.status.ToString();
}

}  // namespace
}  // namespace zeroc
