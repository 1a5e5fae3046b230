#include "libzeroc/checkpoint/safetensors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>

#include "libzeroc/checkpoint/checkpoint_testing.h"

namespace zeroc {
namespace {

using testing::Bytes;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using testing::RawSafetensors;
using testing::ReadAll;
using testing::TempDir;

constexpr std::string_view kTwo =
    R"({"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},)"
    R"("b":{"dtype":"BF16","shape":[2,1],"data_offsets":[8,12]}})";

Status ParseStatus(std::string_view bytes) { return SafetensorsFile::Parse(Bytes(bytes), "t").status(); }

TEST(SafetensorsTest, ReadsTensorsInPlace) {
  const std::string bytes = RawSafetensors(kTwo, "0123456789ab");
  const auto file = SafetensorsFile::Parse(Bytes(bytes), "t");
  ASSERT_TRUE(file.ok()) << file.status().ToString();
  EXPECT_THAT((*file)->names(), ElementsAre("a", "b"));
  EXPECT_EQ((*file)->metadata().at("format"), "pt");
  const TensorView* const b = (*file)->Find("b");
  ASSERT_NE(b, nullptr);
  EXPECT_EQ(b->dtype, DType::kBf16);
  EXPECT_THAT(b->shape, ElementsAre(2, 1));
  EXPECT_EQ(b->bytes, 4U);
  EXPECT_EQ(reinterpret_cast<const char*>(b->data), bytes.data() + bytes.size() - 4);
  EXPECT_EQ((*file)->Find("c"), nullptr);
}

TEST(SafetensorsTest, AcceptsScalarsEmptyTensorsAndPadding) {
  const std::string header = R"({"e":{"dtype":"F32","shape":[0,7],"data_offsets":[0,0]},)"
                             R"("s":{"data_offsets":[0,8],"dtype":"I64","shape":[]}}   )";
  const std::string bytes = RawSafetensors(header, "01234567");
  const auto file = SafetensorsFile::Parse(Bytes(bytes), "t");
  ASSERT_TRUE(file.ok()) << file.status().ToString();
  EXPECT_EQ((*file)->Find("e")->bytes, 0U);
  EXPECT_TRUE((*file)->Find("s")->shape.empty());
}

TEST(SafetensorsTest, EveryTruncationIsRefused) {
  const std::string bytes = RawSafetensors(kTwo, "0123456789ab");
  for (std::size_t n = 0; n < bytes.size(); ++n) {
    const std::string cut = bytes.substr(0, n);
    EXPECT_FALSE(ParseStatus(cut).ok()) << n;
  }
  EXPECT_FALSE(ParseStatus(bytes + "x").ok());
}

TEST(SafetensorsTest, RandomDamageNeverCrashes) {
  const std::string good = RawSafetensors(kTwo, "0123456789ab");
  std::mt19937 random(7);
  for (int round = 0; round < 20000; ++round) {
    std::string bytes = good;
    for (int i = 0; i < 3; ++i) bytes[random() % bytes.size()] = static_cast<char>(random());
    const auto file = SafetensorsFile::Parse(Bytes(bytes), "t");
    if (!file.ok()) continue;
    for (const auto& [name, view] : (*file)->tensors()) {
      const auto* const begin = reinterpret_cast<const char*>(view.data);
      ASSERT_GE(begin, bytes.data());
      ASSERT_LE(begin + view.bytes, bytes.data() + bytes.size());
    }
  }
}

struct Hostile {
  std::string header;
  std::size_t data_bytes;
  std::string cause;  // a part of the message
};

class SafetensorsHostileTest : public ::testing::TestWithParam<Hostile> {};

TEST_P(SafetensorsHostileTest, IsRefusedWithTheCause) {
  const std::string bytes = RawSafetensors(GetParam().header, std::string(GetParam().data_bytes, 'x'));
  const Status status = ParseStatus(bytes);
  ASSERT_FALSE(status.ok());
  EXPECT_THAT(status.ToString(), HasSubstr(GetParam().cause));
  EXPECT_LT(status.message().size(), 400U);
}

std::string OneTensor(const std::string& dtype, const std::string& shape, const std::string& offsets) {
  return R"({"w":{"dtype":")" + dtype + R"(","shape":)" + shape + R"(,"data_offsets":)" + offsets + "}}";
}

std::string TwoTensors(const std::string& first, const std::string& second) {
  return R"({"a":{"dtype":"U8","shape":[4],"data_offsets":)" + first +
         R"(},"b":{"dtype":"U8","shape":[4],"data_offsets":)" + second + "}}";
}

INSTANTIATE_TEST_SUITE_P(
    Cases, SafetensorsHostileTest,
    ::testing::Values(
        Hostile{OneTensor("F32", "[4]", "[0,8]"), 8, "does not fill"},
        Hostile{OneTensor("F32", "[2]", "[0,16]"), 8, "outside"},
        Hostile{OneTensor("F32", "[2]", "[8,0]"), 8, "outside"},
        Hostile{OneTensor("F32", "[2]", "[0,8]"), 12, "cover 8 of 12"},
        Hostile{OneTensor("F32", "[4611686018427387904,4]", "[0,0]"), 0, "does not fill"},
        Hostile{OneTensor("F32", "[18446744073709551615]", "[0,8]"), 8, "too large"},
        Hostile{OneTensor("F32", "[99999999999999999999]", "[0,8]"), 8, "too large"},
        Hostile{OneTensor("F32", "[-2]", "[0,8]"), 8, "negative"},
        Hostile{OneTensor("F32", "[2.0]", "[0,8]"), 8, "fractional"},
        Hostile{OneTensor("F32", "[[2]]", "[0,8]"), 8, "an array"},
        Hostile{OneTensor("F32", "[\"2\"]", "[0,8]"), 8, "a string"},
        Hostile{OneTensor("F32", "2", "[0,8]"), 8, "a number"}, Hostile{OneTensor("F32", "null", "[0,8]"), 8, "null"},
        Hostile{OneTensor("F32", "[1,1,1,1,1,1,1,1,2]", "[0,8]"), 8, "dimensions"},
        Hostile{OneTensor("F32", "[2]", "[0]"), 8, "fewer than two"},
        Hostile{OneTensor("F32", "[2]", "[0,8,8]"), 8, "more than two"},
        Hostile{OneTensor("F8_E4M3", "[8]", "[0,8]"), 8, "UNIMPLEMENTED"},
        Hostile{OneTensor("F32\",\"dtype\":\"F32", "[2]", "[0,8]"), 8, "twice"},
        Hostile{OneTensor("F32\",\"extra\":\"F32", "[2]", "[0,8]"), 8, "unknown key"},
        Hostile{R"({"w":{"dtype":"F32","shape":[2]}})", 8, "missing"},
        Hostile{TwoTensors("[0,4]", "[2,6]"), 6, "overlapping"},
        Hostile{TwoTensors("[0,4]", "[0,4]"), 4, "overlapping"}, Hostile{TwoTensors("[0,4]", "[5,9]"), 9, "hole"},
        Hostile{TwoTensors("[1,5]", "[5,9]"), 9, "hole"},
        Hostile{R"({"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
                R"("w":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}})",
                2, "twice"},
        Hostile{R"({"__metadata__":{"k":1}})", 0, "a number"},
        Hostile{R"({"__metadata__":{"k":"1","k":"2"}})", 0, "twice"},
        Hostile{R"({"__metadata__":{},"__metadata__":{}})", 0, "twice"},
        Hostile{R"({"__metadata__":{"k":{}}})", 0, "an object"}, Hostile{R"({"w":[]})", 0, "an array"},
        Hostile{"{", 0, "not valid JSON"}, Hostile{"{}x", 0, "not valid JSON"}, Hostile{" {}", 0, "start with '{'"},
        Hostile{"[1]", 0, "start with '{'"}, Hostile{"{\"\xff\":1}", 0, "not valid JSON"},
        Hostile{"{\"w\":" + std::string(1 << 20, '['), 0, "an array"},
        Hostile{"{\"" + std::string(1 << 20, 'n') + "\":1}", 0, "..."}));

TEST(SafetensorsTest, HeaderLengthIsBounded) {
  for (const std::uint64_t length : {std::uint64_t{100'000'001}, std::uint64_t{1} << 63, ~std::uint64_t{0}}) {
    std::string bytes = RawSafetensors("{}", "");
    std::memcpy(bytes.data(), &length, 8);
    EXPECT_THAT(ParseStatus(bytes).ToString(), HasSubstr("limit")) << length;
  }
  std::string bytes = RawSafetensors("{}", "");
  const std::uint64_t length = 3;
  std::memcpy(bytes.data(), &length, 8);
  EXPECT_THAT(ParseStatus(bytes).ToString(), HasSubstr("past the end"));
}

TEST(SafetensorsTest, OpenNamesTheFile) {
  const TempDir dir;
  EXPECT_EQ(SafetensorsFile::Open(dir.path() + "/none").status().code(), StatusCode::kNotFound);
  EXPECT_EQ(SafetensorsFile::Open(dir.path()).status().code(), StatusCode::kInvalidArgument);
  const std::string path = dir.Write("bad.safetensors", "");
  EXPECT_THAT(SafetensorsFile::Open(path).status().ToString(), HasSubstr("bad.safetensors: the file is empty"));
}

TEST(SafetensorsTest, WriteThenReadGivesTheSameAlignedTensors) {
  const TempDir dir;
  const std::string path = dir.path() + "/plan";
  const std::string data = "abcdefghijklmnopqrstuvwxyz0123456789";
  const auto view = [&data](DType dtype, std::vector<std::int64_t> shape, std::size_t bytes) {
    return TensorView{.dtype = dtype, .shape = std::move(shape), .data = Bytes(data).data(), .bytes = bytes};
  };
  const TensorMap tensors = {{"odd", view(DType::kU8, {3}, 3)},
                             {"half", view(DType::kF16, {1, 3}, 6)},
                             {"none", view(DType::kF32, {0}, 0)},
                             {"double", view(DType::kF64, {}, 8)},
                             {"name \"with\" \xc3\xa9", view(DType::kI32, {2}, 8)}};
  ASSERT_TRUE(WriteSafetensors(path, tensors, {{"k", "v\n"}}).ok());
  const std::string first = ReadAll(path);
  ASSERT_TRUE(WriteSafetensors(path, tensors, {{"k", "v\n"}}).ok());
  EXPECT_EQ(ReadAll(path), first);
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(dir.path()), {}), 1) << "a temporary file is left";

  const auto file = SafetensorsFile::Open(path);
  ASSERT_TRUE(file.ok()) << file.status().ToString();
  EXPECT_EQ((*file)->metadata().at("k"), "v\n");
  ASSERT_EQ((*file)->tensors().size(), tensors.size());
  for (const auto& [name, wanted] : tensors) {
    const TensorView* const got = (*file)->Find(name);
    ASSERT_NE(got, nullptr) << name;
    EXPECT_EQ(got->dtype, wanted.dtype);
    EXPECT_EQ(got->shape, wanted.shape);
    ASSERT_EQ(got->bytes, wanted.bytes);
    EXPECT_EQ(std::memcmp(got->data, wanted.data, wanted.bytes), 0) << name;
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(got->data) % DTypeBytes(got->dtype), 0U) << name;
  }
}

TEST(SafetensorsTest, WriteRefusesWhatItCouldNotReadBack) {
  const TempDir dir;
  const std::string path = dir.path() + "/plan";
  const std::string data(16, 'x');
  TensorView view{.dtype = DType::kF32, .shape = {4}, .data = Bytes(data).data(), .bytes = 16};
  EXPECT_FALSE(WriteSafetensors(path, {{"", view}}, {}).ok());
  EXPECT_FALSE(WriteSafetensors(path, {{"__metadata__", view}}, {}).ok());
  EXPECT_FALSE(WriteSafetensors(path, {{"\xff", view}}, {}).ok());
  view.bytes = 12;
  EXPECT_FALSE(WriteSafetensors(path, {{"w", view}}, {}).ok());
  EXPECT_TRUE(std::filesystem::is_empty(dir.path()));
  view.bytes = 16;
  EXPECT_EQ(WriteSafetensors(dir.path() + "/no/such", {{"w", view}}, {}).code(), StatusCode::kNotFound);
}

}  // namespace
}  // namespace zeroc
