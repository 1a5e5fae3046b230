#include "services/router/request_flow.h"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>

#include "libzeroc/compression/prefix_hash.h"
#include "services/router/test_flow.h"

namespace zeroc {
namespace {

using std::chrono::milliseconds;

TEST_F(RequestFlowTest, AWholeRequest) {
  v1::GenerateRequest request = TestRequest("prompt", 5);
  request.set_request_id("r1");
  request.mutable_sampling()->set_seed(42);
  request.mutable_sampling()->add_stop("never");
  Start(request);
  ASSERT_EQ(decode_->reserves.size(), 1U);
  EXPECT_EQ(decode_->reserves[0].n_prompt_tokens(), 6U);
  EXPECT_EQ(decode_->reserves[0].profile(), "q4") << "within the default budget of 0.1";
  EXPECT_EQ(decode_->reserves[0].layout_hash(), 2U);
  EXPECT_EQ(sink_->events, "") << "nothing is promised before decode has reserved";
  decode_->Grant(7);
  ASSERT_EQ(decode_->decodes.size(), 1U);
  ASSERT_EQ(prefill_->prefills.size(), 1U);
  EXPECT_EQ(prefill_->prefills[0].lease().generation(), 70U);
  EXPECT_EQ(prefill_->prefills[0].decode_worker(), "d");
  EXPECT_EQ(prefill_->prefills[0].token_ids_size(), 6);
  const v1::SamplingParams& sampling = decode_->decodes[0].sampling();
  EXPECT_EQ(sampling.seed(), 42U);
  EXPECT_EQ(sampling.stop_size(), 0) << "stop strings are the router's";
  EXPECT_TRUE(sampling.has_temperature() && sampling.has_top_p() && sampling.has_repetition_penalty());
  EXPECT_EQ(decode_->decodes[0].prompt_ids_size(), 0);

  prefill_->FirstToken('h');
  EXPECT_EQ(sink_->text, "h") << "the first token does not wait for the wire";
  prefill_->Transferred();
  EXPECT_EQ(pool_.Candidates(v1::WORKER_ROLE_PREFILL, {})[0].assigned_tokens, 6U);
  prefill_->EndPrefill();
  EXPECT_EQ(pool_.Candidates(v1::WORKER_ROLE_PREFILL, {})[0].assigned_tokens, 0U) << "that worker's load is over";
  decode_->Admit();
  decode_->Tokens("el");
  decode_->Tokens("lo");
  decode_->Final(v1::FINISH_REASON_LENGTH);
  decode_->EndDecode();

  EXPECT_EQ(sink_->events, "started delta delta delta final ");
  EXPECT_EQ(sink_->text, "hello");
  EXPECT_EQ(sink_->started.profile(), "q4");
  EXPECT_EQ(sink_->started.reason(), "budget");
  EXPECT_EQ(sink_->started.ppl_base(), 10);
  EXPECT_EQ(sink_->final.finish_reason(), v1::FINISH_REASON_LENGTH);
  EXPECT_EQ(sink_->final.usage().completion_tokens(), 5U);
  const v1::RequestStats& stats = sink_->final.stats();
  EXPECT_EQ(stats.kv_bytes().wire(), 200U);
  EXPECT_EQ(stats.kv_bytes().packed(), 240U) << "decode's count of what is resident wins";
  EXPECT_DOUBLE_EQ(stats.wire_hidden_share(), 0.75);
  EXPECT_EQ(stats.transport(), "am over tcp (lo)");
  EXPECT_EQ(stats.prefill_worker(), "p");
  EXPECT_EQ(prefill_->prefill_call->cancels + decode_->decode_call->cancels, 0);
  ExpectClean(0);
  const std::string page = metrics_.Render();
  EXPECT_NE(page.find("zeroc_request_jct_seconds_count{outcome=\"ok\",profile=\"q4\"} 1"), std::string::npos) << page;
  EXPECT_NE(page.find("zeroc_policy_decisions_total{profile=\"q4\",reason=\"budget\"} 1"), std::string::npos);
  EXPECT_NE(page.find("zeroc_kv_bytes_total{stage=\"wire\"} 200"), std::string::npos);
  EXPECT_NE(page.find("vllm:generation_tokens_total{model_name=\"test-model\"} 5"), std::string::npos);
}

TEST_F(RequestFlowTest, CachedBeginningsAreLookedForPassedOnAndReported) {
  Start(TestRequest(std::string(64, 'x'), 1));
  EXPECT_EQ(decode_->reserves.back().prompt_ids_size(), 0) << "nothing of it can be in a cache of 64-token blocks";
  decode_->Grant(7);
  prefill_->FirstToken('a');
  prefill_->Transferred();

  Start(TestRequest(std::string(200, 'x'), 1));
  EXPECT_EQ(decode_->reserves.back().prompt_ids_size(), 200);
  v1::ReserveResponse granted;
  granted.mutable_lease()->set_lease_id(8);
  granted.set_n_cached_tokens(128);
  decode_->AnswerReserve(OkStatus(), granted);
  EXPECT_EQ(prefill_->prefills.back().n_cached_tokens(), 128U) << "they do not travel";
  v1::PrefillEvent first;
  first.mutable_first_token()->set_id('a');
  first.mutable_first_token()->set_n_cached_tokens(64);
  prefill_->prefill_event(first);
  prefill_->Transferred();
  EXPECT_EQ(sink_->final.usage().cached_tokens(), 64U);
  EXPECT_EQ(sink_->final.usage().prompt_tokens(), 200U);
}

TEST_F(RequestFlowTest, GoesToTheWorkersThatHaveItsBeginning) {
  const std::vector<std::int32_t> ids(128, 'x');
  const auto hashes = PrefixHashes(PrefixHashRoot("model", "plan", "q4"), ids);
  const auto prefill2 = std::make_shared<ScriptedWorker>(), decode2 = std::make_shared<ScriptedWorker>();
  AddWorker(v1::WORKER_ROLE_PREFILL, "p2", prefill2, 0, {hashes[1]});
  AddWorker(v1::WORKER_ROLE_DECODE, "d2", decode2, 100, {hashes[0]});
  Start(TestRequest(std::string(129, 'x'), 1));
  ASSERT_EQ(decode2->reserves.size(), 1U);
  decode2->Grant(7);
  ASSERT_EQ(prefill2->prefills.size(), 1U);
  prefill2->FirstToken('a');
  prefill2->Transferred();
  EXPECT_EQ(sink_->final.finish_reason(), v1::FINISH_REASON_LENGTH);
  const std::string page = metrics_.Render();
  EXPECT_NE(page.find("zeroc_policy_prefix_tokens_total{role=\"prefill\"} 128"), std::string::npos) << page;
  EXPECT_NE(page.find("zeroc_policy_prefix_tokens_total{role=\"decode\"} 64"), std::string::npos);

  Start(TestRequest(std::string(129, 'y'), 1));
  EXPECT_EQ(decode_->reserves.size(), 1U) << "nobody has it: the first of equals";
  decode_->Grant(8);
}

TEST_F(RequestFlowTest, TokensOfDecodeMayOvertakeTheFirstToken) {
  Start(TestRequest("x", 3));
  decode_->Grant(7);
  decode_->Admit();
  decode_->Tokens("bc");
  decode_->Final(v1::FINISH_REASON_LENGTH);
  decode_->EndDecode();
  EXPECT_EQ(sink_->text, "");
  prefill_->FirstToken('a');
  EXPECT_EQ(sink_->text, "abc");
  EXPECT_EQ(sink_->ends, 0) << "the account of the transfer is still to come";
  prefill_->Transferred();
  ExpectClean(0);
  EXPECT_EQ(sink_->final.stats().kv_bytes().raw(), 1000U);
}

TEST_F(RequestFlowTest, TheFinalMessageDoesNotWaitForeverForTheAccount) {
  Start(TestRequest("x", 2));
  decode_->Grant(7);
  prefill_->FirstToken('a');
  decode_->Admit();
  decode_->Tokens("b");
  decode_->Final(v1::FINISH_REASON_LENGTH);
  EXPECT_TRUE(WaitFor([&] { return router_.in_flight() == 0; }));
  EXPECT_EQ(sink_->final.usage().completion_tokens(), 2U);
  EXPECT_EQ(prefill_->prefill_call->cancels, 1);
  PokeAfterTheEnd();
}

TEST_F(RequestFlowTest, AFirstTokenThatIsTheLastNeedsNoDecode) {
  for (const bool by_count : {false, true}) {
    sink_->Clear();
    decode_->releases.clear();
    Start(TestRequest("x", by_count ? 1 : 9));
    decode_->Grant(7);
    prefill_->FirstToken('a', by_count ? v1::FINISH_REASON_UNSPECIFIED : v1::FINISH_REASON_STOP);
    EXPECT_EQ(decode_->decode_call->cancels, 1);
    prefill_->Transferred();
    EXPECT_EQ(sink_->final.finish_reason(), by_count ? v1::FINISH_REASON_LENGTH : v1::FINISH_REASON_STOP);
    EXPECT_EQ(sink_->text, "a");
    ExpectClean(1);
    PokeAfterTheEnd();
  }
}

TEST_F(RequestFlowTest, AStopStringAcrossTokensEndsTheRequestAndStopsDecode) {
  v1::GenerateRequest request = TestRequest("x", 20);
  request.mutable_sampling()->add_stop("END");
  Start(request);
  decode_->Grant(7);
  prefill_->FirstToken('a');
  prefill_->Transferred();
  decode_->Admit();
  decode_->Tokens("b E");
  EXPECT_EQ(sink_->text, "ab ");
  decode_->Tokens("ND more");
  EXPECT_EQ(sink_->text, "ab ");
  EXPECT_EQ(sink_->final.finish_reason(), v1::FINISH_REASON_STOP);
  EXPECT_EQ(sink_->final.usage().completion_tokens(), 6U) << "tokens after the stop do not count";
  EXPECT_EQ(sink_->final.stop_string(), "END");
  EXPECT_EQ(decode_->decode_call->cancels, 1);
  ExpectClean(1);
  PokeAfterTheEnd();
}

TEST_F(RequestFlowTest, StopTokensHaveNoTextAndHeldTextComesAtTheEnd) {
  v1::GenerateRequest request = TestRequest("x", 20);
  request.mutable_sampling()->add_stop_token_ids('!');
  request.mutable_sampling()->add_stop("bcd");
  Start(request);
  decode_->Grant(7);
  prefill_->FirstToken('a');
  prefill_->Transferred();
  decode_->Tokens("bc!");
  EXPECT_EQ(sink_->text, "a");
  decode_->Final(v1::FINISH_REASON_STOP);
  EXPECT_EQ(sink_->text, "abc");
  EXPECT_EQ(sink_->final.stop_token_id(), static_cast<std::uint32_t>('!'));
  ExpectClean(0);
}

TEST_F(RequestFlowTest, WhatStoppedTheAnswerCanBePartOfIt) {
  for (const std::string tail : {"bcd!", "bEND"}) {
    sink_->Clear();
    v1::GenerateRequest request = TestRequest("x", 20);
    request.mutable_sampling()->add_stop_token_ids('!');
    request.mutable_sampling()->add_stop("END");
    request.mutable_sampling()->set_include_stop(true);
    Start(request);
    decode_->Grant(7);
    prefill_->FirstToken('a');
    prefill_->Transferred();
    decode_->Tokens(tail);
    if (tail == "bcd!") decode_->Final(v1::FINISH_REASON_STOP);
    EXPECT_EQ(sink_->text, "a" + tail);
    EXPECT_EQ(sink_->ends, 1);
  }
}

TEST_F(RequestFlowTest, ForcedTokensStopNothingAndHaveNoText) {
  v1::GenerateRequest request = TestRequest("x", 6);
  for (const char c : std::string("EN!")) request.mutable_sampling()->add_forced_ids(static_cast<unsigned char>(c));
  request.mutable_sampling()->add_stop("ND");
  request.mutable_sampling()->add_stop_token_ids('!');
  Start(request);
  decode_->Grant(7);
  prefill_->FirstToken('E');
  prefill_->Transferred();
  decode_->Tokens("N!Dab");
  EXPECT_EQ(sink_->text, "Dab");
  EXPECT_EQ(sink_->n_tokens, 6);
  decode_->Final(v1::FINISH_REASON_LENGTH);
  EXPECT_EQ(sink_->final.stop_reason_case(), v1::Final::STOP_REASON_NOT_SET);
  const std::string page = metrics_.Render();
  const auto value = [&](const std::string& name) {
    const std::string series = name + "{model_name=\"test-model\"} ";
    const std::size_t at = page.find(series);
    return at == std::string::npos ? -1 : std::stoi(page.substr(at + series.size()));
  };
  EXPECT_EQ(value("vllm:prompt_tokens_total"), 1 + 3) << "forced tokens are the client's own";
  EXPECT_EQ(value("vllm:generation_tokens_total"), 3);
  EXPECT_EQ(value("vllm:inter_token_latency_seconds_count"), 3);
}

TEST_F(RequestFlowTest, RefusedRequestsReachNoWorker) {
  v1::GenerateRequest too_long = TestRequest(std::string(990, 'x'), 11);
  v1::GenerateRequest no_prompt;
  v1::GenerateRequest bad_profile = TestRequest("x", 1);
  bad_profile.mutable_kv()->set_profile("q9");
  v1::GenerateRequest bad_budget = TestRequest("x", 1);
  bad_budget.mutable_kv()->set_max_ppl_increase(-1);
  const std::pair<v1::GenerateRequest, StatusCode> cases[] = {{too_long, StatusCode::kInvalidArgument},
                                                              {no_prompt, StatusCode::kInvalidArgument},
                                                              {bad_profile, StatusCode::kNotFound},
                                                              {bad_budget, StatusCode::kInvalidArgument}};
  for (const auto& [request, code] : cases) {
    sink_->Clear();
    Start(request);
    EXPECT_EQ(sink_->error.code(), code) << sink_->error.ToString();
    EXPECT_EQ(sink_->events, "error ");
  }
  EXPECT_TRUE(decode_->reserves.empty());
  EXPECT_EQ(router_.in_flight(), 0U);
}

TEST_F(RequestFlowTest, ReserveRefusedIsTriedOnceElsewhere) {
  const auto other = std::make_shared<ScriptedWorker>();
  AddWorker(v1::WORKER_ROLE_DECODE, "d2", other, 50);
  Start(TestRequest("x", 2));
  decode_->Refuse(ResourceExhausted("full"));
  ASSERT_EQ(other->reserves.size(), 1U);
  EXPECT_EQ(other->reserves[0].attempt(), 2U);
  other->Grant(7);
  EXPECT_EQ(other->decodes.size(), 1U);
  EXPECT_EQ(prefill_->prefills.at(0).decode_worker(), "d2");
  flow_->Cancel(Cancelled("enough"));
  EXPECT_EQ(other->releases.size(), 1U);
  EXPECT_TRUE(decode_->releases.empty());
}

TEST_F(RequestFlowTest, OtherReserveFailuresAreNotRetried) {
  const auto other = std::make_shared<ScriptedWorker>();
  AddWorker(v1::WORKER_ROLE_DECODE, "d2", other, 50);
  Start(TestRequest("x", 2));
  decode_->Refuse(FailedPrecondition("another layout"));
  EXPECT_EQ(sink_->error.code(), StatusCode::kFailedPrecondition);
  EXPECT_TRUE(other->reserves.empty());
  ExpectClean(0);
}

// Every place at which a client can go away.
TEST_F(RequestFlowTest, CancelAtEveryStage) {
  for (int stage = 0; stage < 5; ++stage) {
    sink_->Clear();
    prefill_->prefill_event = nullptr;
    decode_->decode_event = nullptr;
    decode_->releases.clear();
    Start(TestRequest("x", 9));
    if (stage >= 1) decode_->Grant(7);
    if (stage >= 2) prefill_->FirstToken('a');
    if (stage >= 3) decode_->Admit();
    if (stage >= 4) decode_->Tokens("b");
    flow_->Cancel(Cancelled("the client has gone"));
    const char* const phases[] = {"reserve", "prefill", "wire", "decode", "decode"};
    EXPECT_EQ(sink_->error.message(), std::string("in phase ") + phases[stage] + ": the client has gone");
    if (stage == 0) {
      EXPECT_EQ(router_.in_flight(), 1U) << "the reservation's answer is still to come";
      decode_->Grant(7);
      EXPECT_TRUE(decode_->decodes.empty()) << "a late grant is given back, not used";
    } else {
      EXPECT_EQ(prefill_->prefill_call->cancels, 1) << stage;
      EXPECT_EQ(decode_->decode_call->cancels, 1) << stage;
    }
    ExpectClean(1);
    PokeAfterTheEnd();
    decode_->decodes.clear();
  }
}

TEST_F(RequestFlowTest, CancelWhileReservingThenRefusal) {
  Start(TestRequest("x", 2));
  flow_->Cancel(Cancelled("gone"));
  decode_->Refuse(ResourceExhausted("full"));
  ExpectClean(0);
}

TEST_F(RequestFlowTest, PrefillFailureNamesWorkerAndPhase) {
  Start(TestRequest("x", 9));
  decode_->Grant(7);
  prefill_->EndPrefill(Internal("matrix is sad"));
  EXPECT_EQ(sink_->error.ToString(), "INTERNAL: prefill worker p in phase prefill: matrix is sad");
  EXPECT_EQ(sink_->origin, ErrorOrigin::kWorker);
  EXPECT_EQ(decode_->decode_call->cancels, 1);
  ExpectClean(1);
  PokeAfterTheEnd();
}

TEST_F(RequestFlowTest, StreamsThatEndEarlyAndWorkersThatTalkTooMuchAreErrors) {
  const auto run = [this](const std::function<void()>& misbehave) {
    sink_->Clear();
    decode_->releases.clear();
    Start(TestRequest("x", 3));
    decode_->Grant(7);
    misbehave();
    ExpectClean(1);
    EXPECT_EQ(sink_->origin, ErrorOrigin::kWorker);
    return sink_->error.ToString();
  };
  EXPECT_EQ(run([&] { prefill_->EndPrefill(); }),
            "INTERNAL: prefill worker p in phase prefill: the stream ended before its last message");
  EXPECT_EQ(run([&] { decode_->EndDecode(); }),
            "INTERNAL: decode worker d in phase prefill: the stream ended before its last message");
  EXPECT_EQ(run([&] {
              prefill_->FirstToken('a');
              prefill_->FirstToken('b');
            }),
            "INTERNAL: prefill worker p in phase wire: sent two first tokens");
  EXPECT_EQ(run([&] {
              prefill_->FirstToken('a');
              decode_->Tokens("bcd");
            }),
            "INTERNAL: decode worker d in phase wire: sent more than max_tokens tokens");
  EXPECT_EQ(run([&] { decode_->Tokens("bcde"); }),
            "INTERNAL: decode worker d in phase prefill: sent more than max_tokens tokens");
}

TEST_F(RequestFlowTest, SilentWorkersFailTheirRequests) {
  Start(TestRequest("x", 9));
  decode_->Grant(7);
  prefill_->FirstToken('a');
  pool_.Expire(WorkerPool::Time::clock::now() + std::chrono::hours(1));
  EXPECT_EQ(sink_->error.code(), StatusCode::kUnavailable);
  EXPECT_NE(sink_->error.message().find("its heartbeats have stopped"), std::string_view::npos);
  ExpectClean(1);
}

TEST_F(RequestFlowTest, NoWorkersIsUnavailable) {
  pool_.Expire(WorkerPool::Time::clock::now() + std::chrono::hours(1));
  Start(TestRequest("x", 9));
  EXPECT_EQ(sink_->error.ToString(), "UNAVAILABLE: no prefill worker is registered");
  EXPECT_EQ(sink_->origin, ErrorOrigin::kRequest);
  ExpectClean(0);
}

TEST_F(RequestFlowTest, TheClientsDeadlineEndsTheRequest) {
  flow_ = router_.Generate(TestRequest("x", 9), std::chrono::system_clock::now() + milliseconds(60), sink_);
  decode_->Grant(7);
  EXPECT_TRUE(WaitFor([&] { return router_.in_flight() == 0; }));
  EXPECT_EQ(sink_->error.ToString(), "DEADLINE_EXCEEDED: in phase prefill: the request's deadline has passed");
  ExpectClean(1);
}

TEST_F(RequestFlowTest, AdmissionIsBoundedAndIdsAreUnique) {
  std::vector<std::shared_ptr<RecordingSink>> sinks;
  for (int i = 0; i < 6; ++i) {
    sinks.push_back(std::make_shared<RecordingSink>());
    v1::GenerateRequest request = TestRequest("x", 9);
    request.set_request_id(i < 2 ? "same" : "id" + std::to_string(i));
    router_.Generate(std::move(request), std::nullopt, sinks.back());
  }
  EXPECT_EQ(sinks[1]->error.code(), StatusCode::kAlreadyExists);
  EXPECT_EQ(sinks[4]->error.code(), StatusCode::kOk);
  EXPECT_EQ(sinks[5]->error.code(), StatusCode::kResourceExhausted);
  EXPECT_EQ(router_.in_flight(), 4U);
  EXPECT_EQ(router_.Abort("nobody").code(), StatusCode::kNotFound);
  EXPECT_TRUE(router_.Abort("same").ok());
  EXPECT_EQ(sinks[0]->error.code(), StatusCode::kCancelled);
  router_.StopAccepting();
  const auto late = std::make_shared<RecordingSink>();
  router_.Generate(TestRequest("x", 1), std::nullopt, late);
  EXPECT_EQ(late->error.code(), StatusCode::kUnavailable);
  EXPECT_FALSE(router_.WaitIdle(milliseconds(10)));
  router_.CancelAll(Unavailable("stopping"));
  EXPECT_EQ(sinks[4]->ends, 1);
  EXPECT_EQ(router_.in_flight(), 4U) << "until their reservations are answered";
  while (!decode_->reserve_done.empty()) decode_->Refuse(ResourceExhausted("full"));
  EXPECT_TRUE(router_.WaitIdle(milliseconds(0)));
}

TEST(RequestStats, PhasesAddUpWhateverTheWorkersClaim) {
  const RequestTimes::Time zero;
  const auto at = [zero](int ms) { return zero + milliseconds(ms); };
  for (const double claim : {0.0, 0.05, 1e9, -3.0, std::nan("")}) {
    for (int reached = 0; reached <= 5; ++reached) {
      RequestTimes times;
      times.arrival = at(10);
      if (reached >= 1) times.reserve_begin = at(20);
      if (reached >= 2) times.reserve_end = at(25);
      if (reached >= 3) times.first_token = at(225);
      if (reached >= 4) times.admitted = at(325);
      if (reached >= 5) times.last_token = at(925);
      times.prefill_seconds = claim;
      times.admit_seconds = claim;
      const auto ended = times.last_token.value_or(at(1000));
      times.last_token = ended;
      const v1::PhaseSeconds p = PhasesOf(times);
      EXPECT_NEAR(p.queue() + p.reserve() + p.prefill() + p.wire() + p.admit() + p.decode(), JctSeconds(times), 1e-9);
      for (const double x : {p.queue(), p.reserve(), p.prefill(), p.wire(), p.admit(), p.decode()}) EXPECT_GE(x, 0);
    }
  }
  RequestTimes times;
  times.arrival = at(0);
  times.reserve_begin = at(10);
  times.reserve_end = at(30);
  times.first_token = at(200);
  times.admitted = at(260);
  times.last_token = at(1000);
  times.prefill_seconds = 0.15;
  times.admit_seconds = 0.01;
  const v1::PhaseSeconds p = PhasesOf(times);
  EXPECT_NEAR(p.queue(), 0.01 + 0.02, 1e-9);
  EXPECT_NEAR(p.reserve(), 0.02, 1e-9);
  EXPECT_NEAR(p.prefill(), 0.15, 1e-9);
  EXPECT_NEAR(p.wire(), 0.05, 1e-9);
  EXPECT_NEAR(p.admit(), 0.01, 1e-9);
  EXPECT_NEAR(p.decode(), 0.74, 1e-9);
}

}  // namespace
}  // namespace zeroc
