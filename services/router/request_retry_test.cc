// Workers that fail or are lost while they serve a request: where the flow goes on, and what the client sees of it.
#include <gtest/gtest.h>

#include "services/router/test_flow.h"

namespace zeroc {
namespace {

using std::chrono::milliseconds;

class RequestRetryTest : public RequestFlowTest {
 protected:
  explicit RequestRetryTest(FlowConfig config = MakeConfig()) : RequestFlowTest(config) {}
  void AddSecondWorkers() {
    AddWorker(v1::WORKER_ROLE_PREFILL, "p2", prefill2_, 0);
    AddWorker(v1::WORKER_ROLE_DECODE, "d2", decode2_, 50);
  }
  // "p" and "d" have given "ab" and decode runs.
  void RunToMidStream(const v1::GenerateRequest& request) {
    Start(request);
    decode_->Grant(7);
    prefill_->FirstToken('a');
    prefill_->Transferred();
    prefill_->EndPrefill();
    decode_->Admit();
    decode_->Tokens("b");
  }
  double Retries(const std::string& stage) {
    const std::string page = metrics_.Render();
    const std::string name = "zeroc_retries_total{stage=\"" + stage + "\"} ";
    const std::size_t at = page.find(name);
    return at == std::string::npos ? 0 : std::stod(page.substr(at + name.size()));
  }

  std::shared_ptr<ScriptedWorker> prefill2_ = std::make_shared<ScriptedWorker>();
  std::shared_ptr<ScriptedWorker> decode2_ = std::make_shared<ScriptedWorker>();
};

TEST_F(RequestRetryTest, AnotherPrefillWorkerTakesALostPrompt) {
  AddSecondWorkers();
  Start(TestRequest("prompt", 3));
  decode_->Grant(7);
  prefill_->EndPrefill(Unavailable("connection reset"));
  ASSERT_EQ(decode_->releases.size(), 1U) << "every attempt has its own lease";
  EXPECT_EQ(decode_->releases[0].lease_id(), 7U);
  EXPECT_EQ(decode_->decode_call->cancels, 1);
  ASSERT_EQ(decode2_->reserves.size(), 1U) << "the hand-off failed: neither side is the first choice again";
  EXPECT_EQ(decode2_->reserves[0].attempt(), 2U);
  EXPECT_EQ(decode2_->reserves[0].n_prompt_tokens(), 6U);
  decode2_->Grant(8);
  ASSERT_EQ(prefill2_->prefills.size(), 1U);
  EXPECT_EQ(prefill2_->prefills[0].n_streamed(), 0U);
  EXPECT_EQ(prefill2_->prefills[0].lease().lease_id(), 8U);
  EXPECT_EQ(prefill2_->prefills[0].sampling().seed(), prefill_->prefills[0].sampling().seed());
  prefill2_->FirstToken('a');
  prefill2_->Transferred();
  decode2_->Admit();
  decode2_->Tokens("bc");
  decode2_->Final(v1::FINISH_REASON_LENGTH);
  EXPECT_EQ(sink_->events, "started delta delta final ") << "started is said once";
  EXPECT_EQ(sink_->text, "abc");
  EXPECT_EQ(sink_->final.stats().attempts(), 2U);
  EXPECT_EQ(sink_->final.stats().prefill_worker(), "p2");
  EXPECT_EQ(sink_->final.stats().decode_worker(), "d2");
  EXPECT_EQ(Retries("prefill"), 1);
  EXPECT_TRUE(decode2_->releases.empty());
  EXPECT_EQ(router_.in_flight(), 0U);
}

TEST_F(RequestRetryTest, AStreamGoesOnBehindItsLastTokenWhenDecodeIsLost) {
  AddSecondWorkers();
  v1::GenerateRequest request = TestRequest("prompt", 5);
  request.mutable_sampling()->set_seed(42);
  RunToMidStream(request);
  const OnEvent<v1::DecodeEvent> lost_decode = decode_->decode_event;
  decode_->EndDecode(Unavailable("connection reset"));
  EXPECT_EQ(Retries("decode"), 1);
  ASSERT_EQ(decode2_->reserves.size(), 1U);
  EXPECT_EQ(decode2_->reserves[0].n_prompt_tokens(), 8U) << "the prompt and what is out";
  EXPECT_EQ(decode2_->reserves[0].max_tokens(), 3U);
  decode2_->Grant(8);
  ASSERT_EQ(prefill_->prefills.size(), 2U) << "prefill had done its part: it may do it again";
  const v1::PrefillRequest& again = prefill_->prefills[1];
  const std::vector<std::uint32_t> expected{'p', 'r', 'o', 'm', 'p', 't', 'a', 'b'};
  EXPECT_TRUE(std::equal(expected.begin(), expected.end(), again.token_ids().begin(), again.token_ids().end()));
  EXPECT_EQ(again.n_streamed(), 2U);
  EXPECT_EQ(again.sampling().max_tokens(), 3U);
  EXPECT_EQ(again.sampling().seed(), 42U);
  EXPECT_EQ(again.attempt(), 2U);
  const v1::DecodeRequest& decode = decode2_->decodes.at(0);
  EXPECT_EQ(decode.n_streamed(), 2U);
  EXPECT_EQ(decode.n_prompt_tokens(), 8U);
  EXPECT_EQ(decode.prompt_ids_size(), 8) << "the penalties count what was streamed";

  v1::DecodeEvent late;
  late.mutable_tokens()->add_ids('?');
  lost_decode(late);
  prefill_->FirstToken('c');
  prefill_->Transferred();
  decode2_->Admit();
  lost_decode(late);
  decode2_->Tokens("de");
  decode2_->Final(v1::FINISH_REASON_LENGTH);
  EXPECT_EQ(sink_->text, "abcde") << "no gap and nothing twice";
  EXPECT_EQ(sink_->n_tokens, 5);
  EXPECT_EQ(sink_->final.usage().completion_tokens(), 5U);
  EXPECT_EQ(sink_->final.usage().prompt_tokens(), 6U) << "what is prefilled again is no prompt";
  const v1::PhaseSeconds& p = sink_->final.stats().phases();
  EXPECT_NEAR(p.queue() + p.reserve() + p.prefill() + p.wire() + p.admit() + p.decode(),
              sink_->final.stats().jct_seconds(), 1e-9);
  EXPECT_EQ(router_.in_flight(), 0U);
}

TEST_F(RequestRetryTest, StopStringsAndCharactersReachAcrossALostWorker) {
  AddSecondWorkers();
  v1::GenerateRequest request = TestRequest("x", 20);
  request.mutable_sampling()->add_stop("END");
  RunToMidStream(request);
  decode_->Tokens("\xc3");  // half a character
  decode_->Tokens("\xa9 E");
  EXPECT_EQ(sink_->text, "ab\xc3\xa9 ");
  decode_->EndDecode(DataLoss("a block's checksum is wrong"));
  decode2_->Grant(8);
  EXPECT_EQ(prefill_->prefills.at(1).n_streamed(), 6U) << "tokens that are out, their text or not";
  prefill_->FirstToken('N');
  prefill_->Transferred();
  decode2_->Admit();
  decode2_->Tokens("D more");
  EXPECT_EQ(sink_->text, "ab\xc3\xa9 ");
  EXPECT_EQ(sink_->final.finish_reason(), v1::FINISH_REASON_STOP);
  EXPECT_EQ(sink_->final.usage().completion_tokens(), 8U);
  EXPECT_EQ(decode2_->releases.size(), 1U);
}

TEST_F(RequestRetryTest, TheOnlyWorkersAreTriedAgainALittleLater) {
  RunToMidStream(TestRequest("x", 3));
  decode_->EndDecode(Unavailable("connection reset"));
  EXPECT_EQ(decode_->reserves.size(), 1U) << "not at once";
  ASSERT_TRUE(WaitFor([&] { return decode_->n_reserves == 2; }));
  decode_->Grant(8);
  prefill_->FirstToken('c');
  prefill_->Transferred();
  EXPECT_EQ(sink_->final.finish_reason(), v1::FINISH_REASON_LENGTH);
  EXPECT_EQ(sink_->text, "abc");
}

TEST_F(RequestRetryTest, GivesUpAfterRetriesMax) {
  Start(TestRequest("x", 9));
  for (std::size_t i = 1; i <= 3; ++i) {
    ASSERT_TRUE(WaitFor([&] { return decode_->n_reserves == i; })) << i;
    decode_->Grant(7);
    ASSERT_EQ(sink_->ends, 0);
    prefill_->EndPrefill(Unavailable("connection reset"));
  }
  EXPECT_EQ(sink_->error.ToString(), "UNAVAILABLE: prefill worker p in phase prefill: connection reset");
  EXPECT_EQ(sink_->origin, ErrorOrigin::kWorker);
  EXPECT_EQ(Retries("prefill"), 2);
  ExpectClean(3);
  PokeAfterTheEnd();
}

TEST_F(RequestRetryTest, NobodyLeftIsAClearError) {
  RunToMidStream(TestRequest("x", 9));
  pool_.Expire(WorkerPool::Time::clock::now() + std::chrono::hours(1));
  EXPECT_EQ(sink_->error.code(), StatusCode::kUnavailable);
  EXPECT_EQ(sink_->error.message(),
            "decode worker d in phase decode: its heartbeats have stopped; not tried again: no prefill worker is "
            "registered");
  EXPECT_EQ(sink_->origin, ErrorOrigin::kWorker);
  ExpectClean(1);
}

TEST_F(RequestRetryTest, FailuresOfTheRequestItselfAreNotRetried) {
  AddSecondWorkers();
  for (const Status& status : {InvalidArgument("no"), FailedPrecondition("no"), Internal("no"), NotFound("no")}) {
    sink_->Clear();
    decode_->releases.clear();
    Start(TestRequest("x", 9));
    decode_->Grant(7);
    prefill_->EndPrefill(status);
    EXPECT_EQ(sink_->error.code(), status.code());
    ExpectClean(1);
  }
  EXPECT_TRUE(decode2_->reserves.empty());
}

TEST_F(RequestRetryTest, NothingIsTriedAgainWhenTheDeadlineLeavesNoTime) {
  AddSecondWorkers();
  flow_ = router_.Generate(TestRequest("x", 9), std::chrono::system_clock::now() + milliseconds(15), sink_);
  decode_->Grant(7);
  prefill_->EndPrefill(Unavailable("connection reset"));
  EXPECT_TRUE(WaitFor([&] { return router_.in_flight() == 0; }));
  EXPECT_TRUE(decode2_->reserves.empty());
  EXPECT_EQ(sink_->ends, 1);
}

TEST_F(RequestRetryTest, AWorkerLostWhileItReservesGivesALateGrantBack) {
  AddWorker(v1::WORKER_ROLE_PREFILL, "p2", prefill2_, 0);
  Start(TestRequest("x", 1));
  pool_.Expire(WorkerPool::Time::clock::now() + std::chrono::hours(1));  // everybody
  EXPECT_EQ(sink_->error.code(), StatusCode::kUnavailable);
  EXPECT_EQ(router_.in_flight(), 1U) << "until the reservation is answered";
  decode_->Grant(7);
  ExpectClean(1);
}

// A grant that comes when its attempt has been given up and no other has begun.
TEST_F(RequestRetryTest, AGrantThatComesWhileTheNextAttemptWaitsIsGivenBack) {
  const auto now = WorkerPool::Time::clock::now();
  v1::WorkerInfo second;
  second.set_role(v1::WORKER_ROLE_PREFILL);
  second.set_name("p2");
  pool_.Add(second, {}, prefill2_, now - milliseconds(3000));
  AddWorker(v1::WORKER_ROLE_DECODE, "d2", decode2_, 50);
  Start(TestRequest("x", 2));
  decode_->Grant(7);
  prefill_->EndPrefill(Unavailable("connection reset"));
  ASSERT_EQ(decode2_->reserves.size(), 1U);
  pool_.Expire(now + milliseconds(2500));  // "p2"; "p" is the only one left, a little later
  decode2_->Grant(8);
  EXPECT_EQ(decode2_->releases.size(), 1U);
  EXPECT_TRUE(decode2_->decodes.empty());
  ASSERT_TRUE(WaitFor([&] { return decode2_->n_reserves == 2; }));
  decode2_->Grant(9);
  EXPECT_EQ(prefill_->prefills.size(), 2U);
}

TEST_F(RequestRetryTest, ALeaseThatExpiredOrIsForgottenIsReservedAnew) {
  AddSecondWorkers();
  for (const Status& status : {Status(StatusCode::kDeadlineExceeded, "lease 7 expired"), NotFound("no such lease")}) {
    sink_->Clear();
    decode2_->reserves.clear();
    Start(TestRequest("x", 1));
    decode_->Grant(7);
    decode_->EndDecode(status);
    ASSERT_EQ(decode2_->reserves.size(), 1U) << status.ToString();
    EXPECT_EQ(prefill_->prefill_call->cancels, 1);
    decode2_->Grant(8);
    prefill2_->FirstToken('a');
    prefill2_->Transferred();
    EXPECT_EQ(sink_->text, "a");
    EXPECT_EQ(sink_->ends, 1);
  }
}

// Prefill lets go of the lease when its first token is the last one; decode's word of that may come first.
TEST_F(RequestRetryTest, DecodesWordThatPrefillLetGoWaitsForPrefills) {
  AddSecondWorkers();
  const Status let_go = Cancelled("prefill let go of the lease");
  for (const bool last : {true, false}) {
    sink_->Clear();
    Start(TestRequest("x", 2));
    decode_->Grant(7);
    decode_->EndDecode(let_go);
    EXPECT_EQ(prefill_->prefill_call->cancels, 0);
    ASSERT_TRUE(decode2_->reserves.empty());
    prefill_->FirstToken('a', last ? v1::FINISH_REASON_STOP : v1::FINISH_REASON_UNSPECIFIED);
    EXPECT_EQ(sink_->text, "a");
    if (last) {
      prefill_->Transferred();
      EXPECT_EQ(sink_->final.finish_reason(), v1::FINISH_REASON_STOP);
      EXPECT_EQ(sink_->final.stats().attempts(), 1U);
      EXPECT_EQ(router_.in_flight(), 0U);
    }
  }
  ASSERT_EQ(decode2_->reserves.size(), 1U) << "more is to come, and decode has nothing to go on with";
  EXPECT_EQ(decode2_->reserves[0].n_prompt_tokens(), 2U);
  EXPECT_EQ(Retries("decode"), 1);
  decode2_->Grant(8);
}

TEST_F(RequestRetryTest, ItDoesNotWaitForeverNorForADeadWorker) {
  AddSecondWorkers();
  Start(TestRequest("x", 2));
  decode_->Grant(7);
  decode_->EndDecode(Cancelled("prefill let go of the lease"));
  ASSERT_TRUE(WaitFor([&] { return decode2_->n_reserves == 1; })) << "prefill says nothing";
  EXPECT_EQ(prefill_->prefill_call->cancels, 1);
  flow_->Cancel(Cancelled("enough"));
  decode2_->Grant(8);

  sink_->Clear();
  Start(TestRequest("x", 2));
  decode_->Grant(7);
  decode_->EndDecode(Cancelled("prefill let go of the lease"));
  prefill_->EndPrefill(Unavailable("connection reset"));
  EXPECT_EQ(decode2_->n_reserves, 2U) << "at once";
  EXPECT_EQ(Retries("prefill"), 1);
  std::this_thread::sleep_for(milliseconds(80));
  EXPECT_EQ(decode2_->n_reserves, 2U) << "the lost attempt is over";
  decode2_->Grant(9);
}

TEST_F(RequestRetryTest, TokensThatWereNeverShownAreDroppedWithTheirAttempt) {
  AddSecondWorkers();
  Start(TestRequest("x", 3));
  decode_->Grant(7);
  decode_->Tokens("bc");  // before the first token
  prefill_->EndPrefill(Unavailable("connection reset"));
  decode2_->Grant(8);
  EXPECT_EQ(prefill2_->prefills.at(0).n_streamed(), 0U);
  prefill2_->FirstToken('a');
  EXPECT_EQ(sink_->text, "a");
}

TEST_F(RequestRetryTest, CancelWhileTheNextAttemptWaits) {
  RunToMidStream(TestRequest("x", 9));
  decode_->EndDecode(Unavailable("connection reset"));
  flow_->Cancel(Cancelled("the client has gone"));
  ExpectClean(1);
  std::this_thread::sleep_for(milliseconds(60));
  EXPECT_EQ(decode_->reserves.size(), 1U);
  PokeAfterTheEnd();
}

TEST(SamplingBehind, CountsWhatIsLeftAndKeepsPositions) {
  v1::SamplingParams sampling;
  sampling.set_max_tokens(10);
  sampling.set_seed(5);
  sampling.set_forced_from(100);
  for (const std::uint32_t id : {1, 2, 3}) sampling.add_forced_ids(id);
  sampling.set_suppress_before(104);
  const v1::SamplingParams behind = SamplingBehind(sampling, 2);
  EXPECT_EQ(behind.max_tokens(), 8U);
  EXPECT_EQ(behind.forced_from(), 100U);
  EXPECT_EQ(behind.forced_ids_size(), 3);
  EXPECT_EQ(behind.suppress_before(), 104U);
  EXPECT_EQ(behind.seed(), 5U);
  EXPECT_EQ(SamplingBehind(sampling, 12).max_tokens(), 0U);
}

}  // namespace
}  // namespace zeroc
