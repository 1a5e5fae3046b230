// Shared by the tests of the forward pass on a device: one model on three backends, sequences as a test runs them, what
// their errors may be, and a watcher of every block that is packed.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "kernels/bf16.h"
#include "libzeroc/base/check.h"
#include "libzeroc/model/cuda/cuda_transformer.h"
#include "libzeroc/model/forward_testing.h"
#include "libzeroc/model/tiny_model_testing.h"

namespace zeroc::testing {

// Root mean square of logits' errors, in units of the logits', of a model whose activations, keys and values are bf16.
// A rounding is off by at most 2^-9 of its value, evenly spread: 2^-9 / sqrt(3) on average. Eight of them lie in a
// layer (two norms, K, V, queries and probabilities, attended values, the MLP's inside) and one behind all; twice that,
// because the residual stream passes some on.
inline double ExactTolerance(int n_layers) { return 2 * std::sqrt(8.0 * n_layers + 1) * 0x1p-9 / std::sqrt(3.0); }

// With blocks packed at `bits`. A code spans about 4 / (2^bits - 1) deviations of what is packed, and a value that was
// rounded elsewhere than the reference's gets another code as often as the rounding is to a code's span, then with an
// error of that span: sqrt(rounding * span) on average, for K and for V of every layer. Attention averages it, or not.
inline double PackedTolerance(int n_layers, int bits) {
  const double span = 4.0 / ((1 << bits) - 1);
  return ExactTolerance(n_layers) + std::sqrt(2 * n_layers * 0x1p-9 / std::sqrt(3.0) * span);
}

// Blocks that were packed in a step: read when it is over, while their sources are still there.
class PackWatcher : public ForwardObserver {
 public:
  explicit PackWatcher(std::vector<SequenceKv*> sequences) : sequences_(std::move(sequences)) {}

  void OnLayerWritten(int layer) override {
    for (SequenceKv* kv : sequences_) {
      for (int tier = 0; tier < static_cast<int>(kv->format().tiers.size()); ++tier) {
        for (int block = kv->pack_begin(tier); block < kv->pack_end(tier); ++block) {
          packs_.push_back({kv, kv->PackSource(layer, tier, block), &kv->SourceLayout(layer, tier),
                            kv->PackedBlock(layer, tier, block), &kv->FormLayout(layer, tier)});
        }
      }
      if (kv->takes_sink()) {
        packs_.push_back(
            {kv, kv->PackSource(layer, 0, 0), &kv->format().exact, kv->SinkData(layer), &kv->format().sink});
      }
    }
  }

  std::size_t count() const { return packs_.size(); }
  // Packs whose bytes are not the reference's.
  int CountWrong() const {
    return static_cast<int>(
        std::count_if(packs_.begin(), packs_.end(), [](const Pack& pack) { return IsWrong(pack); }));
  }

 private:
  struct Pack {
    const SequenceKv* kv;
    const std::uint8_t* source;
    const kernels::KvBlockLayout* source_layout;
    const std::uint8_t* packed;
    const kernels::KvBlockLayout* packed_layout;
  };
  static std::vector<std::uint8_t> Read(const SequenceKv& kv, const std::uint8_t* block, int bytes) {
    std::vector<std::uint8_t> out(static_cast<std::size_t>(bytes));
    const KvCopy copy{reinterpret_cast<std::byte*>(out.data()), reinterpret_cast<const std::byte*>(block), out.size()};
    EXPECT_TRUE(kv.pool().memory().Read({&copy, 1}).ok());
    return out;
  }
  static bool IsWrong(const Pack& pack) {
    const int bytes = pack.packed_layout->n_kv_heads * pack.packed_layout->head_bytes;  // without the padding
    const auto source = Read(*pack.kv, pack.source, pack.source_layout->block_bytes);
    std::vector<std::uint8_t> want(static_cast<std::size_t>(pack.packed_layout->block_bytes));
    EXPECT_EQ(kernels::ReferenceOps().kv_pack({source.data(), pack.source_layout, want.data(), pack.packed_layout, 0,
                                               pack.packed_layout->n_kv_heads}),
              kernels::KernelStatus::kOk);
    want.resize(static_cast<std::size_t>(bytes));
    return Read(*pack.kv, pack.packed, bytes) != want;
  }

  std::vector<SequenceKv*> sequences_;
  std::vector<Pack> packs_;
};

// Two young tiers, runs of several widths and both kinds of scale, a correction of the mass, nothing kept exact but the
// block that grows: for heads of 32.
inline Profile ZProfile(const ModelGeometry& geometry, int recent_tokens) {
  using kernels::KvScaleKind;
  const std::size_t n_layers = static_cast<std::size_t>(geometry.n_layers);
  const KvShape young = {{{{8, 32}}}, {{{4, 32}}}, {}};
  const KvShape middle = {{{{4, 32}}}, {{{4, 16}, {3, 16}}}, {}};
  KvShape old = {{{{4, 16}, {2, 16, KvScaleKind::kShared}}}, {{{3, 32, KvScaleKind::kShared}}}, {}};
  for (int head = 0; head < geometry.n_kv_heads; ++head) {
    old.mass.insert(old.mass.end(), {0.02f, 0.01f, 0.04f + 0.01f * static_cast<float>(head)});
  }
  Profile profile;
  profile.name = "z" + std::to_string(recent_tokens);
  profile.recent_tokens = recent_tokens;
  profile.young = {{1, std::vector<KvShape>(n_layers, young)}, {1, std::vector<KvShape>(n_layers, middle)}};
  profile.layers.assign(n_layers, old);
  // The layers differ in the places of their blocks and in what one launch meets.
  profile.layers[0] = {{{{3, 32}}}, {{{2, 32}}}, {}};
  return profile;
}

inline TinyShape DeviceTestShape() {
  TinyShape shape;
  shape.head_dim = 32;
  shape.bias = true;
  return shape;
}

// One model on three backends.
class Backends {
 public:
  explicit Backends(const std::string& dir, bool has_plan = true) : threads_(1) {
    const auto checkpoint = std::shared_ptr<const Checkpoint>(Checkpoint::Open(dir).value());
    std::shared_ptr<const Plan> plan;
    if (has_plan) {
      const auto plain = Transformer::Open(checkpoint, nullptr, kernels::ReferenceOps(), threads_).value();
      std::vector<Profile> more;
      const ModelGeometry geometry = GeometryOf(checkpoint->config());
      if (geometry.head_dim == 32) more = {ZProfile(geometry, 0), ZProfile(geometry, 70)};
      Profile now = UniformProfile("q8now", 8, geometry.n_layers, geometry.head_dim);
      now.recent_tokens = 0;
      more.push_back(now);
      plan = MakePlan(*plain, more);
    }
    ref = Transformer::Open(checkpoint, plan, kernels::ReferenceOps(), threads_).value();
    cpu = Transformer::Open(checkpoint, plan, kernels::CpuOps(), threads_).value();
    auto opened = OpenCudaTransformer(checkpoint, plan);
    ZEROC_CHECK(opened.ok(), opened.status().ToString());
    device = std::move(opened).value();
  }

 private:
  ThreadPool threads_;

 public:
  std::unique_ptr<Transformer> ref, cpu, device;
};

// A sequence as a test runs it: cache and tokens.
struct Lane {
  std::unique_ptr<OwnedPool> pool;
  std::unique_ptr<SequenceKv> kv;
  std::vector<std::int32_t> ids;

  Lane(Transformer& model, const std::string& profile, std::vector<std::int32_t> tokens) : ids(std::move(tokens)) {
    const auto format = model.Format(profile).value();
    const int n = static_cast<int>(ids.size());
    pool = OwnedPool::Create(*format, 2, n, n, model.kv_memory()).value();
    kv = SequenceKv::Create(pool->pool(), format, n, n).value();
  }
  ForwardSequence Next(int n, int n_logits) const {
    return {kv.get(), std::span(ids).subspan(static_cast<std::size_t>(kv->n_tokens()), static_cast<std::size_t>(n)),
            n_logits};
  }
};

// Keys and values of tokens [begin, end) as they lie in exact blocks of 16 bits, [layers, tokens, heads, K and V,
// head_dim]. Between steps; every query from n_tokens() on sees them exact.
inline std::vector<float> ExactRows(const SequenceKv& kv, int begin, int end) {
  const kernels::KvBlockLayout& layout = kv.format().exact;
  std::vector<float> rows;
  std::vector<std::uint16_t> block(static_cast<std::size_t>(layout.block_bytes / 2));
  for (int layer = 0; layer < kv.format().n_layers; ++layer) {
    const LayerBlocks blocks = kv.BlocksAt(layer, kv.n_tokens());
    for (int pos = begin; pos < end; ++pos) {
      const BlockRef ref =
          blocks.exact.at(static_cast<std::size_t>(pos / 64 - kv.format().PackedBlocksAt(kv.n_tokens())));
      if (pos == begin || pos % 64 == 0) {
        const KvCopy copy{reinterpret_cast<std::byte*>(block.data()), kv.pool().Data(ref), block.size() * 2};
        EXPECT_TRUE(kv.pool().memory().Read({&copy, 1}).ok());
      }
      // kv_block.h: K in tiles [token group][coordinate tile] of lanes = tokens, V in tiles [coordinate tile][token
      // group] of lanes = coordinates.
      const int token = pos % 64, n_coord_tiles = layout.head_dim / 16;
      for (int head = 0; head < layout.n_kv_heads; ++head) {
        for (const bool is_value : {false, true}) {
          for (int i = 0; i < layout.head_dim; ++i) {
            const int tile = is_value ? i / 16 * 4 + token / 16 : token / 16 * n_coord_tiles + i / 16;
            const int lane = (is_value ? i : token) % 16, depth = (is_value ? token : i) % 16;
            const int at = (head * layout.head_bytes + (is_value ? layout.v : layout.k).codes_offset[0]) / 2 +
                           256 * tile + 32 * (depth / 2) + 2 * lane + depth % 2;
            rows.push_back(kernels::Bf16ToFloat(block[static_cast<std::size_t>(at)]));
          }
        }
      }
    }
  }
  return rows;
}

}  // namespace zeroc::testing
