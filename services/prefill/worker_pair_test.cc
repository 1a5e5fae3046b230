// A prefill and a decode worker in one process, over gRPC on loopback and the KV transport, with the demo model: the
// tokens of a single process, the bytes that were computed, and every block back whatever happens.
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "libzeroc/engine/local_generator.h"
#include "services/prefill/worker_pair_testing.h"
#include "services/worker/proto_convert.h"

namespace zeroc {
namespace {

using namespace testing;  // NOLINT: the two workers and their requests

class WorkerPairTest : public ::testing::TestWithParam<WireKind> {};

TEST_P(WorkerPairTest, GivesTheTokensOfASingleProcess) {
  Cluster cluster(GetParam());
  constexpr int kMaxTokens = 12;
  for (const auto& [profile, format] : TheModels().alone->formats()) {
    if (profile != "bf16" && profile != "q4") continue;
    for (const int n : {1, 63, 64, 65, 300, 700}) {
      SCOPED_TRACE(profile + " " + std::to_string(n));
      const std::vector<std::int32_t> prompt = Prompt(n);
      SamplingParams sampling;
      sampling.max_tokens = kMaxTokens;
      sampling.temperature = n == 300 ? 0.8f : 0;  // random numbers travel by position
      sampling.seed = 20260131;
      sampling.ignore_eos = true;
      const Completion alone =
          Must(GenerateLocally(TheModels().alone->model(), format, prompt, sampling, nullptr, 128));
      const v1::ReserveRequest reserve = cluster.ReserveFor(n, kMaxTokens, profile);
      v1::Lease lease;
      ASSERT_TRUE(cluster.Reserve(reserve, &lease).ok());
      const Outcome outcome = cluster.Run(reserve, lease, prompt, Sampling(kMaxTokens, sampling.temperature));
      ASSERT_TRUE(outcome.prefill.ok()) << outcome.prefill.error_message();
      ASSERT_TRUE(outcome.decode.ok()) << outcome.decode.error_message();
      EXPECT_EQ(outcome.ids, alone.ids);
      EXPECT_EQ(outcome.n_dones, 1);
      EXPECT_EQ(outcome.n_admitted, 1);
      EXPECT_EQ(outcome.n_finals, 1);
      EXPECT_EQ(outcome.final.finish_reason(), v1::FINISH_REASON_LENGTH);
      // The bytes on the wire are the bytes resident at decode; decode has verified every block's checksum.
      EXPECT_EQ(outcome.done.kv_bytes().wire(), outcome.admitted.kv_bytes().packed());
      EXPECT_EQ(outcome.done.kv_bytes().packed(), outcome.admitted.kv_bytes().packed());
      EXPECT_EQ(outcome.done.kv_bytes().raw(), outcome.admitted.kv_bytes().raw());
      if (GetParam() != WireKind::kLoopbackPut) {
        EXPECT_EQ(outcome.admitted.kv_bytes().wire(), outcome.done.kv_bytes().wire());
      }
      EXPECT_GT(outcome.done.wire_seconds(), 0);
      EXPECT_LE(outcome.done.wire_hidden_seconds(), outcome.done.wire_seconds());
      EXPECT_GT(outcome.done.prefill_seconds(), 0);
      EXPECT_FALSE(outcome.done.transport().empty());
      EXPECT_TRUE(cluster.Settles());
    }
  }
}

TEST_P(WorkerPairTest, GoesOnWhereAnEarlierAttemptBroke) {
  Cluster cluster(GetParam());
  constexpr int kMaxTokens = 16, kStreamed = 9;
  std::vector<std::int32_t> tokens = Prompt(300);
  v1::SamplingParams penalised = Sampling(kMaxTokens, 0.8f);
  penalised.set_presence_penalty(0.5f);
  penalised.set_frequency_penalty(0.5f);
  penalised.set_repetition_penalty(1.2f);
  const Completion alone = Must(GenerateLocally(TheModels().alone->model(), TheModels().alone->formats().at("q4"),
                                                tokens, Must(SamplingFromProto(penalised)), nullptr, 128));
  tokens.insert(tokens.end(), alone.ids.begin(), alone.ids.begin() + kStreamed);
  penalised.set_max_tokens(kMaxTokens - kStreamed);
  const v1::ReserveRequest reserve = cluster.ReserveFor(static_cast<int>(tokens.size()), kMaxTokens - kStreamed, "q4");
  v1::Lease lease;
  ASSERT_TRUE(cluster.Reserve(reserve, &lease).ok());
  const Outcome outcome = cluster.Run(reserve, lease, tokens, penalised, nullptr, kStreamed);
  ASSERT_TRUE(outcome.prefill.ok()) << outcome.prefill.error_message();
  ASSERT_TRUE(outcome.decode.ok()) << outcome.decode.error_message();
  EXPECT_EQ(outcome.ids, std::vector<std::int32_t>(alone.ids.begin() + kStreamed, alone.ids.end()));
  EXPECT_TRUE(cluster.Settles());
}

TEST_P(WorkerPairTest, AFirstTokenThatEndsTheRequestNeedsNoDecode) {
  Cluster cluster(GetParam());
  const v1::ReserveRequest reserve = cluster.ReserveFor(300, 1, "bf16");
  v1::Lease lease;
  ASSERT_TRUE(cluster.Reserve(reserve, &lease).ok());
  const Outcome outcome = cluster.Run(reserve, lease, Prompt(300), Sampling(1));
  EXPECT_TRUE(outcome.prefill.ok()) << outcome.prefill.error_message();
  EXPECT_EQ(outcome.first.finish_reason(), v1::FINISH_REASON_LENGTH);
  EXPECT_EQ(outcome.n_dones, 1);
  EXPECT_EQ(outcome.n_finals, 0);
  EXPECT_TRUE(cluster.Settles());
}

TEST_P(WorkerPairTest, ACancelAtAnyStageReturnsAllBlocks) {
  Cluster cluster(GetParam());
  for (const std::string stage : {"started", "first_token", "admitted", "token", "done"}) {
    for (const bool both : {true, false}) {
      SCOPED_TRACE(stage + (both ? " both" : " one"));
      const v1::ReserveRequest reserve = cluster.ReserveFor(700, 400, "bf16");
      v1::Lease lease;
      ASSERT_TRUE(cluster.Reserve(reserve, &lease).ok());
      EXPECT_GT(cluster.decode().usage().n_blocks_used, 0u);
      const Outcome outcome =
          cluster.Run(reserve, lease, Prompt(700), Sampling(400),
                      [&](const std::string& event, grpc::ClientContext& prefill, grpc::ClientContext& decode) {
                        if (event != stage) return;
                        if (both || stage == "started" || stage == "first_token") prefill.TryCancel();
                        if (both || stage == "admitted" || stage == "token" || stage == "done") decode.TryCancel();
                      });
      EXPECT_FALSE(outcome.decode.ok() && outcome.prefill.ok());
      EXPECT_EQ(outcome.n_finals, 0);
      EXPECT_TRUE(cluster.Settles());
    }
  }
}

TEST_P(WorkerPairTest, ALostPeerEndsBothSidesAndTheNextRequestConnectsAnew) {
  Cluster cluster(GetParam());
  const v1::ReserveRequest reserve = cluster.ReserveFor(2000, 8, "bf16");
  v1::Lease lease;
  ASSERT_TRUE(cluster.Reserve(reserve, &lease).ok());
  const Outcome outcome = cluster.Run(reserve, lease, Prompt(2000), Sampling(8),
                                      [&](const std::string& event, grpc::ClientContext&, grpc::ClientContext&) {
                                        if (event != "started") return;
                                        std::this_thread::sleep_for(milliseconds(30));
                                        cluster.prefill().ClosePeers();
                                      });
  EXPECT_EQ(outcome.prefill.error_code(), grpc::StatusCode::UNAVAILABLE) << outcome.prefill.error_message();
  EXPECT_NE(outcome.prefill.error_message().find(kDecodeName), std::string::npos) << outcome.prefill.error_message();
  EXPECT_FALSE(outcome.decode.ok());
  EXPECT_EQ(outcome.n_admitted, 0);
  EXPECT_TRUE(cluster.Settles());

  const v1::ReserveRequest again = cluster.ReserveFor(100, 4, "bf16");
  ASSERT_TRUE(cluster.Reserve(again, &lease).ok());
  const Outcome second = cluster.Run(again, lease, Prompt(100), Sampling(4));
  EXPECT_TRUE(second.prefill.ok()) << second.prefill.error_message();
  EXPECT_TRUE(second.decode.ok()) << second.decode.error_message();
  EXPECT_TRUE(cluster.Settles());
}

INSTANTIATE_TEST_SUITE_P(Wires, WorkerPairTest,
                         ::testing::Values(WireKind::kLoopbackAm, WireKind::kLoopbackPut, WireKind::kUcxTcp),
                         [](const ::testing::TestParamInfo<WireKind>& test) { return WireName(test.param); });

TEST(WorkerPairLimitsTest, ReserveRefusesWhatItCannotServe) {
  Cluster cluster(WireKind::kLoopbackAm, 30'000, 8 << 20);
  v1::Lease lease;
  const auto code = [&](const std::function<void(v1::ReserveRequest&)>& change) {
    v1::ReserveRequest request = cluster.ReserveFor(64, 8, "bf16");
    change(request);
    return cluster.Reserve(request, &lease).error_code();
  };
  EXPECT_EQ(code([](auto& r) { r.set_model_fingerprint("other"); }), grpc::StatusCode::FAILED_PRECONDITION);
  EXPECT_EQ(code([](auto& r) { r.set_plan_id("other"); }), grpc::StatusCode::FAILED_PRECONDITION);
  EXPECT_EQ(code([](auto& r) { r.set_layout_hash(1); }), grpc::StatusCode::FAILED_PRECONDITION);
  EXPECT_EQ(code([](auto& r) { r.set_profile("no-such"); }), grpc::StatusCode::NOT_FOUND);
  EXPECT_EQ(code([](auto& r) { r.set_n_prompt_tokens(0); }), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(code([](auto& r) { r.set_n_prompt_tokens(4'000'000'000u); }), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(code([](auto& r) { r.set_n_prompt_tokens(8000); }), grpc::StatusCode::OUT_OF_RANGE);
  const v1::ReserveRequest twice = cluster.ReserveFor(64, 8, "bf16");
  ASSERT_TRUE(cluster.Reserve(twice, &lease).ok());
  v1::Lease second;
  EXPECT_EQ(cluster.Reserve(twice, &second).error_code(), grpc::StatusCode::ALREADY_EXISTS);
  cluster.decode().Release({lease.lease_id(), lease.generation() + 1}, "stale");
  EXPECT_EQ(cluster.decode().in_flight(), 1u);
  cluster.decode().Release({lease.lease_id(), lease.generation()}, "test");
  EXPECT_TRUE(cluster.Settles());
}

TEST(WorkerPairLimitsTest, ALeaseThatNobodyFillsExpires) {
  Cluster cluster(WireKind::kLoopbackAm, 300);
  const v1::ReserveRequest reserve = cluster.ReserveFor(100, 8, "bf16");
  v1::Lease lease;
  ASSERT_TRUE(cluster.Reserve(reserve, &lease).ok());
  const auto generate = [&] {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + seconds(kSettleS));
    v1::DecodeRequest request;
    request.set_lease_id(lease.lease_id());
    request.set_generation(lease.generation());
    request.set_request_id(reserve.request_id());
    request.set_n_prompt_tokens(100);
    *request.mutable_sampling() = Sampling(8);
    const auto stream = cluster.decode_stub().Generate(&context, request);
    v1::DecodeEvent event;
    EXPECT_FALSE(stream->Read(&event));
    return stream->Finish();
  };
  const grpc::Status status = generate();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  EXPECT_NE(status.error_message().find("expired"), std::string::npos) << status.error_message();
  EXPECT_NE(cluster.decode_metrics().Render().find("zeroc_kv_leases_expired_total"), std::string::npos);
  EXPECT_TRUE(cluster.Settles());
  EXPECT_EQ(generate().error_code(), grpc::StatusCode::DEADLINE_EXCEEDED) << "the reason is kept for a late caller";
  // Prefill comes too late: it is refused, and its own blocks come back.
  EXPECT_FALSE(cluster.Run(reserve, lease, Prompt(100), Sampling(8)).prefill.ok());
  EXPECT_TRUE(cluster.Settles());
}

TEST(WorkerPairLimitsTest, PrefillRefusesWhatDoesNotFitTheLease) {
  Cluster cluster(WireKind::kLoopbackAm);
  const v1::ReserveRequest reserve = cluster.ReserveFor(100, 8, "bf16");
  v1::Lease lease;
  ASSERT_TRUE(cluster.Reserve(reserve, &lease).ok());
  EXPECT_EQ(cluster.Run(reserve, lease, Prompt(99), Sampling(8)).prefill.error_code(),
            grpc::StatusCode::INVALID_ARGUMENT);
  ASSERT_TRUE(cluster.Settles());
  const v1::ReserveRequest bad_ids = cluster.ReserveFor(3, 8, "bf16");
  ASSERT_TRUE(cluster.Reserve(bad_ids, &lease).ok());
  EXPECT_EQ(cluster.Run(bad_ids, lease, {1, -1, 2}, Sampling(8)).prefill.error_code(),
            grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_TRUE(cluster.Settles());
  EXPECT_EQ(cluster.Run(bad_ids, lease, {1, 2, 3}, Sampling(8), nullptr, 3).prefill.error_code(),
            grpc::StatusCode::INVALID_ARGUMENT);
  v1::Lease truncated = lease;
  truncated.mutable_kv_layout()->resize(20);
  EXPECT_EQ(cluster.Run(bad_ids, truncated, {1, 2, 3}, Sampling(8)).prefill.error_code(),
            grpc::StatusCode::INVALID_ARGUMENT);
  v1::Lease small_arena = lease;
  small_arena.set_arena_bytes(64);
  EXPECT_EQ(cluster.Run(bad_ids, small_arena, {1, 2, 3}, Sampling(8)).prefill.error_code(),
            grpc::StatusCode::OUT_OF_RANGE);
  EXPECT_TRUE(cluster.Settles());
}

}  // namespace
}  // namespace zeroc
