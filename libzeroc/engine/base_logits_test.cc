// The file of uncompressed logits, alone and under ScoreText.
#include "libzeroc/engine/base_logits.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <vector>

#include "libzeroc/engine/scoring.h"
#include "libzeroc/model/tiny_model_testing.h"

namespace zeroc {
namespace {

namespace fs = std::filesystem;
using testing::TinyModel;

class BaseLogitsTest : public ::testing::Test {
 protected:
  BaseLogitsTest() : folder_(fs::temp_directory_path() / ("zeroc_base_logits_" + std::to_string(::getpid()))) {
    fs::remove_all(folder_);
    fs::create_directories(folder_);
    path_ = (folder_ / "base").string();
  }
  ~BaseLogitsTest() override { fs::remove_all(folder_); }

  std::size_t n_files() const {
    return static_cast<std::size_t>(std::distance(fs::directory_iterator(folder_), fs::directory_iterator()));
  }

  fs::path folder_;
  std::string path_;
};

TEST_F(BaseLogitsTest, KeepsRowsAndAppearsOnlyWhenWhole) {
  const std::vector<float> rows[] = {{1, 2, 3}, {4, 5, 6}};
  {
    auto writer = BaseLogits::Open(path_, "key", 2, 3).value();
    ASSERT_FALSE(writer->complete());
    writer->Write(1, rows[1].data());
    EXPECT_FALSE(fs::exists(path_));
    writer->Write(0, rows[0].data());
    ASSERT_TRUE(writer->Finish().ok());
  }
  const auto reader = BaseLogits::Open(path_, "key", 2, 3).value();
  ASSERT_TRUE(reader->complete());
  for (int r = 0; r < 2; ++r) {
    EXPECT_EQ(std::vector<float>(reader->Row(r).begin(), reader->Row(r).end()), rows[r]);
  }
  EXPECT_EQ(n_files(), 1u);
}

TEST_F(BaseLogitsTest, UnfinishedLeavesNothing) {
  { const auto writer = BaseLogits::Open(path_, "key", 2, 3).value(); }
  EXPECT_EQ(n_files(), 0u);
}

TEST_F(BaseLogitsTest, RefusesWhatIsNotItsOwn) {
  ASSERT_TRUE(BaseLogits::Open(path_, "key", 2, 3).value()->Finish().ok());
  const auto code = [&](const std::string& key, std::int64_t rows, std::int64_t vocab) {
    return BaseLogits::Open(path_, key, rows, vocab).status().code();
  };
  EXPECT_EQ(code("other", 2, 3), StatusCode::kFailedPrecondition);
  EXPECT_EQ(code("key", 3, 3), StatusCode::kFailedPrecondition);
  EXPECT_EQ(code("key", 2, 4), StatusCode::kFailedPrecondition);
  fs::resize_file(path_, 70);
  EXPECT_EQ(code("key", 2, 3), StatusCode::kFailedPrecondition);
  fs::resize_file(path_, 0);
  EXPECT_EQ(code("key", 2, 3), StatusCode::kFailedPrecondition);
  fs::remove(path_);
  fs::create_directories(path_);
  EXPECT_EQ(code("key", 2, 3), StatusCode::kInvalidArgument);
  EXPECT_EQ(BaseLogits::Open((folder_ / "no/base").string(), "key", 2, 3).status().code(), StatusCode::kNotFound);
}

// What is compared with kept logits gets the very figures of what is compared with computed ones.
TEST_F(BaseLogitsTest, ScoresAreTheSameWithAFile) {
  TinyModel tiny({});
  ThreadPool threads(2);
  const auto model = Transformer::Open(tiny.Open(), nullptr, kernels::ReferenceOps(), threads).value();
  const ScoredMethod base{model.get(), model->Format("none").value()};
  // Another model on the same text stands for a method: seeds differ, so KL is far from zero.
  TinyModel other({}, 2);
  const auto other_model = Transformer::Open(other.Open(), nullptr, kernels::ReferenceOps(), threads).value();
  const std::vector<ScoredMethod> methods = {{other_model.get(), other_model->Format("none").value()}};
  std::vector<std::int32_t> tokens = tiny.RandomIds(100, 3), bytes(100, 2);
  for (const bool through_decode : {true, false}) {
    ScoreOptions options{.context = 40, .stride = 15, .through_decode = through_decode, .batch_windows = 2};
    const auto plain = ScoreText(tokens, bytes, 1, base, methods, options).value();
    options.base_logits_file = path_ + (through_decode ? "-decode" : "-prefill");
    for (int run = 0; run < 2; ++run) {  // written, then read
      const auto kept = ScoreText(tokens, bytes, 1, base, methods, options).value();
      for (std::size_t m = 0; m < 2; ++m) {
        EXPECT_EQ(kept[m].token_nll, plain[m].token_nll);
        EXPECT_EQ(kept[m].token_kl, plain[m].token_kl);
      }
      EXPECT_GT(kept[1].kl, 1e-4);
      EXPECT_EQ(kept[1].kv_bytes_per_token, plain[1].kv_bytes_per_token);
    }
    // Alone, the base is computed, its bytes counted.
    EXPECT_EQ(ScoreText(tokens, bytes, 1, base, {}, options).value()[0].kv_bytes_per_token,
              plain[0].kv_bytes_per_token);
    std::vector<std::int32_t> others = tokens;
    others[50] = others[50] == 0 ? 1 : 0;
    EXPECT_EQ(ScoreText(others, bytes, 1, base, methods, options).status().code(), StatusCode::kFailedPrecondition);
  }
}

}  // namespace
}  // namespace zeroc
