#include "libzeroc/compression/profile.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <utility>

#include "libzeroc/base/check.h"
#include "libzeroc/checkpoint/model_config.h"
#include "libzeroc/compression/canonical.h"

namespace zeroc {
namespace {

using kernels::KvBlockLayout;
using kernels::KvRun;
using kernels::KvScaleKind;
using kernels::KvSideLayout;

// Far above any model in use; they bound what a hostile plan can ask for.
constexpr int kMaxLayers = 1024;
constexpr int kMaxHeads = 1024;
constexpr int kMaxHidden = 1 << 20;
constexpr int kMaxRecentTokens = 1 << 20;
constexpr int kMaxYoungBlocks = 1 << 14;  // of one tier
constexpr std::size_t kMaxNameLength = 64;

constexpr int kRunGranule = 16;

// Bump when the meaning of a layout changes without any of its numbers changing.
constexpr int kLayoutHashVersion = 3;

Status CheckRange(const char* what, int value, int low, int high) {
  if (value >= low && value <= high) return OkStatus();
  return InvalidArgument(std::string(what) + " " + std::to_string(value) + " is not in " + std::to_string(low) + ".." +
                         std::to_string(high));
}

Status ValidateName(const std::string& name) {
  const auto is_good = [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '.' || c == '_' || c == '-';
  };
  if (!name.empty() && name.size() <= kMaxNameLength && std::all_of(name.begin(), name.end(), is_good)) {
    return OkStatus();
  }
  return InvalidArgument("a profile name must be 1 to 64 characters of a-z, 0-9, '.', '_' and '-'");
}

Status ValidateShape(const TierShape& shape, int head_dim) {
  if (shape.runs.empty() || shape.runs.size() > static_cast<std::size_t>(kernels::kMaxRuns)) {
    return InvalidArgument(std::to_string(shape.runs.size()) + " runs, not 1.." + std::to_string(kernels::kMaxRuns));
  }
  int width_sum = 0;
  for (const KvRun& run : shape.runs) {
    if (!kernels::IsValidBits(run.bits) || run.bits > 16) {
      return InvalidArgument("a run of " + std::to_string(run.bits) + " bits");
    }
    if (run.scale != KvScaleKind::kAffine && (run.scale != KvScaleKind::kShared || !kernels::IsQuantised(run.bits))) {
      return InvalidArgument("scale kind " + std::to_string(static_cast<int>(run.scale)) + " for a run of " +
                             std::to_string(run.bits) + " bits");
    }
    if (run.width <= 0 || run.width > head_dim || run.width % kRunGranule != 0) {
      return InvalidArgument("a run of width " + std::to_string(run.width) + ", not a multiple of 16 up to head_dim " +
                             std::to_string(head_dim));
    }
    width_sum += run.width;
  }
  if (width_sum != head_dim) {
    return InvalidArgument("widths sum to " + std::to_string(width_sum) + ", head_dim is " + std::to_string(head_dim));
  }
  return OkStatus();
}

// After the K shape has been validated.
Status ValidateMass(const KvShape& shape, int n_kv_heads) {
  if (shape.mass.empty()) return OkStatus();
  const std::size_t per_head = 1 + shape.k.runs.size();
  const std::size_t expected = static_cast<std::size_t>(n_kv_heads) * per_head;
  if (shape.mass.size() != expected) {
    return InvalidArgument("mass has " + std::to_string(shape.mass.size()) + " numbers, not " +
                           std::to_string(expected));
  }
  for (std::size_t i = 0; i < expected; ++i) {
    if (!(std::abs(shape.mass[i]) <= kMaxMass))
      return InvalidArgument("mass holds a number that is not in -1000..1000");
    const std::size_t column = i % per_head;
    if (column > 0 && shape.mass[i] != 0 && !kernels::IsQuantised(shape.k.runs[column - 1].bits)) {
      return InvalidArgument("mass has a coefficient for K run " + std::to_string(column - 1) + ", which has no scale");
    }
  }
  return OkStatus();
}

bool KeepsNothing(const TierShape& shape) {
  return std::all_of(shape.runs.begin(), shape.runs.end(), [](const KvRun& run) { return run.bits == 0; });
}

KvBlockLayout MakeLayout(const ModelGeometry& geometry, int n_tokens, const TierShape& k, const TierShape& v,
                         bool rotate_v) {
  KvBlockLayout layout;
  const bool ok = kernels::MakeKvBlockLayout(geometry.n_kv_heads, geometry.head_dim, n_tokens, k.runs.data(),
                                             static_cast<int>(k.runs.size()), v.runs.data(),
                                             static_cast<int>(v.runs.size()), rotate_v, &layout);
  ZEROC_CHECK(ok, geometry.n_kv_heads, geometry.head_dim, n_tokens);  // the shapes were validated
  return layout;
}

void HashSide(const KvSideLayout& side, CanonicalHash& out) {
  out.Int(side.n_runs);
  for (int r = 0; r < side.n_runs; ++r) {
    out.Int(side.runs[r].bits);
    out.Int(side.runs[r].width);
    out.Int(static_cast<int>(side.runs[r].scale));
    out.Int(side.first_coord[r]);
    out.Int(side.codes_offset[r]);
    out.Int(side.meta_offset[r]);
    out.Int(side.base_offset[r]);
  }
}

void HashLayout(const KvBlockLayout& layout, CanonicalHash& out) {
  out.Int(layout.n_kv_heads);
  out.Int(layout.head_dim);
  out.Int(layout.n_tokens);
  out.Int(layout.head_bytes);
  out.Int(layout.block_bytes);
  out.Int(layout.rotate_v ? 1 : 0);
  HashSide(layout.k, out);
  HashSide(layout.v, out);
}

std::uint64_t HashLayouts(const ProfileLayouts& layouts, const Profile& profile, int n_layers) {
  CanonicalHash hash;
  hash.Text("zeroc-kv-layout");
  hash.Int(kLayoutHashVersion);
  hash.Int(n_layers);
  hash.Int(profile.sink_tokens);
  hash.Int(profile.recent_tokens);
  HashLayout(layouts.exact, hash);
  HashLayout(layouts.sink, hash);
  hash.Int(static_cast<std::int64_t>(layouts.tiers.size()));
  for (const YoungTier& tier : profile.young) hash.Int(tier.n_blocks);
  for (const auto& tier : layouts.tiers) {
    for (const KvBlockLayout& layout : tier) HashLayout(layout, hash);
  }
  return hash.Low64();
}

Status ValidateLayers(const std::vector<KvShape>& layers, const ModelGeometry& geometry) {
  if (layers.size() != static_cast<std::size_t>(geometry.n_layers)) {
    return InvalidArgument("shapes for " + std::to_string(layers.size()) + " layers, the model has " +
                           std::to_string(geometry.n_layers));
  }
  for (std::size_t l = 0; l < layers.size(); ++l) {
    const std::string layer = "layer " + std::to_string(l);
    ZEROC_RETURN_IF_ERROR(ValidateShape(layers[l].k, geometry.head_dim).WithContext(layer + " K"));
    ZEROC_RETURN_IF_ERROR(ValidateShape(layers[l].v, geometry.head_dim).WithContext(layer + " V"));
    ZEROC_RETURN_IF_ERROR(ValidateMass(layers[l], geometry.n_kv_heads).WithContext(layer));
    if (KeepsNothing(layers[l].k) && KeepsNothing(layers[l].v)) {
      return InvalidArgument(layer + ": every coordinate is dropped, so a block would hold no bytes");
    }
  }
  return OkStatus();
}

Status ValidateYoung(const Profile& profile, const ModelGeometry& geometry) {
  if (profile.young.empty()) return OkStatus();
  if (!profile.packs()) return InvalidArgument("young tiers, but nothing is packed");
  if (profile.young.size() > static_cast<std::size_t>(kMaxYoungTiers)) {
    return InvalidArgument(std::to_string(profile.young.size()) + " young tiers, at most " +
                           std::to_string(kMaxYoungTiers) + " are possible");
  }
  for (std::size_t i = 0; i < profile.young.size(); ++i) {
    const std::string tier = "young tier " + std::to_string(i);
    ZEROC_RETURN_IF_ERROR(CheckRange("n_blocks", profile.young[i].n_blocks, 1, kMaxYoungBlocks).WithContext(tier));
    ZEROC_RETURN_IF_ERROR(ValidateLayers(profile.young[i].layers, geometry).WithContext(tier));
  }
  return OkStatus();
}

std::int64_t Elements(const ModelGeometry& geometry) {
  return std::int64_t{2} * geometry.n_layers * geometry.n_kv_heads * geometry.head_dim;
}

}  // namespace

ModelGeometry GeometryOf(const ModelConfig& config) {
  ModelGeometry geometry;
  geometry.n_layers = static_cast<int>(config.n_layers);
  geometry.n_heads = static_cast<int>(config.n_heads);
  geometry.n_kv_heads = static_cast<int>(config.n_kv_heads);
  geometry.head_dim = static_cast<int>(config.head_dim);
  geometry.hidden = static_cast<int>(config.hidden_size);
  return geometry;
}

Status ValidateGeometry(const ModelGeometry& geometry) {
  ZEROC_RETURN_IF_ERROR(CheckRange("n_layers", geometry.n_layers, 1, kMaxLayers));
  ZEROC_RETURN_IF_ERROR(CheckRange("n_heads", geometry.n_heads, 1, kMaxHeads));
  ZEROC_RETURN_IF_ERROR(CheckRange("n_kv_heads", geometry.n_kv_heads, 1, geometry.n_heads));
  ZEROC_RETURN_IF_ERROR(CheckRange("head_dim", geometry.head_dim, kRunGranule, kernels::kMaxHeadDim));
  ZEROC_RETURN_IF_ERROR(CheckRange("hidden", geometry.hidden, 1, kMaxHidden));
  if (geometry.n_heads % geometry.n_kv_heads != 0) {
    return InvalidArgument("n_heads " + std::to_string(geometry.n_heads) + " is not a multiple of n_kv_heads " +
                           std::to_string(geometry.n_kv_heads));
  }
  if (geometry.head_dim % kRunGranule != 0) {
    return InvalidArgument("head_dim " + std::to_string(geometry.head_dim) + " is not a multiple of 16");
  }
  return OkStatus();
}

ProfileCost MeasuredCost(double ppl_base, double increase_direct, double kl, std::optional<double> recall) {
  ProfileCost cost;
  cost.measured = true;
  cost.kl = std::max(kl, 0.0);
  cost.ppl_increase_direct = increase_direct;
  cost.ppl_increase_kl = ppl_base * std::expm1(cost.kl);
  cost.ppl_increase = std::max(cost.ppl_increase_direct, cost.ppl_increase_kl);
  cost.ppl_increase_rel = cost.ppl_increase / ppl_base;
  cost.recall = recall;
  return cost;
}

Status ValidateProfile(const Profile& profile, const ModelGeometry& geometry) {
  ZEROC_RETURN_IF_ERROR(ValidateName(profile.name));
  const std::string context = "profile " + profile.name;
  if (profile.sink_tokens != 0 && profile.sink_tokens != kernels::kSinkTokens) {
    return InvalidArgument(context + ": sink_tokens " + std::to_string(profile.sink_tokens) + " is neither 0 nor 16");
  }
  ZEROC_RETURN_IF_ERROR(CheckRange("recent_tokens", profile.recent_tokens, 0, kMaxRecentTokens).WithContext(context));
  if (profile.packs()) ZEROC_RETURN_IF_ERROR(ValidateLayers(profile.layers, geometry).WithContext(context));
  return ValidateYoung(profile, geometry).WithContext(context);
}

Profile UniformProfile(std::string name, int bits, int n_layers, int head_dim) {
  Profile profile;
  profile.name = std::move(name);
  if (bits == 16) return profile;
  const TierShape side{{KvRun{bits, head_dim}}};
  profile.layers.assign(static_cast<std::size_t>(n_layers), KvShape{side, side});
  return profile;
}

std::vector<Profile> StandardLadder(const ModelGeometry& geometry) {
  static constexpr std::array<std::pair<const char*, int>, 5> kStandard = {
      {{"bf16", 16}, {"q8", 8}, {"q4", 4}, {"q3", 3}, {"q2", 2}}};
  std::vector<Profile> ladder;
  for (const auto& [name, bits] : kStandard) {
    ladder.push_back(UniformProfile(name, bits, geometry.n_layers, geometry.head_dim));
    ProfileCost& cost = ladder.back().cost;
    cost.kv_bytes_per_token = KvBytesPerToken(ladder.back(), geometry, kCostContext);
    cost.bits_per_element = BitsPerElement(ladder.back(), geometry, kCostContext);
  }
  return ladder;
}

int PackedBlocksAt(int query_pos, int recent_tokens) {
  const int behind = query_pos - recent_tokens;
  return behind > 0 ? behind / kernels::kBlockTokens : 0;
}

int BlocksFromTier(const Profile& profile, int tier, int query_pos) {
  int n_younger = 0;
  for (int i = 0; i < tier; ++i) n_younger += profile.young[static_cast<std::size_t>(i)].n_blocks;
  return std::max(0, PackedBlocksAt(query_pos, profile.recent_tokens) - n_younger);
}

KvBytes KvBytesHeld(const Profile& profile, const ModelGeometry& geometry, int context) {
  ZEROC_CHECK(context >= 0, context);
  const Result<ProfileLayouts> made = ProfileLayouts::Make(profile, geometry);
  ZEROC_CHECK(made.ok(), made.status().ToString());
  const ProfileLayouts& layouts = *made;

  const int n_packed = profile.packs() ? BlocksFromTier(profile, 0, context) : 0;
  const int n_left = context - n_packed * kernels::kBlockTokens;
  const std::int64_t n_exact = (n_left + kernels::kBlockTokens - 1) / kernels::kBlockTokens;
  KvBytes bytes;
  const auto n_tiers = static_cast<int>(layouts.tiers.size());
  for (int tier = 0; tier < n_tiers; ++tier) {
    const int n_older = tier + 1 < n_tiers ? BlocksFromTier(profile, tier + 1, context) : 0;
    const std::int64_t n_blocks = BlocksFromTier(profile, tier, context) - n_older;
    for (const KvBlockLayout& layout : layouts.tiers[static_cast<std::size_t>(tier)]) {
      bytes.packed += n_blocks * layout.block_bytes;
    }
  }
  bytes.exact = n_exact * layouts.exact.block_bytes * geometry.n_layers;
  if (n_packed > 0 && layouts.has_sink) bytes.sink = std::int64_t{layouts.sink.block_bytes} * geometry.n_layers;
  bytes.raw = Elements(geometry) * context * 2;
  return bytes;
}

double KvBytesPerToken(const Profile& profile, const ModelGeometry& geometry, int context) {
  ZEROC_CHECK(context >= 1, context);
  return static_cast<double>(KvBytesHeld(profile, geometry, context).held()) / context;
}

double BitsPerElement(const Profile& profile, const ModelGeometry& geometry, int context) {
  return KvBytesPerToken(profile, geometry, context) * 8 / static_cast<double>(Elements(geometry));
}

Result<ProfileLayouts> ProfileLayouts::Make(const Profile& profile, const ModelGeometry& geometry, int exact_bits) {
  ZEROC_RETURN_IF_ERROR(ValidateGeometry(geometry));
  ZEROC_RETURN_IF_ERROR(ValidateProfile(profile, geometry));
  if (exact_bits != 16 && exact_bits != 32) {
    return InvalidArgument("exact blocks of " + std::to_string(exact_bits) + " bits; 16 and 32 exist");
  }
  ProfileLayouts layouts;
  const TierShape whole{{KvRun{exact_bits, geometry.head_dim}}};
  layouts.exact = MakeLayout(geometry, kernels::kBlockTokens, whole, whole, /*rotate_v=*/false);
  layouts.sink = MakeLayout(geometry, kernels::kSinkTokens, whole, whole, /*rotate_v=*/false);
  layouts.has_sink = profile.packs() && profile.sink_tokens > 0;
  const auto add_tier = [&](const std::vector<KvShape>& layers) {
    auto& tier = layouts.tiers.emplace_back();
    for (const KvShape& shape : layers) {
      tier.push_back(MakeLayout(geometry, kernels::kBlockTokens, shape.k, shape.v, /*rotate_v=*/true));
    }
  };
  for (const YoungTier& tier : profile.young) add_tier(tier.layers);
  if (profile.packs()) add_tier(profile.layers);
  layouts.layout_hash = HashLayouts(layouts, profile, geometry.n_layers);
  return layouts;
}

}  // namespace zeroc
