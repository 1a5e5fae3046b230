#include "tools/zeroc/plan_plot.h"

#include <gtest/gtest.h>

#include <cmath>

#include "tools/zeroc/plan_table.h"

namespace zeroc {
namespace {

constexpr ModelGeometry kGeometry = {.n_layers = 2, .n_heads = 2, .n_kv_heads = 1, .head_dim = 32, .hidden = 64};

// A plan of identity maps whose standard profiles cost the given relative increases: q8, q4, q3, q2.
Plan MakePlan(std::vector<double> increases) {
  PlanContents contents;
  contents.model_fingerprint = "f00d";
  contents.geometry = kGeometry;
  std::vector<float> identity(32 * 32, 0.0f);
  for (std::size_t i = 0; i < 32; ++i) identity[33 * i] = 1.0f;
  LayerMaps maps;
  maps.a = maps.b = maps.m = maps.n = identity;
  maps.s_qk = maps.s_vo = std::vector<float>(32, 1.0f);
  contents.layers = {maps, maps};
  contents.ppl_base = 10;
  contents.ladder = StandardLadder(kGeometry);
  for (std::size_t i = 0; i < increases.size(); ++i) {
    contents.ladder[i + 1].cost = MeasuredCost(10, 10 * increases[i], 0, std::nullopt);
  }
  return Plan::Create(std::move(contents)).value();
}

int Count(const std::string& text, const std::string& part) {
  int n = 0;
  for (std::size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++n;
  return n;
}

TEST(PlanPlot, DrawsEveryMeasuredProfileAndTheBudget) {
  const std::string svg = PlanPlot(MakePlan({0.0001, 0.002, 0.01, 0.05}), 0.1);
  EXPECT_EQ(Count(svg, "<circle"), 4);
  for (const char* name : {">q8<", ">q4<", ">q3<", ">q2<"}) EXPECT_EQ(Count(svg, name), 1) << name;
  EXPECT_EQ(Count(svg, "+0.10 perplexity"), 1);
  EXPECT_EQ(Count(svg, "<svg"), 1);
  EXPECT_EQ(Count(svg, "</svg>"), 1);
  EXPECT_EQ(Count(svg, "nan"), 0);
  // All four are undominated: one M and three L.
  EXPECT_EQ(Count(svg, " L"), 3);
}

TEST(PlanPlot, DominatedProfilesAreNotOnTheLine) {
  // q3 costs more than q2 here: more bytes and more increase.
  const std::string svg = PlanPlot(MakePlan({0.0001, 0.002, 0.08, 0.05}), 0.1);
  EXPECT_EQ(Count(svg, "<circle"), 4);
  EXPECT_EQ(Count(svg, " L"), 2);
}

TEST(PlanPlot, NegativeIncreasesStayInsideThePicture) {
  const std::string svg = PlanPlot(MakePlan({-0.01, 0, 0.01, 0.05}), 0.1);
  EXPECT_EQ(Count(svg, "nan"), 0);
  EXPECT_EQ(Count(svg, "inf"), 0);
  EXPECT_EQ(Count(svg, "=\"-"), 0);  // no coordinate left of or above the picture
}

TEST(PlanPlot, NothingMeasured) {
  const std::string svg = PlanPlot(MakePlan({}), 0.1);
  EXPECT_EQ(Count(svg, "<circle"), 0);
  EXPECT_EQ(Count(svg, "</svg>"), 1);
}

TEST(ShapeTable, JoinsEqualLayers) {
  const std::string table = ShapeTable(MakePlan({}));
  EXPECT_EQ(Count(table, "0-1"), 4);  // q8, q4, q3, q2; bf16 packs nothing
  EXPECT_EQ(Count(table, "4x32"), 2);
}

}  // namespace
}  // namespace zeroc
