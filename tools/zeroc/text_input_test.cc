#include "tools/zeroc/text_input.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <map>

namespace zeroc {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

class TextInputTest : public ::testing::Test {
 protected:
  void SetUp() override {
    const std::string name = ::testing::UnitTest::GetInstance()->current_test_info()->name();
    dir_ = std::filesystem::temp_directory_path() / ("zeroc_text_input_" + name + "_" + std::to_string(getpid()));
    std::filesystem::create_directory(dir_);
  }
  void TearDown() override { std::filesystem::remove_all(dir_); }

  std::string Write(const std::string& text) {
    std::string path = (dir_ / "file").string();
    std::ofstream(path, std::ios::binary) << text;
    return path;
  }

  std::filesystem::path dir_;
};

TEST_F(TextInputTest, FileThatIsNotThere) {
  const Result<std::string> text = ReadFile((dir_ / "none.txt").string());
  ASSERT_FALSE(text.ok());
  EXPECT_EQ(text.status().code(), StatusCode::kNotFound);
  EXPECT_THAT(text.status().ToString(), HasSubstr("none.txt"));
}

TEST_F(TextInputTest, FolderIsNoFile) { EXPECT_FALSE(ReadFile(dir_.string()).ok()); }

TEST_F(TextInputTest, FileAboveTheBound) {
  const Result<std::string> text = ReadFile(Write("12345"), 4);
  ASSERT_FALSE(text.ok());
  EXPECT_EQ(text.status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(ReadFile(Write("1234"), 4).value(), "1234");
}

TEST_F(TextInputTest, PartsOfATextAreTheText) {
  const std::string text = "a\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80z\n";
  const std::string path = Write(text);
  for (const double cut : {0.5, 10.0, 25.0, 33.3, 50.0, 61.0, 75.0, 99.0}) {
    const std::string head = ReadTextSlice({path, 0, cut}).value();
    const std::string tail = ReadTextSlice({path, cut, 100}).value();
    EXPECT_EQ(head + tail, text) << cut;
    EXPECT_TRUE(tail.empty() || (static_cast<unsigned char>(tail[0]) & 0xc0) != 0x80) << cut;
  }
}

TEST(ParseTextSlice, KnowsPartsFromNames) {
  EXPECT_EQ(ParseTextSlice("a.txt").value().path, "a.txt");
  EXPECT_EQ(ParseTextSlice("a@b:c").value().path, "a@b:c");
  EXPECT_EQ(ParseTextSlice("me@host/a.txt").value().path, "me@host/a.txt");
  const TextSlice slice = ParseTextSlice("a@b.txt@12.5:50").value();
  EXPECT_EQ(slice.path, "a@b.txt");
  EXPECT_EQ(slice.begin_percent, 12.5);
  EXPECT_EQ(slice.end_percent, 50);
}

TEST(ParseTextSlice, RefusesBoundsOutOfOrder) {
  for (const char* argument : {"f@50:50", "f@60:50", "f@0:100.5"}) {
    EXPECT_EQ(ParseTextSlice(argument).status().code(), StatusCode::kInvalidArgument) << argument;
  }
}

TEST(ParseIdList, TakesCommasAndSpaces) {
  EXPECT_THAT(ParseIdList("1,2, 3\n4").value(), ElementsAre(1, 2, 3, 4));
  EXPECT_THAT(ParseIdList("2147483647").value(), ElementsAre(2147483647));
  EXPECT_TRUE(ParseIdList(" ,").value().empty());
}

TEST(ParseIdList, NamesTheWrongEntry) {
  for (const char* text : {"1,x", "1,-2", "2147483648", "1.5", "0x10"}) {
    EXPECT_EQ(ParseIdList(text).status().code(), StatusCode::kInvalidArgument) << text;
  }
  EXPECT_THAT(ParseIdList("7,abc,8").status().ToString(), HasSubstr("'abc'"));
}

TEST_F(TextInputTest, IdsFiles) {
  EXPECT_THAT(ReadIdsFile(Write("[1, 2]")).value(), ElementsAre(1, 2));
  EXPECT_THAT(ReadIdsFile(Write("{\"ids\":[5]}")).value(), ElementsAre(5));
}

TEST_F(TextInputTest, BrokenIdsFilesAreNamed) {
  const std::map<std::string, std::string> cases = {
      {"", "array"},
      {"[1,", "array"},
      {"7", "array"},
      {"[]", "empty"},
      {"{}", "'ids'"},
      {"{\"ids\":3}", "array"},
      {"[1,\"2\"]", "ids[1]"},
      {"[-1]", "ids[0]"},
      {"[1.5]", "ids[0]"},
      {"[99999999999999999999]", "ids[0]"},
      {"[2147483648]", "ids[0]"},
      {"[[1]]", "ids[0]"},
  };
  for (const auto& [text, expected] : cases) {
    const Result<std::vector<std::int32_t>> ids = ReadIdsFile(Write(text));
    ASSERT_FALSE(ids.ok()) << text;
    EXPECT_THAT(ids.status().ToString(), HasSubstr(expected)) << text;
    EXPECT_THAT(ids.status().ToString(), HasSubstr("file")) << text;
  }
  EXPECT_FALSE(ReadIdsFile(Write(std::string(1 << 20, '['))).ok()) << "deep nesting";
}

TEST_F(TextInputTest, RecallSets) {
  const std::vector<RecallLine> cases =
      ReadRecallSet(Write("{\"prompt\":\"p\",\"answer\":\"a\",\"distance\":256}\n\n"
                          "{\"prompt\":\"q\",\"answer\":\"b\",\"distance\":1,\"group\":\"g\"}"))
          .value();
  ASSERT_EQ(cases.size(), 2u);
  EXPECT_EQ(cases[0].group, "256");
  EXPECT_EQ(cases[1].group, "g");
  EXPECT_EQ(cases[1].prompt + cases[1].answer, "qb");
}

TEST_F(TextInputTest, BrokenRecallSetsNameTheLine) {
  for (const char* line :
       {"{", "[]", "{\"prompt\":\"p\"}", "{\"prompt\":1,\"answer\":\"a\"}", "{\"prompt\":\"\",\"answer\":\"\"}"}) {
    const auto cases = ReadRecallSet(Write("{\"prompt\":\"p\",\"answer\":\"a\"}\n" + std::string(line)));
    ASSERT_FALSE(cases.ok()) << line;
    EXPECT_THAT(cases.status().ToString(), HasSubstr("file:2")) << line;
  }
  EXPECT_FALSE(ReadRecallSet(Write("\n \n")).ok());
}

TEST(TakeEvenly, SpreadsOverGroups) {
  std::vector<RecallLine> cases;
  cases.reserve(30);
  for (int i = 0; i < 30; ++i) cases.push_back({std::to_string(i), "a", i < 20 ? "x" : i < 28 ? "y" : "z"});
  std::map<std::string, int> counts;
  const std::vector<RecallLine> taken = TakeEvenly(cases, 12);
  for (const RecallLine& c : taken) ++counts[c.group];
  EXPECT_EQ(taken.size(), 12u);
  EXPECT_EQ(counts["x"], 5);
  EXPECT_EQ(counts["y"], 5);
  EXPECT_EQ(counts["z"], 2);
  for (std::size_t i = 1; i < taken.size(); ++i) EXPECT_LT(std::stoi(taken[i - 1].prompt), std::stoi(taken[i].prompt));
  EXPECT_EQ(TakeEvenly(cases, 0).size(), 30u);
  EXPECT_EQ(TakeEvenly(cases, 99).size(), 30u);
  EXPECT_EQ(TakeEvenly(cases, 1).size(), 1u);
}

}  // namespace
}  // namespace zeroc
