#include "kernels/cpu/map_amx.h"

#include <cstdlib>
#include <cstring>
#include <memory>

#include "kernels/cpu/amx.h"
#include "kernels/kv_block.h"

#if defined(__x86_64__)
#include <immintrin.h>

namespace zeroc::kernels::cpu {
namespace {

constexpr int kStep = 32;           // coordinates of one tile product
constexpr int kTileElements = 512;  // 16 rows of 32 bf16, or 16 pairs of 16 lanes
constexpr int kMaxSteps = kMaxHeadDim / kStep;
constexpr int kMaxLaneTiles = kMaxHeadDim / 16;
constexpr std::size_t kMapElements = std::size_t{2} * kMaxSteps * kMaxLaneTiles * kTileElements;
constexpr int kTileRows = 16;
constexpr int kGroupElements = 2 * kMaxSteps * kTileElements;  // of 16 rows
constexpr std::size_t kRowElements = std::size_t{MapAmx::kMaxRows / kTileRows} * kGroupElements;

// Splitting a map costs about what 16 rows cost on vectors.
constexpr std::int64_t kRowsThatPay = 32;

constexpr int Steps(int head_dim) { return (head_dim + kStep - 1) / kStep; }

// The high and the low half of 16 floats, as bf16 in the low halves of 32-bit lanes.
struct Halves {
  __m512i hi, lo;
};

ZEROC_AMX_TARGET inline Halves Split(__m512 x) {
  const __m512i hi = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x));
  const __m512 rest = _mm512_sub_ps(x, _mm512_castsi512_ps(_mm512_slli_epi32(hi, 16)));
  return {hi, _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(rest))};
}

ZEROC_AMX_TARGET inline __m512i Pair(__m512i even, __m512i odd) {
  return _mm512_or_si512(even, _mm512_slli_epi32(odd, 16));
}

// B tiles [step][lane tile][hi, lo]: row p holds coordinates 2 p and 2 p + 1 of 16 columns.
ZEROC_AMX_TARGET void SplitMap(const float* map, float scale, int d, std::uint16_t* tiles) {
  const __m512 factor = _mm512_set1_ps(scale);
  for (int s = 0; s < Steps(d); ++s) {
    for (int j = 0; j < d / 16; ++j, tiles += 2 * kTileElements) {
      for (int p = 0; p < 16; ++p) {
        const int row = kStep * s + 2 * p;
        Halves even = {_mm512_setzero_si512(), _mm512_setzero_si512()}, odd = even;
        if (row < d) {
          even = Split(_mm512_mul_ps(factor, _mm512_loadu_ps(map + row * d + 16 * j)));
          odd = Split(_mm512_mul_ps(factor, _mm512_loadu_ps(map + (row + 1) * d + 16 * j)));
        }
        _mm512_store_si512(tiles + 32 * p, Pair(even.hi, odd.hi));
        _mm512_store_si512(tiles + kTileElements + 32 * p, Pair(even.lo, odd.lo));
      }
    }
  }
}

// A tiles [step][hi, lo]: row i holds 32 coordinates of row i of x. Those past d are 0.
ZEROC_AMX_TARGET void SplitRows(const float* x, int n_rows, int d, std::uint16_t* tiles) {
  for (int s = 0; s < Steps(d); ++s, tiles += 2 * kTileElements) {
    const auto second = static_cast<__mmask16>(kStep * s + 16 < d ? 0xffff : 0);
    for (int i = 0; i < n_rows; ++i) {
      const float* from = x + i * d + kStep * s;
      const __m512 a = _mm512_loadu_ps(from), b = _mm512_maskz_loadu_ps(second, from + 16);
      const __m512i hi = (__m512i)_mm512_cvtne2ps_pbh(b, a);
      const __m512 a_hi = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(hi)), 16));
      const __m512 b_hi =
          _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(hi, 1)), 16));
      _mm512_store_si512(tiles + 32 * i, hi);
      _mm512_store_si512(tiles + kTileElements + 32 * i,
                         (__m512i)_mm512_cvtne2ps_pbh(_mm512_sub_ps(b, b_hi), _mm512_sub_ps(a, a_hi)));
    }
  }
}

// Two accumulators take one step of two lane tiles, hi hi + lo hi + hi lo. Twice, because the assembler wants the
// numbers of tile registers as literals.
ZEROC_AMX_TARGET inline void FirstTwo(const std::uint16_t* b0, const std::uint16_t* b1) {
  _tile_loadd(6, b0, 64);
  _tile_loadd(7, b1, 64);
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_dpbf16ps(0, 5, 6);
  _tile_dpbf16ps(1, 5, 7);
  _tile_loadd(6, b0 + kTileElements, 64);
  _tile_loadd(7, b1 + kTileElements, 64);
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
}

ZEROC_AMX_TARGET inline void SecondTwo(const std::uint16_t* b0, const std::uint16_t* b1) {
  _tile_loadd(6, b0, 64);
  _tile_loadd(7, b1, 64);
  _tile_dpbf16ps(2, 4, 6);
  _tile_dpbf16ps(3, 4, 7);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
  _tile_loadd(6, b0 + kTileElements, 64);
  _tile_loadd(7, b1 + kTileElements, 64);
  _tile_dpbf16ps(2, 4, 6);
  _tile_dpbf16ps(3, 4, 7);
}

// Lane tiles j to j + n - 1 (n <= 4) of 16 rows.
ZEROC_AMX_TARGET void MultiplyLanes(const std::uint16_t* rows, const std::uint16_t* map, int d, int j, int n,
                                    float* out) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const auto tile = [&](int s, int i) { return map + (s * (d / 16) + j + (i < n ? i : n - 1)) * 2 * kTileElements; };
  for (int s = 0; s < Steps(d); ++s) {
    _tile_loadd(4, rows + 2 * s * kTileElements, 64);
    _tile_loadd(5, rows + (2 * s + 1) * kTileElements, 64);
    FirstTwo(tile(s, 0), tile(s, 1));
    if (n > 2) SecondTwo(tile(s, 2), tile(s, 3));
  }
  const std::int64_t stride = d * static_cast<std::int64_t>(sizeof(float));
  _tile_stored(0, out + 16 * j, stride);
  if (n > 1) _tile_stored(1, out + 16 * j + 16, stride);
  if (n > 2) _tile_stored(2, out + 16 * j + 32, stride);
  if (n > 3) _tile_stored(3, out + 16 * j + 48, stride);
}

// Kept between calls: a fresh buffer per call would be page-faulted in each time. Zeros, so that rows which a short
// call leaves are numbers. Null where memory is gone.
std::uint16_t* ThreadBuffer() {
  constexpr std::size_t kBytes = (kMapElements + kRowElements) * sizeof(std::uint16_t);
  static_assert(kBytes % 64 == 0);
  thread_local const std::unique_ptr<void, decltype(&std::free)> buffer(
      [] {
        void* memory = std::aligned_alloc(64, kBytes);
        if (memory != nullptr) std::memset(memory, 0, kBytes);
        return memory;
      }(),
      &std::free);
  return static_cast<std::uint16_t*>(buffer.get());
}

}  // namespace

MapAmx::MapAmx(const float* map, float scale, int head_dim, std::int64_t n_rows) : head_dim_(head_dim) {
  if (map == nullptr || n_rows < kRowsThatPay || !AmxReady()) return;
  map_tiles_ = ThreadBuffer();
  if (!active()) return;
  ConfigureTiles(kTileRows);
  SplitMap(map, scale, head_dim, map_tiles_);
}

MapAmx::~MapAmx() {
  if (active()) ReleaseTiles();
}

void MapAmx::Multiply(const float* x, int n_rows, float* out) const {
  alignas(64) float sums[kTileRows * kMaxHeadDim];  // of a last group that is not whole
  std::uint16_t* row_tiles = map_tiles_ + kMapElements;
  for (int r = 0; r < n_rows; r += kTileRows) {
    const int rows = n_rows - r < kTileRows ? n_rows - r : kTileRows;
    SplitRows(x + r * head_dim_, rows, head_dim_, row_tiles + r / kTileRows * kGroupElements);
  }
  asm volatile("" : : : "memory");  // g++ 12 does not see that the tile loads read and the tile stores write
  const int n_lane_tiles = head_dim_ / 16;
  for (int j = 0; j < n_lane_tiles; j += 4) {  // four columns of map tiles stay in the L1 cache for all rows
    for (int r = 0; r < n_rows; r += kTileRows) {
      MultiplyLanes(row_tiles + r / kTileRows * kGroupElements, map_tiles_, head_dim_, j,
                    n_lane_tiles - j < 4 ? n_lane_tiles - j : 4, n_rows - r < kTileRows ? sums : out + r * head_dim_);
    }
  }
  asm volatile("" : : : "memory");
  const int left = n_rows % kTileRows;
  std::memcpy(out + (n_rows - left) * head_dim_, sums, static_cast<std::size_t>(left * head_dim_) * sizeof(float));
}

}  // namespace zeroc::kernels::cpu

#else

namespace zeroc::kernels::cpu {

MapAmx::MapAmx(const float*, float, int head_dim, std::int64_t) : head_dim_(head_dim) {}
MapAmx::~MapAmx() = default;
void MapAmx::Multiply(const float*, int, float*) const {}

}  // namespace zeroc::kernels::cpu

#endif
