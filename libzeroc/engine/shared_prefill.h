// One rank's part of a prompt that the ranks of a prefill group compute together: its blocks, the forward pass with the
// other ranks, the announcements of its own blocks, and on rank 0 the first token. Beside PrefillEngine, not in it: the
// prompt is computed in one pass, and everything else waits meanwhile.
//
// Single-threaded, on the engine's thread.
#pragma once

#include <memory>

#include "libzeroc/base/status.h"
#include "libzeroc/comm/communicator.h"
#include "libzeroc/engine/prefill_engine.h"
#include "libzeroc/kv/sp_split.h"
#include "libzeroc/model/sp_step.h"

namespace zeroc {

class SharedPrefill {
 public:
  // Takes the rank's blocks. kInvalidArgument as PrefillEngine::Submit, kResourceExhausted without room. job.into and
  // job.priority have no meaning here.
  static Result<std::unique_ptr<SharedPrefill>> Create(const ModelConfig& config, BlockPool& pool, PrefillJob job,
                                                       const SpSplit& split, int rank);

  // Every rank's at the same time, with equal options. The listener hears OnStarted, OnBlocksReady of the rank's own
  // blocks and, on rank 0, OnFirstToken; or OnFailed, with the status that is returned. The blocks stay until this
  // object goes.
  Status Run(Transformer& model, Communicator& comm, const SpOptions& options);

  const SpBytes& sent() const { return sent_; }  // to other ranks

 private:
  SharedPrefill(PrefillJob job, const SpSplit& split, int rank) : job_(std::move(job)), split_(split), rank_(rank) {}

  PrefillJob job_;
  const SpSplit split_;
  const int rank_;
  std::unique_ptr<SequenceKv> kv_;
  SpBytes sent_;
};

}  // namespace zeroc
