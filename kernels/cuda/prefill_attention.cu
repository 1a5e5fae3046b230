// Prefill attention: 64 query rows of one KV head over the exact chunk and the packed history in one pass.
//
// Four warps of 16 rows. A head's bytes arrive by asynchronous copies, one block of 64 tokens ahead where shared memory
// allows; then the codes become bf16 once for all warps (integers up to 255 are exact in bf16) and go through mma in
// the usual way of flash attention: scores, running maximum, probabilities as operands without leaving the registers.
// Scales come after the sum over a run (K) or into the probabilities before they are rounded (V).
//
// V runs hold rotated coordinates, so the sums of a packed segment are kept in that segment's rotation: when a rotated
// segment begins, what was summed before is rotated as well, and at its end everything is rotated back (the rotation
// is its own inverse). Both go through shared memory and happen a few times for a tile, not for a block.
#include "kernels/cuda/attention.h"
#include "kernels/cuda/attention_shared.h"
#include "kernels/cuda/launch.h"

namespace zeroc::kernels::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kTileRows = kPrefillTileRows;
constexpr int kScoreTiles = kBlockTokens / 8;  // of eight tokens
// A tile of 16 x 16 bf16 in shared memory: rows of eight lanes' words 96 bytes apart meet every bank once.
constexpr int kPairBytes = 96;
constexpr int kWideTileBytes = 8 * kPairBytes;

struct PrefillParams {
  const float* q;
  const DeviceQueryTile* tiles;
  const DeviceSegment* segments;
  Bf16* dst;
  std::int64_t dst_stride;
  int head_dim;
  int stage_bytes;
  int n_stages;
  Layouts layouts;
};

// Fixed-size part of shared memory; q, one side's tiles as bf16 and the stages follow.
struct PrefillShared {
  ScaleTables scales;
  float q_sum[kMaxRuns][kTileRows];
  float base_sum[kMaxRuns][kTileRows];
};

// What a warp holds of its 16 rows: rows g and g + 8 are this lane's.
template <int kStepsMax>
struct RowState {
  float out[2 * kStepsMax][4];   // [coordinate / 8]
  float base[kMaxRuns][2];       // centres of V, this lane's tokens
  float row_max[2], row_sum[2];  // row_sum: this lane's tokens
  TokenSpan span[2];
};

struct PrefillBlock {
  const PrefillParams& p;
  const DeviceQueryTile& tile;
  PrefillShared* shared;
  std::uint8_t* query;   // [64][query_stride] bf16
  std::uint8_t* wide;    // [head_dim / 16 * 4] tiles of one side
  std::uint8_t* stages;  // [n_stages][stage_bytes], or [64][head_dim + 1] floats between segments
  int warp, g, q;
  int n_steps;  // head_dim / 16
};

ZEROC_DEVICE int RowOf(const PrefillBlock& b, int i) { return 16 * b.warp + b.g + 8 * i; }

// Rows of q lie 16 bytes beyond a multiple of 32 apart: an operand's loads meet every bank once.
constexpr int QueryStride(int head_dim) { return 2 * head_dim + 16; }

ZEROC_DEVICE void LoadQuery(const PrefillBlock& b) {
  const int pairs = b.p.head_dim / 2;
  for (int i = ThreadIdx(); i < kTileRows * pairs; i += kThreads) {
    const int row = i / pairs, pair = i % pairs;
    std::uint32_t word = 0;
    if (row < b.tile.n_rows) {
      const float* q = b.p.q + b.tile.q_offset + std::int64_t{row} * b.p.head_dim + 2 * pair;
      word = PackBf16(q[0], q[1]);
    }
    *reinterpret_cast<std::uint32_t*>(b.query + row * QueryStride(b.p.head_dim) + 4 * pair) = word;
  }
}

// Sums of q over the runs of a layout: two threads for each row.
ZEROC_DEVICE void SumQueries(const PrefillBlock& b, const KvSideLayout& k) {
  const int row = ThreadIdx() / 2;
  const float* q = b.p.q + b.tile.q_offset + std::int64_t{row} * b.p.head_dim;
  for (int r = 0; r < k.n_runs; ++r) {
    float sum = 0.0f;
    for (int i = ThreadIdx() % 2; i < k.runs[r].width && row < b.tile.n_rows; i += 2) sum += q[k.first_coord[r] + i];
    sum += ShuffleXor(sum, 1);
    if (ThreadIdx() % 2 == 0) b.shared->q_sum[r][row] = sum;
  }
}

// Codes of one side of a staged head as bf16 tiles: K [token group][coordinate tile], V [coordinate tile][token group].
// Exact values of tokens outside of [seen_begin, seen_end) become zeros.
template <bool kIsValue>
ZEROC_DEVICE void Widen(const PrefillBlock& b, const KvBlockLayout& layout, const std::uint8_t* head, int seen_begin,
                        int seen_end) {
  const KvSideLayout& side = kIsValue ? layout.v : layout.k;
  const int n_groups = layout.n_tokens / 16;
  for (int r = 0; r < side.n_runs; ++r) {
    const int bits = side.runs[r].bits, n_coord_tiles = side.runs[r].width / 16, first_tile = side.first_coord[r] / 16;
    if (bits == 0) continue;
    for (int i = ThreadIdx(); i < n_coord_tiles * n_groups * 64; i += kThreads) {
      const int tile = i / 64, lane = i % 16, s = i / 16 % 4;
      const std::uint8_t* from = head + side.codes_offset[r] + tile * TileBytes(bits);
      const auto load = [from](int at) { return LoadSharedWord(from + at); };
      const int group = kIsValue ? tile % n_groups : tile / n_coord_tiles;
      const int to_tile =
          kIsValue ? first_tile * n_groups + tile : group * b.n_steps + first_tile + tile % n_coord_tiles;
      std::uint32_t pairs[2];
      if (bits == 16) {
        for (int j = 0; j < 2; ++j) {
          pairs[j] = load(64 * (2 * s + j) + 4 * lane);
          const int token = 16 * group + 4 * s + 2 * j;
          if (kIsValue) pairs[j] = MaskPair(pairs[j], token, seen_begin, seen_end);
        }
      } else {
        const std::uint32_t quad = CodeQuad(bits, lane, s, load);
        for (int j = 0; j < 2; ++j) {
          const auto code = [&](int at) { return FloatToBits(static_cast<float>(quad >> 8 * at & 255u)); };
          pairs[j] = code(2 * j) >> 16 | (code(2 * j + 1) & 0xffff0000u);
        }
      }
      std::uint8_t* to = b.wide + to_tile * kWideTileBytes + 2 * s * kPairBytes + 4 * lane;
      *reinterpret_cast<std::uint32_t*>(to) = pairs[0];
      *reinterpret_cast<std::uint32_t*>(to + kPairBytes) = pairs[1];
    }
  }
}

// The operand of eight lanes (8 n ..) of a widened tile.
struct WideOperand {
  std::uint32_t b0, b1;
};
ZEROC_DEVICE WideOperand LoadWide(const PrefillBlock& b, int tile, int n) {
  const std::uint8_t* at = b.wide + tile * kWideTileBytes + b.q * kPairBytes + 4 * (8 * n + b.g);
  return {*reinterpret_cast<const std::uint32_t*>(at), *reinterpret_cast<const std::uint32_t*>(at + 4 * kPairBytes)};
}

// scores[n][.] += q . k for tokens 8 n ..
ZEROC_DEVICE void Scores(const PrefillBlock& b, const KvBlockLayout& layout, float (&scores)[kScoreTiles][4]) {
  const KvSideLayout& k = layout.k;
  const int n_score_tiles = layout.n_tokens / 8, stride = QueryStride(b.p.head_dim);
  const std::uint8_t* query = b.query + RowOf(b, 0) * stride + 4 * b.q;
  for (int r = 0; r < k.n_runs; ++r) {
    const int bits = k.runs[r].bits, first = k.first_coord[r] / 16;
    if (bits == 0) continue;
    float sums[kScoreTiles][4] = {};
    for (int step = first; step < first + k.runs[r].width / 16; ++step) {
      std::uint32_t a[4];
      for (int i = 0; i < 4; ++i) {
        a[i] = *reinterpret_cast<const std::uint32_t*>(query + i % 2 * 8 * stride + 32 * step + i / 2 * 16);
      }
      ZEROC_UNROLL
      for (int n = 0; n < kScoreTiles; ++n) {
        if (n >= n_score_tiles) break;
        const WideOperand operand = LoadWide(b, n / 2 * b.n_steps + step, n % 2);
        MmaBf16(sums[n], a, operand.b0, operand.b1);
      }
    }
    ZEROC_UNROLL
    for (int n = 0; n < kScoreTiles; ++n) {
      for (int i = 0; i < 4; ++i) {
        const int token = 8 * n + 2 * b.q + i % 2;
        if (bits == 16) {
          scores[n][i] += sums[n][i];
        } else {
          scores[n][i] += b.shared->scales.k_step[r][token] * sums[n][i] +
                          b.shared->scales.k_base[r][token] * b.shared->q_sum[r][RowOf(b, i / 2)];
        }
      }
    }
  }
}

// Scores become probabilities relative to the running maximum; what was summed before shrinks accordingly.
template <int kStepsMax>
ZEROC_DEVICE void Soften(const PrefillBlock& b, const KvBlockLayout& layout, int block_idx, RowState<kStepsMax>* rows,
                         float (&scores)[kScoreTiles][4]) {
  float top[2] = {rows->row_max[0], rows->row_max[1]};
  ZEROC_UNROLL
  for (int n = 0; n < kScoreTiles; ++n) {
    for (int i = 0; i < 4; ++i) {
      const int in_block = 8 * n + 2 * b.q + i % 2, token = block_idx * layout.n_tokens + in_block;
      const TokenSpan& span = rows->span[i / 2];
      const bool is_seen = in_block < layout.n_tokens && token >= span.begin && token < span.end;
      scores[n][i] = is_seen ? scores[n][i] + b.shared->scales.mass[in_block] : -kInfinity;
      top[i / 2] = Max(top[i / 2], scores[n][i]);
    }
  }
  float shrink[2];
  for (int i = 0; i < 2; ++i) {
    for (int mask = 2; mask > 0; mask /= 2) top[i] = Max(top[i], ShuffleXor(top[i], mask));
    shrink[i] = ExpBelow(rows->row_max[i], top[i]);
    rows->row_max[i] = top[i];
    rows->row_sum[i] *= shrink[i];
    ZEROC_UNROLL
    for (int r = 0; r < kMaxRuns; ++r) rows->base[r][i] *= shrink[i];
  }
  ZEROC_UNROLL
  for (int n = 0; n < kScoreTiles; ++n) {
    for (int i = 0; i < 4; ++i) {
      scores[n][i] = ExpBelow(scores[n][i], top[i / 2]);
      rows->row_sum[i / 2] += scores[n][i];
    }
  }
  ZEROC_UNROLL
  for (int j = 0; j < 2 * kStepsMax; ++j) {
    for (int i = 0; i < 4; ++i) rows->out[j][i] *= shrink[i / 2];
  }
}

// The probabilities as operands for run r of V: times its step where it is quantised.
ZEROC_DEVICE void WeightOperands(const PrefillBlock& b, const KvRun& run, int r, const float (&p)[kScoreTiles][4],
                                 std::uint32_t (&a)[4][4]) {
  ZEROC_UNROLL
  for (int group = 0; group < 4; ++group) {
    for (int i = 0; i < 4; ++i) {
      const int n = 2 * group + i / 2, row = i % 2, token = 8 * n + 2 * b.q;
      float first = p[n][2 * row], second = p[n][2 * row + 1];
      if (run.bits != 16) {
        first *= b.shared->scales.v_step[r][token];
        second *= b.shared->scales.v_step[r][token + 1];
      }
      a[group][i] = PackBf16(first, second);
    }
  }
}

// out += probabilities times values.
template <int kStepsMax>
ZEROC_DEVICE void AddValues(const PrefillBlock& b, const KvBlockLayout& layout, const float (&p)[kScoreTiles][4],
                            RowState<kStepsMax>* rows) {
  const KvSideLayout& v = layout.v;
  const int n_groups = layout.n_tokens / 16;
  ZEROC_UNROLL
  for (int r = 0; r < kMaxRuns; ++r) {
    if (r >= v.n_runs) break;
    if (!IsQuantised(v.runs[r].bits)) continue;
    ZEROC_UNROLL
    for (int n = 0; n < kScoreTiles; ++n) {
      for (int i = 0; i < 4; ++i) {
        rows->base[r][i / 2] += p[n][i] * b.shared->scales.v_base[r][8 * n + 2 * b.q + i % 2];
      }
    }
  }
  for (int r = 0; r < v.n_runs; ++r) {
    if (v.runs[r].bits == 0) continue;
    std::uint32_t a[4][4];
    WeightOperands(b, v.runs[r], r, p, a);
    const int first = v.first_coord[r] / 16, end = first + v.runs[r].width / 16;
    ZEROC_UNROLL
    for (int tile = 0; tile < kStepsMax; ++tile) {  // all of them, since they are registers
      if (tile < first || tile >= end) continue;
      ZEROC_UNROLL
      for (int group = 0; group < 4; ++group) {
        if (group >= n_groups) break;
        for (int n = 0; n < 2; ++n) {
          const WideOperand operand = LoadWide(b, tile * n_groups + group, n);
          MmaBf16(rows->out[2 * tile + n], a[group], operand.b0, operand.b1);
        }
      }
    }
  }
}

// Into the rotation of a layout, or out of it (then with the centres of V, which `base` holds in rotated coordinates).
// Through shared memory, where the stages are: no copy is on its way, and whoever read them has met a barrier since.
template <int kStepsMax>
ZEROC_DEVICE void TurnOutputs(const PrefillBlock& b, const KvBlockLayout& layout, bool leaves,
                              RowState<kStepsMax>* rows) {
  const KvSideLayout& v = layout.v;
  auto* x = reinterpret_cast<float*>(b.stages);
  const int row_stride = b.p.head_dim + 1;
  const auto at = [&](int j, int i) { return RowOf(b, i / 2) * row_stride + 8 * j + 2 * b.q + i % 2; };
  ZEROC_UNROLL
  for (int j = 0; j < 2 * kStepsMax; ++j) {
    for (int i = 0; i < 4 && j < 2 * b.n_steps; ++i) x[at(j, i)] = rows->out[j][i];
  }
  ZEROC_UNROLL
  for (int r = 0; r < kMaxRuns; ++r) {
    for (int i = 0; i < 2; ++i) {
      float base = rows->base[r][i];
      for (int mask = 2; mask > 0; mask /= 2) base += ShuffleXor(base, mask);
      if (b.q == 0) b.shared->base_sum[r][RowOf(b, i)] = base;
      rows->base[r][i] = 0.0f;
    }
  }
  Sync();
  for (int r = 0; r < v.n_runs; ++r) {
    if (!IsQuantised(v.runs[r].bits)) continue;
    float* run = x + v.first_coord[r];
    const int width = v.runs[r].width;
    if (leaves) {
      for (int i = ThreadIdx(); i < kTileRows * width; i += kThreads) {
        run[i / width * row_stride + i % width] += b.shared->base_sum[r][i / width];
      }
      Sync();
    }
    if (layout.rotate_v) HadamardRows<1>(run, width, kTileRows, row_stride);
  }
  ZEROC_UNROLL
  for (int j = 0; j < 2 * kStepsMax; ++j) {
    for (int i = 0; i < 4 && j < 2 * b.n_steps; ++i) rows->out[j][i] = x[at(j, i)];
  }
  Sync();  // the stages may be written again
}

ZEROC_DEVICE bool HasQuantisedValues(const KvBlockLayout& layout) {
  for (int r = 0; r < layout.v.n_runs; ++r) {
    if (IsQuantised(layout.v.runs[r].bits)) return true;
  }
  return false;
}

template <int kStepsMax>
ZEROC_DEVICE void RunBlock(const PrefillBlock& b, const DeviceSegment& segment, const KvBlockLayout& layout, int block,
                           const std::uint8_t* stage, int seen_begin, int seen_end, RowState<kStepsMax>* rows) {
  const std::uint8_t* head = StagedHead(segment, layout, b.tile.kv_head, block, stage);
  const int first = block * layout.n_tokens;
  LoadScales<false>(segment, layout, b.tile.kv_head, head, &b.shared->scales);
  Widen<false>(b, layout, head, 0, 0);
  Sync();
  float scores[kScoreTiles][4] = {};
  Scores(b, layout, scores);
  Soften(b, layout, block, rows, scores);
  Sync();  // the keys have been read by all
  Widen<true>(b, layout, head, seen_begin - first, seen_end - first);
  Sync();
  AddValues(b, layout, scores, rows);
}

template <int kStepsMax>
ZEROC_DEVICE void RunSegment(const PrefillBlock& b, const DeviceSegment& segment, bool is_first,
                             RowState<kStepsMax>* rows) {
  const KvBlockLayout& layout = b.p.layouts.at[segment.layout];
  const SegmentWindow window = WindowOf(segment, layout);
  const int seen_begin = SpanOfQuery(window, QueryPos(b.tile, 0)).begin;
  const int seen_end = SpanOfQuery(window, QueryPos(b.tile, b.tile.n_rows - 1)).end;
  if (seen_begin >= seen_end) return;
  for (int i = 0; i < 2; ++i) {
    rows->span[i] = {0, 0};
    if (RowOf(b, i) < b.tile.n_rows) rows->span[i] = SpanOfQuery(window, QueryPos(b.tile, RowOf(b, i)));
  }
  const bool turns = HasQuantisedValues(layout);
  if (turns && !is_first) TurnOutputs(b, layout, /*leaves=*/false, rows);
  const int begin = seen_begin / layout.n_tokens, end = (seen_end + layout.n_tokens - 1) / layout.n_tokens;
  const bool is_ahead = b.p.n_stages == 2;
  SumQueries(b, layout.k);
  CopyHead(segment, layout, b.tile.kv_head, begin, b.stages);
  for (int block = begin; block < end; ++block) {
    std::uint8_t* stage = b.stages + (is_ahead ? (block - begin) % 2 * b.p.stage_bytes : 0);
    CopyAsyncWait<0>();
    Sync();  // the block is there, and nobody needs the one before any more
    if (is_ahead && block + 1 < end) {
      CopyHead(segment, layout, b.tile.kv_head, block + 1, b.stages + (block + 1 - begin) % 2 * b.p.stage_bytes);
    }
    RunBlock(b, segment, layout, block, stage, seen_begin, seen_end, rows);
    if (!is_ahead && block + 1 < end) {
      Sync();
      CopyHead(segment, layout, b.tile.kv_head, block + 1, b.stages);
    }
  }
  if (turns) TurnOutputs(b, layout, /*leaves=*/true, rows);
}

template <int kStepsMax>
ZEROC_DEVICE void RunTile(const PrefillParams& p) {
  const DeviceQueryTile tile = p.tiles[BlockIdx()];
  std::uint8_t* query = SharedMemory() + sizeof(PrefillShared);
  std::uint8_t* wide = query + kTileRows * QueryStride(p.head_dim);
  const int lane = ThreadIdx() % 32, n_steps = p.head_dim / 16;
  const PrefillBlock b = {p,
                          tile,
                          reinterpret_cast<PrefillShared*>(SharedMemory()),
                          query,
                          wide,
                          wide + n_steps * 4 * kWideTileBytes,
                          ThreadIdx() / 32,
                          lane / 4,
                          lane % 4,
                          n_steps};
  RowState<kStepsMax> rows = {};
  rows.row_max[0] = rows.row_max[1] = -kInfinity;
  LoadQuery(b);
  for (int s = 0; s < tile.n_segments; ++s) RunSegment(b, p.segments[tile.first_segment + s], s == 0, &rows);
  for (int i = 0; i < 2; ++i) {
    float sum = rows.row_sum[i];
    for (int mask = 2; mask > 0; mask /= 2) sum += ShuffleXor(sum, mask);
    rows.row_sum[i] = sum == 0.0f ? 0.0f : 1.0f / sum;  // a row that saw nothing is zero
  }
  ZEROC_UNROLL
  for (int j = 0; j < 2 * kStepsMax; ++j) {
    for (int i = 0; i < 2 && j < 2 * n_steps; ++i) {
      const int row = RowOf(b, i);
      if (row >= tile.n_rows) continue;
      Bf16* to = p.dst + OutputOffset(tile, row, p.dst_stride, p.head_dim) + 8 * j + 2 * b.q;
      to[0] = ToBf16(rows.out[j][2 * i] * rows.row_sum[i]);
      to[1] = ToBf16(rows.out[j][2 * i + 1] * rows.row_sum[i]);
    }
  }
}

ZEROC_KERNEL(kThreads) PrefillKernel64(PrefillParams p) { RunTile<4>(p); }
ZEROC_KERNEL(kThreads) PrefillKernel128(PrefillParams p) { RunTile<8>(p); }
ZEROC_KERNEL(kThreads) PrefillKernel256(PrefillParams p) { RunTile<16>(p); }

// What all processors of compute capability 8.0 give to a thread block; those of 8.6 and 8.9 give 99 KiB.
constexpr int kSharedWish = 99 * 1024;

}  // namespace

KernelStatus PrefillAttention(const PrefillAttentionArgs& args, Stream stream) {
  const KernelStatus good = CheckLayouts(args.layouts, args.n_layouts, args.head_dim);
  if (good != KernelStatus::kOk) return good;
  if (args.n_tiles < 0) return KernelStatus::kBadShape;
  if (args.n_tiles == 0) return KernelStatus::kOk;
  if (args.q == nullptr || args.tiles == nullptr || args.segments == nullptr || args.dst == nullptr) {
    return KernelStatus::kBadShape;
  }
  PrefillParams params = {args.q, args.tiles, args.segments, args.dst, args.dst_stride, args.head_dim, 0, 2, {}};
  int head_bytes = 0;
  for (int i = 0; i < args.n_layouts; ++i) {
    params.layouts.at[i] = args.layouts[i];
    head_bytes = std::max(head_bytes, args.layouts[i].head_bytes);
  }
  params.stage_bytes = StageBytes(head_bytes);
  const int fixed = static_cast<int>(sizeof(PrefillShared)) + kTileRows * QueryStride(args.head_dim) +
                    args.head_dim / 4 * kWideTileBytes;
  const int row_bytes = kTileRows * (args.head_dim + 1) * static_cast<int>(sizeof(float));
  if (fixed + std::max(2 * params.stage_bytes, row_bytes) > kSharedWish) params.n_stages = 1;
  const int shared_bytes = fixed + std::max(params.n_stages * params.stage_bytes, row_bytes);
  const LaunchShape shape = {args.n_tiles, kThreads, shared_bytes};
  if (args.head_dim <= 64) return Launch(PrefillKernel64, shape, stream, params);
  if (args.head_dim <= 128) return Launch(PrefillKernel128, shape, stream, params);
  return Launch(PrefillKernel256, shape, stream, params);
}

}  // namespace zeroc::kernels::cuda
