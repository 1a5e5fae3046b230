// The op table: every arithmetic step of the engine as plain argument structs and function pointers.
//
// Two tables exist on every machine. ReferenceOps: scalar float32, written to be read, the judge of everything else.
// CpuOps: SIMD (AVX-512, AVX2 or the baseline, chosen at run time by the processor) and oneDNN for matrix products.
// All ops run on the calling thread, keep nothing between calls but thread-local scratch of linear and oneDNN's own
// caches, and may run on several threads at once as long as their outputs do not overlap. A bad shape returns kBadShape
// and writes nothing; callers treat that as a bug of theirs.
//
// "act" is the dtype in which activations enter matrix products: f32 for the reference, bf16 for the CPU table.
// Rows are contiguous unless a stride (in elements) is given. bf16 is a raw std::uint16_t, rounded to nearest even.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>

#include "kernels/kv_block.h"

namespace zeroc::kernels {

using Bf16 = std::uint16_t;

enum class KernelStatus : std::uint8_t { kOk = 0, kBadShape = 1, kUnsupported = 2 };

// out[r, :] (+)= table[ids[r], :] as f32. ids are in range (the tokenizer edge checked them; positions, the model).
struct EmbedArgs {
  const Bf16* table;        // [vocab, hidden], or [positions, hidden] of learned positions
  const std::int32_t* ids;  // [n_rows]
  std::int64_t n_rows, hidden;
  float* out;               // [n_rows, hidden]
  bool accumulate = false;  // add to out instead of writing it
};

// out = x / sqrt(mean(x^2) + eps) * gain  (Zhang and Sennrich 2019).
struct RmsNormArgs {
  const float* x;    // [n_rows, hidden]
  const Bf16* gain;  // [hidden]
  std::int64_t n_rows, hidden;
  float eps;
  void* out;  // act [n_rows, hidden]
};

// out = (x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps) * gain + bias  (Ba et al. 2016, arXiv 1607.06450).
struct LayerNormArgs {
  const float* x;     // [n_rows, hidden]
  const Bf16* gain;   // [hidden]
  const float* bias;  // [hidden]
  std::int64_t n_rows, hidden;
  float eps;
  void* out;  // act [n_rows, hidden]
};

// RMS norm of every head by itself, in place and in f32: queries or keys of models with QK-norm, before RoPE.
struct HeadNormArgs {
  float* x;  // [n_rows, n_heads * head_dim] with stride
  std::int64_t n_rows, stride, n_heads, head_dim;
  const Bf16* gain;  // [head_dim], the same for every head
  float eps;
};

// y[r, o] (+)= sum_k x[r, k] * w[o, k] (+ bias[o]) for o in [out_begin, out_end). w is read where it lies (row-major as
// in Hugging Face checkpoints, usually a memory map): no packed second copy. Callers split [0, n_out) over threads.
struct LinearArgs {
  const void* x;  // act [n_rows, k]
  std::int64_t n_rows, k;
  const Bf16* w;      // [n_out, k]
  const float* bias;  // [n_out] or null
  std::int64_t n_out, out_begin, out_end;
  float* y;               // [n_rows, n_out] with y_stride floats per row
  std::int64_t y_stride;  // >= n_out
  bool accumulate;        // add to y (the residual stream) instead of writing it
};

// out = silu(gate) * up  (Shazeer 2020, arXiv 2002.05202).
struct SwiGluArgs {
  const float* gate;  // [n_rows, width] with stride
  const float* up;
  std::int64_t n_rows, width, stride;
  void* out;  // act [n_rows, width]
};

// out = max(x, 0); NaN stays NaN.
struct ReluArgs {
  const float* x;  // [n_rows, width] with stride
  std::int64_t n_rows, width, stride;
  void* out;  // act [n_rows, width]
};

// Rotary position embedding, half-split convention: pairs (i, i + d/2) turn by pos * inv_freq[i].
// Tables hold cos and sin for consecutive positions, starting at the position of row 0.
struct RopeRows {
  const float* cos;  // [n_tokens, head_dim / 2], null for models without RoPE
  const float* sin;
};

// q' = scale * Hd A_g^T rope(q): queries in the coordinates of the packed keys, grouped by the KV head that they read.
// Hd rotates the quantised runs of `rotation` (HadamardRun); models with RoPE have it inside A instead.
struct QueryPrepArgs {
  const float* q;  // [n_tokens, n_heads * head_dim] with q_stride
  std::int64_t q_stride;
  std::int32_t n_tokens, n_heads, n_kv_heads, head_dim;
  std::int32_t kv_head_begin, kv_head_end;  // the part this call does
  RopeRows rope;
  const float* q_map;                      // A [n_kv_heads, head_dim, head_dim] row-major, or null for the identity
  float scale;                             // softmax scale, 1 / sqrt(head_dim)
  float* out;                              // [n_kv_heads, n_tokens, group, head_dim], group = n_heads / n_kv_heads
  const KvSideLayout* rotation = nullptr;  // null for none
};

// k' = Hd B_g^T rope(k) and v into exact (16- or 32-bit) blocks. Tokens first_pos .. first_pos + n_tokens - 1 fall into
// blocks[0] (the block that holds first_pos), blocks[1], ...; rows of a block that are not written stay as they are.
struct KvWriteArgs {
  const float* k;  // [n_tokens, n_kv_heads * head_dim] with kv_stride, before RoPE
  const float* v;
  std::int64_t kv_stride;
  std::int32_t first_pos, n_tokens;
  std::int32_t kv_head_begin, kv_head_end;
  RopeRows rope;
  const float* k_map;           // B [n_kv_heads, head_dim, head_dim] row-major, or null
  const KvBlockLayout* layout;  // one run of 16 or 32 bits on both sides, n_tokens = 64
  std::uint8_t* const* blocks;
  const KvSideLayout* rotation = nullptr;  // Hd, as for queries
};

// Quantises the heads of a full block of any layout (64 tokens, k' and v as they lie there; mostly an exact one) into
// a packed block: its first packed_layout->n_tokens tokens. Between equal layouts the bytes are copied, and so are runs
// of 16 and 32 bits. The same bytes on every ISA.
// K is already in the profile's rotated coordinates; V runs are rotated here when layout->rotate_v.
// Scales (and with them the clip points) follow the rule of scale_search.h.
// NaN and infinities have no code: the caller keeps them out; what is written for them is finite, else unspecified.
struct KvPackArgs {
  const std::uint8_t* source;
  const KvBlockLayout* source_layout;
  std::uint8_t* packed;
  const KvBlockLayout* packed_layout;
  std::int32_t kv_head_begin, kv_head_end;
};

// A stretch of one sequence's keys and values in blocks of one layout.
struct KvSegment {
  const std::uint8_t* const* blocks;  // [n_blocks]
  std::int32_t n_blocks;
  const KvBlockLayout* layout;
  std::int32_t first_pos;           // position of the first token of blocks[0]
  std::int32_t begin_pos, end_pos;  // only tokens in [begin_pos, end_pos) are attended to
  // A query at position p sees whole blocks by their age p - (position of the block's last token), in
  // [min_age, max_age]: so one call serves queries of which some see a block packed and others exact.
  std::int32_t min_age = std::numeric_limits<std::int32_t>::min();
  std::int32_t max_age = std::numeric_limits<std::int32_t>::max();
  // Correction of the softmax mass that coarse codes lose: null, or [n_kv_heads][1 + kMaxRuns]. With m the row of the
  // head, every score of the segment grows by m[0] + sum over quantised K runs r of m[1 + r] * half_r(t)^2, natural
  // logarithm.
  const float* mass = nullptr;
};

// Softmax attention of a tile of query rows over segments, codes used where they lie. Partial result: unnormalised,
// so that parts over different blocks merge exactly by log-sum-exp (AttentionMerge).
//   s[r, t] = q[r] . k[t] + mass(t)    for position(t) <= first_query_pos + r / group
//   row_max = max s,  row_sum = sum exp(s - row_max),  out = sum exp(s - row_max) v[t]
// V's rotation is undone once per row and segment. Precision depends on n_rows alone, never on the history:
//   up to kDecodeRowsMax rows (decode): q, and the probabilities times V's step, are 16-bit integers with one scale
//     per row and run (AVX-512 VNNI); exact runs take float32, or with AMX the sum of two bf16.
//   more rows (prefill), with AMX: q, the probabilities and the dequantised K and V of runs of at most 4 bits are
//     rounded to bf16; 8-bit runs to the sum of two bf16. Without AMX: codes as above (VNNI), other runs in float32.
// A row that sees no token gets row_max = -inf, row_sum = 0, out = 0.
struct AttentionArgs {
  const float* q;  // [n_rows, head_dim], scaled (QueryPrep)
  std::int32_t n_rows, group, head_dim;
  std::int32_t first_query_pos;
  std::int32_t kv_head;
  const KvSegment* segments;
  std::int32_t n_segments;
  float* out;      // [n_rows, head_dim]
  float* row_max;  // [n_rows]
  float* row_sum;  // [n_rows]
  void* scratch;   // AttentionScratchBytes(n_rows, head_dim), 64-byte aligned; ReferenceOps does not use it
};
// Rows per call; callers cut larger tiles. A block is unpacked once per call, so many rows make that cheap.
inline constexpr int kAttentionRowsMax = 1024;
inline constexpr int kDecodeRowsMax = 8;
// Two sides of at most two blocks, unpacked (64 KiB each side), and per row about 10 * head_dim bytes; never any
// history.
std::size_t AttentionScratchBytes(int n_rows, int head_dim);

// dst[r] = sum_p e^(max_p - max) out_p[r] / sum_p e^(max_p - max) sum_p[r], as act. Rows (token, head in group) go to
// dst + token * dst_stride + (kv_head * group + j) * head_dim.
struct AttentionMergeArgs {
  const float* const* out;      // [n_parts] of [n_rows, head_dim]
  const float* const* row_max;  // [n_parts] of [n_rows]
  const float* const* row_sum;
  std::int32_t n_parts, n_rows, group, head_dim, kv_head;
  void* dst;  // act
  std::int64_t dst_stride;
};

struct Ops {
  const char* name;      // "ref" or "cpu"
  const char* (*isa)();  // e.g. "AVX3_DL", "AVX2", "scalar"
  int act_bytes;         // 4 (f32) or 2 (bf16)
  KernelStatus (*embed)(const EmbedArgs&);
  KernelStatus (*rms_norm)(const RmsNormArgs&);
  KernelStatus (*layer_norm)(const LayerNormArgs&);
  KernelStatus (*head_norm)(const HeadNormArgs&);
  KernelStatus (*linear)(const LinearArgs&);
  KernelStatus (*swiglu)(const SwiGluArgs&);
  KernelStatus (*relu)(const ReluArgs&);
  KernelStatus (*query_prep)(const QueryPrepArgs&);
  KernelStatus (*kv_write)(const KvWriteArgs&);
  KernelStatus (*kv_pack)(const KvPackArgs&);
  KernelStatus (*attention)(const AttentionArgs&);
  KernelStatus (*attention_merge)(const AttentionMergeArgs&);
};

const Ops& ReferenceOps();
const Ops& CpuOps();

}  // namespace zeroc::kernels
