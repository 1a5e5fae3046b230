// The SIMD ops behind CpuOps(). Each op picks its instruction set at run time (Highway); activations are bf16.
//
// Internal to kernels/: tests and benches use the parts below the table to force one path. Any thread.
// Sums run in float32 with fused multiply-add where the instruction set has it, so results differ between instruction
// sets in the last bits; on one machine they are the same from run to run and for every split over threads.
#pragma once

#include "kernels/ops.h"

namespace zeroc::kernels::cpu {

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

// Name of the instruction set in use, e.g. "AVX3".
const char* IsaName();

// Attention on AMX tiles, and, for at most kDecodeRowsMax rows, on AVX-512 VNNI. False (and nothing written) where that
// is not to be had, for more rows (VNNI), or if a segment holds 32-bit runs; the arguments are good.
bool AttentionAmx(const AttentionArgs& args);
bool AttentionVnni(const AttentionArgs& args);

// One segment of quantised runs for many rows on AVX-512 VNNI, into what the rows' out, row_max and row_sum hold of the
// segments before. False (and nothing written) where that is not to be had, for fewer than 8 rows, or if the segment
// holds other runs.
bool AttendCodesVnni(const AttentionArgs& args, const KvSegment& segment);

// The matrix-vector kernels, which stream the weights once, take up to this many rows.
inline constexpr int kMatVecRowsMax = 8;

// The three ways of Linear; each takes any number of rows (LinearMatVec: at most kMatVecRowsMax).
void LinearMatVec(const LinearArgs& args);
// bf16 product on AMX tiles. False where AMX is not to be had, or without memory for its scratch (3 MiB per thread).
bool LinearAmx(const LinearArgs& args);
// float32 product of oneDNN over converted panels of the weights. False if out of memory.
bool LinearSgemm(const LinearArgs& args);

}  // namespace zeroc::kernels::cpu
