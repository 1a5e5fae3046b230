// Y = X W^T for many rows on AMX, with the weights read where they lie.
//
// AMX wants one operand in rows and the other in pairs along k. Rows of W already are the row operand, so the product is
// computed transposed, Y^T = W X^T, and only X (small, hot) is rearranged. No second copy of any weight is made.
//   W panel    32 outputs x k, from the memory map, prefetched one panel ahead into L2
//   X chunk    up to 256 rows x 2048 columns as B tiles (1 MiB, half of L2), built once per chunk
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

constexpr std::int64_t kChunkRows = 256;
constexpr std::int64_t kChunkColumns = 2048;
constexpr std::int64_t kTileElements = 512;  // a B tile: 16 rows of x by 32 columns

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

// x rows [0, rows) by columns [0, columns) (a multiple of 32) as B tiles [rows / 16][columns / 32]; missing rows are 0.
ZEROC_AMX_TARGET void PackRows(const Bf16* x, std::int64_t x_stride, std::int64_t rows, std::int64_t columns,
                               Bf16* out) {
  for (std::int64_t r = 0; r < rows; r += 16) {
    for (std::int64_t c = 0; c < columns; c += 32, out += kTileElements) {
      __m512i v[16];
      for (int i = 0; i < 16; ++i) {
        v[i] = r + i < rows ? _mm512_loadu_si512(x + (r + i) * x_stride + c) : _mm512_setzero_si512();
      }
      Transpose(v);
      for (int i = 0; i < 16; ++i) _mm512_store_si512(out + 32 * i, v[i]);
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

struct Chunk {
  const Bf16* x;  // B tiles [rows / 16][steps]
  std::int64_t first_row, rows;
  std::int64_t first_column, steps;  // steps of 32 columns
};

// Walks the next panel's cache lines while this one is computed.
struct Prefetcher {
  const char* row;
  std::int64_t stride, n_rows, n_lines;
  std::int64_t line = 0;
  inline void Next() {
    if (n_rows == 0) return;
    _mm_prefetch(row + 64 * line, _MM_HINT_T1);
    if (++line == n_lines) {
      line = 0;
      row += stride;
      --n_rows;
    }
  }
};

// 32 outputs (full panels) by all rows of the chunk.
ZEROC_AMX_TARGET void MultiplyPanel(const Target& to, const Chunk& chunk, std::int64_t o, Prefetcher* next) {
  const LinearArgs& args = *to.args;
  alignas(64) float sums[4][256];
  const std::int64_t w_stride = 2 * args.k;
  const Bf16* w0 = args.w + o * args.k + chunk.first_column;
  const Bf16* w1 = w0 + 16 * args.k;
  for (std::int64_t r = 0; r < chunk.rows; r += 32) {
    const Bf16* x0 = chunk.x + r / 16 * chunk.steps * kTileElements;
    const bool two = r + 16 < chunk.rows;
    const Bf16* x1 = two ? x0 + chunk.steps * kTileElements : x0;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (std::int64_t s = 0; s < chunk.steps; ++s) {
      _tile_loadd(6, x0 + s * kTileElements, 64);
      _tile_loadd(4, w0 + 32 * s, w_stride);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(5, w1 + 32 * s, w_stride);
      _tile_dpbf16ps(1, 5, 6);
      _tile_loadd(7, x1 + s * kTileElements, 64);
      _tile_dpbf16ps(2, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
      for (int i = 0; i < 4; ++i) next->Next();
    }
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    _tile_stored(2, sums[2], 64);
    _tile_stored(3, sums[3], 64);
    asm volatile("" : : : "memory");
    for (int i = 0; i < (two ? 4 : 2); ++i) {
      const std::int64_t row = r + 16 * (i / 2);
      const int rows = static_cast<int>(chunk.rows - row < 16 ? chunk.rows - row : 16);
      StoreSums(to, sums[i], o + 16 * (i % 2), 16, chunk.first_row + row, rows);
    }
  }
}

// The last outputs, up to 16 at a time; the tiles are configured for `outs` rows of A.
ZEROC_AMX_TARGET void MultiplyTail(const Target& to, const Chunk& chunk, std::int64_t o, int outs) {
  const LinearArgs& args = *to.args;
  alignas(64) float sums[256];
  const Bf16* w = args.w + o * args.k + chunk.first_column;
  for (std::int64_t r = 0; r < chunk.rows; r += 16) {
    const Bf16* x = chunk.x + r / 16 * chunk.steps * kTileElements;
    _tile_zero(0);
    for (std::int64_t s = 0; s < chunk.steps; ++s) {
      _tile_loadd(4, w + 32 * s, 2 * args.k);
      _tile_loadd(6, x + s * kTileElements, 64);
      _tile_dpbf16ps(0, 4, 6);
    }
    _tile_stored(0, sums, 64);
    asm volatile("" : : : "memory");
    StoreSums(to, sums, o, outs, chunk.first_row + r, static_cast<int>(chunk.rows - r < 16 ? chunk.rows - r : 16));
  }
}

void MultiplyChunk(const Target& to, const Chunk& chunk) {
  const LinearArgs& args = *to.args;
  std::int64_t o = args.out_begin;
  ConfigureTiles(16);
  for (; o + 32 <= args.out_end; o += 32) {
    const std::int64_t ahead = args.out_end - o - 32 < 32 ? args.out_end - o - 32 : 32;
    Prefetcher next = {reinterpret_cast<const char*>(args.w + (o + 32) * args.k + chunk.first_column), 2 * args.k,
                       ahead, chunk.steps};
    MultiplyPanel(to, chunk, o, &next);
  }
  for (; o < args.out_end; o += 16) {
    const int outs = static_cast<int>(args.out_end - o < 16 ? args.out_end - o : 16);
    ConfigureTiles(outs);
    MultiplyTail(to, chunk, o, outs);
  }
  ReleaseTiles();
}

}  // namespace

bool LinearAmx(const LinearArgs& args) {
  if (!AmxReady() || args.k % 32 != 0) return false;
  // Kept between calls: a fresh megabyte per call would be page-faulted in each time.
  constexpr std::size_t kScratchBytes = kChunkRows * kChunkColumns * sizeof(Bf16);
  thread_local const std::unique_ptr<void, decltype(&std::free)> scratch(std::aligned_alloc(64, kScratchBytes),
                                                                         &std::free);
  if (scratch == nullptr) return false;
  auto* packed = static_cast<Bf16*>(scratch.get());
  for (std::int64_t row = 0; row < args.n_rows; row += kChunkRows) {
    const std::int64_t rows = args.n_rows - row < kChunkRows ? args.n_rows - row : kChunkRows;
    for (std::int64_t column = 0; column < args.k; column += kChunkColumns) {
      const std::int64_t columns = args.k - column < kChunkColumns ? args.k - column : kChunkColumns;
      PackRows(static_cast<const Bf16*>(args.x) + row * args.k + column, args.k, rows, columns, packed);
      const Target to = {&args, args.accumulate || column > 0, args.bias != nullptr && column == 0};
      MultiplyChunk(to, {packed, row, rows, column, columns / 32});
    }
  }
  return true;
}

}  // namespace zeroc::kernels::cpu

#else

namespace zeroc::kernels::cpu {
bool LinearAmx(const LinearArgs&) { return false; }
}  // namespace zeroc::kernels::cpu

#endif
