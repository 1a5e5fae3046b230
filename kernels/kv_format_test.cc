// The bytes of a KV block: layouts, tiles, scales, and the Hadamard rotation.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <random>
#include <set>
#include <vector>

#include "kernels/hadamard.h"
#include "kernels/kv_block.h"
#include "kernels/scale_search.h"
#include "kernels/tile_codec.h"

namespace zeroc::kernels {
namespace {

using ::testing::ElementsAreArray;

TEST(KvBlockLayout, PlacesCodesThenMetaOfEachSide) {
  const KvRun k[] = {{4, 16}, {3, 16}, {0, 32}};
  const KvRun v[] = {{16, 32}, {1, 32}};
  KvBlockLayout layout;
  ASSERT_TRUE(MakeKvBlockLayout(2, 64, 64, k, 3, v, 2, true, &layout));
  EXPECT_EQ(layout.k.codes_offset[0], 0);
  EXPECT_EQ(layout.k.codes_offset[1], 4 * 128);
  EXPECT_EQ(layout.k.codes_offset[2], 4 * 128 + 4 * 96);
  EXPECT_EQ(layout.k.first_coord[2], 32);
  EXPECT_EQ(layout.k.meta_offset[0], 4 * 128 + 4 * 96);
  EXPECT_EQ(layout.k.meta_offset[1], layout.k.meta_offset[0] + 128);
  EXPECT_EQ(layout.k.meta_offset[2], -1);
  EXPECT_EQ(layout.v.codes_offset[0], layout.k.meta_offset[1] + 128);
  EXPECT_EQ(layout.v.codes_offset[1], layout.v.codes_offset[0] + 8 * 512);
  EXPECT_EQ(layout.v.meta_offset[0], -1);
  EXPECT_EQ(layout.v.meta_offset[1], layout.v.codes_offset[1] + 8 * 32);
  EXPECT_EQ(layout.head_bytes, layout.v.meta_offset[1] + 128);
  EXPECT_EQ(layout.block_bytes % 64, 0);
  EXPECT_GE(layout.block_bytes, 2 * layout.head_bytes);
  EXPECT_LT(layout.block_bytes, 2 * layout.head_bytes + 64);
}

TEST(KvBlockLayout, SharedScalesAreNibblesAndOneByteBehindBothSides) {
  const KvRun k[] = {{4, 16, KvScaleKind::kShared}, {3, 16}, {0, 32}};
  const KvRun v[] = {{2, 48, KvScaleKind::kShared}, {1, 16, KvScaleKind::kShared}};
  KvBlockLayout layout;
  ASSERT_TRUE(MakeKvBlockLayout(3, 64, 64, k, 3, v, 2, true, &layout));
  EXPECT_EQ(layout.k.meta_offset[0], 4 * 128 + 4 * 96);
  EXPECT_EQ(layout.k.meta_offset[1], layout.k.meta_offset[0] + 32);
  EXPECT_EQ(layout.v.codes_offset[0], layout.k.meta_offset[1] + 128);
  EXPECT_EQ(layout.v.meta_offset[0], layout.v.codes_offset[1] + 4 * 32);
  EXPECT_EQ(layout.v.meta_offset[1], layout.v.meta_offset[0] + 32);
  EXPECT_EQ(layout.k.base_offset[0], layout.v.meta_offset[1] + 32);
  EXPECT_EQ(layout.k.base_offset[1], -1);
  EXPECT_EQ(layout.k.base_offset[2], -1);
  EXPECT_EQ(layout.v.base_offset[0], layout.k.base_offset[0] + 1);
  EXPECT_EQ(layout.v.base_offset[1], layout.k.base_offset[0] + 2);
  EXPECT_EQ(layout.head_bytes, layout.k.base_offset[0] + 3);
  EXPECT_EQ(layout.block_bytes % 16, 0);
  EXPECT_GE(layout.block_bytes, 3 * layout.head_bytes);
  EXPECT_LT(layout.block_bytes, 3 * layout.head_bytes + 16);
  ASSERT_TRUE(MakeKvBlockLayout(3, 64, 16, k, 3, v, 2, true, &layout));
  EXPECT_EQ(layout.k.meta_offset[1], layout.k.meta_offset[0] + 8);
}

TEST(KvBlockLayout, SizesOfTheUniformProfiles) {
  // Bytes per token and head, K and V, head_dim 64: 128 codes of `bits` bits, and 2 bytes of scale per side.
  for (int bits : {32, 16, 8, 4, 3, 2, 1}) {
    const KvRun run = {bits, 64};
    KvBlockLayout layout;
    ASSERT_TRUE(MakeKvBlockLayout(1, 64, 64, &run, 1, &run, 1, false, &layout));
    EXPECT_EQ(layout.head_bytes, 64 * (16 * bits + (bits < 16 ? 4 : 0))) << bits;
  }
}

TEST(KvBlockLayout, RefusesWhatIsOutOfRangeAndWritesNothing) {
  const KvRun good = {4, 64};
  KvBlockLayout layout;
  layout.head_bytes = 12345;
  const auto make = [&](int heads, int dim, int tokens, std::vector<KvRun> k) {
    return MakeKvBlockLayout(heads, dim, tokens, k.data(), static_cast<int>(k.size()), &good, 1, false, &layout);
  };
  EXPECT_FALSE(make(0, 64, 64, {good}));
  EXPECT_FALSE(make(1 << 30, 64, 64, {good}));
  EXPECT_FALSE(make(1, 64, 32, {good}));
  EXPECT_FALSE(make(1, 72, 64, {{4, 72}}));
  EXPECT_FALSE(make(1, 272, 64, {{4, 272}}));
  EXPECT_FALSE(make(1, 64, 64, {}));
  EXPECT_FALSE(make(1, 64, 64, {{4, 48}}));
  EXPECT_FALSE(make(1, 64, 64, {{4, 48}, {4, 32}}));
  EXPECT_FALSE(make(1, 64, 64, {{4, 48}, {4, -16}, {4, 32}}));
  EXPECT_FALSE(make(1, 64, 64, {{4, 56}, {4, 8}}));
  EXPECT_FALSE(make(1, 64, 64, {{4, 64}, {4, 0}}));
  EXPECT_FALSE(make(1, 64, 64, {{5, 64}}));
  EXPECT_FALSE(make(1, 64, 64, {{-1, 64}}));
  EXPECT_FALSE(make(1, 64, 64, {{0, 16, KvScaleKind::kShared}, {4, 48}}));
  EXPECT_FALSE(make(1, 64, 64, {{16, 64, KvScaleKind::kShared}}));
  EXPECT_FALSE(make(1, 64, 64, {{4, 64, static_cast<KvScaleKind>(2)}}));
  EXPECT_FALSE(make(1, 112, 64, std::vector<KvRun>(7, KvRun{4, 16})));
  EXPECT_EQ(layout.head_bytes, 12345);
  EXPECT_TRUE(make(1, 64, 64, {{2, 16}, {0, 48}}));
}

// Tiles whose code at (lane, depth) is (5 * lane + 3 * depth) mod 2^bits; first bytes worked out by hand from the
// formulas of kv_block.h, the rest pinned by an FNV-1a hash.
struct Golden {
  int bits;
  std::vector<int> first;
  std::uint64_t hash;
};

std::uint64_t Fnv1a(const std::vector<std::uint8_t>& bytes) {
  std::uint64_t hash = 14695981039346656037ull;
  for (std::uint8_t byte : bytes) hash = (hash ^ byte) * 1099511628211ull;
  return hash;
}

TEST(TileCodec, GoldenBytes) {
  const Golden cases[] = {
      // e = 0..7: lane 0 depth 0..3, lane 1 depth 0..3.
      {8, {0, 3, 6, 9, 5, 8, 11, 14}, 17183761681383303237ull},
      // low nibble s = 0, high nibble s = 1 (depth + 4: + 12 mod 16).
      {4, {0xc0, 0xf3, 0x26, 0x59, 0x15, 0x48, 0x7b, 0xae}, 17592171928153677285ull},
      // two low bits of (0,3,6,1..) + 12 s mod 8: s = 0, 2 give c, s = 1, 3 give c + 4, same low bits.
      {3, {0x00, 0xff, 0xaa, 0x55, 0x55, 0x00, 0xff, 0xaa}, 17372213562101705633ull},
      // codes mod 4 do not depend on s (12 s mod 4 = 0): four equal pairs.
      {2, {0x00, 0xff, 0xaa, 0x55, 0x55, 0x00, 0xff, 0xaa}, 6393870242884967941ull},
      // bit 2 s for lane 0..7, bit 2 s + 1 for lane + 8 (40 more: same parity).
      {1, {0x00, 0xff, 0x00, 0xff, 0xff, 0x00, 0xff, 0x00}, 3866981153937686821ull},
  };
  for (const Golden& golden : cases) {
    std::vector<std::uint8_t> tile(static_cast<std::size_t>(TileBytes(golden.bits)));
    for (int lane = 0; lane < 16; ++lane) {
      for (int depth = 0; depth < 16; ++depth) {
        const auto code = static_cast<std::uint32_t>(5 * lane + 3 * depth) % (1u << golden.bits);
        SetCode(tile.data(), golden.bits, lane, depth, code);
      }
    }
    EXPECT_THAT(std::vector<int>(tile.begin(), tile.begin() + 8), ElementsAreArray(golden.first)) << golden.bits;
    EXPECT_EQ(Fnv1a(tile), golden.hash) << golden.bits << " bits";
  }
}

TEST(TileCodec, EveryCodeHasItsOwnBits) {
  std::mt19937 rng(1);
  for (int bits : {8, 4, 3, 2, 1}) {
    std::vector<std::uint8_t> tile(static_cast<std::size_t>(TileBytes(bits)), 0xa5);
    std::uint32_t codes[16][16];
    for (int lane = 0; lane < 16; ++lane) {
      for (int depth = 0; depth < 16; ++depth) {
        codes[lane][depth] = static_cast<std::uint32_t>(rng()) % (1u << bits);
        SetCode(tile.data(), bits, lane, depth, codes[lane][depth]);
      }
    }
    for (int lane = 0; lane < 16; ++lane) {
      for (int depth = 0; depth < 16; ++depth) ASSERT_EQ(GetCode(tile.data(), bits, lane, depth), codes[lane][depth]);
    }
  }
}

TEST(TileCodec, ExactTilesHoldPairsAlongDepth) {
  std::vector<std::uint8_t> tile(512);
  SetExact(tile.data(), 16, 3, 5, -1.5f);  // bf16 0xbfc0 at u16[32 * 2 + 2 * 3 + 1]
  EXPECT_EQ(tile[2 * 71], 0xc0);
  EXPECT_EQ(tile[2 * 71 + 1], 0xbf);
  EXPECT_EQ(GetExact(tile.data(), 16, 3, 5), -1.5f);
  std::vector<std::uint8_t> wide(1024);
  SetExact(wide.data(), 32, 3, 5, 0.1f);  // f32[16 * 5 + 3]
  float back;
  std::memcpy(&back, wide.data() + 4 * 83, 4);
  EXPECT_EQ(back, 0.1f);
  EXPECT_EQ(GetExact(wide.data(), 32, 3, 5), 0.1f);
}

TEST(TileCodec, ScalesFollowTheFormula) {
  for (int code = 1; code < 256; ++code) {
    const double half = std::exp2((code - 160) / 8.0);
    EXPECT_NEAR(kHalfOfScaleCode[static_cast<std::size_t>(code)] / half, 1.0, 2e-7) << code;
  }
  for (int bits : {8, 4, 3, 2, 1}) {
    const KvScale scale = DecodeScale(bits, 168, -32);  // half 2, centre -1
    EXPECT_FLOAT_EQ(scale.base, -3.0f);
    EXPECT_FLOAT_EQ(scale.base + scale.step * static_cast<float>((1 << bits) - 1), 1.0f);
    EXPECT_EQ(DecodeScale(bits, 0, 100).step, 0.0f);
    EXPECT_EQ(DecodeScale(bits, 0, 100).base, 0.0f);
  }
}

TEST(TileCodec, NibblesOfAGroupLieInEightBytes) {
  std::vector<std::uint8_t> meta(32, 0);
  for (int t = 0; t < 64; ++t) SetNibble(meta.data(), t, static_cast<std::uint32_t>(7 * t) % 16);
  for (int t = 0; t < 64; ++t) EXPECT_EQ(GetNibble(meta.data(), t), static_cast<std::uint32_t>(7 * t) % 16) << t;
  // Tokens 0 and 8 share byte 0 (0 and 56 mod 16), tokens 19 and 27 byte 11 (133 mod 16 and 189 mod 16).
  EXPECT_EQ(meta[0], 0x80);
  EXPECT_EQ(meta[11], 0xd5);
}

TEST(TileCodec, SharedScalesFollowTheFormula) {
  EXPECT_EQ(SharedScaleCode(0, 9), 0);  // an empty run, whatever its nibbles hold
  EXPECT_EQ(SharedScaleCode(1, 0), 1);
  EXPECT_EQ(SharedScaleCode(100, 15), 130);
  EXPECT_EQ(SharedScaleCode(225, 15), 255);
  EXPECT_EQ(SharedScaleCode(255, 15), 255);  // bytes from a peer may say anything
  for (int base = 1; base <= kMaxScaleCode; ++base)
    EXPECT_GE(SharedScaleCode(static_cast<std::uint8_t>(base), 1), base);

  const KvRun k = {2, 16, KvScaleKind::kShared}, v = {4, 16};
  KvBlockLayout layout;
  ASSERT_TRUE(MakeKvBlockLayout(1, 16, 16, &k, 1, &v, 1, false, &layout));
  std::vector<std::uint8_t> head(static_cast<std::size_t>(layout.block_bytes), 0);
  head[static_cast<std::size_t>(layout.k.base_offset[0])] = 160;
  SetNibble(head.data() + layout.k.meta_offset[0], 5, 4);  // 160 + 8: half 2
  const KvScale scale = ScaleOf(layout.k, 0, head.data(), 16, 5);
  EXPECT_EQ(scale.base, -2.0f);
  EXPECT_FLOAT_EQ(scale.base + 3 * scale.step, 2.0f);
  EXPECT_EQ(HalfOf(layout.k, 0, head.data(), 5), 2.0f);
  EXPECT_EQ(HalfOf(layout.k, 0, head.data(), 6), 1.0f);
  head[static_cast<std::size_t>(layout.v.meta_offset[0]) + 5] = 176;
  EXPECT_EQ(HalfOf(layout.v, 0, head.data(), 5), 4.0f);
}

TEST(ScaleRule, TakesTheNearestStepInTheLogarithm) {
  EXPECT_EQ(NearestScaleCode(1e-30f), 1);
  EXPECT_EQ(NearestScaleCode(INFINITY), 255);
  EXPECT_EQ(NearestScaleCode(std::nanf("")), 255);
  for (double x = -19.5; x < 11.5; x += 0.013) {
    const auto half = static_cast<float>(std::exp2(x));
    EXPECT_NEAR(NearestScaleCode(half), 160 + 8 * x, 0.501) << x;
    EXPECT_NEAR(NearestEvenStep(half), 4 * x, 0.501) << x;
    EXPECT_EQ(CoveringEvenStep(half), std::ceil(4 * x - 1e-5)) << x;
  }
  EXPECT_EQ(EvenCode(NearestEvenStep(0.0f)), 2);
  EXPECT_EQ(EvenCode(0), 160);
  EXPECT_EQ(EvenCode(1000), 254);
}

TEST(ScaleRule, BaseCodeLeavesTheLargestTokenTheLastNibble) {
  EXPECT_EQ(SharedBaseCode(0), 0);
  EXPECT_EQ(SharedBaseCode(4), 2);
  for (int code = 2; code <= 254; code += 2) {
    const int base = SharedBaseCode(code);
    const auto nibble = static_cast<std::uint32_t>(NibbleOf(code, base));
    EXPECT_EQ(SharedScaleCode(static_cast<std::uint8_t>(base), nibble), code);
    EXPECT_EQ(nibble, code >= 32 ? 15u : static_cast<std::uint32_t>(code - 2) / 2);
  }
  EXPECT_EQ(NibbleOf(100, 120), 0);
}

TEST(Bf16, RoundsToNearestEvenAndKeepsSpecials) {
  EXPECT_EQ(FloatToBf16(1.0f), 0x3f80);
  EXPECT_EQ(FloatToBf16(1.00390625f), 0x3f80);  // halfway between 0x3f80 and 0x3f81: to even
  EXPECT_EQ(FloatToBf16(1.01171875f), 0x3f82);  // halfway between 0x3f81 and 0x3f82: to even
  EXPECT_EQ(FloatToBf16(1.004f), 0x3f81);
  EXPECT_EQ(FloatToBf16(-INFINITY), 0xff80);
  EXPECT_EQ(FloatToBf16(3.4e38f), 0x7f80);
  EXPECT_TRUE(std::isnan(Bf16ToFloat(FloatToBf16(NAN))));
  EXPECT_TRUE(std::isnan(Bf16ToFloat(FloatToBf16(std::bit_cast<float>(0x7f800001u)))));
}

TEST(Hadamard, IsOrthonormalItsOwnInverseAndCutsIntoCells) {
  std::mt19937 rng(2);
  std::normal_distribution<float> normal;
  for (int width : {16, 32, 48, 64, 80, 112, 128, 256}) {
    std::vector<float> x(static_cast<std::size_t>(width));
    for (float& value : x) value = normal(rng);
    std::vector<float> y = x;
    HadamardRun(y.data(), width);
    double energy_x = 0, energy_y = 0, cell = 0;
    for (int i = 0; i < width; ++i) {
      energy_x += double{x[i]} * x[i];
      energy_y += double{y[i]} * y[i];
    }
    EXPECT_NEAR(energy_y / energy_x, 1.0, 1e-5);
    // Row 0 of the first cell is constant: 1 / sqrt(cell).
    const int first = static_cast<int>(std::bit_floor(static_cast<unsigned>(width)));
    for (int i = 0; i < first; ++i) cell += x[i];
    EXPECT_NEAR(y[0], cell / std::sqrt(static_cast<double>(first)), 1e-4);
    HadamardRun(y.data(), width);
    for (int i = 0; i < width; ++i) EXPECT_NEAR(y[i], x[i], 1e-5) << width;
  }
}

}  // namespace
}  // namespace zeroc::kernels
