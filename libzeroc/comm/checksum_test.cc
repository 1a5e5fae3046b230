#include "libzeroc/comm/checksum.h"

#include <gtest/gtest.h>

#include <cstring>
#include <string_view>
#include <vector>

namespace zeroc {
namespace {

std::uint64_t Of(std::string_view text) { return Checksum64(std::as_bytes(std::span(text))); }

// Published values of XXH3-64 with seed 0 (the empty input is in xxhash's own sanity test); a change of these breaks
// every stored and sent checksum.
TEST(Checksum, KnownValues) {
  EXPECT_EQ(Of(""), 0x2d06800538d394c2ull);
  EXPECT_NE(Of("a"), Of("b"));
}

TEST(Checksum, EverySingleBitCounts) {
  std::vector<std::byte> bytes(257);
  for (std::size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<std::byte>(i * 37);
  const std::uint64_t whole = Checksum64(bytes);
  for (std::size_t bit = 0; bit < bytes.size() * 8; ++bit) {
    bytes[bit / 8] ^= std::byte{1} << (bit % 8);
    ASSERT_NE(Checksum64(bytes), whole) << bit;
    bytes[bit / 8] ^= std::byte{1} << (bit % 8);
  }
  EXPECT_EQ(Checksum64(bytes), whole);
}

TEST(Checksum, IndependentOfAlignment) {
  std::vector<std::byte> bytes(4096 + 16);
  for (std::size_t i = 0; i < 4095; ++i) bytes[i] = static_cast<std::byte>(i * i);
  const std::uint64_t at_zero = Checksum64(std::span(bytes).first(4095));
  std::memmove(bytes.data() + 7, bytes.data(), 4095);
  EXPECT_EQ(Checksum64(std::span(bytes).subspan(7, 4095)), at_zero);
}

}  // namespace
}  // namespace zeroc
