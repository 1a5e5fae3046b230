// tokenizer.json files that are broken, lie, or ask for what is not supported.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>
#include <random>

#include "libzeroc/tokenizer/byte_level.h"
#include "libzeroc/tokenizer/tokenizer.h"

namespace zeroc {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;

// 256 bytes, "ab" and a special token.
json Small() {
  json root = json::parse(R"({"added_tokens":[{"id":257,"content":"<s>","special":true,"normalized":false}],
    "normalizer":null,"pre_tokenizer":{"type":"ByteLevel","add_prefix_space":false,"use_regex":true},
    "post_processor":{"type":"TemplateProcessing","single":[{"SpecialToken":{"id":"<s>","type_id":0}},
      {"Sequence":{"id":"A","type_id":0}}],"special_tokens":{"<s>":{"id":"<s>","ids":[257],"tokens":["<s>"]}}},
    "decoder":{"type":"ByteLevel"},"model":{"type":"BPE","vocab":{"ab":256},"merges":["a b"]}})");
  for (int byte = 0; byte < 256; ++byte) {
    root["model"]["vocab"][ByteToCharacter(static_cast<unsigned char>(byte))] = byte;
  }
  return root;
}

Status ParseStatus(const json& root) { return Tokenizer::Parse(root.dump(), "t.json").status(); }

TEST(TokenizerHostileTest, TheSmallFileIsGood) {
  const auto tokenizer = Tokenizer::Parse(Small().dump(), "t.json");
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status().ToString();
  EXPECT_EQ(*(*tokenizer)->EncodePrompt("abc"), (std::vector<int>{257, 256, 'c'}));
}

struct BadPlace {
  std::string pointer;  // JSON pointer of the value to replace
  json value;
  std::string cause;
};

class BadPlaceTest : public ::testing::TestWithParam<BadPlace> {};

TEST_P(BadPlaceTest, IsRefusedNamingTheField) {
  json root = Small();
  root[json::json_pointer(GetParam().pointer)] = GetParam().value;
  const Status status = ParseStatus(root);
  ASSERT_FALSE(status.ok()) << GetParam().pointer << " = " << GetParam().value;
  EXPECT_THAT(status.ToString(), HasSubstr("t.json: "));
  EXPECT_THAT(status.ToString(), HasSubstr(GetParam().cause));
}

INSTANTIATE_TEST_SUITE_P(
    Unsupported, BadPlaceTest,
    ::testing::Values(
        BadPlace{"/model/type", "Unigram", "UNIMPLEMENTED: t.json: model.type \"Unigram\""},
        BadPlace{"/model/type", "WordPiece", "model.type \"WordPiece\""},
        BadPlace{"/model/byte_fallback", true, "model.byte_fallback"}, BadPlace{"/model/dropout", 0.1, "model.dropout"},
        BadPlace{"/model/end_of_word_suffix", "</w>", "model.end_of_word_suffix"},
        BadPlace{"/normalizer", {{"type", "NFKC"}}, "normalizer.type \"NFKC\" is not supported (NFC is"},
        BadPlace{
            "/normalizer", {{"type", "Sequence"}, {"normalizers", {{{"type", "Lowercase"}}}}}, "normalizers[0].type"},
        BadPlace{"/pre_tokenizer", nullptr, "does not end in ByteLevel"},
        BadPlace{"/pre_tokenizer/type", "Metaspace", "pre_tokenizer.type \"Metaspace\""},
        BadPlace{"/pre_tokenizer", {{"type", "Sequence"}, {"pretokenizers", json::array()}}, "ByteLevel"},
        BadPlace{"/pre_tokenizer",
                 {{"type", "Sequence"}, {"pretokenizers", {{{"type", "ByteLevel"}}, {{"type", "ByteLevel"}}}}},
                 "pretokenizers[1].type: nothing may follow"},
        BadPlace{"/decoder", nullptr, "decoder"}, BadPlace{"/decoder/type", "WordPiece", "decoder.type"},
        BadPlace{"/post_processor/type", "BertProcessing", "post_processor.type"},
        BadPlace{"/post_processor/single", json::array(), "no place for the text"}));

INSTANTIATE_TEST_SUITE_P(
    Malformed, BadPlaceTest,
    ::testing::Values(
        BadPlace{"/model", nullptr, "model is missing"}, BadPlace{"/model", json::array(), "model is missing"},
        BadPlace{"/model/vocab", json::object(), "byte 0"}, BadPlace{"/model/vocab", 7, "model.vocab is missing"},
        BadPlace{"/model/vocab/ab", -1, "model.vocab \"ab\""}, BadPlace{"/model/vocab/ab", 1.5, "not a token id"},
        BadPlace{"/model/vocab/ab", 4294967296, "not a token id"},
        BadPlace{"/model/vocab/ab", 1 << 21, "not a token id"}, BadPlace{"/model/vocab/ab", 97, "repeats token id 97"},
        BadPlace{"/model/vocab/ab", "256", "not a token id"},
        BadPlace{"/model/merges", nullptr, "model.merges is missing"},
        BadPlace{"/model/merges/0", "ab", "model.merges[0] is neither"},
        BadPlace{"/model/merges/0", "a b c", "model.merges[0] is neither"},
        BadPlace{"/model/merges/0", {"a", "b", "c"}, "model.merges[0] is neither"},
        BadPlace{"/model/merges/0", {"a", 1}, "model.merges[0] is neither"},
        BadPlace{"/model/merges/0", {"a", "c"}, "not in model.vocab"},
        BadPlace{"/model/merges/0", 3, "model.merges[0] is neither"},
        BadPlace{"/model/ignore_merges", "yes", "model.ignore_merges is not a boolean"},
        BadPlace{"/pre_tokenizer",
                 {{"type", "Split"}, {"pattern", {{"Regex", "("}}}, {"behavior", "Isolated"}},
                 "pre_tokenizer"},
        BadPlace{
            "/pre_tokenizer", {{"type", "Split"}, {"pattern", "x"}, {"behavior", "Isolated"}}, "pre_tokenizer.pattern"},
        BadPlace{
            "/pre_tokenizer", {{"type", "Split"}, {"pattern", {{"String", "x"}}}, {"behavior", "Eaten"}}, "\"Eaten\""},
        BadPlace{"/pre_tokenizer", {{"type", "Sequence"}}, "pretokenizers is missing"},
        BadPlace{"/pre_tokenizer", "ByteLevel", "pre_tokenizer is not an object"},
        BadPlace{"/pre_tokenizer/use_regex", 1, "use_regex is not a boolean"},
        BadPlace{"/added_tokens", 1, "added_tokens is not a list"},
        BadPlace{"/added_tokens/0", 1, "added_tokens[0] is not an object"},
        BadPlace{"/added_tokens/0/content", "", "content is empty"},
        BadPlace{"/added_tokens/0/content", std::string(600, 'x'), "longer than 512"},
        BadPlace{"/added_tokens/0/content", "ab", "is 256 in model.vocab"},
        BadPlace{"/added_tokens/0/id", 256, "repeats token id 256"},
        BadPlace{"/added_tokens/0/id", nullptr, "id is missing"},
        BadPlace{"/post_processor/special_tokens", json::object(), "has no ids"},
        BadPlace{"/post_processor/special_tokens/<s>/ids", {999}, "no token of this tokenizer"},
        BadPlace{"/post_processor/single/1", {{"Sequence", {{"id", "B"}}}}, "single[1]"}));

TEST(TokenizerHostileTest, BrokenTextIsAnError) {
  const std::string good = Small().dump();
  for (std::size_t n = 0; n < good.size(); n += 97) {
    EXPECT_EQ(Tokenizer::Parse(good.substr(0, n), "t").status().code(), StatusCode::kInvalidArgument) << n;
  }
  EXPECT_FALSE(Tokenizer::Parse("[]", "t").ok());
  EXPECT_FALSE(Tokenizer::Parse(std::string(1 << 20, '['), "t").ok());
  EXPECT_THAT(Tokenizer::Parse(std::string(9 << 20, ','), "t").status().ToString(), HasSubstr("values"));
  std::string nested;
  for (int i = 0; i < 100000; ++i) nested += "{\"normalizer\":";
  EXPECT_FALSE(Tokenizer::Parse(nested + "1" + std::string(100000, '}'), "t").ok());
  EXPECT_EQ(Tokenizer::Open("no/such/folder").status().code(), StatusCode::kNotFound);
  EXPECT_FALSE(Tokenizer::Open("/dev/null").ok());
}

TEST(TokenizerHostileTest, RandomDamageNeverCrashes) {
  const std::string good = Small().dump();
  std::mt19937 random(17);
  int accepted = 0;
  for (int round = 0; round < 3000; ++round) {
    std::string text = good;
    text[random() % text.size()] = static_cast<char>(random());
    const auto tokenizer = Tokenizer::Parse(text, "t");
    if (!tokenizer.ok()) continue;
    ++accepted;
    const auto ids = (*tokenizer)->Encode("ab <s> \xff abc");
    if (ids.ok()) static_cast<void>((*tokenizer)->Decode(*ids));
  }
  EXPECT_GT(accepted, 0);
}

}  // namespace
}  // namespace zeroc
