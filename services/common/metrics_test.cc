#include "services/common/metrics.h"

#include <gtest/gtest.h>

#include <fstream>
#include <set>
#include <sstream>

namespace zeroc {
namespace {

void TouchEverything(Metrics& m) {
  m.ObserveJct("q4", "ok", 1);
  m.ObservePhase("wire", 0.1);
  m.CountDecision("q4", "budget");
  m.SetPplIncrease("budget", 0.1);
  m.CountRetry("reserve");
  m.SetWorkers("decode", 1);
  m.SetRoutersRegistered(2);
  m.SetPrefillBacklog(100);
  m.AddKvBytes("raw", 10);
  m.AddSpBytes("allgather", 7);
  m.ObserveKvCompressionRatio(4);
  m.ObserveKvTransfer(0.2);
  m.SetKvBlocks("free", 3);
  m.CountLeaseExpired();
  m.CountChecksumFailure();
  m.ObserveTimeToFirstToken(0.1);
  m.ObserveInterTokenLatency(0.01);
  m.ObserveE2eLatency(1);
  m.ObserveQueueTime(0.1);
  m.ObservePrefillTime(0.1);
  m.ObserveDecodeTime(0.1);
  m.SetRequestsRunning(1);
  m.SetRequestsWaiting(1);
  m.SetRequestsSwapped(1);
  m.CountPreemption();
  m.ObserveIterationTokens(64);
  m.SetKvCacheUsage(0.5);
  m.AddPromptTokens(5);
  m.AddGenerationTokens(5);
  m.CountSuccess("length");
  m.SetRuntimeInfo({{"transport", "am over tcp (lo)"}});
}

std::set<std::string> NamesOn(const std::string& page) {
  std::set<std::string> names;
  std::istringstream lines(page);
  for (std::string line; std::getline(lines, line);) {
    if (line.starts_with("# TYPE ")) names.insert(line.substr(7, line.find(' ', 7) - 7));
  }
  return names;
}

TEST(Metrics, ShowsOnlyWhatWasUsed) {
  Metrics metrics("m");
  EXPECT_TRUE(NamesOn(metrics.Render()).empty());
  metrics.CountLeaseExpired(0);
  EXPECT_EQ(NamesOn(metrics.Render()), std::set<std::string>{"zeroc_kv_leases_expired_total"});
}

TEST(Metrics, EveryMetricOfTheDesignIsThere) {
  Metrics metrics("m");
  TouchEverything(metrics);
  const std::set<std::string> expected{"zeroc_request_jct_seconds",
                                       "zeroc_jct_phase_seconds",
                                       "zeroc_kv_bytes_total",
                                       "zeroc_sp_bytes_total",
                                       "zeroc_kv_compression_ratio",
                                       "zeroc_kv_transfer_seconds",
                                       "zeroc_policy_decisions_total",
                                       "zeroc_ppl_increase",
                                       "zeroc_kv_blocks",
                                       "zeroc_kv_leases_expired_total",
                                       "zeroc_kv_checksum_failures_total",
                                       "zeroc_retries_total",
                                       "zeroc_workers",
                                       "zeroc_routers_registered",
                                       "zeroc_prefill_backlog_tokens",
                                       "zeroc_runtime_info",
                                       "vllm:time_to_first_token_seconds",
                                       "vllm:inter_token_latency_seconds",
                                       "vllm:e2e_request_latency_seconds",
                                       "vllm:request_queue_time_seconds",
                                       "vllm:request_prefill_time_seconds",
                                       "vllm:request_decode_time_seconds",
                                       "vllm:num_requests_running",
                                       "vllm:num_requests_waiting",
                                       "vllm:num_requests_swapped",
                                       "vllm:num_preemptions_total",
                                       "vllm:iteration_tokens_total",
                                       "vllm:kv_cache_usage_perc",
                                       "vllm:prompt_tokens_total",
                                       "vllm:generation_tokens_total",
                                       "vllm:request_success_total"};
  EXPECT_EQ(NamesOn(metrics.Render()), expected);
}

// The page of documentation is kept by this: a metric without an entry fails.
TEST(Metrics, EveryMetricIsDocumented) {
  std::ifstream file("docs/metrics.md");
  if (!file) GTEST_SKIP() << "not run from the project's root";
  std::stringstream text;
  text << file.rdbuf();
  Metrics metrics("m");
  TouchEverything(metrics);
  for (const std::string& name : NamesOn(metrics.Render())) {
    EXPECT_NE(text.str().find("`" + name), std::string::npos) << name << " is not in docs/metrics.md";
  }
}

TEST(Metrics, LabelsAndValuesAndBuckets) {
  Metrics metrics("demo");
  metrics.AddKvBytes("wire", 100);
  metrics.AddKvBytes("wire", 23);
  metrics.ObserveTimeToFirstToken(0.03);
  const std::string page = metrics.Render();
  EXPECT_NE(page.find("zeroc_kv_bytes_total{stage=\"wire\"} 123\n"), std::string::npos) << page;
  EXPECT_NE(page.find("vllm:time_to_first_token_seconds_bucket{model_name=\"demo\",le=\"0.02\"} 0\n"),
            std::string::npos)
      << page;
  EXPECT_NE(page.find("vllm:time_to_first_token_seconds_bucket{model_name=\"demo\",le=\"0.04\"} 1\n"),
            std::string::npos);
}

}  // namespace
}  // namespace zeroc
