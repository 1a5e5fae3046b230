// Every metric of ZeroC's services, as named methods. Names, labels and units: docs/metrics.md.
//
// Thread-safe. A metric appears on the page after its first call, so each service shows only what it has. Base units:
// seconds, bytes, ratios. Label values come from small fixed sets (profiles, reasons, status codes), never from
// clients.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>

namespace zeroc {

class Metrics {
 public:
  // model_name is the constant label that vLLM's dashboards group by.
  explicit Metrics(const std::string& model_name);
  ~Metrics();
  Metrics(const Metrics&) = delete;
  Metrics& operator=(const Metrics&) = delete;

  // The page, Prometheus text format 0.0.4.
  std::string Render() const;

  // ---- one request, at the router ----
  void ObserveJct(std::string_view profile, std::string_view outcome, double seconds);
  void ObservePhase(std::string_view phase, double seconds);  // queue, reserve, prefill, wire, admit, decode
  void CountDecision(std::string_view profile, std::string_view reason);
  // Prompt tokens that the router expects in the prefix cache of the worker that it chose. n = 0: as CountRetry.
  void AddPrefixExpected(std::string_view role, std::uint64_t n_tokens);  // prefill, decode
  void SetPplIncrease(std::string_view kind, double absolute);  // budget, predicted, audited; of the last request
  // n = 0 puts the series on the page, so that a rate is known from the first event on.
  void CountRetry(std::string_view stage, int n = 1);  // reserve, prefill, decode
  void SetWorkers(std::string_view role, double n);    // registered and healthy

  // ---- one worker ----
  void SetRoutersRegistered(double n);    // routers that have accepted this worker
  void SetPrefillBacklog(double tokens);  // prompt tokens queued and in work

  // ---- keys and values ----
  void AddKvBytes(std::string_view stage, std::uint64_t bytes);   // raw, packed, wire
  void AddSpBytes(std::string_view scheme, std::uint64_t bytes);  // to other ranks of a prefill group
  void ObserveKvCompressionRatio(double ratio);                   // raw / wire of one request
  void ObserveKvTransfer(double seconds);                         // first byte to last byte of one request
  void SetKvBlocks(std::string_view state, double n);             // used, free, leased, resident, quarantined
  void CountLeaseExpired(int n = 1);                              // n = 0: as CountRetry
  void CountChecksumFailure(int n = 1);

  // ---- the shared meanings, by vLLM's names ----
  void ObserveTimeToFirstToken(double seconds);
  void ObserveInterTokenLatency(double seconds);
  void ObserveE2eLatency(double seconds);
  void ObserveQueueTime(double seconds);
  void ObservePrefillTime(double seconds);
  void ObserveDecodeTime(double seconds);
  void SetRequestsRunning(double n);
  void SetRequestsWaiting(double n);
  void SetRequestsSwapped(double n);   // preempted, their KV in ordinary memory
  void CountPreemption(int n = 1);     // n = 0: as CountRetry
  void ObserveIterationTokens(int n);  // of one step of an engine
  void SetKvCacheUsage(double share);  // [0, 1]
  void AddPromptTokens(std::uint64_t n);
  void AddGenerationTokens(std::uint64_t n);
  void AddPrefixCacheLookup(std::uint64_t n_queried, std::uint64_t n_hit);  // tokens of one prompt
  void SetPrefixCacheBytes(double bytes);
  void CountSuccess(std::string_view finished_reason);  // stop, length

  // What was chosen at start (backend, isa, transport_tls, ..), as labels of zeroc_runtime_info = 1. Call once.
  void SetRuntimeInfo(const std::map<std::string, std::string>& labels);

 private:
  struct Families;
  std::unique_ptr<Families> families_;
};

}  // namespace zeroc
