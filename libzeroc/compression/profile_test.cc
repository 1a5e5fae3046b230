#include "libzeroc/compression/profile.h"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>

#include "libzeroc/checkpoint/model_config.h"

namespace zeroc {
namespace {

using kernels::KvRun;
using kernels::KvScaleKind;

// models/zeroc-demo.
constexpr ModelGeometry kDemo = {.n_layers = 4, .n_heads = 6, .n_kv_heads = 2, .head_dim = 64, .hidden = 384};

TEST(PackedBlocksAt, FollowsTheVisibilityRule) {
  for (const int recent : {0, 1, 63, 64, 100, 128, 129}) {
    for (int pos = 0; pos < 700; ++pos) {
      int expected = 0;
      for (int b = 0; b < 20; ++b) expected += pos - (64 * b + 63) > recent ? 1 : 0;
      ASSERT_EQ(PackedBlocksAt(pos, recent), expected) << "pos " << pos << " recent " << recent;
    }
  }
}

TEST(UniformProfile, ThreeBitsOfTheDemoModelAreThreeAndAQuarterWithScales) {
  const Profile q3 = UniformProfile("q3", 3, kDemo.n_layers, kDemo.head_dim);
  const Result<ProfileLayouts> layouts = ProfileLayouts::Make(q3, kDemo);
  ASSERT_TRUE(layouts.ok()) << layouts.status().ToString();
  ASSERT_EQ(layouts->tiers.size(), 1U);
  ASSERT_EQ(layouts->tiers[0].size(), 4U);
  const double elements = 2.0 * 2 * 64 * 64;  // sides, heads, coordinates, tokens
  for (const kernels::KvBlockLayout& layout : layouts->tiers[0]) {
    EXPECT_DOUBLE_EQ(layout.block_bytes * 8 / elements, 3.25);
    EXPECT_TRUE(layout.rotate_v);
  }
}

TEST(KvBytes, MatchHandComputedNumbers) {
  const Profile q3 = UniformProfile("q3", 3, 4, 64);
  // One side of one head: 64 tokens * 64 coordinates * 3 / 8 + 64 * 2 = 1664; a layer: * 2 sides * 2 heads = 6656.
  // An exact block: 64 * 64 * 2 bytes * 2 sides * 2 heads = 32768; the sink block a quarter of it.
  KvBytes bytes = KvBytesHeld(q3, kDemo, 4096);  // 62 packed blocks, then 128 tokens
  EXPECT_EQ(bytes.packed, 4 * 62 * 6656);
  EXPECT_EQ(bytes.exact, 4 * 2 * 32768);
  EXPECT_EQ(bytes.sink, 4 * 8192);
  EXPECT_EQ(bytes.raw, 4096 * 2048);
  EXPECT_DOUBLE_EQ(KvBytesPerToken(q3, kDemo, 4096), 475.0);
  EXPECT_DOUBLE_EQ(BitsPerElement(q3, kDemo, 4096), 475.0 * 8 / 1024);

  bytes = KvBytesHeld(q3, kDemo, 4095);  // one token less: block 61 is not behind the window yet, 191 tokens stay exact
  EXPECT_EQ(bytes.packed, 4 * 61 * 6656);
  EXPECT_EQ(bytes.exact, 4 * 3 * 32768);

  bytes = KvBytesHeld(q3, kDemo, 191);  // nothing packed yet, hence no sink block
  EXPECT_EQ(bytes.packed, 0);
  EXPECT_EQ(bytes.sink, 0);
  EXPECT_EQ(bytes.exact, 4 * 3 * 32768);
  bytes = KvBytesHeld(q3, kDemo, 192);
  EXPECT_EQ(bytes.packed, 4 * 6656);
  EXPECT_EQ(bytes.sink, 4 * 8192);
  EXPECT_EQ(bytes.exact, 4 * 2 * 32768);
  EXPECT_EQ(KvBytesHeld(q3, kDemo, 0).held(), 0);

  Profile no_sink = q3;
  no_sink.sink_tokens = 0;
  EXPECT_EQ(KvBytesHeld(no_sink, kDemo, 4096).sink, 0);
}

TEST(KvBytes, SharedScalesTakeHalfAByte) {
  // Per head: 64 * (16 * 4 + 48 * 2 + 64 * 1) / 8 bytes of codes, 3 runs * (32 bytes of nibbles + 1).
  Profile shared = UniformProfile("z", 2, 4, 64);
  for (KvShape& shape : shared.layers) {
    shape.k.runs = {{4, 16, KvScaleKind::kShared}, {2, 48, KvScaleKind::kShared}};
    shape.v.runs = {{1, 64, KvScaleKind::kShared}};
  }
  const int head_bytes = 1792 + 3 * 33;
  const int block_bytes = (2 * head_bytes + 15) / 16 * 16;
  EXPECT_EQ(KvBytesHeld(shared, kDemo, 4096).packed, 4 * 62 * block_bytes);
  EXPECT_LT(block_bytes, 2 * head_bytes + 16);
}

TEST(KvBytes, YoungTiersHoldTheBlocksBehindTheWindow) {
  Profile aged = UniformProfile("aged", 1, 4, 64);
  aged.recent_tokens = 0;
  aged.young = {{1, UniformProfile("", 8, 4, 64).layers}, {3, UniformProfile("", 4, 4, 64).layers}};
  // Of 64 blocks one has 8 bits, three have 4, the rest 1; two bytes of scale per token, side and head.
  const auto block = [](int bits) { return std::int64_t{64} * (64 * bits / 8 + 2) * 4; };
  EXPECT_EQ(KvBytesHeld(aged, kDemo, 4096).packed, 4 * (block(8) + 3 * block(4) + 60 * block(1)));
  EXPECT_EQ(KvBytesHeld(aged, kDemo, 4096).exact, 0);
  EXPECT_EQ(KvBytesHeld(aged, kDemo, 128).packed, 4 * (block(8) + block(4)));
  EXPECT_EQ(BlocksFromTier(aged, 0, 4096), 64);
  EXPECT_EQ(BlocksFromTier(aged, 1, 4096), 63);
  EXPECT_EQ(BlocksFromTier(aged, 2, 4096), 60);
  EXPECT_EQ(BlocksFromTier(aged, 2, 200), 0);
  const ProfileLayouts layouts = ProfileLayouts::Make(aged, kDemo).value();
  ASSERT_EQ(layouts.tiers.size(), 3U);
  EXPECT_EQ(layouts.tiers[1][0].k.runs[0].bits, 4);
  Profile other = aged;
  other.young[0].n_blocks = 2;
  EXPECT_NE(ProfileLayouts::Make(other, kDemo)->layout_hash, layouts.layout_hash);
}

TEST(ValidateProfile, NamesTheYoungTierThatIsWrong) {
  const auto message = [](const Profile& profile) { return std::string(ValidateProfile(profile, kDemo).message()); };
  Profile profile = UniformProfile("aged", 1, 4, 64);
  const YoungTier good{2, UniformProfile("", 8, 4, 64).layers};
  profile.young = {good, good};
  EXPECT_TRUE(ValidateProfile(profile, kDemo).ok());
  profile.young[1].n_blocks = 0;
  EXPECT_NE(message(profile).find("young tier 1: n_blocks"), std::string::npos) << message(profile);
  profile.young[1] = {1, {}};
  EXPECT_NE(message(profile).find("young tier 1: shapes for 0 layers"), std::string::npos) << message(profile);
  profile.young[1] = good;
  profile.young[1].layers[2].v.runs[0].width = 48;
  EXPECT_NE(message(profile).find("young tier 1: layer 2 V"), std::string::npos) << message(profile);
  profile.young.assign(4, good);
  EXPECT_NE(message(profile).find("at most 3"), std::string::npos) << message(profile);
  Profile exact = UniformProfile("bf16", 16, 4, 64);
  exact.young = {good};
  EXPECT_NE(message(exact).find("nothing is packed"), std::string::npos) << message(exact);
}

TEST(KvBytes, MixedTiersAndUncompressed) {
  // K: 16 at 4, 16 at 2, 32 dropped; V: 64 at 1. Per head: 64 * (16*4 + 16*2 + 64)/8 + 3 runs * 128 bytes of scales.
  Profile mixed = UniformProfile("mixed", 2, 4, 64);
  for (KvShape& shape : mixed.layers) {
    shape.k.runs = {{4, 16}, {2, 16}, {0, 32}};
    shape.v.runs = {{1, 64}};
  }
  EXPECT_EQ(KvBytesHeld(mixed, kDemo, 4096).packed, 4 * 62 * 2 * (1280 + 3 * 128));

  const Profile bf16 = UniformProfile("bf16", 16, 4, 64);
  EXPECT_FALSE(bf16.packs());
  EXPECT_DOUBLE_EQ(KvBytesPerToken(bf16, kDemo, 4096), 2048.0);
  EXPECT_DOUBLE_EQ(BitsPerElement(bf16, kDemo, 4096), 16.0);
  EXPECT_EQ(KvBytesHeld(bf16, kDemo, 65).held(), 4 * 2 * 32768);
}

TEST(StandardLadder, HasTheFiveNamesWithFallingBytes) {
  const std::vector<Profile> ladder = StandardLadder(kDemo);
  ASSERT_EQ(ladder.size(), 5U);
  const char* names[] = {"bf16", "q8", "q4", "q3", "q2"};
  for (std::size_t i = 0; i < 5; ++i) {
    EXPECT_EQ(ladder[i].name, names[i]);
    EXPECT_FALSE(ladder[i].cost.measured);
    if (i == 0) continue;
    EXPECT_LT(ladder[i].cost.kv_bytes_per_token, ladder[i - 1].cost.kv_bytes_per_token);
  }
  EXPECT_DOUBLE_EQ(ladder[3].cost.kv_bytes_per_token, 475.0);
}

TEST(ProfileLayouts, HashTellsLayoutsApartAndNothingElse) {
  const auto hash_of = [](const Profile& profile, const ModelGeometry& geometry = kDemo, int exact_bits = 16) {
    const Result<ProfileLayouts> layouts = ProfileLayouts::Make(profile, geometry, exact_bits);
    EXPECT_TRUE(layouts.ok()) << layouts.status().ToString();
    return layouts->layout_hash;
  };
  const Profile q3 = UniformProfile("q3", 3, 4, 64);
  Profile renamed = q3;
  renamed.name = "other";
  renamed.cost.kl = 1;
  EXPECT_EQ(hash_of(renamed), hash_of(q3));

  Profile other_window = q3;
  other_window.recent_tokens = 64;
  EXPECT_NE(hash_of(other_window), hash_of(q3));
  Profile one_layer = q3;
  one_layer.layers[2].v.runs = {{4, 16}, {3, 48}};
  EXPECT_NE(hash_of(one_layer), hash_of(q3));
  // The same bytes per block, but runs in another order.
  Profile swapped = one_layer;
  swapped.layers[2].v.runs = {{3, 48}, {4, 16}};
  EXPECT_NE(hash_of(swapped), hash_of(one_layer));
  Profile shared = q3;
  shared.layers[2].v.runs = {{3, 64, KvScaleKind::kShared}};
  EXPECT_NE(hash_of(shared), hash_of(q3));
  Profile corrected = q3;
  corrected.layers[2].mass = {1, 2, 3, 4};
  EXPECT_EQ(hash_of(corrected), hash_of(q3));  // no byte of a block depends on it; plan_id covers it
  EXPECT_NE(hash_of(q3, kDemo, 32), hash_of(q3));
  ModelGeometry more_heads = kDemo;
  more_heads.n_kv_heads = 6;
  EXPECT_NE(hash_of(q3, more_heads), hash_of(q3));
  const Profile bf16 = UniformProfile("bf16", 16, 4, 64);
  ModelGeometry fewer_layers = kDemo;
  fewer_layers.n_layers = 3;
  EXPECT_NE(hash_of(bf16, fewer_layers), hash_of(bf16));
}

TEST(ValidateProfile, NamesWhatIsWrong) {
  const Profile good = UniformProfile("q3", 3, 4, 64);
  ASSERT_TRUE(ValidateProfile(good, kDemo).ok());
  const auto expect_refused = [&](const std::function<void(Profile&)>& damage, const std::string& cause) {
    Profile bad = good;
    damage(bad);
    const Status status = ValidateProfile(bad, kDemo);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    EXPECT_NE(status.message().find(cause), std::string::npos) << status.ToString();
    EXPECT_FALSE(ProfileLayouts::Make(bad, kDemo).ok());
  };
  expect_refused([](Profile& p) { p.name = ""; }, "name");
  expect_refused([](Profile& p) { p.name = "a b"; }, "name");
  expect_refused([](Profile& p) { p.name = std::string(65, 'a'); }, "name");
  expect_refused([](Profile& p) { p.sink_tokens = 8; }, "sink_tokens 8");
  expect_refused([](Profile& p) { p.recent_tokens = -1; }, "recent_tokens -1");
  expect_refused([](Profile& p) { p.recent_tokens = 1 << 30; }, "recent_tokens");
  expect_refused([](Profile& p) { p.layers.pop_back(); }, "3 layers");
  expect_refused([](Profile& p) { p.layers[1].k.runs.clear(); }, "layer 1 K: 0 runs");
  expect_refused([](Profile& p) { p.layers[1].v.runs.assign(7, KvRun{2, 16}); }, "layer 1 V: 7 runs");
  expect_refused([](Profile& p) { p.layers[0].k.runs = {{5, 64}}; }, "5 bits");
  expect_refused([](Profile& p) { p.layers[0].k.runs = {{32, 64}}; }, "32 bits");
  expect_refused([](Profile& p) { p.layers[0].k.runs = {{16, 64, KvScaleKind::kShared}}; }, "scale kind 1");
  expect_refused([](Profile& p) { p.layers[0].k.runs = {{3, 16}, {0, 48, KvScaleKind::kShared}}; }, "scale kind 1");
  expect_refused([](Profile& p) { p.layers[0].v.runs[0].scale = static_cast<KvScaleKind>(2); }, "scale kind 2");
  expect_refused([](Profile& p) { p.layers[2].mass = {1, 2, 3}; }, "layer 2: mass has 3 numbers, not 4");
  expect_refused([](Profile& p) { p.layers[2].mass = {1, 2, 3, 1001}; }, "layer 2: mass holds");
  expect_refused([](Profile& p) { p.layers[2].mass = {1, 2, 3, NAN}; }, "layer 2: mass holds");
  expect_refused(
      [](Profile& p) {
        p.layers[2].k.runs = {{3, 48}, {0, 16}};
        p.layers[2].mass = {1, 2, 0, 3, 4, 5};
      },
      "K run 1, which has no scale");
  expect_refused([](Profile& p) { p.layers[0].k.runs = {{3, 48}}; }, "sum to 48");
  expect_refused([](Profile& p) { p.layers[0].k.runs = {{3, 64}, {3, 16}}; }, "sum to 80");
  expect_refused([](Profile& p) { p.layers[0].k.runs = {{3, 40}, {3, 24}}; }, "width 40");
  expect_refused([](Profile& p) { p.layers[0].k.runs = {{3, -16}, {3, 64}, {2, 16}}; }, "width -16");
  expect_refused([](Profile& p) { p.layers[3] = {{{{0, 64}}}, {{{0, 64}}}}; }, "layer 3: every coordinate");
}

TEST(ValidateGeometry, RefusesWhatNoModelHas) {
  EXPECT_TRUE(ValidateGeometry(kDemo).ok());
  for (const auto& [member, value] :
       std::vector<std::pair<int ModelGeometry::*, int>>{{&ModelGeometry::n_layers, 0},
                                                         {&ModelGeometry::n_layers, 1 << 20},
                                                         {&ModelGeometry::n_heads, 7},
                                                         {&ModelGeometry::n_heads, 0},
                                                         {&ModelGeometry::n_kv_heads, 0},
                                                         {&ModelGeometry::n_kv_heads, 12},
                                                         {&ModelGeometry::head_dim, 40},
                                                         {&ModelGeometry::head_dim, 512},
                                                         {&ModelGeometry::head_dim, 0},
                                                         {&ModelGeometry::hidden, 0},
                                                         {&ModelGeometry::hidden, -5}}) {
    ModelGeometry bad = kDemo;
    bad.*member = value;
    EXPECT_FALSE(ValidateGeometry(bad).ok()) << value;
  }
}

TEST(GeometryOf, ReadsTheConfig) {
  ModelConfig config;
  config.n_layers = 4;
  config.n_heads = 6;
  config.n_kv_heads = 2;
  config.head_dim = 64;
  config.hidden_size = 384;
  EXPECT_EQ(GeometryOf(config), kDemo);
}

TEST(MeasuredCost, PromisesTheLargerIncrease) {
  const ProfileCost by_kl = MeasuredCost(30.0, -0.2, 0.01, 0.9);
  EXPECT_DOUBLE_EQ(by_kl.ppl_increase_kl, 30.0 * std::expm1(0.01));
  EXPECT_DOUBLE_EQ(by_kl.ppl_increase, by_kl.ppl_increase_kl);
  EXPECT_DOUBLE_EQ(by_kl.ppl_increase_rel, by_kl.ppl_increase / 30.0);
  EXPECT_DOUBLE_EQ(by_kl.ppl_increase_direct, -0.2);
  EXPECT_TRUE(by_kl.measured);
  const ProfileCost direct = MeasuredCost(30.0, 0.5, -1e-12, std::nullopt);
  EXPECT_DOUBLE_EQ(direct.ppl_increase, 0.5);
  EXPECT_EQ(direct.kl, 0);
}

}  // namespace
}  // namespace zeroc
