// The engine's own loop over a model on a device (or its emulation).
#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

#include "kernels/cuda/runtime.h"
#include "libzeroc/engine/local_generator.h"
#include "libzeroc/model/cuda/cuda_testing.h"

namespace zeroc {
namespace {

using testing::Backends;
using testing::DeviceTestShape;
using testing::RandomIds;
using testing::RunChunks;
using testing::TinyModel;

// Pools in the model's memory, prefill, decode over the end of a block, greedy tokens.
TEST(CudaGenerateTest, GeneratesWhatItsLogitsSay) {
  if (const char* why = kernels::cuda::WhyUnavailable()) GTEST_SKIP() << "no GPU: " << why;
  const TinyModel tiny(DeviceTestShape(), 7);
  const Backends models(tiny.dir());
  Transformer& model = *models.device;
  const auto vocab = static_cast<std::size_t>(model.config().vocab_size);
  std::vector<std::int32_t> ids = RandomIds(126, model.config().vocab_size, 9);
  const int n_prompt = static_cast<int>(ids.size());
  SamplingParams sampling;
  sampling.max_tokens = 6;
  sampling.temperature = 0;
  sampling.ignore_eos = true;
  const auto completion = GenerateLocally(model, model.Format("z0").value(), ids, sampling);
  ASSERT_TRUE(completion.ok()) << completion.status().ToString();
  ASSERT_EQ(completion->ids.size(), 6u);
  ids.insert(ids.end(), completion->ids.begin(), completion->ids.end());
  const auto logits = RunChunks(model, "z0", ids, {n_prompt, 1});
  for (std::size_t i = 0; i < 6; ++i) {
    const float* row = logits.data() + (static_cast<std::size_t>(n_prompt) - 1 + i) * vocab;
    EXPECT_EQ(std::max_element(row, row + vocab) - row, completion->ids[i]) << i;
  }
}

}  // namespace
}  // namespace zeroc
