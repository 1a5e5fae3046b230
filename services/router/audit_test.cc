#include "services/router/audit.h"

#include <gtest/gtest.h>

#include <cmath>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "services/router/audit_runner.h"
#include "services/router/test_flow.h"

namespace zeroc {
namespace {

using std::chrono::milliseconds;

v1::TokenLogprobs Distribution(std::uint32_t token, const std::vector<std::pair<std::uint32_t, double>>& top) {
  v1::TokenLogprobs logprobs;
  logprobs.set_token_id(token);
  for (const auto& [id, p] : top) {
    if (id == token) logprobs.set_logprob(static_cast<float>(std::log(p)));
    v1::TopLogprob* one = logprobs.add_top();
    one->set_token_id(id);
    one->set_logprob(static_cast<float>(std::log(p)));
  }
  return logprobs;
}

TEST(GroupedKl, IsTheDivergenceOfWhatBothListsShow) {
  const auto p = Distribution(1, {{1, 0.5}, {2, 0.3}, {3, 0.2}});
  const auto q = Distribution(1, {{1, 0.25}, {2, 0.25}, {3, 0.5}});
  EXPECT_NEAR(GroupedKl(p, p), 0, 1e-6);
  EXPECT_NEAR(GroupedKl(p, q), 0.5 * std::log(2.0) + 0.3 * std::log(1.2) + 0.2 * std::log(0.4), 1e-5);
}

TEST(GroupedKl, GroupingNeverMakesItLarger) {
  const std::vector<std::pair<std::uint32_t, double>> p{{1, 0.4}, {2, 0.3}, {3, 0.2}, {4, 0.1}};
  const std::vector<std::pair<std::uint32_t, double>> q{{1, 0.1}, {2, 0.2}, {3, 0.3}, {4, 0.4}};
  const double whole = GroupedKl(Distribution(1, p), Distribution(1, q));
  const double grouped = GroupedKl(Distribution(1, {p[0], p[1]}), Distribution(1, {q[3], q[2], q[0]}));
  EXPECT_LT(grouped, whole);
  EXPECT_GT(grouped, 0);
}

TEST(GroupedKl, ForeignFiguresGiveNoNonsense) {
  v1::TokenLogprobs broken;
  broken.set_logprob(std::nanf(""));
  EXPECT_EQ(GroupedKl(broken, broken), 0);
  const auto more_than_one = Distribution(1, {{1, 0.9}, {2, 0.9}});
  EXPECT_GE(GroupedKl(more_than_one, Distribution(1, {{1, 0.5}})), 0);
}

class AuditTest : public testing::Test {
 protected:
  static Audit::Config MakeConfig(double share = 1) {
    Audit::Config config;
    config.share = share;
    config.window_tokens = 2'000;
    config.tokens_min = 500;
    config.pending_max = 3;
    config.tokens_max = 100;
    return config;
  }
  static Audit::Sample Served(const std::string& profile, std::size_t n_prompt = 10) {
    return {std::vector<std::uint32_t>(n_prompt, 1), {1, 2, 3}, profile};
  }
  // Positions whose mean KL gives the increase, half above and half below.
  static std::vector<double> KlFor(double increase, std::size_t n) {
    std::vector<double> kl(n, std::log1p(increase / 10));
    for (std::size_t i = 0; i < n; ++i) kl[i] *= i % 2 == 0 ? 0.5 : 1.5;
    return kl;
  }
  std::vector<Rung> ladder_ = TestModel().ladder;  // q4 promises 0.05, q2 3.0
  Audit audit_{MakeConfig(), ladder_, /*ppl_base=*/10, 1};
};

TEST_F(AuditTest, SamplesTheShareAndBoundsWhatWaits) {
  EXPECT_FALSE(audit_.Take().has_value());
  for (int i = 0; i < 5; ++i) audit_.Offer(Served("q4"));
  for (int i = 0; i < 3; ++i) EXPECT_EQ(audit_.Take()->profile, "q4");
  EXPECT_FALSE(audit_.Take().has_value());
  audit_.Offer(Served("q4", 98));  // too long
  audit_.Offer({{1}, {2}, "q4"});  // one token says nothing
  audit_.Offer(Served("bf16"));    // nothing to compare
  EXPECT_FALSE(audit_.Take().has_value());

  Audit none(MakeConfig(0), ladder_, 10, 1);
  none.Offer(Served("q4"));
  EXPECT_FALSE(none.Take().has_value());
  Audit some(MakeConfig(0.25), ladder_, 10, 1);
  int n = 0;
  for (int i = 0; i < 1000; ++i) {
    some.Offer(Served("q4"));
    if (some.Take().has_value()) ++n;
  }
  EXPECT_NEAR(n, 250, 60);
}

TEST_F(AuditTest, APromiseThatHoldsStands) {
  audit_.Add("q4", KlFor(0.04, 1000));
  EXPECT_NEAR(audit_.Of("q4")->increase, 0.04, 1e-3);
  EXPECT_LT(audit_.Of("q4")->low, 0.04);
  EXPECT_GT(audit_.Of("q4")->high, 0.04);
  EXPECT_EQ(audit_.Of("q4")->n_tokens, 1000U);
  EXPECT_FALSE(audit_.Excess()[1].has_value());
  EXPECT_FALSE(audit_.Of("q2").has_value());
}

TEST_F(AuditTest, FewTokensProveNothing) {
  audit_.Add("q4", KlFor(0.5, 499));
  EXPECT_FALSE(audit_.Excess()[1].has_value());
  audit_.Add("q4", KlFor(0.5, 1));
  EXPECT_TRUE(audit_.Excess()[1].has_value());
}

TEST_F(AuditTest, AMeasuredIncreaseReplacesABrokenPromiseUntilItHoldsAgain) {
  audit_.Add("q4", KlFor(0.051, 1000));
  EXPECT_FALSE(audit_.Excess()[1].has_value()) << "above, but not surely";
  audit_.Add("q4", KlFor(0.2, 1000));
  ASSERT_TRUE(audit_.Excess()[1].has_value());
  EXPECT_GT(*audit_.Excess()[1], 0.1);
  EXPECT_FALSE(audit_.Excess()[0].has_value() || audit_.Excess()[2].has_value());
  audit_.Add("q4", KlFor(0.051, 2000));
  ASSERT_TRUE(audit_.Excess()[1].has_value()) << "no longer sure, but not back at the promise either";
  EXPECT_NEAR(*audit_.Excess()[1], 0.051, 1e-3);
  audit_.Add("q4", KlFor(0.045, 2000));
  EXPECT_FALSE(audit_.Excess()[1].has_value());
}

TEST_F(AuditTest, AProfileThatIsRuledOutIsStillAudited) {
  audit_.Add("q4", KlFor(0.5, 1000));
  for (int i = 0; i < 2; ++i) audit_.Offer(Served("bf16"));
  EXPECT_EQ(audit_.Take()->profile, "q4") << "or it could never come back";
  for (int i = 0; i < 2; ++i) audit_.Offer(Served("q2"));
  std::set<std::string> taken;
  while (const auto sample = audit_.Take()) taken.insert(sample->profile);
  EXPECT_EQ(taken, (std::set<std::string>{"q2", "q4"}));
}

// --- the work: two scores through the router ---

class AuditRunnerTest : public RequestFlowTest {
 protected:
  AuditRunnerTest() {
    AuditRunner::Config config;
    config.poll = milliseconds(5);
    runner_ = std::make_shared<AuditRunner>(config, router_, audited_, timers_, metrics_);
  }
  ~AuditRunnerTest() override { runner_->Stop(); }
  // Answers the score that the runner asks for: `p` is the share of every forced token.
  void ServeScore(std::size_t n_before, const std::string& profile, double p) {
    ASSERT_TRUE(WaitFor([&] { return decode_->n_reserves > n_before; }));
    EXPECT_EQ(decode_->reserves.back().profile(), profile);
    decode_->Grant(7);
    const v1::SamplingParams& sampling = decode_->decodes.back().sampling();
    ASSERT_EQ(sampling.forced_ids_size(), 2);
    EXPECT_EQ(sampling.logprobs(), 20U);
    v1::PrefillEvent first;
    first.mutable_first_token()->set_id(sampling.forced_ids(0));
    *first.mutable_first_token()->mutable_logprobs() =
        Distribution(sampling.forced_ids(0), {{sampling.forced_ids(0), p}});
    prefill_->prefill_event(first);
    decode_->Admit();
    v1::DecodeEvent second;
    second.mutable_tokens()->add_ids(sampling.forced_ids(1));
    *second.mutable_tokens()->add_logprobs() = Distribution(sampling.forced_ids(1), {{sampling.forced_ids(1), p}});
    decode_->decode_event(second);
    decode_->Final(v1::FINISH_REASON_LENGTH);
    prefill_->Transferred();
  }

  static Audit::Config EveryOne() {
    Audit::Config config;
    config.share = 1;
    return config;
  }
  Audit audited_{EveryOne(), model_.ladder, model_.ppl_base, 1};
  std::shared_ptr<AuditRunner> runner_;
};

TEST_F(AuditRunnerTest, ScoresTheAnswerTwiceAndComparesThem) {
  audited_.Offer({{5, 6, 7}, {8, 9}, "q4"});
  runner_->Start();
  ServeScore(0, "bf16", 0.5);
  EXPECT_LT(decode_->reserves.back().priority(), -1'000'000) << "last in line";
  EXPECT_EQ(decode_->reserves.back().n_prompt_tokens(), 3U);
  ServeScore(1, "q4", 0.25);
  ASSERT_TRUE(WaitFor([&] { return audited_.Of("q4").has_value(); }));
  const double kl = 0.5 * std::log(2.0) + 0.5 * std::log(0.5 / 0.75);
  EXPECT_NEAR(audited_.Of("q4")->increase, 10 * std::expm1(kl), 1e-3);
  EXPECT_EQ(audited_.Of("q4")->n_tokens, 2U);
  ASSERT_TRUE(
      WaitFor([&] { return metrics_.Render().find("zeroc_ppl_increase{kind=\"audited\"}") != std::string::npos; }));
  const std::string page = metrics_.Render();
  EXPECT_EQ(page.find("vllm:request_success_total"), std::string::npos) << "no client was served";
  EXPECT_EQ(page.find("zeroc_policy_decisions_total"), std::string::npos);
}

TEST_F(AuditRunnerTest, WaitsUntilHardlyAnythingRuns) {
  std::vector<std::shared_ptr<RequestFlow>> flows;
  for (int i = 0; i < 2; ++i) {
    flows.push_back(router_.Generate(TestRequest("x", 5), std::nullopt, std::make_shared<RecordingSink>()));
    decode_->Grant(7);
  }
  audited_.Offer({{5, 6, 7}, {8, 9}, "q4"});
  runner_->Start();
  std::this_thread::sleep_for(milliseconds(40));
  EXPECT_EQ(decode_->n_reserves, 2U);
  for (const auto& flow : flows) flow->Cancel(Cancelled("enough"));
  ServeScore(2, "bf16", 0.5);
}

TEST_F(AuditRunnerTest, AFailureDropsTheSampleAndStopCancels) {
  audited_.Offer({{5, 6, 7}, {8, 9}, "q4"});
  audited_.Offer({{5, 6, 7}, {8, 9}, "q2"});
  runner_->Start();
  ASSERT_TRUE(WaitFor([&] { return decode_->n_reserves == 1; }));
  decode_->Refuse(FailedPrecondition("another layout"));
  ASSERT_TRUE(WaitFor([&] { return decode_->n_reserves == 2; })) << "the next sample";
  decode_->Grant(7);
  runner_->Stop();
  EXPECT_TRUE(WaitFor([&] { return router_.in_flight() == 0; }));
  EXPECT_FALSE(audited_.Of("q4").has_value() || audited_.Of("q2").has_value());
}

}  // namespace
}  // namespace zeroc
