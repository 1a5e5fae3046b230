#include "libzeroc/kv/kv_format.h"

#include <algorithm>
#include <utility>

#include "libzeroc/checkpoint/model_config.h"
#include "libzeroc/compression/plan.h"

namespace zeroc {
namespace {

std::vector<float> ExpandMass(const KvShape& shape, int n_kv_heads) {
  if (shape.mass.empty()) return {};
  constexpr std::size_t kColumns = KvTier::kMassColumns;
  const std::size_t per_head = 1 + shape.k.runs.size();
  std::vector<float> out(static_cast<std::size_t>(n_kv_heads) * kColumns, 0.0f);
  for (std::size_t i = 0; i < shape.mass.size(); ++i) out[i / per_head * kColumns + i % per_head] = shape.mass[i];
  return out;
}

}  // namespace

int KvFormat::MinAge(int tier) const {
  int n_younger = 0;
  for (int i = 0; i < tier; ++i) n_younger += tiers[static_cast<std::size_t>(i)].n_blocks;
  return recent_tokens + 1 + n_younger * kernels::kBlockTokens;
}

int KvFormat::BlocksAt(int tier, int query_pos) const {
  return packs ? zeroc::PackedBlocksAt(query_pos, MinAge(tier) - 1) : 0;
}

Result<std::shared_ptr<KvFormat>> KvFormat::FromProfile(const ModelGeometry& geometry, const Profile& profile,
                                                        int exact_bits) {
  ZEROC_ASSIGN_OR_RETURN(ProfileLayouts layouts, ProfileLayouts::Make(profile, geometry, exact_bits));
  auto format = std::make_shared<KvFormat>();
  format->profile = profile.name;
  format->n_layers = geometry.n_layers;
  format->n_kv_heads = geometry.n_kv_heads;
  format->head_dim = geometry.head_dim;
  format->sink_tokens = layouts.has_sink ? profile.sink_tokens : 0;
  format->recent_tokens = profile.recent_tokens;
  format->packs = profile.packs();
  format->exact = layouts.exact;
  format->sink = layouts.sink;
  for (std::size_t i = 0; i < layouts.tiers.size(); ++i) {
    const bool is_young = i < profile.young.size();
    KvTier& tier = format->tiers.emplace_back();
    tier.n_blocks = is_young ? profile.young[i].n_blocks : 0;
    tier.layouts = std::move(layouts.tiers[i]);
    for (const KvShape& shape : is_young ? profile.young[i].layers : profile.layers) {
      tier.mass.push_back(ExpandMass(shape, geometry.n_kv_heads));
    }
  }
  format->layout_hash = layouts.layout_hash;
  return format;
}

Result<std::shared_ptr<const KvFormat>> KvFormat::Uncompressed(const ModelConfig& config, int exact_bits) {
  const ModelGeometry geometry = GeometryOf(config);
  const Profile none = UniformProfile("none", 16, geometry.n_layers, geometry.head_dim);
  ZEROC_ASSIGN_OR_RETURN(std::shared_ptr<KvFormat> format, FromProfile(geometry, none, exact_bits));
  return std::shared_ptr<const KvFormat>(std::move(format));
}

Result<std::shared_ptr<const KvFormat>> KvFormat::FromPlan(const ModelConfig& config, const Plan& plan,
                                                           const std::string& profile_name, int exact_bits) {
  const ModelGeometry geometry = GeometryOf(config);
  if (!(plan.geometry() == geometry)) {
    return FailedPrecondition("plan " + plan.plan_id() + ": its layers and heads are not those of the model");
  }
  const Profile* profile = plan.FindProfile(profile_name);
  if (profile == nullptr) {
    std::string known;
    for (const Profile& p : plan.ladder()) known += (known.empty() ? "" : ", ") + p.name;
    return NotFound("profile '" + profile_name + "' is not in plan " + plan.plan_id() + " (it has " + known + ")");
  }
  ZEROC_ASSIGN_OR_RETURN(std::shared_ptr<KvFormat> format, FromProfile(geometry, *profile, exact_bits));
  format->keys_folded = !config.has_rope();
  if (format->packs && !format->keys_folded) {
    for (int layer = 0; layer < geometry.n_layers; ++layer) {
      KeyMaps maps = plan.KeyMapsOf(*profile, layer);
      format->q_map.push_back(std::move(maps.a));
      format->k_map.push_back(std::move(maps.b));
    }
  }
  return std::shared_ptr<const KvFormat>(std::move(format));
}

}  // namespace zeroc
