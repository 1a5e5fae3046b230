#include "libzeroc/base/status.h"

#include <gtest/gtest.h>

#include <memory>

namespace zeroc {
namespace {

Result<int> Half(int x) {
  if (x % 2 != 0) return InvalidArgument("odd: " + std::to_string(x));
  return x / 2;
}

Result<int> Quarter(int x) {
  ZEROC_ASSIGN_OR_RETURN(const int half, Half(x));
  return Half(half);
}

TEST(StatusTest, OkHoldsNothing) {
  const Status ok;
  EXPECT_TRUE(ok.ok());
  EXPECT_EQ(ok.code(), StatusCode::kOk);
  EXPECT_EQ(ok.ToString(), "OK");
  EXPECT_TRUE(ok.WithContext("reading").ok());
}

TEST(StatusTest, CodesHaveGrpcNumbers) {
  EXPECT_EQ(static_cast<int>(InvalidArgument("").code()), 3);
  EXPECT_EQ(static_cast<int>(ResourceExhausted("").code()), 8);
  EXPECT_EQ(static_cast<int>(Unavailable("").code()), 14);
  EXPECT_EQ(static_cast<int>(DataLoss("").code()), 15);
}

TEST(StatusTest, ContextGoesBeforeTheMessage) {
  const Status s = NotFound("no such tensor").WithContext("model.safetensors");
  EXPECT_EQ(s.ToString(), "NOT_FOUND: model.safetensors: no such tensor");
}

TEST(ResultTest, MacrosPassErrorsOn) {
  EXPECT_EQ(*Quarter(12), 3);
  EXPECT_EQ(Quarter(6).status().message(), "odd: 3");
  EXPECT_EQ(Quarter(5).status().code(), StatusCode::kInvalidArgument);
}

TEST(ResultTest, HoldsMoveOnlyValues) {
  Result<std::unique_ptr<int>> r = std::make_unique<int>(7);
  const std::unique_ptr<int> p = std::move(r).value();
  EXPECT_EQ(*p, 7);
}

}  // namespace
}  // namespace zeroc
