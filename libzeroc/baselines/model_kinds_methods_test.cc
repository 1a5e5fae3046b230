// The baselines under every kind of model: they get queries and keys after biases and QK-norm, and RoPE tables only
// where the model has RoPE.
#include <gtest/gtest.h>

#include <cmath>

#include "libzeroc/baselines/methods.h"
#include "libzeroc/model/forward_testing.h"
#include "libzeroc/model/model_kinds_testing.h"

namespace zeroc {
namespace {

using testing::GoldenModel;
using testing::Rms;
using testing::RmsDifference;

constexpr std::size_t kPrompt = 150;

class ModelKindMethodsTest : public ::testing::TestWithParam<const char*> {
 protected:
  ModelKindMethodsTest() : golden_(GetParam()), threads_(2) {
    model_ = Transformer::Open(golden_.Open(), nullptr, kernels::ReferenceOps(), threads_).value();
  }

  // Logits of every token: the prompt at once, then one by one.
  std::vector<float> Run(const BaselineOptions& options) {
    const auto method = MakeBaseline(*model_, options);
    EXPECT_TRUE(method.ok()) << method.status().ToString();
    const std::span<const std::int32_t> ids(golden_.ids());
    const auto cache = (*method)->NewSequence(static_cast<int>(ids.size())).value();
    const auto vocab = static_cast<std::size_t>(model_->config().vocab_size);
    std::vector<float> logits(ids.size() * vocab);
    for (std::size_t begin = 0; begin < ids.size();) {
      const std::size_t n = begin == 0 ? kPrompt : 1;
      const ForwardSequence step{
          .tokens = ids.subspan(begin, n), .n_logits = static_cast<int>(n), .attention = cache.get()};
      EXPECT_TRUE(model_->Forward({&step, 1}, logits.data() + begin * vocab).ok());
      if (begin == 0) cache->EndPrompt();
      begin += n;
    }
    return logits;
  }

  GoldenModel golden_;
  ThreadPool threads_;
  std::unique_ptr<Transformer> model_;
};

TEST_P(ModelKindMethodsTest, ExactIsTheEngineAndTheOthersAreNear) {
  const std::vector<float> want = testing::RunChunks(*model_, "none", golden_.ids(), {200});
  const double scale = Rms(want);
  EXPECT_LT(RmsDifference(Run({.name = "exact"}), want), 1e-5 * scale);
  EXPECT_LT(RmsDifference(Run({.name = "int8"}), want), 0.1 * scale);
  for (const char* name : {"palu", "zeroc-paper"}) {
    BaselineOptions options{.name = name, .kv_bits = 16};  // half of the reference's 32
    for (unsigned seed = 0; seed < 2; ++seed) {
      options.calibration.push_back(testing::RandomIds(300, model_->config().vocab_size, seed));
    }
    const double error = RmsDifference(Run(options), want);
    EXPECT_GT(error, 1e-5 * scale) << name;
    EXPECT_LT(error, 2 * scale) << name;
  }
}

INSTANTIATE_TEST_SUITE_P(Kinds, ModelKindMethodsTest, ::testing::ValuesIn(testing::kModelKinds),
                         [](const auto& kind) { return std::string(kind.param); });

}  // namespace
}  // namespace zeroc
