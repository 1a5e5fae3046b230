// Decode: continuous batching over received, packed KV. Every Step runs one token of every admitted sequence.
//
// Single-threaded: one loop calls Step and every other method (EngineThread carries calls over).
// A sequence is reserved first (its blocks for prompt and output are taken, so nothing fails later for want of memory),
// filled by the wire, admitted, and released, by the owner, exactly once.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <vector>

#include "libzeroc/base/status.h"
#include "libzeroc/engine/sampler.h"
#include "libzeroc/kv/sequence_kv.h"
#include "libzeroc/model/transformer.h"

namespace zeroc {

enum class SequenceId : std::uint64_t {};

enum class FinishReason : std::uint8_t { kStop = 1, kLength = 2 };  // as proto zeroc.v1.FinishReason

// Called from Step, on the engine's thread. A listener may call Release from inside.
class DecodeListener {
 public:
  virtual ~DecodeListener() = default;
  virtual void OnToken(const SampledToken& token) = 0;
  virtual void OnFinished(FinishReason reason) = 0;  // after the last OnToken; the blocks stay until Release
  virtual void OnFailed(const Status& status) = 0;
};

struct DecodeStart {
  SamplingParams sampling;
  std::vector<std::int32_t> prompt;  // only needed for repetition_penalty; may be empty otherwise
  int n_prompt_tokens = 0;
  SampledToken first_token;  // sampled at prefill; not reported again
  DecodeListener* listener = nullptr;
};

class DecodeEngine {
 public:
  struct Options {
    int batch_max = 64;  // sequences per step; more wait their turn, oldest first
  };

  DecodeEngine(Transformer& model, BlockPool& pool, const Options& options);
  ~DecodeEngine();

  // Takes the blocks for n_prompt_tokens + max_tokens. kResourceExhausted: not now. kInvalidArgument: beyond the model.
  Result<SequenceId> Reserve(std::shared_ptr<const KvFormat> format, int n_prompt_tokens, int max_tokens);

  // Null for an unknown id. Where the wire writes: kv(id)->BlocksAt(layer, n_prompt_tokens).
  const SequenceKv* kv(SequenceId id) const;

  // The wire is done and verified. Finishes at once when the first token ends the request. kNotFound,
  // kFailedPrecondition (admitted before).
  Status Admit(SequenceId id, DecodeStart start);

  // Stops the sequence if it runs and returns its blocks. Idempotent.
  void Release(SequenceId id);

  // One token for every running sequence. False when none runs.
  bool Step();

  int n_running() const;
  int n_reserved() const { return static_cast<int>(sequences_.size()); }  // all that hold blocks

 private:
  struct Sequence;
  void Deliver(SequenceId id, const SampledToken& token);

  Transformer& model_;
  BlockPool& pool_;
  Options options_;
  std::uint64_t next_id_ = 1;
  std::map<SequenceId, std::unique_ptr<Sequence>> sequences_;
  std::vector<SequenceId> running_;  // admission order
  std::size_t next_in_turn_ = 0;     // round-robin start when more run than batch_max
  std::vector<float> logits_;
};

// Whether `id` ends a request that has n_generated tokens, `id` included.
bool EndsRequest(const SamplingParams& sampling, std::span<const int> eos_ids, std::int32_t id, int n_generated,
                 FinishReason* reason);
// The same for a sampled token: a forced one ends the request only by its number.
bool EndsRequest(const SamplingParams& sampling, std::span<const int> eos_ids, const SampledToken& token,
                 int n_generated, FinishReason* reason);

}  // namespace zeroc
