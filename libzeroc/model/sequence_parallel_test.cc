// One prompt on several ranks, each with its own model, blocks and thread: the logits and packed blocks of one rank,
// the bytes of the formulas, and failures that end for everybody.
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <functional>
#include <thread>

#include "libzeroc/base/mutex.h"
#include "libzeroc/comm/in_process_communicator.h"
#include "libzeroc/kv/owned_pool.h"
#include "libzeroc/model/forward_testing.h"
#include "libzeroc/model/sp_step.h"
#include "libzeroc/model/sp_testing.h"
#include "libzeroc/model/tiny_model_testing.h"
#include "libzeroc/model/transformer.h"

namespace zeroc {
namespace {

using testing::BlockBytes;
using testing::MakePlan;
using testing::RankOutcome;
using testing::Rms;
using testing::RmsDifference;
using testing::RunRank;
using testing::ShareOfDifferentBytes;
using testing::TinyModel;
using testing::TinyShape;

constexpr std::chrono::milliseconds kPatience(60'000);  // a bound against hanging, not a promise

struct Outcome {
  std::vector<float> logits;       // [n_tokens, vocab]
  std::vector<BlockBytes> layers;  // of all ranks together
  std::vector<SpBytes> sent;       // [rank]
};

class Models {
 public:
  Models(const TinyModel& tiny, const kernels::Ops& ops, const std::vector<Profile>& more) : tiny_(tiny), ops_(ops) {
    plan_ = MakePlan(*Transformer::Open(tiny.Open(), nullptr, kernels::ReferenceOps(), threads_).value(), more);
  }

  Outcome OneRank(const std::string& profile, const std::vector<std::int32_t>& ids) {
    auto model = Transformer::Open(tiny_.Open(), plan_, ops_, threads_).value();
    const auto format = model->Format(profile).value();
    const int n = static_cast<int>(ids.size());
    const auto pool = OwnedPool::Create(*format, 1, n, n).value();
    const auto kv = SequenceKv::Create(pool->pool(), format, n, n).value();
    Outcome out;
    out.logits.resize(ids.size() * static_cast<std::size_t>(model->config().vocab_size));
    const ForwardSequence sequence{kv.get(), ids, n};
    EXPECT_TRUE(model->Forward({&sequence, 1}, out.logits.data()).ok());
    out.layers = testing::ReadBlocks(*kv, [](int) { return true; });
    return out;
  }

  Outcome Ranks(int n_ranks, SpScheme scheme, const std::string& profile, const std::vector<std::int32_t>& ids,
                bool all_logits = true) {
    Outcome out;
    std::vector<RankOutcome> outcomes(static_cast<std::size_t>(n_ranks));
    const auto comms = MakeInProcessCommunicators(n_ranks);
    std::vector<std::thread> ranks;
    for (std::size_t rank = 0; rank < outcomes.size(); ++rank) {
      ranks.emplace_back([&, rank] {
        ThreadPool threads(1);
        const auto model = Transformer::Open(tiny_.Open(), plan_, ops_, threads).value();
        outcomes[rank] = RunRank(*model, *comms[rank], {scheme, 1, kPatience, all_logits}, profile, ids);
        EXPECT_EQ(static_cast<double>(comms[rank]->bytes_sent()), outcomes[rank].sent.total());
      });
    }
    for (std::thread& rank : ranks) rank.join();
    for (const RankOutcome& outcome : outcomes) {
      EXPECT_TRUE(outcome.status.ok()) << outcome.status.ToString();
      out.sent.push_back(outcome.sent);
    }
    out.logits = testing::JoinLogits(outcomes, all_logits ? 0 : static_cast<int>(ids.size()) - 1);
    out.layers = testing::JoinBlocks(outcomes);
    return out;
  }

  std::shared_ptr<const KvFormat> Format(const std::string& profile) {
    return Transformer::Open(tiny_.Open(), plan_, ops_, threads_).value()->Format(profile).value();
  }

 private:
  const TinyModel& tiny_;
  const kernels::Ops& ops_;
  ThreadPool threads_{1};
  std::shared_ptr<const Plan> plan_;
};

// Two young tiers and a short exact window, so that short prompts meet every form.
Profile Tiered(const TinyShape& shape) {
  Profile profile = UniformProfile("tiered", 2, shape.n_layers, shape.head_dim);
  profile.recent_tokens = 64;
  profile.young.push_back({2, UniformProfile("8", 8, shape.n_layers, shape.head_dim).layers});
  profile.young.push_back({1, UniformProfile("4", 4, shape.n_layers, shape.head_dim).layers});
  return profile;
}

constexpr SpScheme kExactSchemes[] = {SpScheme::kAllGather, SpScheme::kRing, SpScheme::kUlysses};

TEST(SequenceParallel, LogitsAndBlocksAreThoseOfOneRank) {
  TinyShape shape;  // 4 query heads on 2 KV heads: 3 and 4 ranks are more than KV heads
  const TinyModel tiny(shape);
  Models models(tiny, kernels::ReferenceOps(), {Tiered(shape)});
  for (const int n_tokens : {330, 70, 1}) {  // 6, 2 and 1 blocks: chunks of different lengths, and none
    const auto ids = tiny.RandomIds(n_tokens, 3);
    for (const std::string profile : {"bf16", "q3", "tiered"}) {
      const Outcome one = models.OneRank(profile, ids);
      for (const int n_ranks : {1, 2, 3, 4}) {
        for (const SpScheme scheme : kExactSchemes) {
          if (n_tokens < 300 && (n_ranks == 3 || profile == "q3" || scheme == SpScheme::kRing)) continue;
          const std::string what = profile + " " + std::string(SpSchemeName(scheme)) + " ranks " +
                                   std::to_string(n_ranks) + " tokens " + std::to_string(n_tokens);
          const Outcome many = models.Ranks(n_ranks, scheme, profile, ids);
          // The first layer's keys and values come before any attention: no sum is in another order.
          EXPECT_EQ(ShareOfDifferentBytes(one.layers[0], many.layers[0]), 0) << what;
          if (n_ranks == 1 && scheme != SpScheme::kUlysses) {
            EXPECT_EQ(RmsDifference(one.logits, many.logits), 0) << what;
            EXPECT_EQ(ShareOfDifferentBytes(one.layers[1], many.layers[1]), 0) << what;
          } else {
            // float32 sums in another order; where a value stands on the border of two codes, a code may change.
            EXPECT_LT(RmsDifference(one.logits, many.logits), 1e-5 * Rms(one.logits)) << what;
            EXPECT_LT(ShareOfDifferentBytes(one.layers[1], many.layers[1], "packed"), 0.01) << what;
          }
        }
      }
    }
  }
}

TEST(SequenceParallel, RanksOnTheFastEngine) {
  TinyShape shape;
  shape.n_heads = 6, shape.n_kv_heads = 3;
  const TinyModel tiny(shape, 4);
  Models models(tiny, kernels::CpuOps(), {Tiered(shape)});
  const auto ids = tiny.RandomIds(700, 5);
  for (const std::string profile : {"bf16", "tiered"}) {
    const Outcome one = models.OneRank(profile, ids);
    for (const int n_ranks : {2, 4}) {
      for (const SpScheme scheme : {SpScheme::kAllGather, SpScheme::kUlysses}) {
        const Outcome many = models.Ranks(n_ranks, scheme, profile, ids);
        EXPECT_EQ(ShareOfDifferentBytes(one.layers[0], many.layers[0]), 0);
        // 8 bits of mantissa through a dozen roundings, some of which tip a code: as steps of other sizes on one rank.
        EXPECT_LT(RmsDifference(one.logits, many.logits), Rms(one.logits) * 12 * 0x1p-8)
            << profile << " " << SpSchemeName(scheme) << " " << n_ranks;
      }
    }
  }
}

// Mean KL(one rank || many), nats per token.
double MeanKl(const std::vector<float>& want, const std::vector<float>& got, std::size_t vocab) {
  double sum = 0;
  const auto log_softmax = [vocab](const float* row) {
    std::vector<double> out(row, row + vocab);
    const double max = *std::max_element(out.begin(), out.end());
    double total = 0;
    for (const double x : out) total += std::exp(x - max);
    for (double& x : out) x -= max + std::log(total);
    return out;
  };
  for (std::size_t at = 0; at < want.size(); at += vocab) {
    const auto p = log_softmax(want.data() + at), q = log_softmax(got.data() + at);
    for (std::size_t i = 0; i < vocab; ++i) sum += std::exp(p[i]) * (p[i] - q[i]);
  }
  return sum / (static_cast<double>(want.size()) / static_cast<double>(vocab));
}

TEST(SequenceParallel, EightBitQueriesAndOutputsCostLittle) {
  const TinyShape shape;
  const TinyModel tiny(shape);
  Models models(tiny, kernels::ReferenceOps(), {Tiered(shape)});
  const auto ids = tiny.RandomIds(400, 8);
  for (const std::string profile : {"bf16", "q3"}) {
    const Outcome one = models.OneRank(profile, ids);
    const Outcome many = models.Ranks(3, SpScheme::kUlysses8, profile, ids);
    const double kl = MeanKl(one.logits, many.logits, static_cast<std::size_t>(shape.vocab));
    EXPECT_GT(kl, 1e-9);
    EXPECT_LT(kl, 1e-3) << profile;  // the bound that docs/sequence_parallel.md states
  }
}

TEST(SequenceParallel, OnlyTheLastTokensLogits) {
  const TinyModel tiny({});
  Models models(tiny, kernels::ReferenceOps(), {});
  const auto ids = tiny.RandomIds(330, 6);
  const Outcome one = models.OneRank("q4", ids);
  const std::vector<float> last(one.logits.end() - 97, one.logits.end());
  for (const SpScheme scheme : kExactSchemes) {
    const Outcome many = models.Ranks(3, scheme, "q4", ids, /*all_logits=*/false);
    EXPECT_LT(RmsDifference(last, many.logits), 1e-5 * Rms(last)) << SpSchemeName(scheme);
    EXPECT_EQ(ShareOfDifferentBytes(one.layers[0], many.layers[0]), 0);
  }
}

// --- bytes ---

TEST(SequenceParallel, BytesAreThoseOfTheFormula) {
  TinyShape shape;
  const TinyModel tiny(shape);
  Models models(tiny, kernels::CpuOps(), {Tiered(shape)});
  const auto ids = tiny.RandomIds(2048, 2);
  for (const std::string profile : {"bf16", "q3", "tiered"}) {
    const auto format = models.Format(profile);
    for (const int n_ranks : {2, 4}) {
      for (const SpScheme scheme : {SpScheme::kAllGather, SpScheme::kRing, SpScheme::kUlysses, SpScheme::kUlysses8}) {
        if (n_ranks == 2 && (scheme == SpScheme::kRing || profile != "tiered")) continue;
        const Outcome many = models.Ranks(n_ranks, scheme, profile, ids);
        const SpBytes want = PredictSpBytes(scheme, *format, shape.n_heads, 2048, n_ranks, 2, true);
        SpBytes mean;
        for (const SpBytes& sent : many.sent) {
          mean.blocks += sent.blocks / n_ranks;
          mean.windows += sent.windows / n_ranks;
          mean.queries += sent.queries / n_ranks;
          mean.outputs += sent.outputs / n_ranks;
        }
        const std::string what =
            profile + " " + std::string(SpSchemeName(scheme)) + " ranks " + std::to_string(n_ranks);
        EXPECT_NEAR(mean.blocks, want.blocks, want.blocks * 0.02) << what;
        EXPECT_NEAR(mean.queries, want.queries, want.queries * 0.001) << what;
        EXPECT_NEAR(mean.outputs, want.outputs, want.outputs * 0.001) << what;
        EXPECT_NEAR(mean.total(), want.total(), want.total() * 0.02) << what;
      }
    }
  }
}

// The exchange alone, at the size of a large model: blocks of zeros, one query at the prompt's end.
std::vector<double> BytesSent(SpScheme scheme, int n_ranks, const std::shared_ptr<const KvFormat>& format, int n_heads,
                              int n_tokens) {
  const SpSplit split(n_tokens, n_ranks);
  const auto comms = MakeInProcessCommunicators(n_ranks);
  const AttentionShape shape{n_heads, format->n_kv_heads, format->head_dim};
  std::vector<double> sent(static_cast<std::size_t>(n_ranks));
  std::vector<std::thread> ranks;
  for (int rank = 0; rank < n_ranks; ++rank) {
    ranks.emplace_back([&, rank] {
      ThreadPool threads(1);
      AttentionWorkspace workspace(kernels::CpuOps(), threads);
      const auto pool = OwnedPool::Create(*format, 1, n_tokens, n_tokens).value();
      const auto kv = SequenceKv::CreateShare(pool->pool(), format, split, rank).value();
      SpStep step(*comms[static_cast<std::size_t>(rank)], {scheme, 1, kPatience}, *kv, split);
      kv->BeginStep(n_tokens);
      const auto width = static_cast<std::size_t>(n_heads * format->head_dim);
      const std::vector<float> q(width);
      std::vector<std::uint16_t> out(width);
      std::vector<AttentionQueries> queries;
      if (rank == 0) queries.push_back({kv.get(), n_tokens - 1, 1, q.data(), out.data()});
      for (int layer = 0; layer < format->n_layers; ++layer) {
        step.OnLayerWritten(layer, shape);
        EXPECT_TRUE(step.Attend(layer, false, shape, 2, queries, threads, workspace).ok());
      }
      EXPECT_TRUE(step.Finish().ok());
      sent[static_cast<std::size_t>(rank)] = step.sent().total();
    });
  }
  for (std::thread& rank : ranks) rank.join();
  return sent;
}

TEST(SequenceParallel, PackedBlocksOfALongPromptAreFourAndAHalfTimesSmaller) {
  // A layer of Llama-3.1-8B, of which two KV heads and their queries: the ratio does not depend on the number.
  const ModelGeometry geometry{1, 8, 2, 128, 1024};
  const auto make = [&](int bits) {
    return std::shared_ptr<const KvFormat>(
        KvFormat::FromProfile(geometry, UniformProfile("p", bits, 1, 128), 16).value());
  };
  const auto q3 = make(3), bf16 = make(16);
  for (const int n_ranks : {2, 4}) {
    for (const SpScheme scheme : {SpScheme::kAllGather, SpScheme::kRing}) {
      const auto packed = BytesSent(scheme, n_ranks, q3, 8, 32768), exact = BytesSent(scheme, n_ranks, bf16, 8, 32768);
      double sum_packed = 0, sum_exact = 0;
      for (std::size_t rank = 0; rank < packed.size(); ++rank) {
        EXPECT_GT(exact[rank] / packed[rank], 4.5) << SpSchemeName(scheme) << " rank " << rank;
        sum_packed += packed[rank];
        sum_exact += exact[rank];
      }
      const double want = PredictSpBytes(scheme, *q3, 8, 32768, n_ranks, 2, true).total();
      EXPECT_NEAR(sum_packed / n_ranks, want, want * 0.02);
      const double want_exact = PredictSpBytes(scheme, *bf16, 8, 32768, n_ranks, 2, true).total();
      EXPECT_NEAR(sum_exact / n_ranks, want_exact, want_exact * 0.02);
    }
  }
}

// --- failures ---

// A rank of three ends, or says nothing any more, when it has sent the blocks of a layer: the others' passes end with
// its reason, or at their deadline.
TEST(SequenceParallel, ARankThatFailsEndsThePassOfAll) {
  TinyShape shape;
  shape.n_layers = 3;  // the last layer's blocks are nobody's any more
  const TinyModel tiny(shape);
  ThreadPool threads(1);
  const auto plan = MakePlan(*Transformer::Open(tiny.Open(), nullptr, kernels::ReferenceOps(), threads).value());
  const auto ids = tiny.RandomIds(500, 3);
  for (const SpScheme scheme : kExactSchemes) {
    for (const int layer : {0, 1}) {
      for (const bool silent : {false, true}) {
        if (silent && (layer == 0 || scheme != SpScheme::kAllGather)) continue;
        if (!silent && layer == 0 && scheme == SpScheme::kRing) continue;
        const SpSplit split(500, 3);
        auto comms = MakeInProcessCommunicators(3);
        std::vector<std::thread> ranks;
        std::atomic<int> n_ended = 0;
        for (int rank = 0; rank < 3; ++rank) {
          ranks.emplace_back([&, rank] {
            ThreadPool own(1);
            auto model = Transformer::Open(tiny.Open(), plan, kernels::ReferenceOps(), own).value();
            const auto format = model->Format("q3").value();
            const auto pool = OwnedPool::Create(*format, 1, 500, 500).value();
            Communicator& comm = *comms[static_cast<std::size_t>(rank)];
            {
              const auto kv = SequenceKv::CreateShare(pool->pool(), format, split, rank).value();
              const auto patience = silent ? std::chrono::milliseconds(300) : kPatience;
              SpStep step(comm, {scheme, 1, patience}, *kv, split);
              struct Fail : ForwardObserver {
                Communicator* comm = nullptr;
                int at = -1;
                bool silent = false;
                std::atomic<int>* n_ended = nullptr;
                void OnLayerWritten(int layer_idx) override {
                  if (layer_idx != at) return;
                  if (!silent) return comm->Abort(Internal("the disk is gone"));
                  while (*n_ended < 2) std::this_thread::yield();  // as a stopped process does
                }
              } fail;
              fail.comm = &comm;
              fail.at = rank == 1 ? layer : -1;
              fail.silent = silent;
              fail.n_ended = &n_ended;
              std::vector<float> logits(97);
              const ForwardSequence sequence{kv.get(), ids, step.CountLogits(), nullptr, &step};
              const Status status = model->Forward({&sequence, 1}, logits.data(), &fail);
              ++n_ended;
              EXPECT_FALSE(status.ok());
              EXPECT_EQ(status.code(), silent ? StatusCode::kDeadlineExceeded : StatusCode::kInternal)
                  << status.ToString();
            }
            EXPECT_EQ(pool->pool().usage().n_blocks_used, 0U);
            // The model is as good as new.
            EXPECT_FALSE(testing::RunChunks(*model, "q3", {ids.begin(), ids.begin() + 10}, {10}).empty());
          });
        }
        for (std::thread& rank : ranks) rank.join();
      }
    }
  }
}

}  // namespace
}  // namespace zeroc
