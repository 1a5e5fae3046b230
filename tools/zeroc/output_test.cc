#include "tools/zeroc/output.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "tools/zeroc/model_cost.h"

namespace zeroc {
namespace {

TEST(Table, ColumnsLineUp) {
  Table table({"name", "x"});
  table.Add({"a", "10.5"});
  table.Add({"longer name", "1"});
  EXPECT_EQ(table.ToString(), "name            x\na            10.5\nlonger name     1\n");
}

TEST(Table, ShortRowsEndEarly) {
  Table table({"a", "b", "c"});
  table.Add({"only"});
  EXPECT_EQ(table.ToString(), "a     b  c\nonly\n");
}

TEST(Fixed, RoundsAndRefusesWhatIsNotFinite) {
  EXPECT_EQ(Fixed(2.345, 1), "2.3");
  EXPECT_EQ(Fixed(-0.5, 0), "-0");
  EXPECT_EQ(Fixed(std::nan(""), 2), "-");
  EXPECT_EQ(Fixed(std::numeric_limits<double>::max(), 17).size(), 309u + 1 + 17);
}

TEST(WithPrefix, PicksThePrefix) {
  EXPECT_EQ(WithPrefix(999, "B/s"), "999.00 B/s");
  EXPECT_EQ(WithPrefix(1500, "B/s"), "1.50 kB/s");
  EXPECT_EQ(WithPrefix(2.5e12, "FLOP/s"), "2.50 TFLOP/s");
}

ModelConfig TinyConfig() {
  ModelConfig config;
  config.vocab_size = 7;
  config.hidden_size = 6;
  config.n_layers = 2;
  config.n_heads = 2;
  config.n_kv_heads = 1;
  config.head_dim = 4;
  config.intermediate_size = 5;
  return config;
}

// Counted by hand: q and o 6x8, k and v 6x4, three MLP matrices 6x5, head 6x7.
TEST(CostOfPass, CountsOneTokenThroughEverything) {
  const PassCost cost = CostOfPass(TinyConfig(), 2, 1, 1);
  const double layer_weights = 2 * 48 + 2 * 24 + 3 * 30;
  EXPECT_DOUBLE_EQ(cost.flops, 2 * (2 * layer_weights + 42) + 2 * 2 * (2 * 8 * 3));  // 3 tokens seen by 8 query columns
  EXPECT_DOUBLE_EQ(cost.bytes, 2 * (2 * layer_weights + 42));
}

TEST(CostOfPass, LastLayerOnlyFeedsTheCacheWithoutLogits) {
  const PassCost cost = CostOfPass(TinyConfig(), 0, 2, 0);
  EXPECT_DOUBLE_EQ(cost.flops, 2 * 2 * (2 * 48 + 2 * 24 + 3 * 30) + 2 * 2 * (2 * 24) + 4 * 8 * (1 + 2));
  EXPECT_DOUBLE_EQ(cost.bytes, 2 * (2 * 48 + 2 * 24 + 3 * 30 + 2 * 24));
}

TEST(CostOfPass, ChunksAddUpToTheWhole) {
  const ModelConfig config = TinyConfig();
  const double whole = CostOfPass(config, 0, 100, 1).flops;
  const double parts = CostOfPass(config, 0, 37, 0).flops + CostOfPass(config, 37, 63, 1).flops;
  EXPECT_NEAR(parts, whole, 1e-9 * whole);
}

}  // namespace
}  // namespace zeroc
