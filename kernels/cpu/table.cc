#include "kernels/cpu/cpu.h"

namespace zeroc::kernels {

const Ops& CpuOps() {
  static constexpr Ops kOps = {.name = "cpu",
                               .isa = cpu::IsaName,
                               .act_bytes = 2,
                               .embed = cpu::Embed,
                               .rms_norm = cpu::RmsNorm,
                               .layer_norm = cpu::LayerNorm,
                               .head_norm = cpu::HeadNorm,
                               .linear = cpu::Linear,
                               .swiglu = cpu::SwiGlu,
                               .relu = cpu::Relu,
                               .query_prep = cpu::QueryPrep,
                               .kv_write = cpu::KvWrite,
                               .kv_pack = cpu::KvPack,
                               .attention = cpu::Attention,
                               .attention_merge = cpu::AttentionMerge};
  return kOps;
}

}  // namespace zeroc::kernels
