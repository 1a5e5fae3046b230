#include "kernels/reference/reference.h"

namespace zeroc::kernels {

const Ops& ReferenceOps() {
  static constexpr Ops kOps = {.name = "ref",
                               .isa = [] { return "scalar"; },
                               .act_bytes = 4,
                               .embed = reference::Embed,
                               .rms_norm = reference::RmsNorm,
                               .layer_norm = reference::LayerNorm,
                               .head_norm = reference::HeadNorm,
                               .linear = reference::Linear,
                               .swiglu = reference::SwiGlu,
                               .relu = reference::Relu,
                               .query_prep = reference::QueryPrep,
                               .kv_write = reference::KvWrite,
                               .kv_pack = reference::KvPack,
                               .attention = reference::Attention,
                               .attention_merge = reference::AttentionMerge};
  return kOps;
}

}  // namespace zeroc::kernels
