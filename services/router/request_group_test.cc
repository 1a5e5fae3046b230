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

}  // namespace
}  // namespace zeroc
