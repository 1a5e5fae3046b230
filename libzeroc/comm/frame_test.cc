#include "libzeroc/comm/frame.h"

#include <gtest/gtest.h>

#include <random>

namespace zeroc {
namespace {

FrameHeader SampleHeader() {
  FrameHeader header;
  header.kind = FrameKind::kPiece;
  header.from_connector = true;
  header.type = 0xfedc;
  header.connection = 0x0123456789abcdefull;
  header.sequence = 1;
  header.tag = {~std::uint64_t{0}, 7};
  header.offset = 1ull << 40;
  header.bytes = 1 << 20;
  return header;
}

TEST(Frame, HeaderRoundTripsAndItsBytesArePinned) {
  const FrameHeader header = SampleHeader();
  const FrameHeaderBytes bytes = EncodeFrameHeader(header);
  const auto decoded = DecodeFrameHeader(bytes);
  ASSERT_TRUE(decoded.ok()) << decoded.status().ToString();
  EXPECT_EQ(*decoded, header);
  const unsigned char start[] = {'Z', 'C', 'T', '1', 5, 1, 0xdc, 0xfe, 0xef, 0xcd, 0xab, 0x89, 0x67, 0x45, 0x23, 0x01};
  for (std::size_t i = 0; i < sizeof start; ++i) EXPECT_EQ(std::to_integer<int>(bytes[i]), start[i]) << i;
}

TEST(Frame, MalformedHeadersAreRefused) {
  const FrameHeaderBytes good = EncodeFrameHeader(SampleHeader());
  for (std::size_t size = 0; size < kFrameHeaderBytes; ++size) {
    EXPECT_FALSE(DecodeFrameHeader(std::span(good).first(size)).ok()) << size;
  }
  for (const auto& [at, value] : {std::pair{0, 0}, {3, '2'}, {4, 0}, {4, 10}, {4, 255}, {5, 2}}) {
    FrameHeaderBytes bad = good;
    bad[static_cast<std::size_t>(at)] = static_cast<std::byte>(value);
    EXPECT_EQ(DecodeFrameHeader(bad).status().code(), StatusCode::kInvalidArgument) << at << ' ' << value;
  }
}

TEST(Frame, HelloRoundTripsAndForeignHellosAreBounded) {
  const auto bytes = EncodeHello({"prefill\n1", {std::string("\0addr", 5)}});
  const auto hello = DecodeHello(bytes);
  ASSERT_TRUE(hello.ok());
  EXPECT_EQ(hello->name, "prefill?1") << "control characters of a foreign name do not reach a log";
  EXPECT_EQ(hello->address.bytes, std::string("\0addr", 5));
  for (std::size_t size = 0; size < bytes.size(); ++size) EXPECT_FALSE(DecodeHello(std::span(bytes).first(size)).ok());
  auto longer = bytes;
  longer.push_back(std::byte{0});
  EXPECT_FALSE(DecodeHello(longer).ok());
  auto huge = bytes;  // a name of 4 GiB in a frame of a few bytes
  for (int i = 0; i < 4; ++i) huge[static_cast<std::size_t>(i)] = std::byte{0xff};
  EXPECT_FALSE(DecodeHello(huge).ok());
  EXPECT_FALSE(DecodeHello(EncodeHello({"n", {""}})).ok());
}

TEST(Frame, AcksRoundTripAndMalformedListsAreRefused) {
  const std::vector<AckEntry> acks = {{1, PieceVerdict::kPlaced}, {~std::uint64_t{0}, PieceVerdict::kRefused}};
  const auto bytes = EncodeAcks(acks);
  const auto decoded = DecodeAcks(bytes);
  ASSERT_TRUE(decoded.ok());
  EXPECT_EQ(*decoded, acks);
  EXPECT_FALSE(DecodeAcks({}).ok());
  EXPECT_FALSE(DecodeAcks(std::span(bytes).first(10)).ok());
  auto bad = bytes;
  bad[8] = std::byte{9};
  EXPECT_FALSE(DecodeAcks(bad).ok());
  EXPECT_FALSE(DecodeAcks(std::vector<std::byte>(9 * (kAckEntriesMax + 1))).ok());
}

TEST(Frame, RandomBytesNeverCrash) {
  std::mt19937 rng(1);
  for (int round = 0; round < 20'000; ++round) {
    std::vector<std::byte> bytes(rng() % 80);
    for (auto& b : bytes) b = static_cast<std::byte>(rng());
    (void)DecodeFrameHeader(bytes);
    (void)DecodeHello(bytes);
    (void)DecodeAcks(bytes);
  }
}

}  // namespace
}  // namespace zeroc
