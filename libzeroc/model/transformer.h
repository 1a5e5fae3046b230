// The forward pass of a transformer, of any family that ModelConfig knows, over paged, partly packed KV caches: prefill
// chunks and decode steps alike.
//
// One call takes any number of sequences, each with some new tokens and its own KvFormat, so a batch may mix profiles.
// Transformer::Open runs it on this machine's processors: weights are read where the checkpoint maps them, only the
// folded value and output weights of a plan are copies, and the work is spread over the given thread pool. Devices open
// models of their own (libzeroc/model/cuda); their sequences' blocks lie in the model's memory.
// Not thread-safe: one step loop calls Forward.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "kernels/ops.h"
#include "libzeroc/base/status.h"
#include "libzeroc/base/thread_pool.h"
#include "libzeroc/checkpoint/checkpoint.h"
#include "libzeroc/compression/moments.h"
#include "libzeroc/compression/plan.h"
#include "libzeroc/kv/kv_memory.h"
#include "libzeroc/kv/sequence_kv.h"
#include "libzeroc/model/sequence_attention.h"
#include "libzeroc/model/sp_step.h"

namespace zeroc {

struct ForwardSequence {
  SequenceKv* kv = nullptr;                // between steps; takes the tokens at positions n_tokens() ..
  std::span<const std::int32_t> tokens;    // at least one, ids in [0, vocab_size)
  int n_logits = 0;                        // logits wanted for the last n_logits tokens
  SequenceAttention* attention = nullptr;  // instead of kv; then for every sequence of the step
  // A prompt that a group of ranks shares: kv is this rank's share, tokens are the whole prompt, and of them the rank
  // computes its own. n_logits is sp->CountLogits(). The only sequence of its step.
  SpStep* sp = nullptr;
};

// What a caller may watch while a step runs. Called on the thread that called Forward.
class ForwardObserver {
 public:
  virtual ~ForwardObserver() = default;

  // Layer `layer` of every sequence of the batch is written and, where due, packed: its blocks may travel.
  virtual void OnLayerWritten(int /*layer*/) {}

  // Calibration: queries and keys after QK-norm and RoPE, and values, of one sequence, float32, as the model's own
  // weights give them; ask a model without a plan, since a plan's maps are folded into the weights. Off by default
  // (it costs time).
  virtual bool WantsProjections() const { return false; }
  virtual void OnProjections(int /*layer*/, int /*first_pos*/, int /*n_tokens*/, const HeadRows& /*q*/,
                             const HeadRows& /*k*/, const HeadRows& /*v*/) {}
};

// Part of a step: calibration computes the layers that many profiles share once, and each profile's own behind them.
struct LayerRange {
  int begin = 0;
  int end = -1;  // -1: all layers, and the logits
  // Rows of the residual stream, [rows of the step, hidden_size]: what goes into layer `begin` (not read when that is
  // 0), and where to leave what would go into layer `end` (not written when that is -1).
  const float* input = nullptr;
  float* output = nullptr;
};

class Transformer {
 public:
  // With a plan, W_V and W_O are folded (exact up to one rounding), without RoPE W_Q and W_K too, and every profile of
  // the plan can be served; without one only KvFormat::Uncompressed. kInvalidArgument / kNotFound for missing or
  // misshapen tensors, named.
  static Result<std::unique_ptr<Transformer>> Open(std::shared_ptr<const Checkpoint> checkpoint,
                                                   std::shared_ptr<const Plan> plan, const kernels::Ops& ops,
                                                   ThreadPool& threads);
  virtual ~Transformer() = default;
  Transformer(const Transformer&) = delete;
  Transformer& operator=(const Transformer&) = delete;

  const ModelConfig& config() const { return checkpoint_->config(); }
  const Checkpoint& checkpoint() const { return *checkpoint_; }
  const Plan* plan() const { return plan_.get(); }  // null without one
  // Name and ISA say where Forward runs; the functions are for what runs beside it on this machine's processors, with
  // the same dtype of activations.
  const kernels::Ops& ops() const { return ops_; }
  // Pools of its sequences are made in it. Lives as long as the model.
  virtual KvMemory& kv_memory() = 0;

  // The format of a profile for this model's engine; "none" without a plan. Cached.
  Result<std::shared_ptr<const KvFormat>> Format(const std::string& profile);

  // Runs one step of every sequence (BeginStep .. EndStep are done here) and writes logits [sum of n_logits,
  // vocab_size] in sequence order. Ids out of range, and learned positions beyond max_positions, are kInvalidArgument
  // and nothing is changed. A group's step fails when any of its ranks does, with the communicator's status: the logits
  // and the sequence are then worth nothing. With a part of the layers, only they touch the sequences' blocks; not for
  // groups.
  Status Forward(std::span<const ForwardSequence> sequences, float* logits, ForwardObserver* observer = nullptr,
                 const LayerRange& layers = {});

 protected:
  Transformer(std::shared_ptr<const Checkpoint> checkpoint, std::shared_ptr<const Plan> plan, const kernels::Ops& ops)
      : checkpoint_(std::move(checkpoint)), plan_(std::move(plan)), ops_(ops) {}

  // kFailedPrecondition for a plan of another model.
  static Status CheckPlan(const Checkpoint& checkpoint, const Plan* plan);

 private:
  // Forward behind its checks; at least one sequence.
  virtual Status Step(std::span<const ForwardSequence> sequences, float* logits, ForwardObserver* observer,
                      const LayerRange& layers) = 0;
  Status CheckBatch(std::span<const ForwardSequence> sequences);

  std::shared_ptr<const Checkpoint> checkpoint_;
  std::shared_ptr<const Plan> plan_;
  const kernels::Ops& ops_;
  std::map<std::string, std::shared_ptr<const KvFormat>> formats_;
};

}  // namespace zeroc
