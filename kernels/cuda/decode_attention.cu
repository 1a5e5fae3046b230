// Split-KV decode attention on packed tiles.
//
// A thread block of four warps takes its items one after the other, block by block of 64 tokens: the head's bytes
// arrive by asynchronous copies one block ahead; warp w computes the scores of tokens 16 w .. 16 w + 15 on all
// coordinates, then coordinate tiles w, w + 4, .. of the values on all tokens. Codes become bytes in registers and go
// to the tensor cores as they are: q and the probabilities are 16-bit integers, high and low byte by themselves, so
// that sums over codes are exact int32; scales come after the sums (K) or are folded into the probabilities (V). Exact
// runs take bf16 products.
#include "kernels/cuda/attention.h"
#include "kernels/cuda/attention_shared.h"
#include "kernels/cuda/launch.h"

namespace zeroc::kernels::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = 4;
constexpr int kTileRows = kDecodeTileRows;
constexpr int kOwnTilesMax = kMaxHeadDim / 16 / kWarps;  // coordinate tiles of one warp
constexpr float kLargest = 32512.0f;                     // 127 * 256: the high byte stays in range

struct DecodeParams {
  const float* q;
  const DeviceQueryTile* tiles;
  const DeviceSegment* segments;
  const DeviceItem* items;
  const std::int32_t* first_item;
  float* out;
  float* row_max;
  float* row_sum;
  int head_dim;
  int stage_bytes;    // of one head, with room for its misalignment
  int query_stride;   // bytes of a row of q, high or low half
  int weight_stride;  // the same for the probabilities
  Layouts layouts;
};

// Fixed-size part of shared memory; q, probabilities and the two stages follow.
struct DecodeShared {
  ScaleTables scales;
  float q_unit[kMaxRuns][kTileRows];
  float q_sum[kMaxRuns][kTileRows];
  float warp_max[kWarps][kTileRows];
  float warp_sum[kWarps][kTileRows];
  float warp_base[kWarps][kMaxRuns][kTileRows];
};

// Two rows of an operand of 16: lane / 4 and that plus 8, as the fragments have it.
struct TwoRows {
  float at[2];
};

struct DecodeBlock {
  const DecodeParams& p;
  const DeviceQueryTile& tile;
  const DeviceSegment& segment;
  const KvBlockLayout& layout;
  DecodeShared* shared;
  std::uint8_t* query;    // [high, low][16][query_stride]
  std::uint8_t* weights;  // [high, low][16][weight_stride]
  std::uint8_t* stages;   // [2][stage_bytes]
  int warp, g, q;         // of the fragments
  TokenSpan span[2];      // what rows g and g + 8 see, from the segment's first block
};

// Columns (bytes) of the runs in a row of q or of the probabilities.
constexpr int QueryColumns(const KvRun& run) {
  return run.bits == 16 ? 2 * run.width : IsQuantised(run.bits) ? (run.width + 31) / 32 * 32 : 0;
}
constexpr int WeightColumns(const KvRun& run) {
  return run.bits == 16 ? 2 * kBlockTokens : IsQuantised(run.bits) ? kBlockTokens : 0;
}

struct SplitInt {
  std::uint8_t high, low;
};
// x = 256 high + low, both signed.
ZEROC_DEVICE SplitInt SplitBytes(int x) {
  const int high = (x + 128) >> 8;
  return {static_cast<std::uint8_t>(high), static_cast<std::uint8_t>(x - 256 * high)};
}

// Fills q of the tile: eight threads for each row.
ZEROC_DEVICE void LoadQuery(const DecodeBlock& b) {
  const int row = ThreadIdx() / 8, sub = ThreadIdx() % 8, d = b.p.head_dim;
  const bool is_row = row < b.tile.n_rows;
  const float* q = b.p.q + b.tile.q_offset + std::int64_t{row} * d;
  std::uint8_t* high = b.query + row * b.p.query_stride;
  std::uint8_t* low = high + kTileRows * b.p.query_stride;
  int column = 0;
  for (int r = 0; r < b.layout.k.n_runs; ++r) {
    const KvRun& run = b.layout.k.runs[r];
    const int first = b.layout.k.first_coord[r];
    float largest = 0.0f, sum = 0.0f;
    for (int i = sub; i < run.width; i += 8) {
      const float x = is_row ? q[first + i] : 0.0f;
      largest = Max(largest, x < 0.0f ? -x : x);
      sum += x;
    }
    for (int mask = 4; mask > 0; mask /= 2) {
      largest = Max(largest, ShuffleXor(largest, mask));
      sum += ShuffleXor(sum, mask);
    }
    const float inverse = largest > 0.0f ? kLargest / largest : 0.0f;
    for (int i = sub; i < run.width; i += 8) {
      const float x = is_row ? q[first + i] : 0.0f;
      if (IsQuantised(run.bits)) {
        const SplitInt bytes = SplitBytes(RoundToInt(x * inverse));
        high[column + i] = bytes.high;
        low[column + i] = bytes.low;
      } else if (run.bits == 16) {
        const SplitBf16 halves = Split(x);
        reinterpret_cast<Bf16*>(high + column)[i] = halves.high;
        reinterpret_cast<Bf16*>(low + column)[i] = halves.low;
      }
    }
    if (sub == 0) {
      // A NaN must not vanish in the integers.
      b.shared->q_unit[r][row] = sum - sum == 0.0f ? largest / kLargest : sum;
      b.shared->q_sum[r][row] = sum;
    }
    column += QueryColumns(run);
  }
}

// The operand of 16 rows at a column (32 bytes of depth) of q or of the probabilities.
ZEROC_DEVICE void LoadRows(const std::uint8_t* rows, int stride, const DecodeBlock& b, int column,
                           std::uint32_t (&a)[4]) {
  const std::uint8_t* at = rows + b.g * stride + column + 4 * b.q;
  for (int r = 0; r < 4; ++r) {
    a[r] = *reinterpret_cast<const std::uint32_t*>(at + r % 2 * 8 * stride + r / 2 * 16);
  }
}

// scores[n][.] of the warp's two times eight tokens.
ZEROC_DEVICE void Scores(const DecodeBlock& b, const std::uint8_t* head, float (&scores)[2][4]) {
  const KvSideLayout& k = b.layout.k;
  const std::uint8_t* low_half = b.query + kTileRows * b.p.query_stride;
  const int first_token = 16 * b.warp + 2 * b.q;  // of the fragments' columns
  int column = 0;
  for (int r = 0; r < k.n_runs; ++r) {
    const int bits = k.runs[r].bits, n_tiles = k.runs[r].width / 16;
    const std::uint8_t* tiles = head + k.codes_offset[r] + b.warp * n_tiles * TileBytes(bits);
    std::uint32_t high[4], low[4];
    if (bits == 16) {
      for (int i = 0; i < n_tiles; ++i) {
        LoadRows(b.query, b.p.query_stride, b, column + 32 * i, high);
        LoadRows(low_half, b.p.query_stride, b, column + 32 * i, low);
        for (int n = 0; n < 2; ++n) {
          const std::uint8_t* at = tiles + i * TileBytes(16) + 64 * b.q + 4 * (8 * n + b.g);
          const std::uint32_t b0 = LoadSharedWord(at), b1 = LoadSharedWord(at + 256);
          MmaBf16(scores[n], high, b0, b1);
          MmaBf16(scores[n], low, b0, b1);
        }
      }
    } else if (bits > 0) {
      std::int32_t highs[2][4] = {}, lows[2][4] = {};
      for (int i = 0; i < n_tiles; i += 2) {
        LoadRows(b.query, b.p.query_stride, b, column + 16 * i, high);
        LoadRows(low_half, b.p.query_stride, b, column + 16 * i, low);
        for (int n = 0; n < 2; ++n) {
          const std::uint8_t* tile = tiles + i * TileBytes(bits);
          const auto load = [&tile](int at) { return LoadSharedWord(tile + at); };
          const std::uint32_t b0 = CodeQuad(bits, 8 * n + b.g, b.q, load);
          tile += TileBytes(bits);
          const std::uint32_t b1 = i + 1 < n_tiles ? CodeQuad(bits, 8 * n + b.g, b.q, load) : 0u;
          MmaS8U8(highs[n], high, b0, b1);
          MmaS8U8(lows[n], low, b0, b1);
        }
      }
      for (int n = 0; n < 2; ++n) {
        for (int i = 0; i < 4; ++i) {
          const int row = b.g + 8 * (i / 2), token = first_token + 8 * n + i % 2;
          const float sum = 256.0f * static_cast<float>(highs[n][i]) + static_cast<float>(lows[n][i]);
          scores[n][i] += b.shared->scales.k_step[r][token] * (b.shared->q_unit[r][row] * sum) +
                          b.shared->scales.k_base[r][token] * b.shared->q_sum[r][row];
        }
      }
    }
    column += QueryColumns(k.runs[r]);
  }
}

// -inf for what a row does not see, mass for what it does; the largest of each row over the warp's tokens.
ZEROC_DEVICE TwoRows MaskScores(const DecodeBlock& b, int block_idx, float (&scores)[2][4]) {
  TwoRows largest = {-kInfinity, -kInfinity};
  for (int n = 0; n < 2; ++n) {
    for (int i = 0; i < 4; ++i) {
      const int in_block = 16 * b.warp + 8 * n + 2 * b.q + i % 2;
      const int token = block_idx * b.layout.n_tokens + in_block;
      const TokenSpan& span = b.span[i / 2];
      const bool is_seen = in_block < b.layout.n_tokens && token >= span.begin && token < span.end;
      scores[n][i] = is_seen ? scores[n][i] + b.shared->scales.mass[in_block] : -kInfinity;
      largest.at[i / 2] = Max(largest.at[i / 2], scores[n][i]);
    }
  }
  for (int row = 0; row < 2; ++row) {
    for (int mask = 2; mask > 0; mask /= 2) largest.at[row] = Max(largest.at[row], ShuffleXor(largest.at[row], mask));
  }
  return largest;
}

// Probabilities, relative to the block's largest score, as operands of the values' products; and their sums.
ZEROC_DEVICE void StoreWeights(const DecodeBlock& b, const float (&scores)[2][4], const TwoRows& block_max,
                               const TwoRows& rest, TwoRows* sum, float (&base)[kMaxRuns][2]) {
  const KvSideLayout& v = b.layout.v;
  for (int n = 0; n < 2; ++n) {
    const int token = 16 * b.warp + 8 * n + 2 * b.q;
    for (int row = 0; row < 2; ++row) {
      const float first = ExpBelow(scores[n][2 * row], block_max.at[row]);
      const float second = ExpBelow(scores[n][2 * row + 1], block_max.at[row]);
      sum->at[row] += rest.at[row] * (first + second);
      std::uint8_t* high = b.weights + (b.g + 8 * row) * b.p.weight_stride;
      std::uint8_t* low = high + kTileRows * b.p.weight_stride;
      int column = 0;
      ZEROC_UNROLL
      for (int r = 0; r < kMaxRuns; ++r) {
        if (r >= v.n_runs) break;
        if (v.runs[r].bits == 16) {
          const SplitBf16 x = Split(first), y = Split(second);
          const auto put = [&](std::uint8_t* to, Bf16 a, Bf16 c) {
            *reinterpret_cast<std::uint32_t*>(to + column + 2 * token) =
                static_cast<std::uint32_t>(a) | static_cast<std::uint32_t>(c) << 16;
          };
          put(high, x.high, y.high);
          put(low, x.low, y.low);
        } else if (v.runs[r].bits > 0) {
          const float* step = b.shared->scales.v_step[r];
          const float largest = Max(b.shared->scales.v_step_max[r][0], b.shared->scales.v_step_max[r][1]);
          const float inverse = largest > 0.0f ? kLargest / largest : 0.0f;
          const SplitInt x = SplitBytes(RoundToInt(first * step[token] * inverse));
          const SplitInt y = SplitBytes(RoundToInt(second * step[token + 1] * inverse));
          *reinterpret_cast<std::uint16_t*>(high + column + token) = static_cast<std::uint16_t>(x.high | y.high << 8);
          *reinterpret_cast<std::uint16_t*>(low + column + token) = static_cast<std::uint16_t>(x.low | y.low << 8);
          base[r][row] += rest.at[row] *
                          (first * b.shared->scales.v_base[r][token] + second * b.shared->scales.v_base[r][token + 1]);
        }
        column += WeightColumns(v.runs[r]);
      }
    }
  }
}

// out += probabilities times values, for the coordinate tile `own` of the warp's.
ZEROC_DEVICE void AddValues(const DecodeBlock& b, const std::uint8_t* head, int tile, int seen_begin, int seen_end,
                            const TwoRows& rest, float (&out)[2][4]) {
  const KvSideLayout& v = b.layout.v;
  const int n_groups = b.layout.n_tokens / 16;
  int r = 0, column = 0;
  while (16 * tile >= v.first_coord[r] + v.runs[r].width) column += WeightColumns(v.runs[r++]);
  const int bits = v.runs[r].bits;
  if (bits == 0) return;
  const std::uint8_t* tiles = head + v.codes_offset[r] + (tile - v.first_coord[r] / 16) * n_groups * TileBytes(bits);
  const std::uint8_t* low_half = b.weights + kTileRows * b.p.weight_stride;
  std::uint32_t high[4], low[4];
  if (bits == 16) {
    float sums[2][4] = {};
    for (int i = 0; i < n_groups; ++i) {
      LoadRows(b.weights, b.p.weight_stride, b, column + 32 * i, high);
      LoadRows(low_half, b.p.weight_stride, b, column + 32 * i, low);
      for (int n = 0; n < 2; ++n) {
        const std::uint8_t* at = tiles + i * TileBytes(16) + 64 * b.q + 4 * (8 * n + b.g);
        const int token = 16 * i + 2 * b.q;
        const std::uint32_t b0 = MaskPair(LoadSharedWord(at), token, seen_begin, seen_end);
        const std::uint32_t b1 = MaskPair(LoadSharedWord(at + 256), token + 8, seen_begin, seen_end);
        MmaBf16(sums[n], high, b0, b1);
        MmaBf16(sums[n], low, b0, b1);
      }
    }
    for (int n = 0; n < 2; ++n) {
      for (int i = 0; i < 4; ++i) out[n][i] += rest.at[i / 2] * sums[n][i];
    }
    return;
  }
  std::int32_t highs[2][4] = {}, lows[2][4] = {};
  for (int i = 0; i < n_groups; i += 2) {
    LoadRows(b.weights, b.p.weight_stride, b, column + 16 * i, high);
    LoadRows(low_half, b.p.weight_stride, b, column + 16 * i, low);
    for (int n = 0; n < 2; ++n) {
      const std::uint8_t* at = tiles + i * TileBytes(bits);
      const auto load = [&at](int offset) { return LoadSharedWord(at + offset); };
      const std::uint32_t b0 = CodeQuad(bits, 8 * n + b.g, b.q, load);
      at += TileBytes(bits);
      const std::uint32_t b1 = i + 1 < n_groups ? CodeQuad(bits, 8 * n + b.g, b.q, load) : 0u;
      MmaS8U8(highs[n], high, b0, b1);
      MmaS8U8(lows[n], low, b0, b1);
    }
  }
  const float unit = Max(b.shared->scales.v_step_max[r][0], b.shared->scales.v_step_max[r][1]) / kLargest;
  for (int n = 0; n < 2; ++n) {
    for (int i = 0; i < 4; ++i) {
      const float sum = 256.0f * static_cast<float>(highs[n][i]) + static_cast<float>(lows[n][i]);
      out[n][i] += rest.at[i / 2] * (unit * sum);
    }
  }
}

// What a warp has of an item when its blocks are done.
struct ItemSums {
  float out[kOwnTilesMax][2][4];
  float base[kMaxRuns][2];  // of the warp's tokens, this lane's share
  TwoRows row_max, row_sum;
};

// Rotates back, adds the centres and writes the item's part.
ZEROC_DEVICE void FinishItem(const DecodeBlock& b, std::int64_t part, ItemSums* sums) {
  const KvSideLayout& v = b.layout.v;
  const int d = b.p.head_dim, row_stride = d + 1;
  auto* rows = reinterpret_cast<float*>(b.stages);  // [16][row_stride], over the stages
  Sync();                                           // the last block's stage has been read by all
  ZEROC_UNROLL
  for (int own = 0; own < kOwnTilesMax; ++own) {
    const int tile = b.warp + kWarps * own;
    if (16 * tile >= d) break;
    for (int n = 0; n < 2; ++n) {
      for (int i = 0; i < 4; ++i) {
        rows[(b.g + 8 * (i / 2)) * row_stride + 16 * tile + 8 * n + 2 * b.q + i % 2] = sums->out[own][n][i];
      }
    }
  }
  ZEROC_UNROLL
  for (int row = 0; row < 2; ++row) {
    float total = sums->row_sum.at[row];
    for (int mask = 2; mask > 0; mask /= 2) total += ShuffleXor(total, mask);
    if (b.q == 0) b.shared->warp_sum[b.warp][b.g + 8 * row] = total;
    ZEROC_UNROLL
    for (int r = 0; r < kMaxRuns; ++r) {
      float base = sums->base[r][row];
      for (int mask = 2; mask > 0; mask /= 2) base += ShuffleXor(base, mask);
      if (b.q == 0) b.shared->warp_base[b.warp][r][b.g + 8 * row] = base;
    }
  }
  Sync();
  for (int r = 0; r < v.n_runs; ++r) {
    if (!IsQuantised(v.runs[r].bits)) continue;
    float* run = rows + v.first_coord[r];
    for (int i = ThreadIdx(); i < kTileRows * v.runs[r].width; i += kThreads) {
      const int row = i / v.runs[r].width, coord = i % v.runs[r].width;
      float base = 0.0f;
      for (int warp = 0; warp < kWarps; ++warp) base += b.shared->warp_base[warp][r][row];
      run[row * row_stride + coord] += base;
    }
    Sync();
    if (b.layout.rotate_v) HadamardRows<1>(run, v.runs[r].width, kTileRows, row_stride);
  }
  float* out = b.p.out + part * kTileRows * d;
  for (int i = ThreadIdx(); i < b.tile.n_rows * d; i += kThreads) out[i] = rows[i / d * row_stride + i % d];
  if (b.warp == 0 && b.q == 0) {
    for (int row = 0; row < 2; ++row) {
      const int at = b.g + 8 * row;
      if (at >= b.tile.n_rows) continue;
      float total = 0.0f;
      for (int warp = 0; warp < kWarps; ++warp) total += b.shared->warp_sum[warp][at];
      b.p.row_max[part * kTileRows + at] = sums->row_max.at[row];
      b.p.row_sum[part * kTileRows + at] = total;
    }
  }
  Sync();  // rows and sums may be overwritten
}

ZEROC_DEVICE void RunItem(DecodeBlock& b, const DeviceItem& item) {
  ItemSums sums = {};
  sums.row_max = {-kInfinity, -kInfinity};
  const SegmentWindow window = WindowOf(b.segment, b.layout);
  for (int row = 0; row < 2; ++row) {
    const int at = b.g + 8 * row;
    b.span[row] = {0, 0};
    if (at < b.tile.n_rows) b.span[row] = SpanOfQuery(window, QueryPos(b.tile, at));
  }
  const int seen_begin = SpanOfQuery(window, QueryPos(b.tile, 0)).begin;
  const int seen_end = SpanOfQuery(window, QueryPos(b.tile, b.tile.n_rows - 1)).end;
  CopyHead(b.segment, b.layout, b.tile.kv_head, item.block_begin, b.stages);
  LoadQuery(b);
  for (int block = item.block_begin; block < item.block_end; ++block) {
    const int stage = (block - item.block_begin) % 2;
    CopyAsyncWait<0>();
    Sync();  // the block is there, and nobody needs the one before any more
    if (block + 1 < item.block_end) {
      CopyHead(b.segment, b.layout, b.tile.kv_head, block + 1, b.stages + (1 - stage) * b.p.stage_bytes);
    }
    const std::uint8_t* head =
        StagedHead(b.segment, b.layout, b.tile.kv_head, block, b.stages + stage * b.p.stage_bytes);
    LoadScales<true>(b.segment, b.layout, b.tile.kv_head, head, &b.shared->scales);
    Sync();
    float scores[2][4] = {};
    if (16 * b.warp < b.layout.n_tokens) Scores(b, head, scores);
    const TwoRows own_max = MaskScores(b, block, scores);
    if (b.q == 0) {
      for (int row = 0; row < 2; ++row) b.shared->warp_max[b.warp][b.g + 8 * row] = own_max.at[row];
    }
    Sync();
    TwoRows block_max = {-kInfinity, -kInfinity}, shrink, rest;
    for (int row = 0; row < 2; ++row) {
      for (int warp = 0; warp < kWarps; ++warp) {
        block_max.at[row] = Max(block_max.at[row], b.shared->warp_max[warp][b.g + 8 * row]);
      }
      const float top = Max(sums.row_max.at[row], block_max.at[row]);
      shrink.at[row] = ExpBelow(sums.row_max.at[row], top);
      rest.at[row] = ExpBelow(block_max.at[row], top);
      sums.row_max.at[row] = top;
      sums.row_sum.at[row] *= shrink.at[row];
      ZEROC_UNROLL
      for (int r = 0; r < kMaxRuns; ++r) sums.base[r][row] *= shrink.at[row];
    }
    StoreWeights(b, scores, block_max, rest, &sums.row_sum, sums.base);
    Sync();
    const int first = block * b.layout.n_tokens;
    ZEROC_UNROLL
    for (int own = 0; own < kOwnTilesMax; ++own) {
      const int tile = b.warp + kWarps * own;
      if (16 * tile >= b.p.head_dim) break;
      for (int n = 0; n < 2; ++n) {
        for (int i = 0; i < 4; ++i) sums.out[own][n][i] *= shrink.at[i / 2];
      }
      AddValues(b, head, tile, seen_begin - first, seen_end - first, rest, sums.out[own]);
    }
  }
  FinishItem(b, item.part, &sums);
}

ZEROC_KERNEL(kThreads) DecodeAttentionKernel(DecodeParams p) {
  std::uint8_t* memory = SharedMemory();
  auto* shared = reinterpret_cast<DecodeShared*>(memory);
  std::uint8_t* query = memory + sizeof(DecodeShared);
  std::uint8_t* weights = query + 2 * kTileRows * p.query_stride;
  std::uint8_t* stages = weights + 2 * kTileRows * p.weight_stride;
  const int lane = ThreadIdx() % 32;
  for (int i = p.first_item[BlockIdx()]; i < p.first_item[BlockIdx() + 1]; ++i) {
    const DeviceItem item = p.items[i];
    const DeviceQueryTile tile = p.tiles[item.tile];
    const DeviceSegment segment = p.segments[item.segment];
    DecodeBlock block = {
        p,        tile,     segment, p.layouts.at[segment.layout], shared, query, weights, stages, ThreadIdx() / 32,
        lane / 4, lane % 4, {}};
    RunItem(block, item);
  }
}

// ---- Merge ----

struct MergeParams {
  DecodeMergeArgs args;
};

// A thread block for each tile; a thread has a row's coordinate at a time, and computes the row's weights itself.
ZEROC_KERNEL(kThreads) DecodeMergeKernel(MergeParams p) {
  const DeviceQueryTile tile = p.args.tiles[BlockIdx()];
  const int d = p.args.head_dim;
  for (int i = ThreadIdx(); i < tile.n_rows * d; i += kThreads) {
    const int row = i / d, coord = i % d;
    const auto at = [&](int part) { return std::int64_t{tile.first_part + part} * kTileRows + row; };
    float top = -kInfinity;
    for (int part = 0; part < tile.n_parts; ++part) top = Max(top, p.args.row_max[at(part)]);
    float sum = 0.0f, out = 0.0f;
    for (int part = 0; part < tile.n_parts; ++part) {
      // A part whose row saw nothing weighs nothing.
      if (p.args.row_max[at(part)] == -kInfinity) continue;
      const float weight = ExpBelow(p.args.row_max[at(part)], top);
      sum += weight * p.args.row_sum[at(part)];
      out += weight * p.args.out[at(part) * d + coord];
    }
    p.args.dst[OutputOffset(tile, row, p.args.dst_stride, d) + coord] = ToBf16(sum == 0.0f ? 0.0f : out / sum);
  }
}

// Rows of operands lie 16 bytes beyond a multiple of 32 apart: eight of them and four words each meet every bank once.
int OperandStride(int columns) { return (columns + 31) / 32 * 32 + 16; }

}  // namespace

KernelStatus DecodeAttention(const DecodeAttentionArgs& args, Stream stream) {
  const KernelStatus good = CheckLayouts(args.layouts, args.n_layouts, args.head_dim);
  if (good != KernelStatus::kOk) return good;
  if (args.n_thread_blocks < 0) return KernelStatus::kBadShape;
  if (args.n_thread_blocks == 0) return KernelStatus::kOk;
  if (args.q == nullptr || args.tiles == nullptr || args.segments == nullptr || args.items == nullptr ||
      args.first_item == nullptr || args.out == nullptr || args.row_max == nullptr || args.row_sum == nullptr) {
    return KernelStatus::kBadShape;
  }
  DecodeParams params = {args.q,
                         args.tiles,
                         args.segments,
                         args.items,
                         args.first_item,
                         args.out,
                         args.row_max,
                         args.row_sum,
                         args.head_dim,
                         0,
                         0,
                         0,
                         {}};
  int head_bytes = 0, query_columns = 0, weight_columns = 0;
  for (int i = 0; i < args.n_layouts; ++i) {
    const KvBlockLayout& layout = args.layouts[i];
    params.layouts.at[i] = layout;
    head_bytes = std::max(head_bytes, layout.head_bytes);
    int columns = 0, weights = 0;
    for (int r = 0; r < layout.k.n_runs; ++r) columns += QueryColumns(layout.k.runs[r]);
    for (int r = 0; r < layout.v.n_runs; ++r) weights += WeightColumns(layout.v.runs[r]);
    query_columns = std::max(query_columns, columns);
    weight_columns = std::max(weight_columns, weights);
  }
  params.stage_bytes = StageBytes(head_bytes);
  params.query_stride = OperandStride(query_columns);
  params.weight_stride = OperandStride(weight_columns);
  const int row_bytes = kTileRows * (args.head_dim + 1) * static_cast<int>(sizeof(float));
  const int shared_bytes = static_cast<int>(sizeof(DecodeShared)) +
                           2 * kTileRows * (params.query_stride + params.weight_stride) +
                           std::max(2 * params.stage_bytes, row_bytes);
  return Launch(DecodeAttentionKernel, {args.n_thread_blocks, kThreads, shared_bytes}, stream, params);
}

KernelStatus DecodeMerge(const DecodeMergeArgs& args, Stream stream) {
  if (args.n_tiles < 0 || args.head_dim < 16 || args.head_dim > kMaxHeadDim || args.head_dim % 16 != 0) {
    return KernelStatus::kBadShape;
  }
  if (args.n_tiles == 0) return KernelStatus::kOk;
  if (args.tiles == nullptr || args.out == nullptr || args.row_max == nullptr || args.row_sum == nullptr ||
      args.dst == nullptr) {
    return KernelStatus::kBadShape;
  }
  return Launch(DecodeMergeKernel, {args.n_tiles, kThreads}, stream, {args});
}

}  // namespace zeroc::kernels::cuda
