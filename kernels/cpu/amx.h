// Intel AMX and VNNI: whether this process may use them, and the tile shapes that our kernels use.
//
// Linux keeps tile state off until a process asks. All AMX code of the project goes through this header; a kernel
// configures the tiles when it starts and releases them before it returns, so nothing is left behind on the thread.
#pragma once

#include <cstdint>

namespace zeroc::kernels::cpu {

// True if the processor has AMX (BF16, INT8) and AVX-512 (F, BW, VL, DQ, BF16) and the kernel granted the tile state
// to this process.
// Asks once, on the first call; threads inherit the answer. Any thread.
bool AmxReady();

// True if the processor has AVX-512 (F, BW, VL, DQ) and VNNI.
bool VnniReady();

// False: AmxReady() and VnniReady() answer false until set again. For tests and benches, while no op runs.
void AllowAmx(bool allowed);

#if defined(__x86_64__)
#define ZEROC_AVX512_FEATURES "avx512f,avx512bw,avx512vl,avx512dq"
#define ZEROC_AVX512_TARGET __attribute__((target(ZEROC_AVX512_FEATURES)))
#define ZEROC_VNNI_TARGET __attribute__((target(ZEROC_AVX512_FEATURES ",avx512vnni")))
#define ZEROC_AMX_TARGET __attribute__((target(ZEROC_AVX512_FEATURES ",avx512bf16,amx-tile,amx-bf16,amx-int8")))

// The operand of LDTILECFG (Intel SDM vol. 2, palette 1).
struct alignas(64) TileConfig {
  std::uint8_t palette = 1;
  std::uint8_t start_row = 0;
  std::uint8_t reserved[14] = {};
  std::uint16_t row_bytes[16] = {};
  std::uint8_t rows[16] = {};
};

// Tiles 0 to 3 accumulate [a_rows, 16] f32, 4 and 5 hold A [a_rows, 32] bf16, 6 and 7 hold B [16 pairs, 16 lanes].
// Written as assembly: g++ 12 drops stores to the configuration that precede its own intrinsic.
inline void ConfigureTiles(int a_rows) {
  TileConfig config;
  for (int i = 0; i < 8; ++i) {
    config.row_bytes[i] = 64;
    config.rows[i] = static_cast<std::uint8_t>(i < 6 ? a_rows : 16);
  }
  asm volatile("ldtilecfg %0" : : "m"(config) : "memory");
}
inline void ReleaseTiles() { asm volatile("tilerelease" : : : "memory"); }
#endif

}  // namespace zeroc::kernels::cpu
