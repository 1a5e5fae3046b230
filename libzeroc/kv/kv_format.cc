#include "libzeroc/kv/kv_format.h"

#include "libzeroc/compression/plan.h"
#include "libzeroc/compression/profile.h"

namespace zeroc {
namespace {

Result<std::shared_ptr<KvFormat>> Make(const ModelGeometry& geometry, const Profile& profile, int exact_bits) {
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
  format->packed = std::move(layouts.packed);
  format->layout_hash = layouts.layout_hash;
  return format;
}

}  // namespace

int KvFormat::PackedBlocksAt(int query_pos) const {
  return packs ? zeroc::PackedBlocksAt(query_pos, recent_tokens) : 0;
}

Result<std::shared_ptr<const KvFormat>> KvFormat::Uncompressed(const ModelConfig& config, int exact_bits) {
  const ModelGeometry geometry = GeometryOf(config);
  Profile none = UniformProfile("none", 16, geometry.n_layers, geometry.head_dim);
  ZEROC_ASSIGN_OR_RETURN(std::shared_ptr<KvFormat> format, Make(geometry, none, exact_bits));
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
  ZEROC_ASSIGN_OR_RETURN(std::shared_ptr<KvFormat> format, Make(geometry, *profile, exact_bits));
  if (format->packs) {
    for (int layer = 0; layer < geometry.n_layers; ++layer) {
      KeyMaps maps = plan.KeyMapsOf(*profile, layer);
      format->q_map.push_back(std::move(maps.a));
      format->k_map.push_back(std::move(maps.b));
    }
  }
  return std::shared_ptr<const KvFormat>(std::move(format));
}

}  // namespace zeroc
