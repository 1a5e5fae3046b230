// Profiles: how many bits every coordinate of every cached token gets, and what that costs.
//
// A profile names one tier shape per layer and side (K, V) for the packed blocks, and the two exact windows. Profiles
// are plain data; the functions here are pure and may be called from any thread.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/kv_block.h"
#include "libzeroc/base/status.h"

namespace zeroc {

struct ModelConfig;

// The sizes of a model that the KV cache depends on, plus hidden (the width of W_V's input and W_O's output).
struct ModelGeometry {
  int n_layers = 0;
  int n_heads = 0;
  int n_kv_heads = 0;  // divides n_heads
  int head_dim = 0;    // a multiple of 16, at most kernels::kMaxHeadDim
  int hidden = 0;

  bool operator==(const ModelGeometry&) const = default;
};

ModelGeometry GeometryOf(const ModelConfig& config);

// kInvalidArgument naming the field that is out of range. The bounds are far above any model in use and keep a hostile
// file from asking for much memory.
Status ValidateGeometry(const ModelGeometry& geometry);

// Coordinates in the sorted balanced basis (basis.h), cut into contiguous runs. Widths are multiples of 16 and sum to
// head_dim. Bits of a packed run: 16, 8, 4, 3, 2, 1 or 0 (dropped).
struct TierShape {
  std::vector<kernels::KvRun> runs;
  bool operator==(const TierShape&) const = default;
};

struct KvShape {
  TierShape k, v;
  // Mass correction of the packed tokens' scores, [n_kv_heads][1 + K runs] row-major; empty: none. The score of token t
  // becomes score + mass[0] + sum over K runs r of mass[1 + r] * half_r(t)^2, half_r as in kernels/kv_block.h. A run
  // without scale (16 or 0 bits) has coefficient 0.
  std::vector<float> mass;
  bool operator==(const KvShape&) const = default;
};

inline constexpr float kMaxMass = 1e3f;  // bound of every number in KvShape::mass

// What a profile costs. Bytes count everything held at the end of a kCostContext-token window: packed codes and scales,
// exact blocks, the sink block, padding. The increases are decode-scored perplexity minus the uncompressed model's.
struct ProfileCost {
  double bits_per_element = 0;     // kv_bytes_per_token * 8 / (2 * n_layers * n_kv_heads * head_dim)
  double kv_bytes_per_token = 0;   // bytes, all layers
  bool measured = false;           // false: the figures below say nothing
  double ppl_increase = 0;         // the promise: the larger of the two below, absolute
  double ppl_increase_rel = 0;     // ppl_increase / ppl_base
  double ppl_increase_direct = 0;  // on held-out text; may be negative by noise
  double ppl_increase_kl = 0;      // ppl_base * (exp(kl) - 1)
  double kl = 0;                   // nats per token against the uncompressed model
  std::optional<double> recall;    // share of exact answers, 0 to 1; unset without a recall set
};

inline constexpr int kCostContext = 4096;  // tokens

// The measured half of a cost (bytes stay 0; Plan::Create fills them). ppl_base > 0; increase_direct is the profile's
// perplexity minus ppl_base. A KL below zero, which only rounding can give, counts as zero.
ProfileCost MeasuredCost(double ppl_base, double increase_direct, double kl, std::optional<double> recall);

// Packed blocks that have not yet reached the profile's final shapes: a query attends to near keys more than to far
// ones, so the youngest blocks earn more bits (docs/results/token_axis.md). A block passes the tiers in order, each
// packed from the one before.
struct YoungTier {
  int n_blocks = 0;             // 64-token blocks in it, at least 1
  std::vector<KvShape> layers;  // [n_layers]
  bool operator==(const YoungTier&) const = default;
};

inline constexpr int kMaxYoungTiers = 3;

struct Profile {
  std::string name;
  int sink_tokens = kernels::kSinkTokens;  // first tokens kept exact once blocks are packed: 0 or 16 (one sink block)
  int recent_tokens = 128;                 // last tokens kept exact
  std::vector<YoungTier> young;            // behind the exact window, youngest first; empty unless packs()
  std::vector<KvShape> layers;             // [n_layers], all older blocks; empty: nothing is ever packed (bf16)
  ProfileCost cost;

  bool packs() const { return !layers.empty(); }
};

// kInvalidArgument naming the profile, the layer and the field. `layers` is empty or has n_layers entries.
Status ValidateProfile(const Profile& profile, const ModelGeometry& geometry);

// One width for every coordinate of every layer, default windows. bits 16 gives the profile that packs nothing.
Profile UniformProfile(std::string name, int bits, int n_layers, int head_dim);

// The profiles every plan has: bf16, q8, q4, q3, q2, in this order, bytes filled in, nothing measured.
std::vector<Profile> StandardLadder(const ModelGeometry& geometry);

// The visibility rule of prefill, decode and sequence parallelism alike: the number of 64-token blocks, from the start
// of the sequence, that the query at query_pos sees packed. Block b (tokens 64 b to 64 b + 63) is one of them iff
// query_pos - (64 b + 63) > recent_tokens. Later blocks are seen exact.
int PackedBlocksAt(int query_pos, int recent_tokens);

// Everything a sequence of `context` tokens holds, seen by the next query (at position `context`). Bytes of all layers.
struct KvBytes {
  std::int64_t packed = 0;  // full blocks behind the recent window: codes, scales, padding
  std::int64_t exact = 0;   // whole 64-token bf16 blocks that cover the rest
  std::int64_t sink = 0;    // one 16-token bf16 block per layer, once a block is packed
  std::int64_t raw = 0;     // what bf16 needs for `context` tokens, without block padding

  std::int64_t held() const { return packed + exact + sink; }
};

// Logical blocks, from the start, that the query at query_pos sees in tier `tier` (0 the youngest, young.size() the one
// of `layers`) or an older one. BlocksFromTier(profile, 0, t) is PackedBlocksAt(t, recent_tokens).
int BlocksFromTier(const Profile& profile, int tier, int query_pos);

// context >= 0. The profile has passed ValidateProfile.
KvBytes KvBytesHeld(const Profile& profile, const ModelGeometry& geometry, int context);

// held() / context; context >= 1.
double KvBytesPerToken(const Profile& profile, const ModelGeometry& geometry, int context);
double BitsPerElement(const Profile& profile, const ModelGeometry& geometry, int context);

// The byte layouts of one profile on one model. exact_bits is 16 (everywhere) or 32 (the reference engine in memory;
// never on the wire).
struct ProfileLayouts {
  // [tier][n_layers], youngest tier first, 64 tokens, V rotated; empty when nothing is packed.
  std::vector<std::vector<kernels::KvBlockLayout>> tiers;
  kernels::KvBlockLayout exact;  // 64 tokens, one run of exact_bits
  kernels::KvBlockLayout sink;   // 16 tokens, one run of exact_bits
  bool has_sink = false;         // the profile keeps a sink block
  // XXH3 over every field of every layout and the windows: both ends of a hand-off must hold the same number.
  std::uint64_t layout_hash = 0;

  // kInvalidArgument as ValidateProfile and ValidateGeometry.
  static Result<ProfileLayouts> Make(const Profile& profile, const ModelGeometry& geometry, int exact_bits = 16);
};

}  // namespace zeroc
