// Drawing tokens on a GPU: what Sampler::Choose of libzeroc/engine does with one row of logits, after its adjustments.
//
// The order of candidates is the sampler's, so that a seed draws the same token there and here: logits from the best
// down, equal ones by id; without top_k, min_p and top_p the best first and then by id, with id 0 in the best one's
// place. Weights exp(logit - best) are integers of 2^-40, so that sums do not depend on the order of additions; the
// two can differ where the random number falls within 1e-6 of a border.
#pragma once

#include "kernels/cuda/runtime.h"
#include "kernels/ops.h"

namespace zeroc::kernels::cuda {

struct SampleRow {
  double uniform;      // in [0, 1)
  float temperature;   // 0: the best, the least id of equals
  float top_p;         // (0, 1]
  float min_p;         // [0, 1]
  std::int32_t top_k;  // 0: off
};

struct SampleArgs {
  const float* logits;  // [n_rows, vocab] with stride, finite or -infinity; at least one finite
  std::int64_t stride;
  std::int32_t n_rows, vocab;
  const SampleRow* rows;  // [n_rows] device
  std::int32_t* ids;      // [n_rows]
};
// A thread block for each row; reads the row about ten times, from the cache after the first.
KernelStatus Sample(const SampleArgs& args, Stream stream);

}  // namespace zeroc::kernels::cuda
