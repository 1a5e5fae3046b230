#include "libzeroc/tokenizer/tokenizer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <random>
#include <thread>

#include "libzeroc/tokenizer/regex.h"

namespace zeroc {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

class TokenizerTest : public ::testing::Test {
 protected:
  void SetUp() override {
    auto tokenizer = Tokenizer::Open("models/zeroc-demo");
    ASSERT_TRUE(tokenizer.ok()) << tokenizer.status().ToString();
    tokenizer_ = *std::move(tokenizer);
  }

  std::vector<int> Encode(std::string_view text, const EncodeOptions& options = {}) const {
    const auto ids = tokenizer_->Encode(text, options);
    EXPECT_TRUE(ids.ok()) << ids.status().ToString();
    return ids.ok() ? *ids : std::vector<int>();
  }

  std::unique_ptr<Tokenizer> tokenizer_;
};

TEST_F(TokenizerTest, KnowsItsIds) {
  EXPECT_EQ(tokenizer_->vocab_size(), 4096);
  EXPECT_EQ(tokenizer_->bos_id(), 1);
  EXPECT_TRUE(tokenizer_->IsSpecial(2));
  EXPECT_FALSE(tokenizer_->IsSpecial(6));
  EXPECT_EQ(tokenizer_->IdToBytes(6), "!");
  EXPECT_EQ(tokenizer_->IdToBytes(1), "<|bos|>");
  for (const int id : {-1, 4096, 1 << 30}) {
    EXPECT_FALSE(tokenizer_->HasId(id));
    EXPECT_FALSE(tokenizer_->IsSpecial(id));
    EXPECT_EQ(tokenizer_->IdToBytes(id), "");
  }
}

TEST_F(TokenizerTest, RandomBytesRoundTrip) {
  std::mt19937 random(5);
  for (int round = 0; round < 3000; ++round) {
    std::string bytes(random() % 200, '\0');
    const unsigned range = round % 2 == 0 ? 256 : 128;
    for (char& c : bytes) c = static_cast<char>(random() % range);
    const std::vector<int> ids = Encode(bytes);
    EXPECT_EQ(tokenizer_->Decode(ids), bytes);
    for (const int id : ids) ASSERT_TRUE(tokenizer_->HasId(id));
  }
}

// Words repeat, so that the cache is used, evicted and used again.
TEST_F(TokenizerTest, RepeatedWordsEncodeAsTheFirstTime) {
  std::mt19937 random(9);
  std::string text;
  std::vector<int> expected;
  for (int i = 0; i < 20000; ++i) {
    std::string word = " ";
    for (std::size_t n = 1 + random() % 3; n > 0; --n) word += static_cast<char>('a' + random() % 26);
    const std::vector<int> ids = Encode(word);
    text += word;
    expected.insert(expected.end(), ids.begin(), ids.end());
  }
  EXPECT_EQ(Encode(text), expected);
}

TEST_F(TokenizerTest, PromptGetsBosOnce) {
  const auto prompt = [this](std::string_view text, bool parse = true) {
    const auto ids = tokenizer_->EncodePrompt(text, parse);
    EXPECT_TRUE(ids.ok());
    return *ids;
  };
  EXPECT_THAT(prompt(""), ElementsAre(1));
  EXPECT_EQ(prompt("x"), Encode("x", {.parse_special = true, .add_special = true}));
  EXPECT_EQ(prompt("<|bos|>x"), prompt("x"));
  EXPECT_EQ(prompt("<|bos|><|bos|>x").size(), 3U);  // what the caller wrote twice stays twice
  EXPECT_EQ(prompt("<|bos|>x", false).front(), 1);
  EXPECT_GT(prompt("<|bos|>x", false).size(), 4U);
}

TEST_F(TokenizerTest, DecodeMarksUnknownIdsAndSkipsSpecials) {
  const std::vector<int> ids = {1, 6, 4096, -5, 2};
  EXPECT_EQ(tokenizer_->Decode(ids), "<|bos|>!\xef\xbf\xbd\xef\xbf\xbd<|eos|>");
  EXPECT_EQ(tokenizer_->Decode(ids, /*skip_special=*/true), "!\xef\xbf\xbd\xef\xbf\xbd");
  EXPECT_EQ(tokenizer_->Decode({}), "");
}

TEST_F(TokenizerTest, LongWordsAndLongRunsTakeNearLinearTime) {
  for (const std::string& unit :
       {std::string("a"), std::string(" "), std::string("\n"), std::string("="), std::string("7"), std::string("\xff"),
        std::string("é"), std::string(" \n"), std::string("<|")}) {
    std::string text;
    while (text.size() < 1 << 20) text += unit;
    const auto start = std::chrono::steady_clock::now();
    const std::vector<int> ids = Encode(text);
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    EXPECT_EQ(tokenizer_->Decode(ids), text);
    EXPECT_LT(took.count(), 20.0) << "unit " << ::testing::PrintToString(unit);
  }
}

TEST_F(TokenizerTest, RefusesAWordBeyondTheLimit) {
  const auto ids = tokenizer_->Encode(std::string((16 << 20) + 1, 'a'));
  EXPECT_EQ(ids.status().code(), StatusCode::kInvalidArgument);
  EXPECT_THAT(ids.status().ToString(), HasSubstr("a word of 16777217 bytes"));
}

TEST_F(TokenizerTest, ThreadsShareOneTokenizer) {
  const std::string text = "One tokenizer serves every request thread, it doesn't copy 12345.";
  const std::vector<int> expected = Encode(text);
  std::vector<std::thread> threads;
  std::vector<int> wrong(4, 0);
  for (std::size_t t = 0; t < wrong.size(); ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 500; ++i) {
        const auto ids = tokenizer_->Encode(text);
        wrong[t] += !ids.ok() || *ids != expected || tokenizer_->Decode(*ids) != text ? 1 : 0;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_THAT(wrong, ::testing::Each(0));
}

TEST(RegexTest, RefusesWhatTheEnginesReadDifferently) {
  for (const char* pattern : {R"(\w+)", R"(\bx)", R"(\h)", "[a[bc]]", "[a&&b]", R"([\S])", "(?m)x", "a(?i)b", "a{2}+",
                              "a{,3}", "(*UCP)", R"((a)\1)", "[]a]"}) {
    EXPECT_EQ(Regex::Compile(pattern).status().code(), StatusCode::kUnimplemented) << pattern;
  }
  for (const char* pattern : {"(", "[a", R"(\p{NoSuchThing})", "a\\", "\xff", "*"}) {
    EXPECT_EQ(Regex::Compile(pattern).status().code(), StatusCode::kInvalidArgument) << pattern;
  }
  EXPECT_FALSE(Regex::Compile(std::string(70000, 'a')).ok());
}

TEST(RegexTest, CatastrophicPatternsEndInAnError) {
  const auto regex = Regex::Compile("(a+)+[^a]");
  ASSERT_TRUE(regex.ok()) << regex.status().ToString();
  Regex::Matcher matcher(**regex);
  const auto match = matcher.Find(std::string(4000, 'a'), 0);
  EXPECT_EQ(match.status().code(), StatusCode::kResourceExhausted);
}

}  // namespace
}  // namespace zeroc
