// Prompts that the decode worker computes itself: the tokens of a remote prefill, beside requests that decode, and
// every block back. And what a decode worker does when its blocks are fewer than its requests want.
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <atomic>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "libzeroc/engine/local_generator.h"
#include "services/prefill/worker_pair_testing.h"
#include "services/worker/proto_convert.h"

namespace zeroc {
namespace {

using namespace testing;  // NOLINT: the two workers and their requests

struct LocalOutcome {
  grpc::Status status;
  std::vector<std::int32_t> ids;
  std::vector<std::string> events;  // in order, tokens left out
  v1::FirstToken first;
  v1::Admitted admitted;
  v1::DecodeFinal final;
};

v1::ReserveRequest LocalReserve(Cluster& cluster, int n_tokens, int max_tokens, const std::string& profile) {
  v1::ReserveRequest reserve = cluster.ReserveFor(n_tokens, max_tokens, profile);
  reserve.set_local_prefill(true);
  return reserve;
}

v1::DecodeRequest LocalRequest(const v1::ReserveRequest& reserve, const v1::Lease& lease,
                               const std::vector<std::int32_t>& prompt, const v1::SamplingParams& sampling) {
  v1::DecodeRequest request;
  request.set_lease_id(lease.lease_id());
  request.set_generation(lease.generation());
  request.set_request_id(reserve.request_id());
  *request.mutable_sampling() = sampling;
  request.set_n_prompt_tokens(reserve.n_prompt_tokens());
  request.mutable_prompt_ids()->Assign(prompt.begin(), prompt.end());
  request.set_local_prefill(true);
  return request;
}

LocalOutcome Generate(Cluster& cluster, const v1::DecodeRequest& request,
                      const std::function<void(const v1::DecodeEvent&, grpc::ClientContext&)>& on_event = nullptr,
                      milliseconds deadline = seconds(60)) {
  LocalOutcome outcome;
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + deadline);
  const auto stream = cluster.decode_stub().Generate(&context, request);
  v1::DecodeEvent event;
  while (stream->Read(&event)) {
    if (event.has_first_token()) {
      outcome.first = event.first_token();
      outcome.ids.push_back(static_cast<std::int32_t>(event.first_token().id()));
      outcome.events.push_back("first_token");
    }
    for (const std::uint32_t id : event.tokens().ids()) outcome.ids.push_back(static_cast<std::int32_t>(id));
    if (event.has_admitted()) {
      outcome.admitted = event.admitted();
      outcome.events.push_back("admitted");
    }
    if (event.has_final()) {
      outcome.final = event.final();
      outcome.events.push_back("final");
    }
    if (on_event) on_event(event, context);
  }
  outcome.status = stream->Finish();
  return outcome;
}

Completion Alone(const std::string& profile, const std::vector<std::int32_t>& prompt,
                 const v1::SamplingParams& sampling) {
  return Must(GenerateLocally(TheModels().alone->model(), TheModels().alone->formats().at(profile), prompt,
                              Must(SamplingFromProto(sampling)), nullptr, 128));
}

const std::vector<std::string> kWholeAnswer{"first_token", "admitted", "final"};

TEST(LocalPrefillTest, GivesTheTokensOfARemoteOne) {
  Cluster cluster(WireKind::kLoopbackAm);
  for (const std::string profile : {"bf16", "q4"}) {
    for (const int n : {1, 64, 65, 300, 700}) {
      SCOPED_TRACE(profile + " " + std::to_string(n));
      const v1::SamplingParams sampling = Sampling(12, n == 300 ? 0.8f : 0);
      const v1::ReserveRequest reserve = LocalReserve(cluster, n, 12, profile);
      v1::Lease lease;
      ASSERT_TRUE(cluster.Reserve(reserve, &lease).ok());
      const LocalOutcome outcome = Generate(cluster, LocalRequest(reserve, lease, Prompt(n), sampling));
      ASSERT_TRUE(outcome.status.ok()) << outcome.status.error_message();
      EXPECT_EQ(outcome.events, kWholeAnswer);
      EXPECT_EQ(outcome.ids, Alone(profile, Prompt(n), sampling).ids);
      EXPECT_EQ(outcome.admitted.kv_bytes().wire(), 0u);
      EXPECT_GT(outcome.admitted.kv_bytes().packed(), 0u);
      EXPECT_GT(outcome.first.prefill_seconds(), 0);
      EXPECT_EQ(outcome.final.finish_reason(), v1::FINISH_REASON_LENGTH);
      EXPECT_TRUE(cluster.Settles());
    }
  }
  EXPECT_EQ(cluster.prefill_metrics().Render().find("vllm:prompt_tokens_total"), std::string::npos)
      << "the prefill worker had no part in it";
  EXPECT_NE(cluster.decode_metrics().Render().find("vllm:iteration_tokens_total"), std::string::npos);
}

TEST(LocalPrefillTest, GoesOnWhereAnEarlierAttemptBroke) {
  Cluster cluster(WireKind::kLoopbackAm);
  v1::SamplingParams sampling = Sampling(16, 0.8f);
  sampling.set_frequency_penalty(0.7f);
  sampling.set_repetition_penalty(1.2f);
  std::vector<std::int32_t> tokens = Prompt(200);
  const Completion alone = Alone("bf16", tokens, sampling);
  tokens.insert(tokens.end(), alone.ids.begin(), alone.ids.begin() + 7);
  sampling.set_max_tokens(9);
  const v1::ReserveRequest reserve = LocalReserve(cluster, 207, 9, "bf16");
  v1::Lease lease;
  ASSERT_TRUE(cluster.Reserve(reserve, &lease).ok());
  v1::DecodeRequest request = LocalRequest(reserve, lease, tokens, sampling);
  request.set_n_streamed(7);
  const LocalOutcome outcome = Generate(cluster, request);
  ASSERT_TRUE(outcome.status.ok()) << outcome.status.error_message();
  EXPECT_EQ(outcome.ids, std::vector<std::int32_t>(alone.ids.begin() + 7, alone.ids.end()));
}

TEST(LocalPrefillTest, AFirstTokenThatEndsTheRequestIsTheWholeAnswer) {
  Cluster cluster(WireKind::kLoopbackAm);
  const v1::ReserveRequest reserve = LocalReserve(cluster, 100, 1, "bf16");
  v1::Lease lease;
  ASSERT_TRUE(cluster.Reserve(reserve, &lease).ok());
  const LocalOutcome outcome = Generate(cluster, LocalRequest(reserve, lease, Prompt(100), Sampling(1)));
  ASSERT_TRUE(outcome.status.ok()) << outcome.status.error_message();
  EXPECT_EQ(outcome.events, kWholeAnswer);
  EXPECT_EQ(outcome.ids.size(), 1u);
  EXPECT_EQ(outcome.first.finish_reason(), v1::FINISH_REASON_LENGTH);
  EXPECT_TRUE(cluster.Settles());
}

// At most one chunk between two decode steps: who decodes gets a token for each chunk of another's prompt.
TEST(LocalPrefillTest, DecodeGoesOnBetweenTheChunks) {
  DecodeCore::Options options = Cluster::DecodeOptions(30'000, 96 << 20);
  options.local_prefill_chunk_tokens = 64;
  Cluster cluster(WireKind::kLoopbackAm, options);
  const v1::ReserveRequest short_reserve = LocalReserve(cluster, 10, 1500, "bf16");
  const v1::ReserveRequest long_reserve = LocalReserve(cluster, 1900, 2, "bf16");
  v1::Lease short_lease, long_lease;
  ASSERT_TRUE(cluster.Reserve(short_reserve, &short_lease).ok());
  ASSERT_TRUE(cluster.Reserve(long_reserve, &long_lease).ok());
  std::atomic<int> n_tokens = 0;
  std::atomic<bool> stop = false;
  std::thread decoding([&] {
    Generate(cluster, LocalRequest(short_reserve, short_lease, Prompt(10), Sampling(1500)),
             [&](const v1::DecodeEvent& event, grpc::ClientContext& context) {
               n_tokens += event.tokens().ids_size();
               if (stop) context.TryCancel();
             });
  });
  while (n_tokens < 3) std::this_thread::sleep_for(milliseconds(1));
  const int before = n_tokens;
  int meanwhile = 0;
  const LocalOutcome outcome = Generate(cluster, LocalRequest(long_reserve, long_lease, Prompt(1900), Sampling(2)),
                                        [&](const v1::DecodeEvent& event, grpc::ClientContext&) {
                                          if (event.has_first_token()) meanwhile = n_tokens - before;
                                        });
  stop = true;
  decoding.join();
  ASSERT_TRUE(outcome.status.ok()) << outcome.status.error_message();
  EXPECT_GE(meanwhile, 1900 / 64 / 2) << "thirty chunks; what the stream still holds is not counted yet";
  EXPECT_EQ(outcome.ids, Alone("bf16", Prompt(1900), Sampling(2)).ids);
  EXPECT_TRUE(cluster.Settles());
}

TEST(LocalPrefillTest, ACancelOrDeadlineInMidPromptReturnsAllBlocks) {
  DecodeCore::Options options = Cluster::DecodeOptions(30'000, 96 << 20);
  options.local_prefill_chunk_tokens = 64;
  Cluster cluster(WireKind::kLoopbackAm, options);
  for (const int deadline_ms : {1, 15, 40, 100}) {
    SCOPED_TRACE(deadline_ms);
    const v1::ReserveRequest reserve = LocalReserve(cluster, 2000, 40, "q4");
    v1::Lease lease;
    ASSERT_TRUE(cluster.Reserve(reserve, &lease).ok());
    const LocalOutcome outcome =
        Generate(cluster, LocalRequest(reserve, lease, Prompt(2000), Sampling(40)), nullptr, milliseconds(deadline_ms));
    if (!outcome.status.ok()) {
      EXPECT_EQ(outcome.status.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED) << outcome.status.error_message();
      // As the router does: a call that ends early may never have reached the worker.
      cluster.decode().Release({lease.lease_id(), lease.generation()}, "test");
    }
    EXPECT_TRUE(cluster.Settles());
  }
  // By the lease, while the prompt waits behind its own chunks.
  const v1::ReserveRequest reserve = LocalReserve(cluster, 2000, 40, "bf16");
  v1::Lease lease;
  ASSERT_TRUE(cluster.Reserve(reserve, &lease).ok());
  std::thread releasing([&] {
    std::this_thread::sleep_for(milliseconds(10));
    cluster.decode().Release({lease.lease_id(), lease.generation()}, "test");
  });
  Generate(cluster, LocalRequest(reserve, lease, Prompt(2000), Sampling(40)));
  releasing.join();
  EXPECT_TRUE(cluster.Settles());
}

TEST(LocalPrefillTest, RefusesWhatItCannotCompute) {
  Cluster cluster(WireKind::kLoopbackAm);
  const v1::ReserveRequest reserve = LocalReserve(cluster, 100, 4, "bf16");
  v1::Lease lease;
  ASSERT_TRUE(cluster.Reserve(reserve, &lease).ok());
  const auto code = [&](const std::function<void(v1::DecodeRequest&)>& change) {
    v1::DecodeRequest request = LocalRequest(reserve, lease, Prompt(100), Sampling(4));
    change(request);
    return Generate(cluster, request).status.error_code();
  };
  EXPECT_EQ(code([](auto& r) { r.clear_prompt_ids(); }), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(code([](auto& r) { r.mutable_prompt_ids()->RemoveLast(); }), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(code([](auto& r) { r.set_n_streamed(100); }), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(code([](auto& r) {
              r.mutable_prompt_ids()->RemoveLast();
              r.set_n_prompt_tokens(99);
            }),
            grpc::StatusCode::FAILED_PRECONDITION);
  EXPECT_EQ(code([](auto& r) { r.set_local_prefill(false); }), grpc::StatusCode::FAILED_PRECONDITION);
  // None of these has touched the lease.
  EXPECT_EQ(code([](auto&) {}), grpc::StatusCode::OK);
  EXPECT_TRUE(cluster.Settles());
  ASSERT_TRUE(cluster.Reserve(reserve, &lease).ok());
  EXPECT_EQ(code([](auto& r) { r.set_prompt_ids(50, 4'000'000'000u); }), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_TRUE(cluster.Settles());
}

// The router's Generate and Release travel on streams of their own, and may meet.
TEST(LocalPrefillTest, AGenerateThatMeetsItsLeasesEndIsEnded) {
  Cluster cluster(WireKind::kLoopbackAm);
  for (int i = 0; i < 200; ++i) {
    const v1::ReserveRequest reserve =
        i % 2 == 0 ? LocalReserve(cluster, 10, 2, "bf16") : cluster.ReserveFor(10, 2, "bf16");
    v1::Lease lease;
    ASSERT_TRUE(cluster.Reserve(reserve, &lease).ok());
    std::thread releasing([&] { cluster.decode().Release({lease.lease_id(), lease.generation()}, "test"); });
    v1::DecodeRequest request = LocalRequest(reserve, lease, Prompt(10), Sampling(2));
    request.set_local_prefill(reserve.local_prefill());
    const grpc::Status status = Generate(cluster, request, nullptr, seconds(20)).status;
    releasing.join();
    ASSERT_NE(status.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED) << i;
  }
  EXPECT_TRUE(cluster.Settles());
}

// A lack of room is told by Reserve, which the router waits for, and never later.
TEST(LocalPrefillTest, WhatIsReservedHasAllTheRoomThatItNeeds) {
  DecodeCore::Options options = Cluster::DecodeOptions(30'000, 3 << 20);
  options.swap_bytes = 0;
  options.prefix_cache_share = 0.5;
  Cluster cluster(WireKind::kLoopbackAm, options);
  int n_granted = 0, n_refused = 0, n_never = 0;
  for (const std::string profile : {"bf16", "q4"}) {
    for (int n = 64; n < 1900; n += 150) {
      SCOPED_TRACE(profile + " " + std::to_string(n));
      // Two that wait for each other's beginning of the prompt would both count on it.
      std::vector<std::pair<v1::ReserveRequest, v1::Lease>> held;
      for (int i = 0; i < 2; ++i) {
        v1::ReserveRequest reserve = LocalReserve(cluster, n, 4, profile);
        const std::vector<std::int32_t> prompt = Prompt(n);
        reserve.mutable_prompt_ids()->Assign(prompt.begin(), prompt.end());
        v1::ReserveResponse response;
        const grpc::Status status = cluster.Reserve(reserve, &response);
        n_refused += status.error_code() == grpc::StatusCode::RESOURCE_EXHAUSTED;
        n_never += status.error_code() == grpc::StatusCode::OUT_OF_RANGE;
        if (!status.ok()) continue;
        EXPECT_EQ(response.n_cached_tokens(), 0U) << "nothing is taken from the cache, so nothing is promised";
        held.emplace_back(reserve, response.lease());
      }
      for (const auto& [reserve, lease] : held) {
        const LocalOutcome outcome = Generate(cluster, LocalRequest(reserve, lease, Prompt(n), Sampling(4)));
        EXPECT_TRUE(outcome.status.ok()) << outcome.status.error_message();
        ++n_granted;
      }
      EXPECT_TRUE(cluster.Settles());
    }
  }
  EXPECT_GT(n_granted, 0);
  EXPECT_GT(n_refused, 0);
  EXPECT_GT(n_never, 0);
}

// A prefill worker that was told of the same lease is refused, and harms nothing.
TEST(LocalPrefillTest, NoWriterMayComeAfterwards) {
  Cluster cluster(WireKind::kLoopbackAm, 300);
  const v1::ReserveRequest reserve = LocalReserve(cluster, 300, 200, "bf16");
  v1::Lease lease;
  ASSERT_TRUE(cluster.Reserve(reserve, &lease).ok());
  Outcome late;
  std::thread writer;
  const LocalOutcome outcome = Generate(cluster, LocalRequest(reserve, lease, Prompt(300), Sampling(200)),
                                        [&](const v1::DecodeEvent& event, grpc::ClientContext&) {
                                          if (!event.has_admitted()) return;
                                          writer = std::thread([&] {
                                            grpc::ClientContext context;
                                            context.set_deadline(std::chrono::system_clock::now() + seconds(30));
                                            v1::PrefillRequest prefill =
                                                cluster.PrefillFor(reserve, lease, Prompt(300), Sampling(200));
                                            late.prefill = cluster.RunPrefill(context, prefill);
                                          });
                                        });
  writer.join();
  ASSERT_TRUE(outcome.status.ok()) << outcome.status.error_message();
  EXPECT_EQ(outcome.ids, Alone("bf16", Prompt(300), Sampling(200)).ids);
  EXPECT_EQ(late.prefill.error_code(), grpc::StatusCode::FAILED_PRECONDITION) << late.prefill.error_message();
  EXPECT_TRUE(cluster.Settles());
}

// More output than there is memory for: the requests take turns at the blocks, and every one gets its own tokens.
TEST(DecodePressureTest, RequestsThatOutgrowTheMemoryAllEnd) {
  const KvFormat& format = *TheModels().decode->formats().at("bf16");
  constexpr int kRequests = 6, kTokens = 600;
  DecodeCore::Options options = Cluster::DecodeOptions(30'000, 0);
  // All prompts fit with their headroom, not half of the outputs.
  options.kv_bytes = 3 << 20;
  ASSERT_GT(options.kv_bytes, kRequests * SequenceKv::BytesNeeded(format, 64 + 64, 1));
  ASSERT_LT(options.kv_bytes, kRequests * SequenceKv::BytesNeeded(format, 64 + kTokens, 1) / 2);
  Cluster cluster(WireKind::kLoopbackAm, options);
  std::vector<v1::ReserveRequest> reserves;
  std::vector<v1::Lease> leases(kRequests);
  for (int i = 0; i < kRequests; ++i) {
    reserves.push_back(LocalReserve(cluster, 60 + i, kTokens, "bf16"));
    const grpc::Status status = cluster.Reserve(reserves.back(), &leases[static_cast<std::size_t>(i)]);
    ASSERT_TRUE(status.ok()) << status.error_message();
  }
  std::vector<LocalOutcome> outcomes(kRequests);
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < kRequests; ++i) {
    threads.emplace_back([&, i] {
      outcomes[i] =
          Generate(cluster, LocalRequest(reserves[i], leases[i], Prompt(60 + static_cast<int>(i)), Sampling(kTokens)));
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (std::size_t i = 0; i < kRequests; ++i) {
    ASSERT_TRUE(outcomes[i].status.ok()) << outcomes[i].status.error_message();
    EXPECT_EQ(outcomes[i].ids, Alone("bf16", Prompt(60 + static_cast<int>(i)), Sampling(kTokens)).ids);
  }
  cluster.decode().UpdateGauges(cluster.decode_metrics());
  const std::string page = cluster.decode_metrics().Render();
  EXPECT_NE(page.find("vllm:num_preemptions_total{model_name=\"test\"} "), std::string::npos) << page;
  EXPECT_EQ(page.find("vllm:num_preemptions_total{model_name=\"test\"} 0"), std::string::npos) << "nothing was tried";
  EXPECT_NE(page.find("vllm:num_requests_swapped{model_name=\"test\"} 0"), std::string::npos);
  EXPECT_TRUE(cluster.Settles());
}

}  // namespace
}  // namespace zeroc
