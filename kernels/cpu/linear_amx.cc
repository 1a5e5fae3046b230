// Y = X W^T for many rows on AMX, with the weights read where they lie.
//
// AMX wants one operand in rows and the other in pairs along k. Rows of W already are the row operand, so the product
// is computed transposed, Y^T = W X^T, and only X is rearranged. The model's weights get no second copy: what is copied
// below is a block of them, for as long as it is in use (docs/adr/0004-own-amx-product.md).
//   X chunk    up to 512 rows x 2048 columns as B tiles, built once per chunk (2 MiB)
//   W block    more than 128 rows: 1 MiB of W as dense A tiles. Checkpoints align tensors to a few bytes, and a tile
//              load of rows that straddle cache lines costs twice a dense one. With 512 rows the copy made the product
//              1.3 times faster, with 64 rows 1.3 times slower.
//   W panel    fewer rows: 32 outputs, straight from the memory map
//   registers  2 x 2 accumulators of 16 x 16: four loads for four products
#include <cstdint>
#include <cstdlib>
#include <memory>

#include "kernels/cpu/amx.h"
#include "kernels/cpu/cpu.h"

#if defined(__x86_64__)
#include <immintrin.h>

namespace zeroc::kernels::cpu {
namespace {

constexpr std::int64_t kStep = 32;           // columns of one tile product
constexpr std::int64_t kTileElements = 512;  // a B tile: 16 rows of x by 32 columns; an A tile: 16 outputs by 32
constexpr std::int64_t kPanelOuts = 32, kPanelRows = 32;
constexpr std::int64_t kChunkRows = 512, kChunkColumns = 2048;
constexpr std::int64_t kBlockElements = 256 * kChunkColumns;  // half of a 2 MiB L2 cache
constexpr std::int64_t kDirectRowsMax = 128;

// Transposes 16 x 16 32-bit elements.
ZEROC_AMX_TARGET inline void Transpose(__m512i (&v)[16]) {
  __m512i t[16];
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    v[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    v[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    v[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    v[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  // Each v[4 i + j] holds column 4 c + j (c = 128-bit lane) of rows 4 i .. 4 i + 3: gather the lanes.
  for (int j = 0; j < 4; ++j) {
    const __m512i a = _mm512_shuffle_i32x4(v[j], v[4 + j], 0x88), b = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0x88);
    const __m512i c = _mm512_shuffle_i32x4(v[j], v[4 + j], 0xdd), d = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0xdd);
    t[j] = _mm512_shuffle_i32x4(a, b, 0x88);
    t[8 + j] = _mm512_shuffle_i32x4(a, b, 0xdd);
    t[4 + j] = _mm512_shuffle_i32x4(c, d, 0x88);
    t[12 + j] = _mm512_shuffle_i32x4(c, d, 0xdd);
  }
  for (int i = 0; i < 16; ++i) v[i] = t[i];
}

// Columns [0, columns) of a row, 32 at a time, as masks: nothing is read past the last one.
ZEROC_AMX_TARGET inline __mmask32 ColumnMask(std::int64_t columns_left) {
  return columns_left >= kStep ? ~__mmask32{0} : static_cast<__mmask32>((1u << columns_left) - 1u);
}

// x rows [0, rows) by columns [0, columns) as B tiles [rows / 16][columns / 32]; missing rows and columns are 0.
ZEROC_AMX_TARGET void PackX(const Bf16* x, std::int64_t x_stride, std::int64_t rows, std::int64_t columns, Bf16* out) {
  for (std::int64_t r = 0; r < rows; r += 16) {
    for (std::int64_t c = 0; c < columns; c += kStep, out += kTileElements) {
      const __mmask32 mask = ColumnMask(columns - c);
      __m512i v[16];
      for (int i = 0; i < 16; ++i) {
        v[i] = r + i < rows ? _mm512_maskz_loadu_epi16(mask, x + (r + i) * x_stride + c) : _mm512_setzero_si512();
      }
      Transpose(v);
      for (int i = 0; i < 16; ++i) _mm512_store_si512(out + kStep * i, v[i]);
    }
  }
}

// w rows [0, outs) by columns [0, columns) as pairs of A tiles [columns / 32][32 outs][32]; the missing are 0. Four
// steps of a row at a time: longer runs of stores, 2 KiB apart, would push each other out of the L1 cache.
ZEROC_AMX_TARGET void PackW(const Bf16* w, std::int64_t w_stride, std::int64_t outs, std::int64_t columns, Bf16* out) {
  constexpr std::int64_t kRun = 4 * kStep;
  for (std::int64_t begin = 0; begin < columns; begin += kRun) {
    const std::int64_t end = columns - begin < kRun ? columns : begin + kRun;
    for (std::int64_t i = 0; i < kPanelOuts; ++i) {
      for (std::int64_t c = begin; c < end; c += kStep) {
        const __mmask32 mask = i < outs ? ColumnMask(columns - c) : 0;
        const Bf16* from = i < outs ? w + i * w_stride + c : w;
        _mm512_store_si512(out + c * kPanelOuts + i * kStep, _mm512_maskz_loadu_epi16(mask, from));
      }
    }
  }
}

// Where one 16 x 16 accumulator goes: outputs [o, o + outs) of rows [r, r + rows).
struct Target {
  const LinearArgs* args;
  bool accumulate;  // the caller's wish, or a k chunk after the first
  bool add_bias;
};

// sums is [output][row]; y is [row][output].
ZEROC_AMX_TARGET void StoreSums(const Target& to, const float* sums, std::int64_t o, int outs, std::int64_t r,
                                int rows) {
  const LinearArgs& args = *to.args;
  const auto mask = static_cast<__mmask16>((1u << outs) - 1u);
  __m512i v[16];
  for (int i = 0; i < 16; ++i) v[i] = i < outs ? _mm512_load_si512(sums + 16 * i) : _mm512_setzero_si512();
  Transpose(v);
  const __m512 bias = to.add_bias ? _mm512_maskz_loadu_ps(mask, args.bias + o) : _mm512_setzero_ps();
  for (int i = 0; i < rows; ++i) {
    float* y = args.y + (r + i) * args.y_stride + o;
    __m512 sum = _mm512_add_ps(_mm512_castsi512_ps(v[i]), bias);
    if (to.accumulate) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, y));
    _mm512_mask_storeu_ps(y, mask, sum);
  }
}

// 32 outputs of W as A tiles: element (out, column) of step s is at data[s * step + out * stride + column].
struct Panel {
  const Bf16* data;
  std::int64_t step, stride;
};

// The product of one panel and up to 32 rows of x, given as two rows of B tiles.
ZEROC_AMX_TARGET void MultiplyBlock(const Target& to, const Panel& w, const Bf16* x, std::int64_t steps, std::int64_t o,
                                    int outs, std::int64_t r, int rows) {
  alignas(64) float sums[4][256];
  const std::int64_t w_bytes = w.stride * 2;
  const Bf16* w0 = w.data;
  const Bf16* w1 = w.data + 16 * w.stride;
  const Bf16* x0 = x;
  const Bf16* x1 = rows > 16 ? x + steps * kTileElements : x;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (std::int64_t s = 0; s < steps; ++s) {
    _tile_loadd(4, w0 + s * w.step, w_bytes);
    _tile_loadd(5, w1 + s * w.step, w_bytes);
    _tile_loadd(6, x0 + s * kTileElements, 64);
    _tile_loadd(7, x1 + s * kTileElements, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 5, 6);
    _tile_dpbf16ps(2, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums[0], 64);
  _tile_stored(1, sums[1], 64);
  _tile_stored(2, sums[2], 64);
  _tile_stored(3, sums[3], 64);
  asm volatile("" : : : "memory");  // g++ 12 does not see that the intrinsics above write
  for (int i = 0; i < 4; ++i) {
    const int first_out = 16 * (i % 2), first_row = 16 * (i / 2);
    if (first_out >= outs || first_row >= rows) continue;
    StoreSums(to, sums[i], o + first_out, outs - first_out < 16 ? outs - first_out : 16, r + first_row,
              rows - first_row < 16 ? rows - first_row : 16);
  }
}

int Smaller(std::int64_t a, std::int64_t b) { return static_cast<int>(a < b ? a : b); }

// One chunk of x, given as B tiles, by all outputs. `packed_w` holds kBlockElements.
void MultiplyChunk(const Target& to, const Bf16* x, std::int64_t first_row, std::int64_t rows,
                   std::int64_t first_column, std::int64_t columns, Bf16* packed_w) {
  const LinearArgs& args = *to.args;
  const std::int64_t steps = (columns + kStep - 1) / kStep;
  const bool copy = rows > kDirectRowsMax || columns % kStep != 0;
  const std::int64_t panel_elements = steps * kStep * kPanelOuts;
  const std::int64_t block_outs = copy ? kBlockElements / panel_elements * kPanelOuts : kPanelOuts;
  for (std::int64_t block = args.out_begin; block < args.out_end; block += block_outs) {
    const std::int64_t end = block + Smaller(block_outs, args.out_end - block);
    const Bf16* w = args.w + block * args.k + first_column;
    const bool dense = copy || end - block < kPanelOuts;
    for (std::int64_t o = block; dense && o < end; o += kPanelOuts) {
      PackW(w + (o - block) * args.k, args.k, Smaller(kPanelOuts, end - o), columns,
            packed_w + (o - block) / kPanelOuts * panel_elements);
    }
    asm volatile("" : : : "memory");  // nor that the tile loads read
    // Rows outside, outputs inside: y is written along its rows.
    for (std::int64_t r = 0; r < rows; r += kPanelRows) {
      for (std::int64_t o = block; o < end; o += kPanelOuts) {
        const Panel panel = dense
                                ? Panel{packed_w + (o - block) / kPanelOuts * panel_elements, kTileElements * 2, kStep}
                                : Panel{w, kStep, args.k};
        MultiplyBlock(to, panel, x + r * steps * kStep, steps, o, Smaller(kPanelOuts, end - o), first_row + r,
                      Smaller(kPanelRows, rows - r));
      }
    }
  }
}

}  // namespace

bool LinearAmx(const LinearArgs& args) {
  if (!AmxReady()) return false;
  // Kept between calls: fresh megabytes per call would be page-faulted in each time.
  constexpr std::size_t kScratchBytes = (kChunkRows * kChunkColumns + kBlockElements) * sizeof(Bf16);
  thread_local const std::unique_ptr<void, decltype(&std::free)> scratch(std::aligned_alloc(64, kScratchBytes),
                                                                         &std::free);
  if (scratch == nullptr) return false;
  auto* packed_x = static_cast<Bf16*>(scratch.get());
  const auto* x = static_cast<const Bf16*>(args.x);
  ConfigureTiles(16);
  for (std::int64_t row = 0; row < args.n_rows; row += kChunkRows) {
    const std::int64_t rows = Smaller(kChunkRows, args.n_rows - row);
    for (std::int64_t column = 0; column < args.k; column += kChunkColumns) {
      const std::int64_t columns = Smaller(kChunkColumns, args.k - column);
      PackX(x + row * args.k + column, args.k, rows, columns, packed_x);
      const Target to = {&args, args.accumulate || column > 0, args.bias != nullptr && column == 0};
      MultiplyChunk(to, packed_x, row, rows, column, columns, packed_x + kChunkRows * kChunkColumns);
    }
  }
  ReleaseTiles();
  return true;
}

}  // namespace zeroc::kernels::cpu

#else

namespace zeroc::kernels::cpu {
bool LinearAmx(const LinearArgs&) { return false; }
}  // namespace zeroc::kernels::cpu

#endif
