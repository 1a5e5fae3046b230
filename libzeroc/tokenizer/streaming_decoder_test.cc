#include "libzeroc/tokenizer/streaming_decoder.h"

#include <gtest/gtest.h>

#include <random>

#include "libzeroc/tokenizer/utf8.h"

namespace zeroc {
namespace {

class StreamingDecoderTest : public ::testing::Test {
 protected:
  void SetUp() override {
    auto tokenizer = Tokenizer::Open("models/zeroc-demo");
    ASSERT_TRUE(tokenizer.ok()) << tokenizer.status().ToString();
    tokenizer_ = *std::move(tokenizer);
  }

  // One id per byte, so that every split inside a character occurs.
  std::vector<int> ByteTokens(std::string_view bytes) const {
    std::vector<int> ids;
    for (const char c : bytes) {
      const auto id = tokenizer_->Encode(std::string_view(&c, 1));
      EXPECT_TRUE(id.ok());
      ids.insert(ids.end(), id->begin(), id->end());
    }
    return ids;
  }

  std::string Stream(const std::vector<int>& ids, bool skip_special = false) const {
    StreamingDecoder decoder(*tokenizer_, skip_special);
    std::string out;
    for (const int id : ids) {
      const std::string piece = decoder.Push(id);
      EXPECT_EQ(ReplaceInvalidUtf8(piece), piece) << "half a character was emitted";
      out += piece;
    }
    return out + decoder.Flush();
  }

  std::unique_ptr<Tokenizer> tokenizer_;
};

TEST_F(StreamingDecoderTest, HoldsBackUnfinishedCharacters) {
  StreamingDecoder decoder(*tokenizer_);
  const std::vector<int> ids = ByteTokens("a\xf0\x9f\x98\x80z");
  const std::vector<std::string> expected = {"a", "", "", "", "\xf0\x9f\x98\x80", "z"};
  ASSERT_EQ(ids.size(), expected.size());
  for (std::size_t i = 0; i < ids.size(); ++i) EXPECT_EQ(decoder.Push(ids[i]), expected[i]) << i;
  EXPECT_EQ(decoder.Flush(), "");
}

TEST_F(StreamingDecoderTest, InvalidBytesAreReplacedAsSoonAsTheyCannotBeCompleted) {
  StreamingDecoder decoder(*tokenizer_);
  const std::vector<int> ids = ByteTokens(
      "\xe2\x82"
      "A\xff\xc3");
  EXPECT_EQ(decoder.Push(ids[0]), "");
  EXPECT_EQ(decoder.Push(ids[1]), "");
  EXPECT_EQ(decoder.Push(ids[2]),
            "\xef\xbf\xbd"
            "A");
  EXPECT_EQ(decoder.Push(ids[3]), "\xef\xbf\xbd");
  EXPECT_EQ(decoder.Push(ids[4]), "");
  EXPECT_EQ(decoder.Flush(), "\xef\xbf\xbd");
  EXPECT_EQ(decoder.Flush(), "");
}

TEST_F(StreamingDecoderTest, EqualsTheWholeDecodeOnRandomBytes) {
  std::mt19937 random(11);
  const std::vector<std::string> pieces = {"a",    "é",    "漢",           "😀",       "\xf0\x9f", "\xe2\x82", "\xc3",
                                           "\x80", "\xff", "\xed\xa0\x80", "\xf4\x90"};
  for (int round = 0; round < 3000; ++round) {
    std::string bytes;
    for (std::size_t i = random() % 12; i > 0; --i) bytes += pieces[random() % pieces.size()];
    EXPECT_EQ(Stream(ByteTokens(bytes)), ReplaceInvalidUtf8(bytes));
    const auto ids = tokenizer_->Encode(bytes);
    ASSERT_TRUE(ids.ok());
    EXPECT_EQ(Stream(*ids), ReplaceInvalidUtf8(bytes));
  }
}

TEST_F(StreamingDecoderTest, SkipsSpecialsAndMarksUnknownIds) {
  const std::vector<int> ids = {1, ByteTokens("x")[0], 2};
  EXPECT_EQ(Stream(ids), "<|bos|>x<|eos|>");
  EXPECT_EQ(Stream(ids, /*skip_special=*/true), "x");
  EXPECT_EQ(Stream({-1, 1 << 30}), "\xef\xbf\xbd\xef\xbf\xbd");
}

TEST(Utf8Test, ReplacementCountsMaximalPrefixes) {
  const std::string r = "\xef\xbf\xbd";
  EXPECT_EQ(ReplaceInvalidUtf8("\xe2\x82"), r);
  EXPECT_EQ(ReplaceInvalidUtf8("\xed\xa0\x80"), r + r + r);  // a surrogate: no byte begins anything
  EXPECT_EQ(ReplaceInvalidUtf8("\xc0\x80"), r + r);
  EXPECT_EQ(ReplaceInvalidUtf8("\xf4\x90\x80\x80"), r + r + r + r);
  EXPECT_EQ(ReplaceInvalidUtf8("\xf0\x9f\x98x"), r + "x");
  EXPECT_EQ(ReplaceInvalidUtf8("\xf4\x8f\xbf\xbf"), "\xf4\x8f\xbf\xbf");
}

}  // namespace
}  // namespace zeroc
