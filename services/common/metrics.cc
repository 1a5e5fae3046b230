#include "services/common/metrics.h"

#include <prometheus/counter.h>
#include <prometheus/gauge.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>
#include <prometheus/text_serializer.h>

#include <utility>
#include <vector>

#include "libzeroc/base/mutex.h"

namespace zeroc {
namespace {

using Labels = std::map<std::string, std::string>;
using Buckets = prometheus::Histogram::BucketBoundaries;

// vLLM's buckets, so that its dashboards' quantiles stay comparable.
const Buckets& TtftBuckets() {
  static const Buckets buckets{.001, .005, .01, .02, .04, .06, .08, .1, .25, .5,  .75,
                               1,    2.5,  5,   7.5, 10,  20,  40,  80, 160, 640, 2560};
  return buckets;
}
const Buckets& ItlBuckets() {
  static const Buckets buckets{.01, .025, .05, .075, .1, .15, .2, .3, .4, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80};
  return buckets;
}
const Buckets& E2eBuckets() {
  static const Buckets buckets{.3, .5, .8, 1,  1.5, 2,   2.5, 5,   10,   15,  20,
                               30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680};
  return buckets;
}
// A phase can be a millisecond (reserve) or an hour (decode of a long answer): 1-2-5 steps over that range.
const Buckets& PhaseBuckets() {
  static const Buckets buckets{.0005, .001, .002, .005, .01, .02, .05, .1,  .2,   .5,   1,
                               2,     5,    10,   20,   50,  100, 200, 500, 1000, 2000, 5000};
  return buckets;
}
// Of vLLM's nixl_xfer_time_seconds, and on to the minute that a slow link takes.
const Buckets& TransferBuckets() {
  static const Buckets buckets{.001, .005, .01, .025, .05, .075, .1, .2, .3, .5, .75, 1, 2.5, 5, 10, 30, 60};
  return buckets;
}
// vLLM's, too.
const Buckets& IterationBuckets() {
  static const Buckets buckets{1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384};
  return buckets;
}
const Buckets& RatioBuckets() {
  static const Buckets buckets{1, 1.5, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16};
  return buckets;
}

// One family whose members are made at first use and looked up by their labels after.
template <typename T>
class Series {
 public:
  template <typename Builder>
  Series(prometheus::Registry& registry, Builder builder, const char* name, const char* help, Labels constant = {},
         const Buckets* buckets = nullptr)
      : family_(builder.Name(name).Help(help).Labels(constant).Register(registry)), buckets_(buckets) {}

  T& Get(const Labels& labels = {}) {
    MutexLock lock(mu_);
    T*& member = members_[labels];
    if (member == nullptr) {
      if constexpr (std::is_same_v<T, prometheus::Histogram>) {
        member = &family_.Add(labels, *buckets_);
      } else {
        member = &family_.Add(labels);
      }
    }
    return *member;
  }

 private:
  prometheus::Family<T>& family_;
  const Buckets* buckets_;
  Mutex mu_;
  std::map<Labels, T*> members_ ZEROC_GUARDED_BY(mu_);
};

using Counters = Series<prometheus::Counter>;
using Gauges = Series<prometheus::Gauge>;
using Histograms = Series<prometheus::Histogram>;

}  // namespace

struct Metrics::Families {
  explicit Families(const std::string& model_name) : vllm{{"model_name", model_name}} {}

  Counters MakeCounter(const char* name, const char* help, Labels constant = {}) {
    return {registry, prometheus::BuildCounter(), name, help, std::move(constant)};
  }
  Gauges MakeGauge(const char* name, const char* help, Labels constant = {}) {
    return {registry, prometheus::BuildGauge(), name, help, std::move(constant)};
  }
  Histograms MakeHistogram(const char* name, const char* help, const Buckets& buckets, Labels constant = {}) {
    return {registry, prometheus::BuildHistogram(), name, help, std::move(constant), &buckets};
  }

  const Labels vllm;
  prometheus::Registry registry;

  Histograms jct = MakeHistogram("zeroc_request_jct_seconds", "Arrival at the router to the last token.", E2eBuckets());
  Histograms phase = MakeHistogram("zeroc_jct_phase_seconds", "Parts of the JCT; they add up to it.", PhaseBuckets());
  Counters decisions = MakeCounter("zeroc_policy_decisions_total", "Profiles chosen, and why.");
  Counters prefix_expected =
      MakeCounter("zeroc_policy_prefix_tokens_total", "Prompt tokens expected in the prefix cache of chosen workers.");
  Gauges ppl_increase = MakeGauge("zeroc_ppl_increase", "Perplexity increase of the last request, absolute.");
  Counters retries = MakeCounter("zeroc_retries_total", "Attempts made again because a worker failed.");
  Gauges workers = MakeGauge("zeroc_workers", "Workers registered and healthy.");

  Gauges routers_registered = MakeGauge("zeroc_routers_registered", "Routers that have accepted this worker.");
  Gauges prefill_backlog = MakeGauge("zeroc_prefill_backlog_tokens", "Prompt tokens queued and in work.");

  Counters kv_bytes = MakeCounter("zeroc_kv_bytes_total", "Prompt KV bytes: as bf16, resident packed, sent.");
  Counters sp_bytes = MakeCounter("zeroc_sp_bytes_total", "Bytes sent to other ranks of a prefill group.");
  Histograms kv_ratio = MakeHistogram("zeroc_kv_compression_ratio", "KV bytes raw / wire per request.", RatioBuckets());
  Histograms kv_transfer =
      MakeHistogram("zeroc_kv_transfer_seconds", "First to last KV byte per request.", TransferBuckets());
  Gauges kv_blocks = MakeGauge("zeroc_kv_blocks", "KV blocks by state.");
  Counters leases_expired = MakeCounter("zeroc_kv_leases_expired_total", "Leases that ended by expiry.");
  Counters checksum_failures = MakeCounter("zeroc_kv_checksum_failures_total", "KV blocks with a wrong checksum.");
  Gauges runtime = MakeGauge("zeroc_runtime_info", "What was chosen at start, as labels.");

  Histograms ttft = MakeHistogram("vllm:time_to_first_token_seconds", "Time to first token.", TtftBuckets(), vllm);
  Histograms itl = MakeHistogram("vllm:inter_token_latency_seconds", "Time between tokens.", ItlBuckets(), vllm);
  Histograms e2e = MakeHistogram("vllm:e2e_request_latency_seconds", "End-to-end latency.", E2eBuckets(), vllm);
  Histograms queue = MakeHistogram("vllm:request_queue_time_seconds", "Time in queues.", E2eBuckets(), vllm);
  Histograms prefill = MakeHistogram("vllm:request_prefill_time_seconds", "Time in prefill.", E2eBuckets(), vllm);
  Histograms decode = MakeHistogram("vllm:request_decode_time_seconds", "Time in decode.", E2eBuckets(), vllm);
  Gauges running = MakeGauge("vllm:num_requests_running", "Requests running.", vllm);
  Gauges waiting = MakeGauge("vllm:num_requests_waiting", "Requests waiting.", vllm);
  Gauges swapped = MakeGauge("vllm:num_requests_swapped", "Requests preempted, their KV swapped out.", vllm);
  Counters preemptions = MakeCounter("vllm:num_preemptions_total", "Preemptions.", vllm);
  Histograms iteration =
      MakeHistogram("vllm:iteration_tokens_total", "Tokens of one engine step.", IterationBuckets(), vllm);
  Gauges kv_usage = MakeGauge("vllm:kv_cache_usage_perc", "KV cache in use, 0 to 1.", vllm);
  Counters prompt_tokens = MakeCounter("vllm:prompt_tokens_total", "Prompt tokens.", vllm);
  Counters generation_tokens = MakeCounter("vllm:generation_tokens_total", "Generated tokens.", vllm);
  Counters prefix_queries =
      MakeCounter("vllm:prefix_cache_queries_total", "Prompt tokens looked up in the prefix cache.", vllm);
  Counters prefix_hits = MakeCounter("vllm:prefix_cache_hits_total", "Prompt tokens found there.", vllm);
  Gauges prefix_bytes = MakeGauge("zeroc_prefix_cache_bytes", "KV bytes that the prefix cache holds.");
  Counters success = MakeCounter("vllm:request_success_total", "Requests that ended well.", vllm);
};

Metrics::Metrics(const std::string& model_name) : families_(std::make_unique<Families>(model_name)) {}
Metrics::~Metrics() = default;

std::string Metrics::Render() const { return prometheus::TextSerializer().Serialize(families_->registry.Collect()); }

void Metrics::ObserveJct(std::string_view profile, std::string_view outcome, double seconds) {
  families_->jct.Get({{"profile", std::string(profile)}, {"outcome", std::string(outcome)}}).Observe(seconds);
}
void Metrics::ObservePhase(std::string_view phase, double seconds) {
  families_->phase.Get({{"phase", std::string(phase)}}).Observe(seconds);
}
void Metrics::CountDecision(std::string_view profile, std::string_view reason) {
  families_->decisions.Get({{"profile", std::string(profile)}, {"reason", std::string(reason)}}).Increment();
}
void Metrics::AddPrefixExpected(std::string_view role, std::uint64_t n_tokens) {
  families_->prefix_expected.Get({{"role", std::string(role)}}).Increment(static_cast<double>(n_tokens));
}
void Metrics::SetPplIncrease(std::string_view kind, double absolute) {
  families_->ppl_increase.Get({{"kind", std::string(kind)}}).Set(absolute);
}
void Metrics::CountRetry(std::string_view stage, int n) {
  families_->retries.Get({{"stage", std::string(stage)}}).Increment(n);
}
void Metrics::SetWorkers(std::string_view role, double n) {
  families_->workers.Get({{"role", std::string(role)}}).Set(n);
}

void Metrics::SetRoutersRegistered(double n) { families_->routers_registered.Get().Set(n); }
void Metrics::SetPrefillBacklog(double tokens) { families_->prefill_backlog.Get().Set(tokens); }

void Metrics::AddKvBytes(std::string_view stage, std::uint64_t bytes) {
  families_->kv_bytes.Get({{"stage", std::string(stage)}}).Increment(static_cast<double>(bytes));
}
void Metrics::AddSpBytes(std::string_view scheme, std::uint64_t bytes) {
  families_->sp_bytes.Get({{"scheme", std::string(scheme)}}).Increment(static_cast<double>(bytes));
}
void Metrics::ObserveKvCompressionRatio(double ratio) { families_->kv_ratio.Get().Observe(ratio); }
void Metrics::ObserveKvTransfer(double seconds) { families_->kv_transfer.Get().Observe(seconds); }
void Metrics::SetKvBlocks(std::string_view state, double n) {
  families_->kv_blocks.Get({{"state", std::string(state)}}).Set(n);
}
void Metrics::CountLeaseExpired(int n) { families_->leases_expired.Get().Increment(n); }
void Metrics::CountChecksumFailure(int n) { families_->checksum_failures.Get().Increment(n); }

void Metrics::ObserveTimeToFirstToken(double seconds) { families_->ttft.Get().Observe(seconds); }
void Metrics::ObserveInterTokenLatency(double seconds) { families_->itl.Get().Observe(seconds); }
void Metrics::ObserveE2eLatency(double seconds) { families_->e2e.Get().Observe(seconds); }
void Metrics::ObserveQueueTime(double seconds) { families_->queue.Get().Observe(seconds); }
void Metrics::ObservePrefillTime(double seconds) { families_->prefill.Get().Observe(seconds); }
void Metrics::ObserveDecodeTime(double seconds) { families_->decode.Get().Observe(seconds); }
void Metrics::SetRequestsRunning(double n) { families_->running.Get().Set(n); }
void Metrics::SetRequestsWaiting(double n) { families_->waiting.Get().Set(n); }
void Metrics::SetRequestsSwapped(double n) { families_->swapped.Get().Set(n); }
void Metrics::CountPreemption(int n) { families_->preemptions.Get().Increment(n); }
void Metrics::ObserveIterationTokens(int n) { families_->iteration.Get().Observe(n); }
void Metrics::SetKvCacheUsage(double share) { families_->kv_usage.Get().Set(share); }
void Metrics::AddPromptTokens(std::uint64_t n) { families_->prompt_tokens.Get().Increment(static_cast<double>(n)); }
void Metrics::AddGenerationTokens(std::uint64_t n) {
  families_->generation_tokens.Get().Increment(static_cast<double>(n));
}
void Metrics::AddPrefixCacheLookup(std::uint64_t n_queried, std::uint64_t n_hit) {
  families_->prefix_queries.Get().Increment(static_cast<double>(n_queried));
  families_->prefix_hits.Get().Increment(static_cast<double>(n_hit));
}
void Metrics::SetPrefixCacheBytes(double bytes) { families_->prefix_bytes.Get().Set(bytes); }
void Metrics::CountSuccess(std::string_view finished_reason) {
  families_->success.Get({{"finished_reason", std::string(finished_reason)}}).Increment();
}

void Metrics::SetRuntimeInfo(const std::map<std::string, std::string>& labels) {
  families_->runtime.Get(labels).Set(1);
}

}  // namespace zeroc
