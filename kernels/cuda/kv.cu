// Queries, keys and values into packed coordinates, the cache write and packing. Compiled without contraction of
// products and sums into one rounding: packed bytes depend on it.
#include "kernels/checks.h"
#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/map_rows.h"
#include "kernels/cuda/pack_rows.h"

namespace zeroc::kernels::cuda {
namespace {

// ---- Maps ----

struct SplitMapsParams {
  const float* maps;
  std::uint8_t* tiles;
  int head_dim;
};

// A block for each head; a thread writes the word of two rows and one column, both halves.
ZEROC_KERNEL(kKvThreads) SplitMapsKernel(SplitMapsParams p) {
  const int d = p.head_dim;
  const float* map = p.maps + std::int64_t{BlockIdx()} * d * d;
  std::uint8_t* to = p.tiles + std::int64_t{BlockIdx()} * 4 * d * d;
  for (int i = ThreadIdx(); i < d * d / 2; i += kKvThreads) {
    const int row = i / d * 2, column = i % d;
    const SplitPair pair = SplitTwo(map[row * d + column], map[(row + 1) * d + column]);
    std::uint8_t* at =
        to + (column / 16 * (d / 16) + row / 16) * TileBytes(16) + 64 * (row % 16 / 2) + 4 * (column % 16);
    *reinterpret_cast<std::uint32_t*>(at) = pair.high;
    *reinterpret_cast<std::uint32_t*>(at + 2 * d * d) = pair.low;
  }
}

// ---- Queries ----

static_assert(kQueryTileRows == kRows);

struct QueryPrepParams {
  QueryPrepBatchArgs args;
  KvSideLayout rotation;
  bool rotates;
};

// A block for each tile and KV head.
ZEROC_KERNEL(kKvThreads) QueryPrepKernel(QueryPrepParams p) {
  auto* x = reinterpret_cast<float*>(SharedMemory());
  const QueryPrepBatchArgs& args = p.args;
  const QueryPrepTile tile = args.tiles[BlockIdx() / args.n_kv_heads];
  const int d = args.head_dim, group = args.n_heads / args.n_kv_heads, head = BlockIdx() % args.n_kv_heads;
  const int n_rows = tile.n_tokens * group;
  const auto row_of = [&](int row) -> HeadRow {
    const int at = tile.first_row + row;
    if (at >= n_rows) return {nullptr, nullptr, nullptr};
    const float* q =
        args.q + (tile.first_token + at / group) * args.q_stride + std::int64_t{head * group + at % group} * d;
    if (args.rope.cos == nullptr) return {q, nullptr, nullptr};
    const std::int64_t pos = tile.first_pos + at / group;
    return {q, args.rope.cos + pos * (d / 2), args.rope.sin + pos * (d / 2)};
  };
  LoadTurnedRows(row_of, d, x);
  if (args.map_tiles != nullptr) MapRowsOf(args.map_tiles + std::int64_t{head} * 4 * d * d, d, x);
  if (p.rotates) {
    for (int i = ThreadIdx(); i < d * kRows; i += kKvThreads) x[i / kRows * kRowStride + i % kRows] *= args.scale;
    Sync();
    HadamardQuantised(x, p.rotation);
  }
  const float scale = p.rotates ? 1.0f : args.scale;
  float* out = args.out + tile.out_offset + (std::int64_t{head} * n_rows + tile.first_row) * d;
  for (int i = ThreadIdx(); i < Min(kRows, n_rows - tile.first_row) * d; i += kKvThreads) {
    out[i] = scale * x[i % d * kRowStride + i / d];
  }
}

// ---- Keys and values ----

struct KvWriteParams {
  const float* k;
  const float* v;
  std::int64_t kv_stride;
  const KvWriteBlock* blocks;
  int n_heads;
  RopeRows rope;
  const std::uint8_t* map_tiles;
  bool rotates, packs;
  KvSideLayout rotation;
  KvBlockLayout layout;
  KvBlockLayout packed_layout;
};

// Rounds x to bf16, in place, and writes tokens [begin, end) to the exact block. A thread has a pair of depth steps.
template <bool kIsValue>
ZEROC_DEVICE void WriteExact(const KvBlockLayout& layout, int begin, int end, float* x, std::uint8_t* head) {
  const int n_coord_tiles = layout.head_dim / 16;
  std::uint8_t* codes = head + (kIsValue ? layout.v.codes_offset[0] : layout.k.codes_offset[0]);
  for (int i = ThreadIdx(); i < n_coord_tiles * (kRows / 16) * 128; i += kKvThreads) {
    const int tile = i / 128, lane = i % 16, pair = i / 16 % 8;
    const int coord_tile = kIsValue ? tile / (kRows / 16) : tile % n_coord_tiles;
    const int group = kIsValue ? tile % (kRows / 16) : tile / n_coord_tiles;
    for (int j = 0; j < 2; ++j) {
      const int depth = 2 * pair + j;
      const int token = 16 * group + (kIsValue ? depth : lane), coord = 16 * coord_tile + (kIsValue ? lane : depth);
      if (token < begin || token >= end) continue;
      float& value = x[coord * kRowStride + token];
      const Bf16 rounded = ToBf16(value);
      value = FromBf16(rounded);
      *reinterpret_cast<Bf16*>(codes + tile * TileBytes(16) + 64 * pair + 4 * lane + 2 * j) = rounded;
    }
  }
}

template <bool kIsValue>
ZEROC_DEVICE void WriteSide(const KvWriteParams& p) {
  auto* x = reinterpret_cast<float*>(SharedMemory());
  auto* scratch = reinterpret_cast<PackScratch*>(SharedMemory() + RowsBytes(p.layout.head_dim));
  const int head_idx = BlockIdx() % p.n_heads;
  const KvWriteBlock place = p.blocks[BlockIdx() / p.n_heads];
  const int d = p.layout.head_dim, begin = place.first_pos % kRows, end = begin + place.n_rows;
  const float* from = (kIsValue ? p.v : p.k) + std::int64_t{head_idx} * d;
  const auto row_of = [&](int row) -> HeadRow {
    if (row < begin || row >= end) return {nullptr, nullptr, nullptr};
    const float* values = from + (place.first_row + row - begin) * p.kv_stride;
    if (kIsValue || p.rope.cos == nullptr) return {values, nullptr, nullptr};
    const std::int64_t pos = place.first_pos + row - begin;
    return {values, p.rope.cos + pos * (d / 2), p.rope.sin + pos * (d / 2)};
  };
  LoadTurnedRows(row_of, d, x);
  if (!kIsValue && p.map_tiles != nullptr) MapRowsOf(p.map_tiles + std::int64_t{head_idx} * 4 * d * d, d, x);
  if (!kIsValue && p.rotates) HadamardQuantised(x, p.rotation);
  std::uint8_t* head = place.block + std::int64_t{head_idx} * p.layout.head_bytes;
  WriteExact<kIsValue>(p.layout, begin, end, x, head);
  if (!p.packs || place.packed == nullptr) return;  // the whole thread block
  const KvSideLayout& exact = kIsValue ? p.layout.v : p.layout.k;
  for (int i = ThreadIdx(); i < d * kRows && (begin > 0 || end < kRows); i += kKvThreads) {
    const int coord = i / kRows, token = i % kRows;
    if (token >= begin && token < end) continue;
    const int tile = kIsValue ? coord / 16 * (kRows / 16) + token / 16 : token / 16 * (d / 16) + coord / 16;
    const int lane = (kIsValue ? coord : token) % 16, depth = (kIsValue ? token : coord) % 16;
    const int at = exact.codes_offset[0] + tile * TileBytes(16) + 64 * (depth / 2) + 4 * lane + 2 * (depth % 2);
    x[coord * kRowStride + token] = FromBf16(*reinterpret_cast<const Bf16*>(head + at));
  }
  Sync();
  PackRows<kIsValue>(p.packed_layout, x, scratch, place.packed + std::int64_t{head_idx} * p.packed_layout.head_bytes);
}

// A block for each KV block, head and side.
ZEROC_KERNEL(kKvThreads) KvWriteKernel(KvWriteParams p) {
  if (BlockIdxY() == 0) {
    WriteSide<false>(p);
  } else {
    WriteSide<true>(p);
  }
}

struct KvPackParams {
  const std::uint8_t* const* sources;
  std::uint8_t* const* packed;
  int kv_head_begin, n_heads;
  bool copies;  // equal layouts
  KvBlockLayout source_layout;
  KvBlockLayout packed_layout;
};

template <bool kIsValue>
ZEROC_DEVICE void PackSide(const KvPackParams& p) {
  auto* x = reinterpret_cast<float*>(SharedMemory());
  auto* scratch = reinterpret_cast<PackScratch*>(SharedMemory() + RowsBytes(p.source_layout.head_dim));
  const int head_idx = p.kv_head_begin + BlockIdx() % p.n_heads, block_idx = BlockIdx() / p.n_heads;
  const std::uint8_t* from = p.sources[block_idx] + std::int64_t{head_idx} * p.source_layout.head_bytes;
  std::uint8_t* to = p.packed[block_idx] + std::int64_t{head_idx} * p.packed_layout.head_bytes;
  if (p.copies) {
    const int half = p.source_layout.head_bytes / 2;
    const int begin = kIsValue ? half : 0, end = kIsValue ? p.source_layout.head_bytes : half;
    for (int i = begin + ThreadIdx(); i < end; i += kKvThreads) to[i] = from[i];
    return;
  }
  DecodeRows<kIsValue>(p.source_layout, from, x);
  PackRows<kIsValue>(p.packed_layout, x, scratch, to);
}

ZEROC_KERNEL(kKvThreads) KvPackKernel(KvPackParams p) {
  if (BlockIdxY() == 0) {
    PackSide<false>(p);
  } else {
    PackSide<true>(p);
  }
}

int PackBytes(int head_dim) { return RowsBytes(head_dim) + static_cast<int>(sizeof(PackScratch)); }

}  // namespace

KernelStatus SplitMaps(const float* maps, int n_heads, int head_dim, std::uint8_t* tiles, Stream stream) {
  if (maps == nullptr || tiles == nullptr || n_heads < 1 || head_dim < 16 || head_dim > kMaxHeadDim ||
      head_dim % 16 != 0) {
    return KernelStatus::kBadShape;
  }
  return Launch(SplitMapsKernel, {n_heads, kKvThreads}, stream, {maps, tiles, head_dim});
}

KernelStatus QueryPrepBatch(const QueryPrepBatchArgs& args, Stream stream) {
  if (args.n_tiles < 0) return KernelStatus::kBadShape;
  // The same checks as for one sequence; the tiles are the device's to follow.
  if (!IsGood(QueryPrepArgs{args.q, args.q_stride, 1, args.n_heads, args.n_kv_heads, args.head_dim, 0, args.n_kv_heads,
                            args.rope, nullptr, args.scale, args.out, args.rotation})) {
    return KernelStatus::kBadShape;
  }
  if (args.n_tiles == 0) return KernelStatus::kOk;
  if (args.tiles == nullptr) return KernelStatus::kBadShape;
  const bool rotates = args.rotation != nullptr;
  QueryPrepParams params = {args, rotates ? *args.rotation : KvSideLayout{}, rotates};
  params.args.rotation = nullptr;
  return Launch(QueryPrepKernel, {std::int64_t{args.n_tiles} * args.n_kv_heads, kKvThreads, RowsBytes(args.head_dim)},
                stream, params);
}

KernelStatus KvWriteBatch(const KvWriteBatchArgs& args, Stream stream) {
  if (args.n_blocks < 0 || args.layout == nullptr) return KernelStatus::kBadShape;
  const int n_heads = args.layout->n_kv_heads;
  std::uint8_t* any = nullptr;
  if (!IsGood(KvWriteArgs{args.k, args.v, args.kv_stride, 0, 1, 0, n_heads, args.rope, nullptr, args.layout, &any,
                          args.rotation})) {
    return KernelStatus::kBadShape;
  }
  if (HasFloatRuns(*args.layout)) return KernelStatus::kUnsupported;
  const bool packs = args.packed_layout != nullptr;
  if (packs && (args.packed_layout->n_kv_heads != n_heads || args.packed_layout->head_dim != args.layout->head_dim)) {
    return KernelStatus::kBadShape;
  }
  if (packs && HasFloatRuns(*args.packed_layout)) return KernelStatus::kUnsupported;
  if (args.n_blocks == 0) return KernelStatus::kOk;
  if (args.blocks == nullptr) return KernelStatus::kBadShape;
  const bool rotates = args.rotation != nullptr;
  const KvWriteParams params = {args.k,         args.v,
                                args.kv_stride, args.blocks,
                                n_heads,        args.rope,
                                args.map_tiles, rotates,
                                packs,          rotates ? *args.rotation : KvSideLayout{},
                                *args.layout,   packs ? *args.packed_layout : KvBlockLayout{}};
  return Launch(KvWriteKernel,
                {std::int64_t{args.n_blocks} * n_heads, kKvThreads, PackBytes(args.layout->head_dim), /*n_blocks_y=*/2},
                stream, params);
}

KernelStatus KvPackBatch(const KvPackBatchArgs& args, Stream stream) {
  if (args.n_blocks < 0) return KernelStatus::kBadShape;
  if (args.n_blocks == 0) return KernelStatus::kOk;
  if (args.sources == nullptr || args.packed == nullptr) return KernelStatus::kBadShape;
  // The same checks as for one block; the pointers are the device's to follow.
  std::uint8_t any = 0;
  if (!IsGood(KvPackArgs{&any, args.source_layout, &any, args.packed_layout, args.kv_head_begin, args.kv_head_end})) {
    return KernelStatus::kBadShape;
  }
  if (HasFloatRuns(*args.source_layout) || HasFloatRuns(*args.packed_layout)) return KernelStatus::kUnsupported;
  const int n_heads = args.kv_head_end - args.kv_head_begin;
  const KvPackParams params = {
      args.sources,        args.packed,        args.kv_head_begin, n_heads, *args.source_layout == *args.packed_layout,
      *args.source_layout, *args.packed_layout};
  return Launch(KvPackKernel,
                {std::int64_t{args.n_blocks} * n_heads, kKvThreads, PackBytes(args.source_layout->head_dim), 2}, stream,
                params);
}

}  // namespace zeroc::kernels::cuda
