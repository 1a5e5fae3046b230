// Decode steps that start as one recorded graph: the same logits as launch by launch. On the emulation, which tells how
// many launches there were.
#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "kernels/cuda/host_simt/queue.h"
#include "libzeroc/model/cuda/cuda_testing.h"

namespace zeroc {
namespace {

namespace simt = kernels::cuda::simt;
using testing::Backends;
using testing::DeviceTestShape;
using testing::Lane;
using testing::RandomIds;
using testing::TinyModel;

constexpr int kSteps = 16;

// Two sequences decode side by side, one of them over the end of a block. *n_works: what each step enqueued.
std::vector<float> Decode(Transformer& model, ForwardObserver* observer, std::vector<std::int64_t>* n_works) {
  const Lane lanes[] = {{model, "z0", RandomIds(120 + kSteps, model.config().vocab_size, 1)},
                        {model, "bf16", RandomIds(40 + kSteps, model.config().vocab_size, 2)}};
  const ForwardSequence prompts[] = {lanes[0].Next(120, 0), lanes[1].Next(40, 0)};
  EXPECT_TRUE(model.Forward(prompts, nullptr).ok());
  const auto step_values = static_cast<std::size_t>(2 * model.config().vocab_size);
  std::vector<float> logits(kSteps * step_values, std::nanf(""));
  for (std::size_t step = 0; step < kSteps; ++step) {
    const ForwardSequence tokens[] = {lanes[0].Next(1, 1), lanes[1].Next(1, 1)};
    simt::LoseWork(-1);
    EXPECT_TRUE(model.Forward(tokens, logits.data() + step * step_values, observer).ok());
    n_works->push_back(simt::CountWork());
  }
  return logits;
}

TEST(CudaDecodeGraphTest, RecordedStepsAreTheSameSteps) {
  const TinyModel tiny(DeviceTestShape(), 9);
  const Backends models(tiny.dir());
  std::vector<std::int64_t> n_recorded, n_launched;
  const std::vector<float> recorded = Decode(*models.device, nullptr, &n_recorded);
  ForwardObserver observer;  // who looks at every layer gets every launch by itself
  const std::vector<float> launched = Decode(*models.device, &observer, &n_launched);
  EXPECT_EQ(recorded, launched);
  int n_graphs = 0;
  for (std::size_t step = 0; step < kSteps; ++step) {
    const bool is_graph = n_recorded[step] == 1;  // the copy of the logits
    n_graphs += is_graph ? 1 : 0;
    EXPECT_TRUE(is_graph || n_recorded[step] >= n_launched[step]) << step;
    EXPECT_GT(n_launched[step], 20) << step;
  }
  // All but the first two, the one that ends the block, and what comes new behind it.
  EXPECT_GE(n_graphs, kSteps - 6);
}

}  // namespace
}  // namespace zeroc
