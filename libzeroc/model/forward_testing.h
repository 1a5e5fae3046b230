// Shared by tests that run a whole model: logits of a sequence in chunks, and a plan as calibration makes it.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "libzeroc/checkpoint/tensor_names.h"
#include "libzeroc/compression/moments.h"
#include "libzeroc/kv/owned_pool.h"
#include "libzeroc/model/transformer.h"

namespace zeroc::testing {

inline std::vector<std::int32_t> RandomIds(int n, std::int64_t vocab, unsigned seed) {
  std::mt19937 rng(seed);
  std::vector<std::int32_t> ids(static_cast<std::size_t>(n));
  for (auto& id : ids) id = static_cast<std::int32_t>(rng() % static_cast<unsigned>(vocab));
  return ids;
}

// Logits of every token, fed in steps of the given sizes (the last one repeats).
inline std::vector<float> RunChunks(Transformer& model, const std::string& profile,
                                    const std::vector<std::int32_t>& ids, const std::vector<int>& chunks) {
  const auto format = model.Format(profile).value();
  const int n = static_cast<int>(ids.size());
  const auto vocab = static_cast<std::size_t>(model.config().vocab_size);
  const auto pool = OwnedPool::Create(*format, 1, n, n, model.kv_memory()).value();
  const auto kv = SequenceKv::Create(pool->pool(), format, n, n).value();
  std::vector<float> logits(ids.size() * vocab);
  std::size_t next_chunk = 0;
  for (int begin = 0; begin < n;) {
    const int size = std::min(chunks[std::min(next_chunk++, chunks.size() - 1)], n - begin);
    const auto part = std::span(ids).subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(size));
    const ForwardSequence sequence{kv.get(), part, size};
    EXPECT_TRUE(model.Forward({&sequence, 1}, logits.data() + static_cast<std::size_t>(begin) * vocab).ok());
    begin += size;
  }
  return logits;
}

inline double RmsDifference(const std::vector<float>& a, const std::vector<float>& b) {
  double sum = 0;
  for (std::size_t i = 0; i < a.size(); ++i) sum += (a[i] - b[i]) * (a[i] - b[i]);
  return std::sqrt(sum / static_cast<double>(a.size()));
}

inline double Rms(const std::vector<float>& a) { return RmsDifference(a, std::vector<float>(a.size(), 0.0f)); }

// Gathers moments over random tokens and solves the maps: a plan as calibration makes it, without measured costs.
// `more`: profiles behind the standard ladder.
inline std::shared_ptr<const Plan> MakePlan(Transformer& model, const std::vector<Profile>& more = {}) {
  class Observer : public ForwardObserver {
   public:
    explicit Observer(const ModelGeometry& geometry) : moments(geometry) {}
    bool WantsProjections() const override { return true; }
    void OnProjections(int layer, int first_pos, int n_tokens, const HeadRows& q, const HeadRows& k,
                       const HeadRows& v) override {
      moments.Add(layer, first_pos, n_tokens, q, k, v);
    }
    MomentAccumulator moments;
  };
  const Checkpoint& checkpoint = model.checkpoint();
  PlanContents contents;
  contents.geometry = GeometryOf(checkpoint.config());
  contents.model_fingerprint = checkpoint.fingerprint();
  contents.ladder = StandardLadder(contents.geometry);
  contents.ladder.insert(contents.ladder.end(), more.begin(), more.end());
  Observer observer(contents.geometry);
  const auto format = model.Format("none").value();
  for (unsigned seed = 0; seed < 3; ++seed) {
    const auto ids = RandomIds(300, checkpoint.config().vocab_size, 100 + seed);
    const auto pool = OwnedPool::Create(*format, 1, 300, 300, model.kv_memory()).value();
    const auto kv = SequenceKv::Create(pool->pool(), format, 300, 300).value();
    const ForwardSequence sequence{kv.get(), ids, 0};
    EXPECT_TRUE(model.Forward({&sequence, 1}, nullptr, &observer).ok());
  }
  for (int l = 0; l < checkpoint.config().n_layers; ++l) {
    auto maps = SolveLayer(observer.moments, l, OutputWeight(checkpoint, l).value());
    EXPECT_TRUE(maps.ok()) << maps.status().ToString();
    contents.layers.push_back(std::move(maps).value());
  }
  auto plan = Plan::Create(std::move(contents));
  EXPECT_TRUE(plan.ok()) << plan.status().ToString();
  return std::make_shared<const Plan>(std::move(plan).value());
}

}  // namespace zeroc::testing
