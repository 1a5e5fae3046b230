// A cache that attends for itself: what a sequence may carry instead of a SequenceKv, so that another way of keeping
// keys and values runs under the same weights, layers and tokens as the engine's own.
//
// One thread calls BeginStep, Attend once per layer in order, EndStep. Implementations own all their state and may
// spread work over the given pool; they get memory when they are made, so a step cannot fail.
#pragma once

#include <cstdint>
#include <memory>

#include "kernels/ops.h"
#include "libzeroc/base/status.h"
#include "libzeroc/base/thread_pool.h"

namespace zeroc {

// The projections of one sequence's new tokens in one layer, float32, before RoPE and after biases and QK-norm. Row r
// starts at q + r * stride (and so k, v) and belongs to position n_tokens() + r.
struct AttentionRows {
  const float* q;  // [n_tokens, n_heads * head_dim]
  const float* k;  // [n_tokens, n_kv_heads * head_dim]
  const float* v;
  std::int64_t stride;     // floats
  int n_tokens;            // at least one
  kernels::RopeRows rope;  // [n_tokens, head_dim / 2]
};

class SequenceAttention {
 public:
  virtual ~SequenceAttention() = default;

  // Tokens held or evicted so far: the position of the next one.
  virtual int n_tokens() const = 0;
  // Tokens that fit in all; a step beyond it is a bug of the caller.
  virtual int max_tokens() const = 0;

  virtual void BeginStep(int n_new) = 0;
  // out [rows.n_tokens, n_heads * head_dim]: causal softmax attention, before W_O.
  virtual void Attend(int layer, const AttentionRows& rows, ThreadPool& threads, float* out) = 0;
  virtual void EndStep() = 0;

  // Between steps, once: what follows is decode. Methods that compress behind the prompt do it here.
  virtual void EndPrompt() = 0;

  // Bytes that a real cache of this method holds now, everything counted, all layers.
  virtual std::uint64_t HeldBytes() const = 0;
};

// One way of keeping keys and values, ready to serve sequences of one model. Const after it is made; any thread.
class AttentionMethod {
 public:
  virtual ~AttentionMethod() = default;
  // Host memory of one sequence of max_tokens tokens.
  virtual std::uint64_t BytesNeeded(int max_tokens) const = 0;
  // kResourceExhausted without memory.
  virtual Result<std::unique_ptr<SequenceAttention>> NewSequence(int max_tokens) const = 0;
};

}  // namespace zeroc
