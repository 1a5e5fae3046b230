#include "services/router/policy.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

namespace zeroc {
namespace {

std::vector<Rung> Ladder() {
  return {{"bf16", 1000, true, 0.0, std::nullopt, 0},
          {"q8", 530, true, 0.02, std::nullopt, 0},
          {"q4", 280, true, 0.09, std::nullopt, 0},
          {"q3", 215, true, 0.4, std::nullopt, 0},
          {"q2", 150, false, 0.0, std::nullopt, 0}};
}

std::string Chosen(const std::vector<Rung>& ladder, std::optional<double> budget,
                   std::optional<std::string> requested = std::nullopt) {
  const Result<PolicyDecision> decision = ChooseProfile({ladder, requested, budget, 0.1});
  if (!decision.ok()) return std::string(StatusCodeName(decision.status().code()));
  return ladder[decision->rung_idx].name + " " + std::string(decision->reason);
}

TEST(Policy, TakesTheFewestBytesWithinTheBudget) {
  const std::vector<Rung> ladder = Ladder();
  EXPECT_EQ(Chosen(ladder, std::nullopt), "q4 budget") << "the default budget is 0.1";
  EXPECT_EQ(Chosen(ladder, 0.0), "bf16 budget");
  EXPECT_EQ(Chosen(ladder, 0.02), "q8 budget") << "the bound itself is inside";
  EXPECT_EQ(Chosen(ladder, 0.0199), "bf16 budget");
  EXPECT_EQ(Chosen(ladder, 0.4), "q3 budget");
  EXPECT_EQ(Chosen(ladder, 1e9), "q3 budget") << "what was never measured promises nothing";
}

TEST(Policy, ARequestedProfileIsTakenOrNotFound) {
  const std::vector<Rung> ladder = Ladder();
  EXPECT_EQ(Chosen(ladder, 0.0, "q2"), "q2 requested");
  EXPECT_EQ(Chosen(ladder, std::nullopt, "bf16"), "bf16 requested");
  EXPECT_EQ(Chosen(ladder, std::nullopt, "q5"), "NOT_FOUND");
  EXPECT_EQ(Chosen(ladder, std::nullopt, ""), "NOT_FOUND");
}

TEST(Policy, RefusesBudgetsThatAreNoNumbers) {
  const std::vector<Rung> ladder = Ladder();
  EXPECT_EQ(Chosen(ladder, -0.1), "INVALID_ARGUMENT");
  EXPECT_EQ(Chosen(ladder, std::numeric_limits<double>::quiet_NaN()), "INVALID_ARGUMENT");
  EXPECT_EQ(Chosen(ladder, std::numeric_limits<double>::infinity()), "INVALID_ARGUMENT");
}

TEST(Policy, NothingMeasuredMeansNoCompression) {
  std::vector<Rung> ladder = Ladder();
  for (Rung& rung : ladder) rung.measured = false;
  EXPECT_EQ(Chosen(ladder, 10.0), "bf16 budget");
  ladder[1].measured = true;
  ladder[1].ppl_increase = std::nan("");
  EXPECT_EQ(Chosen(ladder, 10.0), "bf16 budget");
  EXPECT_EQ(Chosen({}, 10.0), "FAILED_PRECONDITION");
}

// Any way of cutting the text into pieces gives what the whole text gives.

}  // namespace
}  // namespace zeroc
