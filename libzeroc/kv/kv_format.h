// What one profile makes of one model's KV cache: block layouts per layer, windows and tiers, and the maps into packed
// coordinates.
//
// Made once per profile and shared, read-only, by every sequence that uses it. Two workers may exchange blocks exactly
// when model fingerprint, plan id and layout_hash agree.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kernels/kv_block.h"
#include "libzeroc/base/status.h"
#include "libzeroc/compression/profile.h"

namespace zeroc {

struct ModelConfig;
class Plan;

// One age class of packed blocks.
struct KvTier {
  int n_blocks = 0;                             // blocks in it; 0 for the oldest tier, which holds the rest
  std::vector<kernels::KvBlockLayout> layouts;  // [n_layers]
  // Mass correction (KvShape::mass) by layer, [n_kv_heads][kMassColumns]: a constant, then one coefficient per K run, 0
  // behind the last. Empty for a layer without.
  static constexpr int kMassColumns = 1 + kernels::kMaxRuns;
  std::vector<std::vector<float>> mass;
};

struct KvFormat {
  std::string profile;
  int n_layers = 0;
  int n_kv_heads = 0;
  int head_dim = 0;
  int sink_tokens = 0;
  int recent_tokens = 0;
  bool packs = false;  // false: every block stays exact (profile bf16, method none)

  kernels::KvBlockLayout exact;  // 64 tokens, one 16-bit run (32-bit for the reference engine)
  kernels::KvBlockLayout sink;   // 16 tokens, as exact
  std::vector<KvTier> tiers;     // youngest first, empty unless packs

  // Maps of the profile, its Hadamard rotation included; empty for the identity.
  std::vector<std::vector<float>> k_map;  // [n_layers][n_kv_heads, head_dim, head_dim], k' = B^T k
  std::vector<std::vector<float>> q_map;  // likewise, q' = A^T q
  // Models without RoPE have A and B in their weights: no maps, and the rotation is all that is left at run time.
  bool keys_folded = false;

  std::uint64_t layout_hash = 0;

  // What kernels take for one layer; null where there is nothing to do.
  const float* KeyMap(int layer) const { return MapOf(k_map, layer); }
  const float* QueryMap(int layer) const { return MapOf(q_map, layer); }
  const kernels::KvSideLayout* KeyRotation(int layer) const {
    return keys_folded && packs ? &tiers.back().layouts[static_cast<std::size_t>(layer)].k : nullptr;
  }

  // Segments that a query may see: sink, tiers, exact window.
  static constexpr int kMaxSegments = 2 + kMaxYoungTiers + 1;

  // Logical blocks, from the start of the sequence, that the query at query_pos sees in `tier` or an older one.
  int BlocksAt(int tier, int query_pos) const;
  int PackedBlocksAt(int query_pos) const { return BlocksAt(0, query_pos); }

  // Logical blocks, from the start of the sequence, that have reached the form which they keep for good when the next
  // query stands at n_tokens: the oldest tier, or whole exact blocks of a format that packs nothing. Their bytes depend
  // on the tokens up to their own end alone.
  int LastingBlocksAt(int n_tokens) const {
    return packs ? BlocksAt(static_cast<int>(tiers.size()) - 1, n_tokens) : n_tokens / kernels::kBlockTokens;
  }

  // A block of `tier` has an age (query position minus position of its last token) from here up to the next tier's.
  int MinAge(int tier) const;

  // Without a plan nothing is packed (method none). exact_bits is 16, or 32 for the reference engine.
  static Result<std::shared_ptr<const KvFormat>> Uncompressed(const ModelConfig& config, int exact_bits);

  // kNotFound for a profile that the plan does not have; kFailedPrecondition if the plan's shape is not the model's.
  static Result<std::shared_ptr<const KvFormat>> FromPlan(const ModelConfig& config, const Plan& plan,
                                                          const std::string& profile, int exact_bits);

  // The sizes alone, for a profile without maps: what a pool, a lease and the tests need.
  static Result<std::shared_ptr<KvFormat>> FromProfile(const ModelGeometry& geometry, const Profile& profile,
                                                       int exact_bits);

 private:
  static const float* MapOf(const std::vector<std::vector<float>>& maps, int layer) {
    return maps.empty() ? nullptr : maps[static_cast<std::size_t>(layer)].data();
  }
};

}  // namespace zeroc
