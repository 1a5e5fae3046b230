// One request of the prefill worker: its transfer, its times, and the engine's calls about it. Part of prefill_core.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "libzeroc/engine/shared_prefill.h"
#include "services/prefill/prefill_core.h"

namespace zeroc {

std::int64_t PrefillNowNs();  // monotonic

// Lives until its Sender has ended and the engine has released its job, whichever is later.
struct PrefillCore::Request final : PrefillListener, std::enable_shared_from_this<Request> {
  Request(PrefillCore& core, Key key, Sink sink, Sender sender);

  PrefillCore& core;
  const Key key;
  const Sink sink;
  std::string decode_worker;
  SamplingParams sampling;
  int n_prompt_tokens = 0;
  int rank = 0, n_ranks = 1;
  // Set under core.mu_, once.
  PeerId peer = PeerId::kNone;
  std::shared_ptr<std::atomic<std::int64_t>> link_progress_ns;

  Mutex mu;
  Sender sender ZEROC_GUARDED_BY(mu);
  std::string transport ZEROC_GUARDED_BY(mu);
  bool first_token_final ZEROC_GUARDED_BY(mu) = false;  // decode is not needed
  std::int64_t arrived_ns = 0;
  std::int64_t started_ns ZEROC_GUARDED_BY(mu) = 0;
  int n_cached_tokens ZEROC_GUARDED_BY(mu) = 0;
  std::int64_t computed_ns ZEROC_GUARDED_BY(mu) = 0;
  std::int64_t wire_hidden_ns ZEROC_GUARDED_BY(mu) = 0;  // of the wire's time, until computed_ns

  std::string sp_scheme ZEROC_GUARDED_BY(mu);  // of a prompt that several ranks compute
  std::uint64_t sp_bytes ZEROC_GUARDED_BY(mu) = 0;

  // Engine thread.
  std::unique_ptr<SharedPrefill> shared;  // of such a prompt
  bool submitted = false;
  bool released = false;
  PrefillJobId job{};

  // Calls `step(sender, now)` and carries its actions out, in order, under the request's mutex.
  template <typename Step>
  void Drive(Step step) {
    MutexLock lock(mu);
    Do(step(sender, PrefillNowNs()));
  }
  void Do(SenderActions actions) ZEROC_REQUIRES(mu);
  v1::PrefillEvent Done() ZEROC_REQUIRES(mu);
  // Cancelled, or its transfer failed.
  bool Unwanted() {
    MutexLock lock(mu);
    return sender.stopping();
  }

  void OnStarted(int n_cached_tokens) override;
  void OnBlocksReady(const SequenceKv& kv, const ReadyBlocks& blocks) override;
  void OnFirstToken(const SequenceKv& kv, const SampledToken& token) override;
  void OnFailed(const Status& status) override;
};

}  // namespace zeroc
