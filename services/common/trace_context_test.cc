#include "services/common/trace_context.h"

#include <gtest/gtest.h>

namespace zeroc {
namespace {

constexpr char kGood[] = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

TEST(TraceContext, ReadsAndContinuesATrace) {
  const auto parent = ParseTraceparent(kGood);
  ASSERT_TRUE(parent.has_value());
  EXPECT_EQ(parent->Header(), kGood);
  const TraceContext child = ChildOf(*parent);
  EXPECT_EQ(child.trace_id, parent->trace_id);
  EXPECT_EQ(child.flags, "01");
  EXPECT_NE(child.parent_id, parent->parent_id);
  EXPECT_TRUE(ParseTraceparent(child.Header()).has_value());
  EXPECT_TRUE(ParseTraceparent("01" + std::string(kGood).substr(2) + "-later").has_value());
}

TEST(TraceContext, IgnoresWhatIsMalformed) {
  const std::string good = kGood;
  for (std::size_t cut = 0; cut < good.size(); ++cut) EXPECT_FALSE(ParseTraceparent(good.substr(0, cut)).has_value());
  for (std::size_t at = 0; at < good.size(); ++at) {
    std::string bad = good;
    bad[at] = 'X';
    EXPECT_FALSE(ParseTraceparent(bad).has_value()) << bad;
  }
  EXPECT_FALSE(ParseTraceparent(good + "-more").has_value()) << "version 00 ends here";
  EXPECT_FALSE(ParseTraceparent("ff" + good.substr(2)).has_value());
  EXPECT_FALSE(ParseTraceparent("00-" + std::string(32, '0') + "-00f067aa0ba902b7-01").has_value());
  EXPECT_FALSE(ParseTraceparent("00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01").has_value());
}

}  // namespace
}  // namespace zeroc
