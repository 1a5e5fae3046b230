// Ids against Hugging Face's `tokenizers` (tests/data/tokenizer_golden.json, made by tools/golden/tokenizer_golden.py)
// and, where the folder is at hand, against the shared golden data of the demo model.
#include <gtest/gtest.h>

#include <fstream>
#include <map>
#include <nlohmann/json.hpp>

#include "libzeroc/tokenizer/tokenizer.h"

namespace zeroc {
namespace {

using nlohmann::json;

std::string FromBase64(std::string_view text) {
  constexpr std::string_view kAlphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string out;
  unsigned bits = 0;
  int n_bits = 0;
  for (const char c : text) {
    const std::size_t value = kAlphabet.find(c);
    if (value == std::string_view::npos) break;  // padding
    bits = bits << 6 | static_cast<unsigned>(value);
    n_bits += 6;
    if (n_bits >= 8) out += static_cast<char>(bits >> (n_bits -= 8) & 0xff);
  }
  return out;
}

class TokenizerGoldenTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    std::ifstream in("tests/data/tokenizer_golden.json");
    ASSERT_TRUE(in) << "run from the root of the repository";
    golden_ = json::parse(in);
    for (const auto& [name, spec] : golden_.at("tokenizers").items()) {
      auto tokenizer = Tokenizer::Parse(spec.dump(), name);
      ASSERT_TRUE(tokenizer.ok()) << tokenizer.status().ToString();
      tokenizers_[name] = *std::move(tokenizer);
    }
    auto demo = Tokenizer::Open("models/zeroc-demo");
    ASSERT_TRUE(demo.ok()) << demo.status().ToString();
    tokenizers_["models/zeroc-demo/tokenizer.json"] = *std::move(demo);
  }
  static void TearDownTestSuite() { tokenizers_.clear(); }

  // Added tokens that take white space, splits that drop text, and text in form C cannot round-trip.
  static bool KeepsText(const std::string& name) {
    return name != "added" && name != "prefix_space" && name != "split_prefix" && name != "split_removed" &&
           name != "nfc";
  }

  static json golden_;
  static std::map<std::string, std::unique_ptr<Tokenizer>> tokenizers_;
};

json TokenizerGoldenTest::golden_;
std::map<std::string, std::unique_ptr<Tokenizer>> TokenizerGoldenTest::tokenizers_;

TEST_F(TokenizerGoldenTest, IdsEqualHuggingFace) {
  ASSERT_GT(golden_.at("cases").size(), 1000U);
  for (const json& c : golden_.at("cases")) {
    const auto name = c.at("tokenizer").get<std::string>();
    const Tokenizer& tokenizer = *tokenizers_.at(name);
    const auto text = c.at("text").get<std::string>();
    const bool parse_special = c.at("parse_special").get<bool>();
    const auto ids = tokenizer.Encode(text, {.parse_special = parse_special, .add_special = false});
    ASSERT_TRUE(ids.ok()) << ids.status().ToString();
    EXPECT_EQ(*ids, c.at("ids").get<std::vector<int>>()) << name << ": " << c.at("text");
    if (KeepsText(name)) {
      EXPECT_EQ(tokenizer.Decode(*ids), text) << name;
    }
    if (!c.contains("ids_with_special")) continue;
    const auto special = tokenizer.Encode(text, {.parse_special = parse_special, .add_special = true});
    ASSERT_TRUE(special.ok()) << special.status().ToString();
    EXPECT_EQ(*special, c.at("ids_with_special").get<std::vector<int>>()) << name << ": " << c.at("text");
  }
}

TEST_F(TokenizerGoldenTest, InvalidUtf8RoundTrips) {
  for (const json& item : golden_.at("invalid_utf8")) {
    const std::string bytes = FromBase64(item.get<std::string>());
    for (const auto& [name, tokenizer] : tokenizers_) {
      if (!KeepsText(name)) continue;
      const auto ids = tokenizer->Encode(bytes);
      ASSERT_TRUE(ids.ok()) << ids.status().ToString();
      EXPECT_EQ(tokenizer->Decode(*ids), bytes) << name;
    }
  }
}

TEST_F(TokenizerGoldenTest, SharedCasesOfTheDemoModel) {
  std::ifstream in("../shared/golden/zeroc-demo/tokenizer_golden.json");
  if (!in) GTEST_SKIP() << "shared golden data is not here";
  const json cases = json::parse(in).at("cases");
  ASSERT_GE(cases.size(), 200U);
  const Tokenizer& tokenizer = *tokenizers_.at("models/zeroc-demo/tokenizer.json");
  for (const json& c : cases) {
    const std::string bytes = FromBase64(c.at("bytes_b64").get<std::string>());
    const auto ids =
        tokenizer.Encode(bytes, {.parse_special = c.at("parse_special").get<bool>(), .add_special = false});
    ASSERT_TRUE(ids.ok()) << ids.status().ToString();
    EXPECT_EQ(*ids, c.at("ids").get<std::vector<int>>()) << c.at("bytes_b64");
    EXPECT_EQ(tokenizer.Decode(*ids), bytes) << c.at("bytes_b64");
  }
}

}  // namespace
}  // namespace zeroc
