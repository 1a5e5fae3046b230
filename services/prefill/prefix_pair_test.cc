// The prefix caches of both workers: what a prompt shares with an earlier one is neither computed nor sent again, its
// tokens are those of a cold run, and every block comes back.
#include <algorithm>
#include <cstdio>

#include "libzeroc/engine/local_generator.h"
#include "services/prefill/worker_pair_testing.h"

namespace zeroc {
namespace {

using testing::Cluster;
using testing::Must;
using testing::Outcome;
using testing::Prompt;
using testing::TheModels;
using testing::WireKind;

constexpr int kMaxTokens = 12;
using Tokens = std::vector<std::int32_t>;

Tokens Fork(const Tokens& tokens, int n_same, int n_more) {
  Tokens fork(tokens.begin(), tokens.begin() + n_same);
  for (const std::int32_t id : Prompt(n_more)) fork.push_back(id);
  return fork;
}

struct Answer {
  Outcome outcome;
  int n_present = 0;  // tokens that decode did not want
};

Answer Ask(Cluster& cluster, const Tokens& prompt, const std::string& profile) {
  Answer answer;
  v1::ReserveRequest reserve = cluster.ReserveFor(static_cast<int>(prompt.size()), kMaxTokens, profile);
  reserve.mutable_prompt_ids()->Assign(prompt.begin(), prompt.end());
  v1::ReserveResponse reserved;
  const grpc::Status status = cluster.Reserve(reserve, &reserved);
  EXPECT_TRUE(status.ok()) << status.error_message();
  answer.n_present = static_cast<int>(reserved.n_cached_tokens());
  answer.outcome = cluster.Run(reserve, reserved.lease(), prompt, testing::Sampling(kMaxTokens));
  EXPECT_TRUE(answer.outcome.prefill.ok()) << answer.outcome.prefill.error_message();
  EXPECT_TRUE(answer.outcome.decode.ok()) << answer.outcome.decode.error_message();
  EXPECT_TRUE(cluster.Settles());
  return answer;
}

Tokens Alone(const Tokens& prompt, const std::string& profile) {
  SamplingParams sampling;
  sampling.max_tokens = kMaxTokens;
  sampling.temperature = 0;
  sampling.seed = 20260131;
  sampling.ignore_eos = true;
  const auto format = TheModels().alone->formats().at(profile);
  return Must(GenerateLocally(TheModels().alone->model(), format, prompt, sampling, nullptr, 128)).ids;
}

class PrefixPairTest : public ::testing::TestWithParam<WireKind> {};

TEST_P(PrefixPairTest, OnlyTheSuffixIsComputedAndSent) {
  for (const std::string profile : {"bf16", "q4", "z3"}) {
    SCOPED_TRACE(profile);
    Cluster cluster(GetParam());
    const KvFormat& format = *TheModels().alone->formats().at(profile);
    const Tokens first = Prompt(900);
    const Answer cold = Ask(cluster, first, profile);
    EXPECT_EQ(cold.n_present, 0);
    EXPECT_EQ(cold.outcome.first.n_cached_tokens(), 0u);
    EXPECT_EQ(cold.outcome.ids, Alone(first, profile));
    const std::uint64_t all_bytes = cold.outcome.done.kv_bytes().wire();
    EXPECT_EQ(cold.outcome.done.kv_bytes().packed(), all_bytes);

    // The second of a family leaves a state where it parts from the first, so look at the third.
    Ask(cluster, Fork(first, 700, 150), profile);
    const Tokens prompt = Fork(first, 700, 200);
    const Answer warm = Ask(cluster, prompt, profile);
    EXPECT_EQ(warm.outcome.ids, Alone(prompt, profile));
    // Prefill knows what they have in common from the blocks that last where it left the first one, at 896.
    const int n_common = std::min(700, 64 * format.LastingBlocksAt(896));
    EXPECT_EQ(warm.outcome.first.n_cached_tokens(), static_cast<std::uint32_t>(n_common / 128 * 128));
    const int n_lasting = std::min(700 / 64, format.LastingBlocksAt(900));
    EXPECT_EQ(warm.n_present, 64 * n_lasting);
    // As many bytes are resident as of the cold prompt of that length; those of the present tokens did not travel.
    EXPECT_EQ(warm.outcome.admitted.kv_bytes().packed(), all_bytes);
    EXPECT_EQ(warm.outcome.done.kv_bytes().packed(), all_bytes);
    std::uint64_t present_bytes = 0;
    for (std::size_t l = 0; l < static_cast<std::size_t>(format.n_layers); ++l) {
      present_bytes +=
          static_cast<std::uint64_t>(n_lasting) *
          static_cast<std::uint64_t>((format.packs ? format.tiers.back().layouts[l] : format.exact).block_bytes);
      if (format.packs && format.sink_tokens > 0) present_bytes += static_cast<std::uint64_t>(format.sink.block_bytes);
    }
    EXPECT_EQ(warm.outcome.done.kv_bytes().wire(), all_bytes - present_bytes);
    if (GetParam() != WireKind::kLoopbackPut) {
      EXPECT_EQ(warm.outcome.admitted.kv_bytes().wire(), all_bytes - present_bytes);
    }
    // The same again: prefill resumes at its last whole chunk before the end.
    const Answer again = Ask(cluster, prompt, profile);
    EXPECT_EQ(again.outcome.first.n_cached_tokens(), 896u);
    EXPECT_EQ(again.outcome.ids, warm.outcome.ids);

    const std::string page = cluster.prefill_metrics().Render();
    EXPECT_NE(page.find("vllm:prefix_cache_queries_total{model_name=\"test\"} 3550"), std::string::npos) << page;
    EXPECT_NE(page.find("vllm:prefix_cache_hits_total{model_name=\"test\"}"), std::string::npos);
    EXPECT_NE(cluster.decode_metrics().Render().find("vllm:prefix_cache_hits_total"), std::string::npos);
    for (auto* fill : {+[](Cluster&c, v1::WorkerLoad*load) { c.prefill().FillLoad(load); },
                       +[](Cluster&c, v1::WorkerLoad*load) { c.decode().FillLoad(load); }}) {
      v1::WorkerLoad load;
      fill(cluster, &load);
      EXPECT_GT(load.prefix_hashes_size(), 0);
    }
  }
}

// Only prefill has a cache: nothing is present, all blocks travel, those that were not computed too.
TEST_P(PrefixPairTest, WithoutIdsInTheReservationAllBlocksTravel) {
  Cluster cluster(GetParam());
  const Tokens prompt = Prompt(700);
  for (const unsigned n_cached : {0u, 640u}) {
    const v1::ReserveRequest reserve = cluster.ReserveFor(700, kMaxTokens, "q4");
    v1::Lease lease;
    ASSERT_TRUE(cluster.Reserve(reserve, &lease).ok());
    const Outcome outcome = cluster.Run(reserve, lease, prompt, testing::Sampling(kMaxTokens));
    ASSERT_TRUE(outcome.prefill.ok()) << outcome.prefill.error_message();
    ASSERT_TRUE(outcome.decode.ok()) << outcome.decode.error_message();
    EXPECT_EQ(outcome.first.n_cached_tokens(), n_cached);
    EXPECT_EQ(outcome.done.kv_bytes().wire(), outcome.done.kv_bytes().packed());
    EXPECT_EQ(outcome.ids, Alone(prompt, "q4"));
    EXPECT_TRUE(cluster.Settles());
  }
}

INSTANTIATE_TEST_SUITE_P(Wires, PrefixPairTest,
                         ::testing::Values(WireKind::kLoopbackAm, WireKind::kLoopbackPut, WireKind::kUcxTcp),
                         [](const ::testing::TestParamInfo<WireKind>& test) { return testing::WireName(test.param); });

// The table of docs/prefix_cache.md.
TEST(PrefixPairBytesTest, StatesOfTheDemoModel) {
  for (const auto& [name, format] : TheModels().alone->formats()) {
    const std::uint64_t state = PrefixCache::StateBytes(*format), lasting = PrefixCache::LastingBytes(*format);
    const int spacing = PrefixCache::StateSpacing(*format);
    std::printf("| `%s` | %llu | %llu | %d |\n", name.c_str(), static_cast<unsigned long long>(lasting),
                static_cast<unsigned long long>(state), spacing);
    EXPECT_LE(4 * state, lasting * static_cast<std::uint64_t>(spacing) / 64) << name;
  }
}

TEST(PrefixPairLimitsTest, AFullCacheRefusesNothing) {
  constexpr std::uint64_t kBytes = 6 << 20;
  const auto fits = [](Cluster& cluster, int n_tokens) {
    const v1::ReserveRequest reserve = cluster.ReserveFor(n_tokens, 8, "bf16");
    v1::Lease lease;
    if (!cluster.Reserve(reserve, &lease).ok()) return false;
    cluster.decode().Release({lease.lease_id(), lease.generation()}, "test");
    EXPECT_TRUE(cluster.Settles());
    return true;
  };
  int most = 64;
  {
    Cluster fresh(WireKind::kLoopbackAm, 30'000, kBytes);
    while (most + 64 + 8 <= TheModels().decode->config().max_positions && fits(fresh, most + 64)) most += 64;
  }
  ASSERT_GT(most, 600);
  Cluster cluster(WireKind::kLoopbackAm, 30'000, kBytes);
  for (const int n : {most - 64, 500, 600}) Ask(cluster, Fork(Prompt(n), n - 1, 1), "bf16");
  EXPECT_TRUE(fits(cluster, most));
  EXPECT_EQ(cluster.decode().usage().n_blocks_used, 0u);
}

TEST(PrefixPairLimitsTest, APromptThatIsNotTheReservedOneIsRefused) {
  Cluster cluster(WireKind::kLoopbackAm);
  const Tokens prompt = Prompt(300);
  v1::ReserveRequest reserve = cluster.ReserveFor(300, 8, "q4");
  reserve.mutable_prompt_ids()->Assign(prompt.begin(), prompt.end() - 1);
  v1::ReserveResponse reserved;
  EXPECT_EQ(cluster.Reserve(reserve, &reserved).error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  reserve.mutable_prompt_ids()->Assign(prompt.begin(), prompt.end());
  ASSERT_TRUE(cluster.Reserve(reserve, &reserved).ok());
  Tokens other = prompt;
  ++other[7];
  const Outcome outcome = cluster.Run(reserve, reserved.lease(), other, testing::Sampling(8));
  EXPECT_EQ(outcome.prefill.error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  EXPECT_NE(outcome.prefill.error_message().find("another prompt"), std::string::npos);
  EXPECT_TRUE(cluster.Settles());
}

}  // namespace
}  // namespace zeroc
