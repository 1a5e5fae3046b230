// The scalar float32 ops behind ReferenceOps(): the judge of every other backend (kernels/ops.h states what each does).
// Written to be read; sums run in a fixed order. Any thread, no allocation.
#pragma once

#include "kernels/ops.h"

namespace zeroc::kernels::reference {

KernelStatus Embed(const EmbedArgs& args);
KernelStatus RmsNorm(const RmsNormArgs& args);
KernelStatus LayerNorm(const LayerNormArgs& args);
KernelStatus HeadNorm(const HeadNormArgs& args);
KernelStatus Linear(const LinearArgs& args);
KernelStatus SwiGlu(const SwiGluArgs& args);
KernelStatus Relu(const ReluArgs& args);
KernelStatus QueryPrep(const QueryPrepArgs& args);
KernelStatus KvWrite(const KvWriteArgs& args);
KernelStatus KvPack(const KvPackArgs& args);
KernelStatus Attention(const AttentionArgs& args);
KernelStatus AttentionMerge(const AttentionMergeArgs& args);

// out[i] of one head: RoPE (if the row has tables), then out = scale * map^T x. x and out may not overlap.
void RotateHead(const float* x, const float* cos, const float* sin, const float* map, float scale, int head_dim,
                float* out);

// Token `token` of one head's K (or V) as float32; V comes back unrotated. head points at the head's first byte.
void DecodeKeyRow(const KvBlockLayout& layout, const std::uint8_t* head, int token, float* out);
void DecodeValueRow(const KvBlockLayout& layout, const std::uint8_t* head, int token, float* out);

}  // namespace zeroc::kernels::reference
