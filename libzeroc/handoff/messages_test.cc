#include "libzeroc/handoff/messages.h"

#include <gtest/gtest.h>

#include <random>

#include "libzeroc/handoff/byte_codec.h"

namespace zeroc {
namespace {

constexpr LeaseKey kLease{0x1122334455667788u, 0x99aabbccddeeff00u};

std::vector<Message> OneOfEach() {
  CommitMessage commit{kLease, 0, 1, 3, true, {7, -1.5f, {{7, -1.5f}, {9, -2.25f}}, 42, 700}, {}};
  for (std::uint32_t i = 0; i < 100; ++i) commit.blocks.push_back({i * 3, 0xfedcba9876543210u * (i + 1)});
  return {AttachMessage{kLease, 1, 4, Delivery::kPut, 3500, 0xabcdef},
          AttachAckMessage{kLease, 1, FailedPrecondition("no such lease")},
          AttachAckMessage{kLease, 1, OkStatus()},
          commit,
          CommitMessage{kLease, 2, 0, 1, false, {}, {}},
          CommitAckMessage{kLease, 0, DataLoss("block 3")},
          AbortMessage{kLease, 3, Cancelled("client went away")},
          ReleasedMessage{kLease, 63},
          LeaseEndedMessage{kLease, 5, DeadlineExceeded("expired"), true}};
}

TEST(MessagesTest, EveryMessageSurvivesTheWire) {
  for (const Message& message : OneOfEach()) {
    const EncodedMessage encoded = EncodeMessage(message);
    const auto parsed = ParseMessage(encoded.type, AsBytes(encoded.payload));
    ASSERT_TRUE(parsed.ok()) << parsed.status().ToString();
    EXPECT_EQ(parsed->index(), message.index());
    EXPECT_EQ(LeaseOf(*parsed), kLease);
    EXPECT_EQ(EncodeMessage(*parsed).payload, encoded.payload);
  }
  const EncodedMessage encoded = EncodeMessage(OneOfEach()[3]);
  const Message parsed = ParseMessage(encoded.type, AsBytes(encoded.payload)).value();
  const auto& commit = std::get<CommitMessage>(parsed);
  EXPECT_EQ(commit.first_token, (FirstToken{7, -1.5f, {{7, -1.5f}, {9, -2.25f}}, 42, 700}));
  EXPECT_EQ(commit.n_parts, 3);
  ASSERT_EQ(commit.blocks.size(), 100u);
  EXPECT_EQ(commit.blocks[99], (BlockChecksum{297, 0xfedcba9876543210u * 100}));
}

TEST(MessagesTest, ReleasedIsPinned) {
  // Version, lease, generation, rank: a change here is a new version (docs/handoff.md).
  const EncodedMessage encoded = EncodeMessage(ReleasedMessage{{1, 2}, 3});
  EXPECT_EQ(encoded.type, 0x4b06);
  EXPECT_EQ(encoded.payload, std::string("\x01\x01\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0\x03\0", 19));
}

TEST(MessagesTest, EveryTruncationAndEveryTrailingByteIsRefused) {
  for (const Message& message : OneOfEach()) {
    const EncodedMessage encoded = EncodeMessage(message);
    for (std::size_t n = 0; n < encoded.payload.size(); ++n) {
      EXPECT_EQ(ParseMessage(encoded.type, AsBytes(encoded.payload.substr(0, n))).status().code(),
                StatusCode::kInvalidArgument);
    }
    EXPECT_EQ(ParseMessage(encoded.type, AsBytes(encoded.payload + '\0')).status().code(),
              StatusCode::kInvalidArgument);
  }
}

TEST(MessagesTest, RefusesFieldsOutOfRange) {
  const auto refused = [](std::uint16_t type, const std::string& payload) {
    return ParseMessage(type, AsBytes(payload)).status().code() == StatusCode::kInvalidArgument;
  };
  const auto encoded = [](const Message& message) { return EncodeMessage(message).payload; };
  EXPECT_TRUE(refused(0, encoded(ReleasedMessage{kLease, 0})));
  EXPECT_TRUE(refused(kFirstMessageType + 7, encoded(ReleasedMessage{kLease, 0})));
  EXPECT_TRUE(refused(kFirstMessageType + 5, encoded(ReleasedMessage{kLease, kRanksMax})));
  EXPECT_TRUE(refused(kFirstMessageType, encoded(AttachMessage{kLease, 4, 4, Delivery::kPut, 1, 1})));
  EXPECT_TRUE(refused(kFirstMessageType, encoded(AttachMessage{kLease, 0, 0, Delivery::kPut, 1, 1})));
  EXPECT_TRUE(refused(kFirstMessageType, encoded(AttachMessage{kLease, 0, 1, static_cast<Delivery>(2), 1, 1})));
  EXPECT_TRUE(refused(kFirstMessageType + 2, encoded(CommitMessage{kLease, 0, 3, 3, false, {}, {}})));
  EXPECT_TRUE(refused(kFirstMessageType + 2, encoded(CommitMessage{kLease, 0, 0, 1, true, {-1, 0, {}, 0, 1}, {}})));
  EXPECT_TRUE(refused(kFirstMessageType + 4, encoded(AbortMessage{kLease, 0, OkStatus()})));
  std::string bad_code = encoded(AbortMessage{kLease, 0, Cancelled("x")});
  bad_code[19] = 17;
  EXPECT_TRUE(refused(kFirstMessageType + 4, bad_code));
  std::string bad_version = encoded(ReleasedMessage{kLease, 0});
  bad_version[0] = 2;
  EXPECT_TRUE(refused(kFirstMessageType + 5, bad_version));
}

TEST(MessagesTest, ACountThatLiesAllocatesNothing) {
  std::string payload = EncodeMessage(CommitMessage{kLease, 0, 0, 1, false, {}, {}}).payload;
  payload.replace(payload.size() - 4, 4, std::string("\0\0\x01\0", 4));  // 65536 blocks, none of them there
  EXPECT_EQ(ParseMessage(kFirstMessageType + 2, AsBytes(payload)).status().code(), StatusCode::kInvalidArgument);
}

TEST(MessagesTest, LongTextIsCut) {
  const EncodedMessage encoded = EncodeMessage(AbortMessage{kLease, 0, Internal(std::string(100'000, 'x'))});
  const Message parsed = ParseMessage(encoded.type, AsBytes(encoded.payload)).value();
  EXPECT_EQ(std::get<AbortMessage>(parsed).status.message().size(), kStatusTextMax);
}

TEST(MessagesTest, DamagedBytesNeverCrash) {
  std::mt19937 rng(5);
  const std::vector<Message> messages = OneOfEach();
  int accepted = 0;
  for (int i = 0; i < 20'000; ++i) {
    EncodedMessage encoded = EncodeMessage(messages[rng() % messages.size()]);
    for (int k = 0; k < 3; ++k) encoded.payload[rng() % encoded.payload.size()] = static_cast<char>(rng());
    if (rng() % 4 == 0) encoded.payload.resize(rng() % (encoded.payload.size() + 1));
    const auto parsed =
        ParseMessage(static_cast<std::uint16_t>(kFirstMessageType + rng() % 8), AsBytes(encoded.payload));
    accepted += parsed.ok() ? 1 : 0;
  }
  EXPECT_GT(accepted, 0);  // damage in a checksum is not visible here
}

}  // namespace
}  // namespace zeroc
