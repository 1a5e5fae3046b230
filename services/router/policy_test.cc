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

// --- nothing measured: the fewest bytes within the budget ---

std::string Chosen(const std::vector<Rung>& ladder, std::optional<double> budget,
                   std::optional<std::string> requested = std::nullopt) {
  const Result<PolicyDecision> decision = [&] {
    PolicyInput input;
    input.ladder = ladder;
    input.requested_profile = requested;
    input.max_ppl_increase = budget;
    input.default_max_ppl_increase = 0.1;
    return Decide(input);
  }();
  if (!decision.ok()) return std::string(StatusCodeName(decision.status().code()));
  EXPECT_FALSE(decision->predicted.has_value() || decision->prefill_idx.has_value());
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

// --- measured: the smallest predicted JCT within the budget ---

// 10,000 prompt tokens are 10 MB of bf16 and take 2 s of prefill; 100 tokens of answer.
struct Scene {
  std::vector<Rung> ladder = Ladder();
  std::vector<PrefillView> prefills{{"p", 0, Line{0, 2e-4}}};
  std::vector<DecodeView> decodes{{"d", 1'000'000'000, 2'000'000'000, Line{0.01, 0}, 1.0}};
  std::vector<std::optional<LinkView>> links;
  std::vector<std::optional<double>> audited;
  PolicyInput input;

  explicit Scene(double bytes_per_second) : links{LinkView{{0.001, 1 / bytes_per_second}, 0.5}} {
    input.n_prompt_tokens = 10'000;
    input.n_output_tokens = 100;
    input.default_max_ppl_increase = 0.1;
  }
  PolicyDecision Decision() {
    input.ladder = ladder;
    input.prefills = prefills;
    input.decodes = decodes;
    input.links = links;
    input.audited = audited;
    const Result<PolicyDecision> decision = Decide(input);
    EXPECT_TRUE(decision.ok()) << decision.status().ToString();
    return *decision;
  }
  std::string Chosen() {
    const PolicyDecision decision = Decision();
    return ladder[decision.rung_idx].name + " " + std::string(decision.reason);
  }
};

TEST(Policy, PredictsTheSumOfItsParts) {
  Scene scene(1e6);  // bf16 takes 10 s on this link
  scene.prefills[0].waiting_tokens = 5'000;
  scene.input.requested_profile = "bf16";
  const PolicyDecision decision = scene.Decision();
  ASSERT_TRUE(decision.predicted.has_value());
  EXPECT_NEAR(decision.predicted->queue, 1.0, 1e-9);
  EXPECT_NEAR(decision.predicted->prefill, 2.0, 1e-9);
  EXPECT_NEAR(decision.predicted->wire, 10.001 - 0.5 * 2.0, 1e-9) << "prefill hides half of what it could";
  EXPECT_NEAR(decision.predicted->decode, 1.0, 1e-9);
  EXPECT_EQ(decision.reason, "requested");
  EXPECT_EQ(decision.prefill_idx, 0U);
}

TEST(Policy, ASlowLinkIsAReasonToCompress) {
  EXPECT_EQ(Scene(1e6).Chosen(), "q4 wire");
  Scene generous(1e6);
  generous.input.max_ppl_increase = 1.0;
  EXPECT_EQ(generous.Chosen(), "q3 wire");
}

TEST(Policy, AFastLinkIsAReasonNotTo) {
  EXPECT_EQ(Scene(1e10).Chosen(), "bf16 link_fast");
  // 50 ms of 3 s are inside what is the same.
  Scene close(200e6);
  EXPECT_EQ(close.Chosen(), "bf16 link_fast");
  Scene none(1e10);
  none.input.max_ppl_increase = 0;
  EXPECT_EQ(none.Chosen(), "bf16 budget") << "nothing else was allowed";
}

TEST(Policy, EquallyFastProfilesAreDecidedByQuality) {
  Scene scene(1e10);
  scene.decodes[0].token_seconds = Line{0, 1e-8};  // bf16: 0.1 s a token; q8 is far from it, q4 and q3 are far apart
  EXPECT_EQ(scene.Chosen(), "q4 decode");
  scene.ladder[2].kv_bytes_per_token = 529;
  EXPECT_EQ(scene.Chosen(), "q8 decode") << "a byte less is not worth 0.07";
}

TEST(Policy, WaitingForRoomIsAReasonToCompress) {
  Scene scene(1e10);
  scene.decodes[0].kv_bytes_total = 12'000'000;
  scene.decodes[0].kv_bytes_free = 4'000'000;  // q4 fits, q8 waits
  EXPECT_EQ(scene.Chosen(), "q4 kv_pressure");
  scene.decodes[0].kv_bytes_total = 5'000'000;  // the others never fit
  EXPECT_EQ(scene.Chosen(), "q4 kv_pressure");
  scene.decodes[0].kv_bytes_total = 1'000;  // nothing does
  EXPECT_EQ(scene.Chosen(), "q4 budget");
  scene.decodes[0] = {"d", 20'000'000, 20'000'000, Line{0.01, 0}, 1.0};
  EXPECT_EQ(scene.Chosen(), "bf16 link_fast");
  scene.input.n_output_max = 20'000;  // of which 100 are expected: q4 takes 9 MB with them, q8 15
  scene.decodes[0].kv_bytes_total = scene.decodes[0].kv_bytes_free = 12'000'000;
  EXPECT_EQ(scene.Chosen(), "q4 kv_pressure") << "memory for the whole answer there must be";
}

TEST(Policy, AnSloOutranksTheJct) {
  // Two pairs: a fast prefill worker far away, a slow one close by.
  Scene scene(1e6);
  scene.prefills.push_back({"near", 0, Line{0, 6e-4}});
  scene.links.push_back(LinkView{{0, 1e-10}, 0.5});
  scene.input.max_ppl_increase = 0.4;
  EXPECT_EQ(scene.Chosen(), "q3 wire") << "2 s + 2.15 s of wire - 1 s hidden";
  scene.decodes[0].token_seconds = Line{0, 0};
  scene.input.tpot_slo_seconds = 0.05;
  EXPECT_EQ(scene.Chosen(), "q3 wire") << "an SLO that is met anyway changes nothing";

  Scene tpot(1e10);
  tpot.decodes[0].token_seconds = Line{0.01, 1e-9};  // bf16 20 ms, q4 12.8 ms a token
  tpot.prefills[0].seconds = Line{0, 1e-2};          // 100 s: the difference is no matter of the JCT
  EXPECT_EQ(tpot.Chosen(), "bf16 link_fast");
  tpot.input.tpot_slo_seconds = 0.013;
  EXPECT_EQ(tpot.Chosen(), "q4 slo");

  Scene ttft(1e10);
  ttft.prefills = {{"busy", 20'000, Line{0, 1e-4}}, {"idle", 0, Line{0, 4e-4}}};
  ttft.links = {ttft.links[0], ttft.links[0]};
  EXPECT_EQ(ttft.Decision().prefill_idx, 0U) << "2 s in the queue and 1 s of prefill";
  ttft.prefills[0].waiting_tokens = 40'000;
  EXPECT_EQ(ttft.Decision().prefill_idx, 1U);
}

TEST(Policy, TakesThePairThatIsFaster) {
  Scene scene(1e6);
  scene.decodes.push_back({"near", 1'000'000'000, 2'000'000'000, Line{0.01, 0}, 1.0});
  scene.links.push_back(LinkView{{0, 1e-10}, 0.5});
  EXPECT_EQ(scene.Decision().decode_idx, 1U);
  EXPECT_EQ(scene.Chosen(), "bf16 link_fast");
  scene.decodes[1].kv_bytes_free = 0;  // a second for room, against 1.8 s of wire
  EXPECT_EQ(scene.Decision().decode_idx, 1U);
  scene.decodes[1].request_decode_seconds = 1'000'000;
  EXPECT_EQ(scene.Decision().decode_idx, 0U);
}

// --- what workers have cached of the prompt ---

std::vector<std::uint32_t> Cached(std::uint32_t n_tokens, std::size_t rung) {
  std::vector<std::uint32_t> cached(Ladder().size(), 0);
  cached[rung] = n_tokens;
  return cached;
}

// One worker alone, and with the three others of its group.
TEST(Policy, AGroupIsTakenWhenItIsFaster) {
  Scene scene(1e10);
  scene.prefills = {{"p", 10'000, Line{0.1, 0.5e-4}, {}, 4}, {"p", 10'000, Line{0, 2e-4}}};
  scene.links = {scene.links[0], scene.links[0]};
  const PolicyDecision group = scene.Decision();
  EXPECT_EQ(group.prefill_idx, 0U);
  EXPECT_NEAR(group.predicted->prefill, 0.6, 1e-9);
  EXPECT_NEAR(group.predicted->queue, 2.0, 1e-9) << "the leader's own tokens wait for one rank";
  scene.prefills[1].cached_tokens = Cached(8'000, 0);
  EXPECT_EQ(scene.Decision().prefill_idx, 1U) << "2,000 tokens alone, or 10,000 on four ranks";
  scene.prefills[1].cached_tokens.clear();
  scene.prefills[0].seconds = Line{1.7, 0.5e-4};  // ranks that are far from each other
  EXPECT_EQ(scene.Decision().prefill_idx, 1U);
}

TEST(Policy, ACachedBeginningIsNeitherComputedNorSent) {
  Scene scene(1e6);
  scene.input.requested_profile = "bf16";
  scene.prefills[0].cached_tokens = Cached(6'000, 0);
  scene.decodes[0].cached_tokens = Cached(9'000, 0);
  const PolicyDecision decision = scene.Decision();
  EXPECT_NEAR(decision.predicted->prefill, 4'000 * 2e-4, 1e-9);
  EXPECT_NEAR(decision.predicted->wire, 1.001 - 0.5 * 0.8, 1e-9);
  EXPECT_NEAR(decision.predicted->decode, 1.0, 1e-9);
  EXPECT_EQ(decision.prefill_cached_tokens, 6'000U);
  EXPECT_EQ(decision.decode_cached_tokens, 9'000U);
  scene.input.requested_profile = "q4";
  EXPECT_EQ(scene.Decision().prefill_cached_tokens, 0U) << "cached for another profile";
  EXPECT_NEAR(scene.Decision().predicted->prefill, 2.0, 1e-9);
}

TEST(Policy, GoesWhereTheBeginningIsUnlessTheQueueCostsMore) {
  Scene scene(1e6);
  scene.prefills.push_back({"p2", 0, Line{0, 2e-4}, Cached(8'000, 2)});
  scene.decodes.push_back({"d2", 1'000'000'000, 2'000'000'000, Line{0.01, 0}, 1.0});
  scene.decodes[1].cached_tokens = Cached(8'000, 2);
  scene.links = std::vector<std::optional<LinkView>>(4, scene.links[0]);
  PolicyDecision decision = scene.Decision();
  EXPECT_EQ(decision.prefill_idx, 1U);
  EXPECT_EQ(decision.decode_idx, 1U);
  EXPECT_EQ(decision.reason, "wire") << "the profile is the same as without";
  scene.prefills[1].waiting_tokens = 7'000;  // 1.4 s, against 1.6 s of prefill
  EXPECT_EQ(scene.Decision().prefill_idx, 1U);
  scene.prefills[1].waiting_tokens = 9'000;
  EXPECT_EQ(scene.Decision().prefill_idx, 0U);
  scene.decodes[1].kv_bytes_free = 0;
  scene.decodes[1].request_decode_seconds = 1'000'000;
  EXPECT_EQ(scene.Decision().decode_idx, 0U) << "waiting for room would cost more";
}

TEST(Policy, ACachedBeginningCanDecideTheProfile) {
  Scene scene(1e6);
  EXPECT_EQ(scene.Chosen(), "q4 wire");
  scene.decodes[0].cached_tokens = Cached(9'990, 1);  // q8: 5 KB are left to send, of q4 2.8 MB
  EXPECT_EQ(scene.Chosen(), "q8 prefix");
  scene.decodes[0].cached_tokens = Cached(9'990, 0);
  EXPECT_EQ(scene.Chosen(), "bf16 prefix");
  scene.input.requested_profile = "q4";
  EXPECT_EQ(scene.Chosen(), "q4 requested");
}

TEST(Policy, WithoutMeasurementsTheBeginningCountsAsWorkDoneAndAsRoom) {
  Scene scene(1e6);
  scene.prefills.push_back({"p2", 5'000, std::nullopt, Cached(8'000, 2)});
  scene.decodes.push_back({"d2", 999'000'000, 2'000'000'000, std::nullopt, std::nullopt});
  scene.links.clear();
  EXPECT_FALSE(scene.Decision().decode_idx.has_value()) << "the pool's matter";
  EXPECT_EQ(scene.Decision().prefill_idx, 1U);
  EXPECT_EQ(scene.Chosen(), "q4 budget");
  scene.prefills[1].waiting_tokens = 9'000;
  EXPECT_EQ(scene.Decision().prefill_idx, 0U);
  scene.decodes[1].cached_tokens = Cached(8'000, 2);  // 2.24 MB, against 1 MB less of room
  EXPECT_EQ(scene.Decision().decode_idx, 1U);
  EXPECT_EQ(scene.Decision().decode_cached_tokens, 8'000U);
  scene.decodes[1].kv_bytes_free = 900'000'000;
  EXPECT_EQ(scene.Decision().decode_idx, 0U);
  EXPECT_EQ(scene.Decision().decode_cached_tokens, 0U);
}

TEST(Policy, EquallyFastWorkersShareTheRequests) {
  Scene scene(1e6);
  scene.decodes.push_back(scene.decodes[0]);
  scene.links.push_back(scene.links[0]);
  EXPECT_EQ(scene.Decision().decode_idx, 0U);
  scene.decodes[0].n_requests = 1;
  EXPECT_EQ(scene.Decision().decode_idx, 1U);
}

TEST(Policy, AnAuditRulesAProfileOut) {
  Scene scene(1e6);
  scene.audited.resize(scene.ladder.size());
  scene.audited[2] = 0.09;
  EXPECT_EQ(scene.Chosen(), "q4 wire") << "measured, and inside";
  scene.audited[2] = 0.15;
  EXPECT_EQ(scene.Chosen(), "q8 audit") << "one rung towards bf16";
  scene.input.max_ppl_increase = 0.2;
  EXPECT_EQ(scene.Chosen(), "q4 wire") << "within this request's budget";
  scene.input.requested_profile = "q4";
  scene.input.max_ppl_increase = 0.1;
  EXPECT_EQ(scene.Chosen(), "q4 requested");
  scene.input.requested_profile.reset();
  scene.audited[1] = 5;
  EXPECT_EQ(scene.Chosen(), "bf16 audit");
  scene.links = {std::nullopt};
  EXPECT_EQ(scene.Chosen(), "bf16 audit") << "without measured links too";
}

}  // namespace
}  // namespace zeroc
