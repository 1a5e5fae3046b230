// Shared by the engines' tests: listeners that remember, and both engines' fixture over the tiny model.
#pragma once

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <span>
#include <vector>

#include "libzeroc/engine/decode_engine.h"
#include "libzeroc/engine/local_generator.h"
#include "libzeroc/engine/prefill_engine.h"
#include "libzeroc/kv/owned_pool.h"
#include "libzeroc/model/tiny_model_testing.h"

namespace zeroc::testing {

struct PrefillLog : PrefillListener {
  void OnBlocksReady(const SequenceKv&, const ReadyBlocks& ready) override {
    for (const BlockRange& range : ready.packed) {
      for (int b = range.begin; b < range.end; ++b) {
        EXPECT_TRUE(packed[ready.layer].insert(b).second) << "blocks are announced once";
      }
    }
    sinks[ready.layer] += ready.sink ? 1 : 0;
    auto& n_exact = exact[ready.layer];
    EXPECT_EQ(ready.exact_begin, n_exact) << "blocks are announced once, in order";
    EXPECT_GE(ready.exact_end, ready.exact_begin);
    n_exact = ready.exact_end;
    exact_at_call.push_back(n_exact);
  }
  void OnFirstToken(const SequenceKv& sequence, const SampledToken& sampled) override {
    kv = &sequence;
    token = sampled;
  }
  void OnFailed(const Status& s) override { status = s; }

  std::map<int, std::set<int>> packed;
  std::map<int, int> sinks, exact;
  std::vector<int> exact_at_call;  // exact blocks announced so far, one entry for each call
  const SequenceKv* kv = nullptr;
  SampledToken token;
  Status status;
};

struct DecodeLog : DecodeListener {
  void OnToken(const SampledToken& token) override { ids.push_back(token.id); }
  void OnFinished(FinishReason r) override {
    ++n_finished;
    reason = r;
  }
  void OnFailed(const Status& s) override { status = s; }

  std::vector<std::int32_t> ids;
  int n_finished = 0;
  FinishReason reason = FinishReason::kStop;
  Status status;
};

// A pool of so many bytes, in slabs small enough that a test can fill it to the brim.
class TightPool {
 public:
  explicit TightPool(std::uint64_t bytes) : memory_(bytes + kSlab + 64) {
    void* start = memory_.data();
    std::size_t left = memory_.size();
    auto* arena = static_cast<std::byte*>(std::align(64, bytes, start, left));
    pool_ = BlockPool::Create({arena, (bytes + kSlab - 1) / kSlab * kSlab}, kSlab).value();
  }
  BlockPool& pool() { return *pool_; }

 private:
  static constexpr std::size_t kSlab = 16 << 10;
  std::vector<std::byte> memory_;
  std::unique_ptr<BlockPool> pool_;
};

class EnginesTest : public ::testing::Test {
 protected:
  // One thread: a step is so short that a team of them waits for each other most of the time on a busy machine.
  explicit EnginesTest(int n_threads = 1) : tiny_({}), threads_(n_threads) {
    model_ = Transformer::Open(tiny_.Open(), nullptr, kernels::ReferenceOps(), threads_).value();
    plain_ = model_->Format("none").value();
    // A 4-bit profile with two younger tiers and identity maps: packs without a calibration.
    const ModelGeometry geometry = GeometryOf(model_->config());
    const auto uniform = [&](int bits) {
      return UniformProfile("packing", bits, geometry.n_layers, geometry.head_dim);
    };
    Profile profile = uniform(4);
    profile.recent_tokens = 20;
    profile.young = {{1, uniform(8).layers}, {2, uniform(3).layers}};
    auto format = KvFormat::FromProfile(geometry, profile, 32).value();
    std::vector<float> identity;
    for (int g = 0; g < geometry.n_kv_heads; ++g) {
      for (int i = 0; i < geometry.head_dim * geometry.head_dim; ++i) {
        identity.push_back(i % (geometry.head_dim + 1) == 0 ? 1.0f : 0.0f);
      }
    }
    format->k_map.assign(static_cast<std::size_t>(geometry.n_layers), identity);
    format->q_map = format->k_map;
    packing_ = format;
  }

  static SamplingParams Sampling(int max_tokens, float temperature = 0) {
    SamplingParams sampling;
    sampling.max_tokens = max_tokens;
    sampling.temperature = temperature;
    sampling.seed = 5;
    sampling.ignore_eos = true;
    return sampling;
  }

  std::unique_ptr<OwnedPool> Pool(int n_sequences, int max_tokens) {
    return OwnedPool::Create(*packing_, n_sequences, max_tokens, 512).value();
  }

  // A prompt computed elsewhere, until the wire has it.
  struct Prefilled {
    std::unique_ptr<OwnedPool> pool;
    PrefillLog log;
    std::unique_ptr<PrefillEngine> engine;
  };
  std::unique_ptr<Prefilled> Prefill(const std::shared_ptr<const KvFormat>& format,
                                     const std::vector<std::int32_t>& prompt, const SamplingParams& sampling) {
    auto made = std::make_unique<Prefilled>();
    made->pool = Pool(1, static_cast<int>(prompt.size()) + 512);
    made->engine = std::make_unique<PrefillEngine>(*model_, made->pool->pool(),
                                                   PrefillEngine::Options{.chunk_tokens = 512, .queue_max = 1});
    EXPECT_TRUE(made->engine->Submit({prompt, sampling, format, &made->log}).ok());
    while (made->engine->Step()) {
    }
    return made;
  }
  // The whole way of a reserved sequence into the batch.
  void Fill(DecodeEngine& decode, SequenceId id, const std::shared_ptr<const KvFormat>& format,
            const std::vector<std::int32_t>& prompt, const SamplingParams& sampling, DecodeLog* log) {
    const auto prefilled = Prefill(format, prompt, sampling);
    const int n = static_cast<int>(prompt.size());
    ASSERT_NE(prefilled->log.kv, nullptr);
    CopyPrompt(*prefilled->log.kv, *decode.kv(id), n);
    log->ids.push_back(prefilled->log.token.id);
    const Status status = decode.Admit(id, {sampling, prompt, n, prefilled->log.token, log});
    ASSERT_TRUE(status.ok()) << status.ToString();
  }

  // What the wire does, by memcpy, to the blocks that `wants` (null: to all).
  void CopyPrompt(const SequenceKv& from, const SequenceKv& to, int n_tokens,
                  const std::function<bool(BlockRef)>& wants = nullptr) {
    const auto copy = [&](BlockRef a, BlockRef b, std::int32_t bytes) {
      if (wants != nullptr && !wants(b)) return;
      std::memcpy(to.pool().Data(b), from.pool().Data(a), static_cast<std::size_t>(bytes));
    };
    const KvFormat& format = from.format();
    for (int layer = 0; layer < format.n_layers; ++layer) {
      const LayerBlocks a = from.BlocksAt(layer, n_tokens), b = to.BlocksAt(layer, n_tokens);
      ASSERT_EQ(a.packed.size(), b.packed.size());
      ASSERT_EQ(a.exact.size(), b.exact.size());
      for (std::size_t tier = 0; tier < a.packed.size(); ++tier) {
        ASSERT_EQ(a.packed[tier].refs.size(), b.packed[tier].refs.size());
        for (std::size_t i = 0; i < a.packed[tier].refs.size(); ++i) {
          copy(a.packed[tier].refs[i], b.packed[tier].refs[i], static_cast<std::int32_t>(a.packed[tier].block_bytes));
        }
      }
      for (std::size_t i = 0; i < a.exact.size(); ++i) copy(a.exact[i], b.exact[i], format.exact.block_bytes);
      if (a.sink.valid()) copy(a.sink, b.sink, format.sink.block_bytes);
    }
  }

  TinyModel tiny_;
  ThreadPool threads_;
  std::unique_ptr<Transformer> model_;
  std::shared_ptr<const KvFormat> plain_, packing_;
};

}  // namespace zeroc::testing
