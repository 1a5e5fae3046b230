// Mass corrections for a model: keys and queries of calibration text, and the fit for any K shape (mass.h).
//
// Gathered once from the uncompressed model; a fit then packs the gathered keys in the shape with the engine's own
// packer, so that it sees the very codes that attention will see. Not thread-safe.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "libzeroc/base/status.h"
#include "libzeroc/compression/plan.h"
#include "libzeroc/engine/ladder_probe.h"
#include "libzeroc/model/transformer.h"

namespace zeroc {

struct MassOptions {
  int windows = 2;              // of the probe text
  int queries_per_window = 48;  // sampled evenly over the second half of the window, every query head of a group
};

class MassTable {
 public:
  // Runs `plain` over the first windows of `text`. Errors of the model.
  static Result<std::unique_ptr<MassTable>> Gather(Transformer& plain, const WindowedText& text, std::int32_t bos_id,
                                                   int context, const MassOptions& options);

  // KvShape::mass of one layer's K shape under the windows of a profile, [n_kv_heads][1 + runs]. Errors of MassFit.
  Result<std::vector<float>> Fit(const Plan& plan, int layer, const TierShape& k_shape, int sink_tokens,
                                 int recent_tokens) const;

 private:
  class Gatherer;
  struct Window {
    std::vector<int> positions;  // of the sampled queries
    // Per layer, after RoPE.
    std::vector<std::vector<float>> keys;     // [context, n_kv_heads * head_dim]
    std::vector<std::vector<float>> queries;  // [positions, n_heads * head_dim], heads of a group together
  };
  MassTable(const kernels::Ops& ops, const ModelGeometry& geometry, int context)
      : ops_(ops), geometry_(geometry), context_(context) {}

  struct PackedKeys;
  PackedKeys Pack(const TierShape& k_shape, const std::vector<float>& k_map, const std::vector<float>& keys) const;

  const kernels::Ops& ops_;
  ModelGeometry geometry_;
  int context_;
  std::vector<Window> windows_;
};

}  // namespace zeroc
