// Prefill: computes prompts chunk by chunk, packs their KV on the way and samples the first token.
//
// Single-threaded: one loop calls Step and every other method (EngineThread carries calls over). Time is passed in by
// the caller's clock only for statistics.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <vector>

#include "libzeroc/base/status.h"
#include "libzeroc/engine/sampler.h"
#include "libzeroc/kv/sequence_kv.h"
#include "libzeroc/model/llama_model.h"

namespace zeroc {

enum class PrefillJobId : std::uint64_t {};

// Blocks of one layer that became final in this step, as indices into SequenceKv::BlocksAt(layer, n_prompt_tokens):
// packed blocks [packed_begin, packed_end); the sink block once; blocks [exact_begin, exact_end) of the exact tail,
// which are full or hold the prompt's end. Every block is announced once, and each kind in order.
struct ReadyBlocks {
  int layer = 0;
  int packed_begin = 0, packed_end = 0;
  bool sink = false;
  int exact_begin = 0, exact_end = 0;
};

// Called from Step, on the engine's thread. Must outlive the job.
class PrefillListener {
 public:
  virtual ~PrefillListener() = default;
  virtual void OnStarted() {}
  // kv stays valid and unchanged in these blocks until Release(job).
  virtual void OnBlocksReady(const SequenceKv& kv, const ReadyBlocks& blocks) = 0;
  virtual void OnFirstToken(const SequenceKv& kv, const SampledToken& token) = 0;
  virtual void OnFailed(const Status& status) = 0;
};

struct PrefillJob {
  std::vector<std::int32_t> tokens;  // the prompt, at least one
  SamplingParams sampling;
  std::shared_ptr<const KvFormat> format;
  PrefillListener* listener = nullptr;
};

class PrefillEngine {
 public:
  struct Options {
    int chunk_tokens = 512;  // tokens per step; a multiple of 64
    int queue_max = 64;      // jobs waiting
  };

  PrefillEngine(LlamaModel& model, BlockPool& pool, const Options& options);
  ~PrefillEngine();

  // kResourceExhausted when the queue is full, kInvalidArgument for a bad job. Blocks are taken when the job starts; a
  // job waits while the pool is full and others run, and fails (OnFailed) when it could never fit.
  Result<PrefillJobId> Submit(PrefillJob job);

  // Returns the job's blocks; also ends a job that waits or runs, without a further call to its listener. Idempotent.
  void Release(PrefillJobId id);

  // One chunk of the oldest runnable job. False when there is nothing to compute.
  bool Step();

  int n_waiting() const { return static_cast<int>(waiting_.size()); }
  int n_held() const { return static_cast<int>(jobs_.size()); }  // every job not yet released
  std::int64_t waiting_tokens() const;                           // prompt tokens not computed yet

 private:
  struct Job;
  enum class StartResult : std::uint8_t { kStarted, kMustWait, kFailed };
  StartResult Start(Job& job);  // kFailed: the job has left the queue and its listener knows
  void RunChunk(Job& job);

  LlamaModel& model_;
  BlockPool& pool_;
  Options options_;
  std::uint64_t next_id_ = 1;
  std::map<PrefillJobId, std::unique_ptr<Job>> jobs_;
  std::deque<PrefillJobId> waiting_;  // not started or not finished, oldest first
  std::vector<float> logits_;
};

}  // namespace zeroc
