// Every kind of model against Hugging Face transformers, and against itself: chunks, folded maps, packed profiles.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdio>
#include <limits>

#include "libzeroc/model/forward_testing.h"
#include "libzeroc/model/model_kinds_testing.h"
#include "libzeroc/model/transformer.h"

namespace zeroc {
namespace {

using testing::GoldenModel;
using testing::MakePlan;
using testing::Rms;
using testing::RmsDifference;
using testing::RunChunks;

class ModelKindTest : public ::testing::TestWithParam<const char*> {
 protected:
  ModelKindTest() : golden_(GetParam()), threads_(1) {}

  std::unique_ptr<Transformer> Open(const kernels::Ops& ops, std::shared_ptr<const Plan> plan = nullptr) {
    auto model = Transformer::Open(golden_.Open(), std::move(plan), ops, threads_);
    EXPECT_TRUE(model.ok()) << model.status().ToString();
    return std::move(model).value();
  }

  // Largest distance from the golden logits, in units of the largest one.
  double WorstError(const std::vector<float>& logits) const {
    double worst = 0, largest = 0;
    for (const GoldenModel::Row& row : golden_.rows()) {
      for (std::size_t i = 0; i < row.logits.size(); ++i) {
        const double error =
            std::fabs(logits[static_cast<std::size_t>(row.pos) * row.logits.size() + i] - row.logits[i]);
        worst = std::isnan(error) ? std::numeric_limits<double>::infinity() : std::max(worst, error);
        largest = std::max(largest, std::fabs(row.logits[i]));
      }
    }
    return worst / largest;
  }

  GoldenModel golden_;
  ThreadPool threads_;
};

TEST_P(ModelKindTest, ReferenceMatchesTransformers) {
  const double error = WorstError(RunChunks(*Open(kernels::ReferenceOps()), "none", golden_.ids(), {64}));
  std::printf("[ tolerance ] %s: %.2g of the largest logit\n", GetParam(), error);
  // Both sides sum in float32 here and there: per layer four products over at most 256 terms and one over 200 tokens,
  // 2^-24 each if all roundings went one way.
  EXPECT_LT(error, 2 * (4 * 256 + 200) * 0x1p-24);
}

TEST_P(ModelKindTest, CpuMatchesTransformers) {
  const double error = WorstError(RunChunks(*Open(kernels::CpuOps()), "none", golden_.ids(), {64}));
  std::printf("[ tolerance ] %s: %.2g of the largest logit\n", GetParam(), error);
  // bf16 activations and KV: 2^-8 through a dozen roundings of values of the order of the logits.
  EXPECT_LT(error, 12 * 0x1p-8);
}

TEST_P(ModelKindTest, ResultsDoNotDependOnChunks) {
  const auto folded = Open(kernels::ReferenceOps(), MakePlan(*Open(kernels::ReferenceOps())));
  std::vector<std::int32_t> ids = golden_.ids();
  ids.insert(ids.end(), golden_.ids().begin(), golden_.ids().end());
  for (const std::string profile : {"bf16", "q8", "q3"}) {
    const auto whole = RunChunks(*folded, profile, ids, {400});
    for (const std::vector<int>& chunks : {std::vector<int>{1}, {100}, {300, 1, 63, 1}}) {
      EXPECT_LT(RmsDifference(whole, RunChunks(*folded, profile, ids, chunks)), 1e-5 * Rms(whole))
          << profile << " chunks " << chunks[0];
    }
  }
}

TEST_P(ModelKindTest, FoldedModelIsTheSameModel) {
  const auto plain = Open(kernels::ReferenceOps());
  const auto plan = MakePlan(*plain);
  std::vector<std::int32_t> ids = golden_.ids();
  ids.insert(ids.end(), golden_.ids().begin(), golden_.ids().end());
  const auto want = RunChunks(*plain, "none", ids, {400});
  const double scale = Rms(want);
  const auto folded = Open(kernels::ReferenceOps(), plan);
  // The folded weights are rounded to bf16 once more: W_V and W_O, without RoPE W_Q and W_K too, of relative error 2^-9
  // per entry; keys, queries and values meet it twice on their way through the layers.
  const double exact = RmsDifference(want, RunChunks(*folded, "bf16", ids, {400}));
  std::printf("[ tolerance ] %s: folded %.2g of the logits\n", GetParam(), exact / scale);
  EXPECT_LT(exact, scale * 0x1p-7);
  double previous = 0;
  for (const std::string profile : {"q8", "q4", "q3", "q2"}) {
    const double error = RmsDifference(want, RunChunks(*folded, profile, ids, {400}));
    std::printf("[ tolerance ] %s: %s %.2g of the logits\n", GetParam(), profile.c_str(), error / scale);
    EXPECT_GT(error, previous) << profile;
    if (profile == "q8") {
      EXPECT_LT(error, scale * 0x1p-6);
    }
    previous = error;
  }
  EXPECT_LT(previous, scale);
  // The same on the CPU table, whose activations are bf16 too.
  const auto cpu = Open(kernels::CpuOps(), plan);
  for (const std::string profile : {"bf16", "q8"}) {
    EXPECT_LT(RmsDifference(want, RunChunks(*cpu, profile, ids, {64})), scale * 12 * 0x1p-8) << profile;
  }
}

INSTANTIATE_TEST_SUITE_P(Kinds, ModelKindTest, ::testing::ValuesIn(testing::kModelKinds),
                         [](const auto& kind) { return std::string(kind.param); });

TEST(ModelKinds, WithoutRopeNothingIsLeftToMapAtRunTime) {
  ThreadPool threads(1);
  for (const char* kind : {"opt", "qwen2"}) {
    const GoldenModel golden(kind);
    const auto plain = Transformer::Open(golden.Open(), nullptr, kernels::ReferenceOps(), threads).value();
    const auto folded = Transformer::Open(golden.Open(), MakePlan(*plain), kernels::ReferenceOps(), threads).value();
    const bool has_rope = plain->config().has_rope();
    const auto format = folded->Format("q4").value();
    EXPECT_EQ(format->KeyMap(1) != nullptr, has_rope);
    EXPECT_EQ(format->QueryMap(1) != nullptr, has_rope);
    EXPECT_EQ(format->KeyRotation(1) == nullptr, has_rope);
    EXPECT_EQ(folded->Format("bf16").value()->KeyRotation(1), nullptr) << "exact keys are not rotated";
  }
}

TEST(ModelKinds, OptFilesOfTheBareDecoderAreTheSameModel) {
  ThreadPool threads(1);
  const GoldenModel golden("opt");
  const GoldenModel bare("opt", [](GoldenModel::Json&, GoldenModel::Tensors& tensors) {
    GoldenModel::Tensors renamed;
    for (auto& [name, values] : tensors) renamed[name.substr(std::string("model.").size())] = std::move(values);
    tensors = std::move(renamed);
  });
  const auto a = Transformer::Open(golden.Open(), nullptr, kernels::ReferenceOps(), threads).value();
  const auto b = Transformer::Open(bare.Open(), nullptr, kernels::ReferenceOps(), threads).value();
  EXPECT_EQ(RunChunks(*a, "none", golden.ids(), {200}), RunChunks(*b, "none", golden.ids(), {200}));
}

TEST(ModelKinds, LearnedPositionsEnd) {
  ThreadPool threads(1);
  const GoldenModel golden("opt");
  const auto model = Transformer::Open(golden.Open(), nullptr, kernels::ReferenceOps(), threads).value();
  const int n = static_cast<int>(model->config().max_positions);
  const auto ids = testing::RandomIds(n + 1, model->config().vocab_size, 1);
  const auto format = model->Format("none").value();
  const auto pool = OwnedPool::Create(*format, 1, n + 1, n + 1).value();
  const auto kv = SequenceKv::Create(pool->pool(), format, n + 1, n + 1).value();
  const ForwardSequence all{kv.get(), ids, 0};
  const Status refused = model->Forward({&all, 1}, nullptr);
  EXPECT_EQ(refused.code(), StatusCode::kInvalidArgument);
  EXPECT_NE(refused.message().find("513 tokens: the model has 512 learned positions"), std::string::npos)
      << refused.message();
  EXPECT_EQ(kv->n_tokens(), 0);
  const ForwardSequence fits{kv.get(), std::span(ids).first(static_cast<std::size_t>(n)), 0};
  EXPECT_TRUE(model->Forward({&fits, 1}, nullptr).ok());
  const ForwardSequence one_more{kv.get(), std::span(ids).last(1), 0};
  EXPECT_EQ(model->Forward({&one_more, 1}, nullptr).code(), StatusCode::kInvalidArgument);
}

TEST(ModelKinds, MissingTensorsAreNamed) {
  ThreadPool threads(1);
  const auto open = [&](const char* kind,
                        const std::function<void(GoldenModel::Json&, GoldenModel::Tensors&)>& change) {
    const GoldenModel golden(kind, change);
    return Transformer::Open(golden.Open(), nullptr, kernels::ReferenceOps(), threads).status();
  };
  const auto without = [](const char* name) {
    return [name](GoldenModel::Json&, GoldenModel::Tensors& tensors) { EXPECT_EQ(tensors.erase(name), 1u) << name; };
  };
  const std::pair<const char*, const char*> tensors[] = {
      {"llama_mha", "model.layers.1.mlp.gate_proj.weight"}, {"llama_biases", "model.layers.0.mlp.down_proj.bias"},
      {"qwen2", "model.layers.1.self_attn.k_proj.bias"},    {"qwen3", "model.layers.0.self_attn.q_norm.weight"},
      {"opt", "model.decoder.embed_positions.weight"},      {"opt", "model.decoder.layers.1.final_layer_norm.bias"},
      {"opt", "model.decoder.layers.1.fc1.bias"},
  };
  for (const auto& [kind, name] : tensors) {
    const Status status = open(kind, without(name));
    EXPECT_EQ(status.code(), StatusCode::kNotFound) << kind;
    EXPECT_NE(status.message().find(name), std::string::npos) << status.message();
  }
  // A config that promises more layers than the file has.
  const Status status =
      open("opt", [](GoldenModel::Json& config, GoldenModel::Tensors&) { config["num_hidden_layers"] = 3; });
  EXPECT_EQ(status.code(), StatusCode::kNotFound);
  EXPECT_NE(status.message().find("model.decoder.layers.2."), std::string::npos) << status.message();
}

TEST(ModelKinds, CheckFiniteNamesTheTensor) {
  const GoldenModel good("qwen3");
  EXPECT_TRUE(good.Open()->CheckFinite().ok());
  const GoldenModel bad("qwen3", [](GoldenModel::Json&, GoldenModel::Tensors& tensors) {
    tensors.at("model.layers.1.self_attn.k_norm.weight")[5] = 0x7fc0;
  });
  const Status status = bad.Open()->CheckFinite();
  EXPECT_EQ(status.code(), StatusCode::kDataLoss);
  EXPECT_NE(status.message().find("\"model.layers.1.self_attn.k_norm.weight\" holds NaN at value 5 of 64"),
            std::string::npos)
      << status.message();
}

}  // namespace
}  // namespace zeroc
