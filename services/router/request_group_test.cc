// Which prompts the router gives to all ranks of a prefill group.
#include <gtest/gtest.h>

#include "services/router/test_flow.h"

namespace zeroc {
namespace {

FlowConfig GroupConfig() {
  FlowConfig config;
  config.limits.vocab_size = 300;
  config.limits.max_positions = 1000;
  config.retry_delay = std::chrono::milliseconds(20);
  config.sp_min_tokens = 6;
  return config;
}

class RequestGroupTest : public RequestFlowTest {
 protected:
  RequestGroupTest() : RequestFlowTest(GroupConfig()) {
    v1::WorkerInfo info;
    info.set_role(v1::WORKER_ROLE_PREFILL);
    info.set_name("p");  // in the place of the worker without a group
    v1::WorkerLoad load;
    load.set_sp_ranks(3);
    pool_.Add(info, load, leader_, WorkerPool::Time::clock::now());
    workers_.push_back(leader_);
  }
  // Serves a long prompt.
  std::uint32_t RanksOfOne() {
    sink_->Clear();
    Start(TestRequest("prompt", 3));
    decode_->Grant(7);
    leader_->FirstToken('a');
    v1::PrefillEvent event;
    event.mutable_done()->set_prefill_seconds(leader_prefill_seconds_);
    event.mutable_done()->set_wire_seconds(0.001);
    event.mutable_done()->mutable_kv_bytes()->set_wire(1000);
    leader_->prefill_event(event);
    leader_->EndPrefill(OkStatus());
    decode_->Admit();
    decode_->Tokens("bc");
    decode_->Final(v1::FINISH_REASON_LENGTH);
    decode_->EndDecode();
    return leader_->prefills.back().sp_ranks();
  }

  double leader_prefill_seconds_ = 0.1;
  std::shared_ptr<ScriptedWorker> leader_ = std::make_shared<ScriptedWorker>();
};

TEST_F(RequestGroupTest, LongPromptsTakeAllRanks) {
  Start(TestRequest("prompt", 3));
  decode_->Grant(7);
  ASSERT_EQ(leader_->prefills.size(), 1U);
  EXPECT_EQ(leader_->prefills[0].sp_ranks(), 3U);
  leader_->FirstToken('a');
  leader_->Transferred();
  decode_->Admit();
  decode_->Tokens("bc");
  decode_->Final(v1::FINISH_REASON_LENGTH);
  EXPECT_EQ(sink_->final.stats().sp_ranks(), 3U);
}

TEST_F(RequestGroupTest, ShortPromptsTakeOne) {
  Start(TestRequest("short", 3));
  decode_->Grant(7);
  ASSERT_EQ(leader_->prefills.size(), 1U);
  EXPECT_EQ(leader_->prefills[0].sp_ranks(), 1U);
}

TEST_F(RequestGroupTest, APromptThatTheGroupFailedGoesOnWithOneRank) {
  Start(TestRequest("prompt", 3));
  decode_->Grant(7);
  ASSERT_EQ(leader_->prefills.size(), 1U);
  leader_->EndPrefill(Unavailable("follower 127.0.0.1:1 is lost"));
  ASSERT_TRUE(WaitFor([&] { return decode_->reserves.size() == 2; }));
  decode_->Grant(8);
  ASSERT_EQ(leader_->prefills.size(), 2U);
  EXPECT_EQ(leader_->prefills[1].sp_ranks(), 1U);
}

TEST_F(RequestGroupTest, AGroupThatWasMeasuredToBeSlowerIsLeftAlone) {
  for (int i = 0; i < Estimates::kPointsMin; ++i) {
    estimates_.AddTransfer({"p", "d", 1000, 1.0, 1 << 20, 0.001, 0, 1});
    estimates_.AddTransfer({"p", "d", 1000, 0.5, 1 << 20, 0.001, 0, 3});
  }
  EXPECT_EQ(RanksOfOne(), 3U);
  for (int i = 0; i < 40; ++i) estimates_.AddTransfer({"p", "d", 1000, 5.0, 1 << 20, 0.001, 0, 3});
  EXPECT_EQ(RanksOfOne(), 1U);
}

TEST_F(RequestGroupTest, WhatAGroupTookIsLearntAsTheGroups) {
  leader_prefill_seconds_ = 0.3;
  for (int i = 0; i < Estimates::kPointsMin; ++i) EXPECT_EQ(RanksOfOne(), 3U);
  EXPECT_NEAR(estimates_.PrefillSeconds("p", 3)->At(6), 0.3, 1e-9);
  EXPECT_NEAR(estimates_.PrefillSeconds("p", 1)->At(2), 0.3, 1e-9) << "a third of the prompt was a rank's";
}

}  // namespace
}  // namespace zeroc
