// Full decode workers: who waits, who goes first, and how long. Prompts that decode prefills itself.
#include <gtest/gtest.h>

#include "services/router/test_flow.h"

namespace zeroc {
namespace {

using std::chrono::milliseconds;

class RequestQueueTest : public RequestFlowTest {
 protected:
  using RequestFlowTest::RequestFlowTest;
  struct Client {
    std::shared_ptr<RecordingSink> sink = std::make_shared<RecordingSink>();
    std::shared_ptr<RequestFlow> flow;
  };
  Client Ask(const std::string& id, int priority = 0, std::uint32_t max_tokens = 2) {
    Client client;
    v1::GenerateRequest request = TestRequest("x", max_tokens);
    request.set_request_id(id);
    request.set_priority(priority);
    client.flow = router_.Generate(std::move(request), std::nullopt, client.sink);
    return client;
  }
  // The worker's next Reserve comes from `id`.
  bool NextIs(const std::string& id) {
    const std::size_t n = n_seen_++;
    return WaitFor([&] { return decode_->n_reserves > n; }) && decode_->reserves[n].request_id() == id;
  }

  std::size_t n_seen_ = 0;
};

TEST_F(RequestQueueTest, AFullWorkerIsAskedAgainUntilItHasRoom) {
  Client client = Ask("a");
  ASSERT_TRUE(NextIs("a"));
  decode_->Refuse(ResourceExhausted("full"));
  EXPECT_EQ(client.sink->ends, 0);
  EXPECT_EQ(queue_->n_waiting(), 1U);
  ASSERT_TRUE(NextIs("a"));
  decode_->Grant(7);
  EXPECT_EQ(client.sink->events, "started ");
  EXPECT_EQ(queue_->n_waiting(), 0U);
  prefill_->FirstToken('a');
  prefill_->Transferred();
  decode_->Admit();
  decode_->Tokens("b");
  decode_->Final(v1::FINISH_REASON_LENGTH);
  const v1::RequestStats& stats = client.sink->final.stats();
  EXPECT_GT(stats.phases().queue(), 0.01) << "waiting is the queue's phase";
  EXPECT_LT(stats.phases().reserve(), stats.phases().queue());
  EXPECT_EQ(stats.attempts(), 1U) << "waiting is no retry";
}

class ShortPatienceTest : public RequestQueueTest {
 protected:
  ShortPatienceTest() : RequestQueueTest(Impatient(MakeConfig())) {}
  static FlowConfig Impatient(FlowConfig config) {
    config.queue_timeout = milliseconds(300);
    return config;
  }
};

TEST_F(ShortPatienceTest, WaitingEndsWithAnErrorThatSaysWhy) {
  Client client = Ask("a");
  decode_->Refuse(ResourceExhausted("no blocks"));
  for (int i = 0; i < 1000 && router_.in_flight() > 0; ++i) {
    if (decode_->n_reserves > ++n_seen_) {
      decode_->Refuse(ResourceExhausted("no blocks"));
    } else {
      --n_seen_;
      std::this_thread::sleep_for(milliseconds(2));
    }
  }
  EXPECT_EQ(client.sink->error.code(), StatusCode::kResourceExhausted);
  EXPECT_EQ(client.sink->error.message(),
            "no decode worker had room within 300 ms: decode worker d in phase reserve: no blocks");
  EXPECT_EQ(client.sink->ends, 1);
  EXPECT_GE(decode_->reserves.size(), 2U) << "it was asked again";
  EXPECT_EQ(queue_->n_waiting(), 0U);
}

TEST_F(RequestQueueTest, HigherPrioritiesGoFirst) {
  Client low = Ask("low");
  ASSERT_TRUE(NextIs("low"));
  decode_->Refuse(ResourceExhausted("full"));
  Client high = Ask("high", 3);
  ASSERT_TRUE(NextIs("high"));
  EXPECT_EQ(decode_->reserves.back().priority(), 3) << "the workers order by it too";
  decode_->Refuse(ResourceExhausted("full"));
  ASSERT_TRUE(NextIs("high"));
  decode_->Grant(7);
  ASSERT_TRUE(NextIs("low"));
  decode_->Grant(8);
  EXPECT_EQ(low.sink->events + high.sink->events, "started started ");
  router_.CancelAll(Cancelled("the test is over"));
}

TEST_F(RequestQueueTest, ALargeRequestDoesNotHoldUpASmallOne) {
  Client large = Ask("large", 0, 900);
  ASSERT_TRUE(NextIs("large"));
  decode_->Refuse(ResourceExhausted("full"));
  Client small = Ask("small");
  ASSERT_TRUE(NextIs("small"));
  decode_->Grant(7);
  EXPECT_EQ(small.sink->events, "started ");
  EXPECT_EQ(large.sink->ends, 0);
  router_.CancelAll(Cancelled("the test is over"));
}

TEST_F(RequestQueueTest, WhatNobodyCanEverHoldIsRefusedAtOnce) {
  const auto larger = std::make_shared<ScriptedWorker>();
  AddWorker(v1::WORKER_ROLE_DECODE, "d2", larger, 50);
  const Status never(StatusCode::kOutOfRange, "9 bytes, more than this worker's 8");
  Client client = Ask("a");
  decode_->Refuse(never);
  ASSERT_EQ(larger->reserves.size(), 1U) << "another worker may be larger";
  larger->Refuse(never);
  EXPECT_EQ(client.sink->error.ToString(),
            "OUT_OF_RANGE: decode worker d2 in phase reserve: no decode worker can ever hold it as profile " +
                larger->reserves[0].profile() + ": 9 bytes, more than this worker's 8");
  EXPECT_EQ(queue_->n_waiting(), 0U);
  EXPECT_EQ(router_.in_flight(), 0U);
}

TEST_F(RequestQueueTest, AWorkerThatIsTooSmallDoesNotEndTheWaitForAFullOne) {
  const auto larger = std::make_shared<ScriptedWorker>();
  AddWorker(v1::WORKER_ROLE_DECODE, "d2", larger, 200);
  Client client = Ask("a");
  for (std::size_t round = 1; round < 4; ++round) {
    ASSERT_TRUE(WaitFor([&] { return larger->n_reserves == round; }));
    larger->Refuse(ResourceExhausted("full"));
    ASSERT_TRUE(WaitFor([&] { return decode_->n_reserves == round; }));
    decode_->Refuse(Status(StatusCode::kOutOfRange, "too small"));
    EXPECT_EQ(client.sink->ends, 0) << client.sink->error.ToString();
  }
  ASSERT_TRUE(WaitFor([&] { return larger->n_reserves == 4; }));
  larger->Grant(7);
  EXPECT_EQ(client.sink->events, "started ");
  EXPECT_EQ(metrics_.Render().find("zeroc_retries_total{"), std::string::npos) << "waiting is no retry";
  router_.CancelAll(Cancelled("the test is over"));
}

TEST_F(RequestQueueTest, AWorkerThatIsLostDoesNotEndTheWaitForAFullOne) {
  const auto larger = std::make_shared<ScriptedWorker>();
  AddWorker(v1::WORKER_ROLE_DECODE, "d2", larger, 200);
  Client client = Ask("a");
  for (std::size_t round = 1; round < 6; ++round) {  // more than retries_max
    ASSERT_TRUE(WaitFor([&] { return larger->n_reserves == round; }));
    larger->Refuse(ResourceExhausted("full"));
    ASSERT_TRUE(WaitFor([&] { return decode_->n_reserves == round; }));
    decode_->Refuse(Unavailable("no connection"));
    EXPECT_EQ(client.sink->ends, 0) << client.sink->error.ToString();
  }
  ASSERT_TRUE(WaitFor([&] { return larger->n_reserves == 6; }));
  larger->Grant(7);
  EXPECT_EQ(client.sink->events, "started ");
  router_.CancelAll(Cancelled("the test is over"));
}

class NobodysTurnTest : public RequestQueueTest {
 protected:
  NobodysTurnTest() : RequestQueueTest(MakeConfig(), std::chrono::hours(1)) {}
};

TEST_F(NobodysTurnTest, TooManyWaitingAreRefusedAtOnce) {
  std::vector<Client> clients;
  for (const char* id : {"a", "b", "c"}) {
    clients.push_back(Ask(id));
    while (!decode_->reserve_done.empty()) decode_->Refuse(ResourceExhausted("full"));
  }
  EXPECT_EQ(clients[2].sink->error.code(), StatusCode::kResourceExhausted);
  EXPECT_NE(clients[2].sink->error.message().find("2 requests wait already"), std::string_view::npos)
      << clients[2].sink->error.ToString();
  EXPECT_EQ(clients[0].sink->ends + clients[1].sink->ends, 0);
  router_.CancelAll(Cancelled("the test is over"));
  EXPECT_EQ(queue_->n_waiting(), 0U);
}

TEST_F(RequestQueueTest, CancelWhileWaiting) {
  Client client = Ask("a");
  decode_->Refuse(ResourceExhausted("full"));
  client.flow->Cancel(Cancelled("the client has gone"));
  EXPECT_EQ(client.sink->error.message(), "in phase queue: the client has gone");
  if (!decode_->reserve_done.empty()) decode_->Grant(7);  // its turn had just come
  EXPECT_TRUE(router_.WaitIdle(milliseconds(1000)));
  EXPECT_EQ(queue_->n_waiting(), 0U);
}

// --- local prefill ---

FlowConfig LocalConfig(FlowConfig config) {
  config.local_prefill_tokens = 4;
  return config;
}

class LocalPrefillTest : public RequestFlowTest {
 protected:
  LocalPrefillTest() : RequestFlowTest(LocalConfig(MakeConfig())) {}
  void DecodeFirstToken(char c) {
    v1::DecodeEvent event;
    event.mutable_first_token()->set_id(static_cast<unsigned char>(c));
    event.mutable_first_token()->set_prefill_seconds(0);
    decode_->decode_event(event);
  }
};

TEST_F(LocalPrefillTest, ShortPromptsStayOnTheDecodeWorker) {
  Start(TestRequest("abcd", 3));
  decode_->Grant(7);
  EXPECT_TRUE(prefill_->prefills.empty());
  ASSERT_EQ(decode_->decodes.size(), 1U);
  EXPECT_TRUE(decode_->decodes[0].local_prefill());
  EXPECT_EQ(decode_->decodes[0].prompt_ids_size(), 4);
  DecodeFirstToken('x');
  EXPECT_EQ(sink_->text, "x");
  v1::DecodeEvent admitted;
  admitted.mutable_admitted()->mutable_kv_bytes()->set_raw(1000);
  admitted.mutable_admitted()->mutable_kv_bytes()->set_packed(300);
  decode_->decode_event(admitted);
  decode_->Tokens("yz");
  decode_->Final(v1::FINISH_REASON_LENGTH);
  EXPECT_EQ(sink_->text, "xyz");
  EXPECT_EQ(sink_->started.reason(), "local_prefill");
  const v1::RequestStats& stats = sink_->final.stats();
  EXPECT_EQ(stats.prefill_worker(), "d");
  EXPECT_EQ(stats.transport(), "none: prefilled by decode");
  EXPECT_EQ(stats.kv_bytes().raw(), 1000U);
  EXPECT_EQ(stats.kv_bytes().packed(), 300U);
  EXPECT_EQ(stats.kv_bytes().wire(), 0U);
  ExpectClean(0);
}

TEST_F(LocalPrefillTest, LongPromptsTravel) {
  Start(TestRequest("abcde", 1));
  decode_->Grant(7);
  EXPECT_EQ(prefill_->prefills.size(), 1U);
  EXPECT_FALSE(decode_->decodes.at(0).local_prefill());
  DecodeFirstToken('x');
  EXPECT_EQ(sink_->error.code(), StatusCode::kInternal);
  ExpectClean(1);
}

TEST_F(LocalPrefillTest, WithoutPrefillWorkersEverythingIsLocal) {
  pool_.Expire(WorkerPool::Time::clock::now() + std::chrono::hours(1));
  EXPECT_FALSE(router_.Ready().ok());
  AddWorker(v1::WORKER_ROLE_DECODE, "d", decode_, 100);
  EXPECT_TRUE(router_.Ready().ok());
  Start(TestRequest(std::string(300, 'x'), 1));
  decode_->Grant(7);
  EXPECT_TRUE(decode_->decodes.at(0).local_prefill());
  DecodeFirstToken('a');
  EXPECT_EQ(sink_->final.finish_reason(), v1::FINISH_REASON_LENGTH);
  ExpectClean(1);
}

TEST_F(LocalPrefillTest, AnOverloadedPoolLeavesModeratePromptsToDecode) {
  for (int i = 0; i < 3; ++i) estimates_.AddTransfer({"p", "d", 100, 1.0, 0, 0, 0});  // 10 ms a token
  v1::WorkerLoad busy;
  busy.set_waiting_tokens(101);
  v1::WorkerInfo info;
  info.set_role(v1::WORKER_ROLE_PREFILL);
  info.set_name("p");
  pool_.Add(info, busy, prefill_, WorkerPool::Time::clock::now());
  Start(TestRequest(std::string(64, 'x'), 1));
  decode_->Grant(7);
  EXPECT_TRUE(decode_->decodes.at(0).local_prefill()) << "1.01 s of waiting";
  DecodeFirstToken('a');
  Start(TestRequest(std::string(65, 'x'), 1));
  decode_->Grant(7);
  EXPECT_FALSE(decode_->decodes.at(1).local_prefill()) << "too long for decode";
}

TEST_F(LocalPrefillTest, ALostWorkerIsDecodesLoss) {
  const auto other = std::make_shared<ScriptedWorker>();
  AddWorker(v1::WORKER_ROLE_DECODE, "d2", other, 50);
  Start(TestRequest("ab", 3));
  decode_->Grant(7);
  DecodeFirstToken('x');
  decode_->EndDecode(Unavailable("connection reset"));
  ASSERT_EQ(other->reserves.size(), 1U);
  other->Grant(8);
  EXPECT_TRUE(other->decodes.at(0).local_prefill());
  EXPECT_EQ(other->decodes[0].n_streamed(), 1U);
  EXPECT_EQ(other->decodes[0].prompt_ids_size(), 3);
  EXPECT_TRUE(prefill_->prefills.empty());
}

// --- what the flow learns, and does with it ---

class LearningTest : public RequestFlowTest {
 protected:
  std::string ServeOne() {
    sink_->Clear();
    Start(TestRequest(std::string(500, 'x'), 3));
    decode_->Grant(7);
    prefill_->FirstToken('a');
    v1::PrefillEvent event;
    event.mutable_done()->set_prefill_seconds(0.1);
    event.mutable_done()->set_wire_seconds(wire_seconds_);
    event.mutable_done()->mutable_kv_bytes()->set_raw(500'000);
    event.mutable_done()->mutable_kv_bytes()->set_wire(140'000);
    prefill_->prefill_event(event);
    decode_->Admit();
    decode_->Tokens("bc");
    v1::DecodeEvent final;
    final.mutable_final()->set_finish_reason(v1::FINISH_REASON_LENGTH);
    final.mutable_final()->set_decode_seconds(0.02);
    decode_->decode_event(final);
    decode_->EndDecode();
    return sink_->started.profile() + " " + sink_->started.reason();
  }
  double wire_seconds_ = 0;
};

TEST_F(LearningTest, AfterAFewTransfersTheLinkDecides) {
  wire_seconds_ = 0.0001;
  for (int i = 0; i < Estimates::kPointsMin; ++i) EXPECT_EQ(ServeOne(), "q4 budget");
  EXPECT_EQ(ServeOne(), "bf16 link_fast");
  wire_seconds_ = 10;
  for (int i = 0; i < 20; ++i) ServeOne();
  EXPECT_EQ(ServeOne(), "q4 wire");
  const std::string page = metrics_.Render();
  EXPECT_NE(page.find("zeroc_policy_decisions_total{profile=\"bf16\",reason=\"link_fast\"}"), std::string::npos);
  EXPECT_NE(page.find("zeroc_policy_decisions_total{profile=\"q4\",reason=\"wire\"}"), std::string::npos);
  EXPECT_NEAR(estimates_.TokenSeconds("d")->At(0), 0.01, 1e-9);
  EXPECT_NEAR(estimates_.ExpectedOutput(100), 3, 1e-9);
}

}  // namespace
}  // namespace zeroc
