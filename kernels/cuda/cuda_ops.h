// The ops of kernels/ops.h on a GPU: the same argument structs, with device pointers, enqueued on a stream. Where the
// CPU works head by head and tile by tile on many threads, one call here takes a whole layer of a whole batch.
//
// "act" is bf16. Layouts and rotations are host pointers, read before the call returns; all else that a struct points
// to is device memory and must stay until the stream has passed. KV blocks begin at multiples of 16 bytes. Layouts with
// 32-bit runs are for the reference engine only: kUnsupported. Bad shapes: kBadShape, and nothing is enqueued.
// kUnsupported also where the device refuses a launch. Any thread; no allocation; one stream's work runs in order.
//
// docs/cuda.md says how each kernel works and what of it has been measured.
#pragma once

#include "kernels/cuda/runtime.h"
#include "kernels/ops.h"

namespace zeroc::kernels::cuda {

KernelStatus Embed(const EmbedArgs& args, Stream stream);
KernelStatus RmsNorm(const RmsNormArgs& args, Stream stream);
KernelStatus LayerNorm(const LayerNormArgs& args, Stream stream);
KernelStatus HeadNorm(const HeadNormArgs& args, Stream stream);
KernelStatus SwiGlu(const SwiGluArgs& args, Stream stream);
KernelStatus Relu(const ReluArgs& args, Stream stream);

// y[r, o] (+)= bias[o] for o in [out_begin, out_end): what comes before a product (linear.h).
struct AddBiasArgs {
  const float* bias;  // [n_out]
  std::int64_t out_begin, out_end;
  std::int64_t n_rows;
  float* y;
  std::int64_t y_stride;
  bool accumulate;
};
KernelStatus AddBias(const AddBiasArgs& args, Stream stream);

// ---- Whole blocks ----

// XXH3 of 64 bits, seed 0, of every block: what libzeroc/comm/checksum.h computes on the host.
struct BlockChecksumArgs {
  const std::uint8_t* const* blocks;  // [n_blocks] device array of device pointers, multiples of 8
  std::int32_t n_blocks;
  std::int64_t block_bytes;  // more than 240, a multiple of 8
  std::uint64_t* out;        // [n_blocks]
};
KernelStatus BlockChecksums(const BlockChecksumArgs& args, Stream stream);

// Between scattered blocks and a contiguous buffer: what a transport without access to device memory sends and receives
// through pinned memory in one copy.
struct BlockCopyArgs {
  std::uint8_t* const* blocks;  // [n_blocks] device array of device pointers, multiples of 16
  std::int32_t n_blocks;
  std::int64_t block_bytes;  // a multiple of 16
  std::uint8_t* contiguous;  // [n_blocks, block_bytes], at a multiple of 16
};
KernelStatus GatherBlocks(const BlockCopyArgs& args, Stream stream);
KernelStatus ScatterBlocks(const BlockCopyArgs& args, Stream stream);

// ---- Queries, keys and values ----

// The maps of a layer as the tensor cores take them: every number as the sum of two bf16, in tiles of the KV format
// (lanes = columns, depth = rows). Done once, when a plan is loaded.
//   maps   [n_heads, head_dim, head_dim] f32 row-major
//   tiles  SplitMapBytes(n_heads, head_dim): [n_heads][high, low][head_dim / 16][head_dim / 16][512]
constexpr std::int64_t SplitMapBytes(int n_heads, int head_dim) {
  return std::int64_t{4} * n_heads * head_dim * head_dim;
}
KernelStatus SplitMaps(const float* maps, int n_heads, int head_dim, std::uint8_t* tiles, Stream stream);

// query_prep for new tokens of many sequences of one format, with the map as SplitMaps made it. The product takes both
// halves of both factors, without the smallest of the four terms: |error| <= 3 * 2^-18 |x| |column|, and that of f32
// sums. A tile is up to kQueryTileRows rows (token, then head in group) of one sequence.
inline constexpr int kQueryTileRows = 64;
struct QueryPrepTile {
  std::int64_t first_token;          // the sequence's first, as a row of q
  std::int64_t out_offset;           // of the sequence's [n_kv_heads, n_tokens, group, head_dim] in out, in floats
  std::int32_t first_pos, n_tokens;  // of the sequence
  std::int32_t first_row;            // of the tile, a multiple of kQueryTileRows
};
struct QueryPrepBatchArgs {
  const float* q;  // [tokens, n_heads * head_dim] with q_stride
  std::int64_t q_stride;
  std::int32_t n_heads, n_kv_heads, head_dim;
  const QueryPrepTile* tiles;  // [n_tiles] device array
  std::int32_t n_tiles;
  RopeRows rope;                  // of every position from 0 on
  const std::uint8_t* map_tiles;  // or null
  float scale;
  float* out;
  const KvSideLayout* rotation = nullptr;
};
KernelStatus QueryPrepBatch(const QueryPrepBatchArgs& args, Stream stream);

// kv_write for new tokens of many sequences of one format, and packing in the same pass: RoPE, K map (tensor cores),
// rounding to bf16, the exact block, and where it is due, the packed block from the same rounded numbers, before they
// leave shared memory. Rows of a block that this call does not write are taken for packing as they lie in the exact
// block.
struct KvWriteBlock {
  std::uint8_t* block;             // exact
  std::uint8_t* packed;            // null for none
  std::int64_t first_row;          // of k and v
  std::int32_t first_pos, n_rows;  // positions first_pos .. lie in this block, from row first_pos % 64 on
};
struct KvWriteBatchArgs {
  const float* k;  // [tokens, n_kv_heads * head_dim] with kv_stride, before RoPE
  const float* v;
  std::int64_t kv_stride;
  const KvWriteBlock* blocks;  // [n_blocks] device array
  std::int32_t n_blocks;
  RopeRows rope;                                 // of every position from 0 on
  const std::uint8_t* map_tiles;                 // of SplitMaps, or null
  const KvBlockLayout* layout;                   // exact, 16-bit runs, 64 tokens
  const KvBlockLayout* packed_layout = nullptr;  // null where no block of the call is packed
  const KvSideLayout* rotation = nullptr;
};
KernelStatus KvWriteBatch(const KvWriteBatchArgs& args, Stream stream);

// kv_pack for many blocks. The bytes are the reference's.
struct KvPackBatchArgs {
  const std::uint8_t* const* sources;  // [n_blocks] device array of device pointers
  std::uint8_t* const* packed;         // [n_blocks]
  std::int32_t n_blocks;
  const KvBlockLayout* source_layout;
  const KvBlockLayout* packed_layout;
  std::int32_t kv_head_begin, kv_head_end;
};
KernelStatus KvPackBatch(const KvPackBatchArgs& args, Stream stream);

}  // namespace zeroc::kernels::cuda
