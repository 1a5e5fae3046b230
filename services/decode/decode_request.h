// One lease of the decode worker and the request it serves. Part of decode_core.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "services/decode/decode_core.h"

namespace zeroc {

std::int64_t DecodeNowNs();  // monotonic

// The engines call it as a listener; everything that is not constant or marked is guarded by the core's mutex.
struct DecodeCore::Request final : DecodeListener, PrefillListener {
  DecodeCore* core = nullptr;
  LeaseKey key;
  std::string request_id;
  std::uint32_t attempt = 0;
  int priority = 0;
  SequenceId sequence{};
  int n_prompt_tokens = 0;
  bool local_prefill = false;
  std::uint64_t kv_bytes = 0;  // of the prompt, resident once committed

  // What Generate brought; constant from then on.
  std::shared_ptr<EventSink<v1::DecodeEvent>> sink;
  SamplingParams sampling;
  std::vector<std::int32_t> prompt;
  int n_streamed = 0;
  std::int64_t arrived_ns = 0;

  std::optional<LeaseReady> ready;
  bool started = false;

  // Engine thread.
  std::int64_t admitted_ns = 0;
  std::optional<PrefillJobId> prefill_job;  // of a prompt that is computed here
  std::int64_t started_ns = 0;              // likewise
  std::int64_t computed_ns = 0;

  void OnToken(const SampledToken& token) override;
  void OnFinished(FinishReason reason) override;
  // Of a prompt that is computed here; nothing is sent, so blocks are nobody's news.
  void OnStarted(int n_cached_tokens) override;
  void OnBlocksReady(const SequenceKv&, const ReadyBlocks&) override {}
  void OnFirstToken(const SequenceKv& kv, const SampledToken& token) override;

  void OnFailed(const Status& status) override;  // of either
};

}  // namespace zeroc
