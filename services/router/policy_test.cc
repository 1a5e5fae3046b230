#include "services/router/policy.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "services/router/stop_matcher.h"

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
TEST(StopMatcher, DoesNotDependOnThePieces) {
  const std::vector<std::string> stops{"END", "ENDE", "\n\n", "abab", "ü!"};
  const struct {
    std::string text, shown;
    bool stopped;
  } cases[] = {{"hello END world", "hello ", true},
               {"EN D EEND", "EN D E", true},
               {"abaabab", "aba", true},
               {"line\nline\n\nrest", "line\nline", true},
               {"no stop EN", "no stop EN", false},
               {"", "", false},
               {"xü!y", "x", true},
               {"ababab", "", true},
               {"a\n", "a\n", false}};
  for (const auto& c : cases) {
    for (std::size_t piece = 1; piece <= c.text.size() + 1; ++piece) {
      StopMatcher matcher(stops);
      std::string shown;
      bool stopped = false;
      for (std::size_t i = 0; i < c.text.size() && !stopped; i += piece) {
        const StopMatcher::Output output = matcher.Push(std::string_view(c.text).substr(i, piece));
        shown += output.text;
        stopped = output.stopped;
      }
      if (!stopped) shown += matcher.Flush();
      EXPECT_EQ(shown, c.shown) << c.text << " in pieces of " << piece;
      EXPECT_EQ(stopped, c.stopped) << c.text << " in pieces of " << piece;
    }
  }
}

TEST(StopMatcher, HoldsBackNoMoreThanNeeded) {
  StopMatcher matcher({"STOP"});
  EXPECT_EQ(matcher.Push("abc").text, "abc");
  EXPECT_EQ(matcher.Push("deST").text, "de");
  EXPECT_EQ(matcher.Push("A").text, "STA");
  StopMatcher none({});
  EXPECT_EQ(none.Push("abc").text, "abc");
}

}  // namespace
}  // namespace zeroc
