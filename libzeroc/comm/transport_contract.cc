#include "libzeroc/comm/transport_contract.h"

#include <algorithm>
#include <cstring>
#include <thread>

#include "libzeroc/comm/checksum.h"

namespace zeroc {

TransportContract::TransportContract() : harness_(GetParam().make()) { decode_hears_.Allow(kTag); }

TransportContract::~TransportContract() {
  prefill_.reset();
  decode_.reset();
}

std::unique_ptr<Transport> TransportContract::Make(const TransportOptions& options, TransportListener& listener) {
  auto transport = harness_->Make(options, listener);
  EXPECT_TRUE(transport.ok()) << transport.status().ToString();
  return transport.ok() ? std::move(transport).value() : nullptr;
}

void TransportContract::Join(TransportOptions options) {
  options.name = "decode-0";
  decode_ = Make(options, decode_hears_);
  options.name = "prefill-0";
  prefill_ = Make(options, prefill_hears_);
  ASSERT_TRUE(decode_ && prefill_);
  auto arena = decode_->AllocateArena(kArenaBytes);
  ASSERT_TRUE(arena.ok()) << arena.status().ToString();
  arena_ = *arena;
  std::memset(arena_.data(), 0, arena_.size());
  auto peer = prefill_->Connect(decode_->LocalAddress(), decode_->LocalArena(), "decode-0");
  ASSERT_TRUE(peer.ok()) << peer.status().ToString();
  to_decode_ = *peer;
  ASSERT_TRUE(Wait([&] { return prefill_hears_.up().size() == 1 && decode_hears_.up().size() == 1; }));
  to_prefill_ = decode_hears_.up().begin()->first;
}

TEST_P(TransportContract, BothSidesLearnWhoTheOtherIsAndHowBytesTravel) {
  Join();
  const auto info = prefill_->Describe(to_decode_);
  ASSERT_TRUE(info.ok()) << info.status().ToString();
  EXPECT_EQ(info->name, "decode-0");
  EXPECT_FALSE(info->incoming);
  EXPECT_EQ(info->delivery, harness_->delivery());
  EXPECT_TRUE(info->description.starts_with(harness_->delivery() == Delivery::kPut ? "put over " : "am over "))
      << info->description;
  std::cout << "[ lanes    ] " << info->description << '\n';
  const auto back = decode_->Describe(to_prefill_);
  ASSERT_TRUE(back.ok());
  EXPECT_EQ(back->name, "prefill-0");
  EXPECT_TRUE(back->incoming);
  ASSERT_TRUE(Wait([&] { return prefill_->Stats(to_decode_)->round_trip_seconds > 0; }));
}

TEST_P(TransportContract, WritesOfAllSizesArriveAndNothingElseIsTouched) {
  Join();
  const std::vector<std::size_t> sizes = {1,          0, 7, 4095, 4096, 4097, (1 << 20) - 1, 1 << 20, (1 << 20) + 1,
                                          kManyPieces};
  std::vector<std::byte> expected(kArenaBytes);
  std::vector<std::vector<std::byte>> sources;
  Outcomes outcomes;
  std::uint64_t offset = 3, total = 0;
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    sources.push_back(PatternBytes(i, sizes[i]));
    std::copy(sources[i].begin(), sources[i].end(), expected.begin() + static_cast<std::ptrdiff_t>(offset));
    prefill_->Write(to_decode_, kTag, sources[i], offset, outcomes.Next());
    offset += sizes[i] + 13;
    total += sizes[i];
  }
  // The last bytes of the arena, exactly to its end.
  sources.push_back(PatternBytes(99, 777));
  std::copy(sources.back().begin(), sources.back().end(), expected.end() - 777);
  prefill_->Write(to_decode_, kTag, sources.back(), kArenaBytes - 777, outcomes.Next());
  total += 777;
  prefill_->Flush(to_decode_, outcomes.Next());
  ASSERT_TRUE(Wait([&] { return outcomes.all(); }));
  EXPECT_TRUE(outcomes.AllOk());
  EXPECT_EQ(Checksum64(arena_), Checksum64(expected));
  EXPECT_EQ(prefill_->probe().Read().bytes_written, total);
  const auto stats = prefill_->Stats(to_decode_);
  ASSERT_TRUE(stats.ok());
  EXPECT_EQ(stats->bytes_written, total);
  EXPECT_GT(stats->busy_seconds, 0);
  if (harness_->delivery() == Delivery::kActiveMessage) {
    EXPECT_EQ(decode_->probe().Read().bytes_received, total);
    EXPECT_EQ(decode_hears_.accepted(), decode_hears_.written());
    EXPECT_EQ(decode_hears_.accepted(), decode_->probe().Read().pieces_received);
  }
}

TEST_P(TransportContract, ManySmallWritesArrive) {
  Join();
  constexpr std::size_t kWrites = 3000;
  std::vector<std::byte> expected(kArenaBytes);
  std::vector<std::vector<std::byte>> sources;
  Outcomes outcomes;
  for (std::size_t i = 0; i < kWrites; ++i) {
    sources.push_back(PatternBytes(i + 1000, 1 + (i * 977) % 3001));
    const std::uint64_t offset = ((i * 1237) % kWrites) * 4096 + i % 64;
    std::copy(sources[i].begin(), sources[i].end(), expected.begin() + static_cast<std::ptrdiff_t>(offset));
    prefill_->Write(to_decode_, kTag, sources[i], offset, outcomes.Next());
  }
  prefill_->Flush(to_decode_, outcomes.Next());
  ASSERT_TRUE(Wait([&] { return outcomes.all(); }));
  EXPECT_TRUE(outcomes.AllOk());
  EXPECT_EQ(Checksum64(arena_), Checksum64(expected));
}

TEST_P(TransportContract, OperationsPostedBeforeTheConnectionIsUpAreKept) {
  decode_ = Make({.name = "d"}, decode_hears_);
  prefill_ = Make({.name = "p"}, prefill_hears_);
  const auto arena = decode_->AllocateArena(1 << 20);
  ASSERT_TRUE(arena.ok());
  const auto peer = prefill_->Connect(decode_->LocalAddress(), decode_->LocalArena(), "decode-0");
  ASSERT_TRUE(peer.ok());
  const auto bytes = PatternBytes(5, 1 << 20);
  Outcomes outcomes;
  prefill_->Write(*peer, kTag, bytes, 0, outcomes.Next());
  prefill_->Flush(*peer, outcomes.Next());
  prefill_->Send(*peer, 4, TextBytes("early"), outcomes.Next());
  ASSERT_TRUE(Wait([&] { return outcomes.all() && decode_hears_.messages().size() == 1; }));
  EXPECT_TRUE(outcomes.AllOk());
  EXPECT_EQ(Checksum64(*arena), Checksum64(bytes));
}

TEST_P(TransportContract, MessagesGoBothWaysAndTheReceiverAnswers) {
  Join();
  Transport* const decode = decode_.get();  // the fixture clears its pointers while the threads still run
  decode_hears_.SetOnMessage([decode](const RecordingListener::Message& message) {
    std::vector<std::byte> answer = message.payload;
    std::reverse(answer.begin(), answer.end());
    decode->Send(message.from, static_cast<std::uint16_t>(message.type + 1), answer, nullptr);
  });
  Outcomes outcomes;
  const std::vector<std::size_t> sizes = {0, 1, 100, 8191, 65'536, kMessageBytesMax - 1, kMessageBytesMax};
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    prefill_->Send(to_decode_, static_cast<std::uint16_t>(10 * i), PatternBytes(i, sizes[i]), outcomes.Next());
  }
  ASSERT_TRUE(Wait([&] { return outcomes.all() && prefill_hears_.messages().size() == sizes.size(); }));
  EXPECT_TRUE(outcomes.AllOk());
  std::set<std::size_t> answered;
  for (const auto& message : prefill_hears_.messages()) {
    const std::size_t i = message.type / 10;
    ASSERT_LT(i, sizes.size());
    EXPECT_EQ(message.type % 10, 1);
    EXPECT_EQ(message.from, to_decode_);
    auto expected = PatternBytes(i, sizes[i]);
    std::reverse(expected.begin(), expected.end());
    EXPECT_TRUE(message.payload == expected) << sizes[i];
    answered.insert(i);
  }
  EXPECT_EQ(answered.size(), sizes.size());
  EXPECT_EQ(decode_->probe().Read().messages_received, sizes.size());

  Outcomes too_big;
  prefill_->Send(to_decode_, 1, std::vector<std::byte>(kMessageBytesMax + 1), too_big.Next());
  ASSERT_TRUE(Wait([&] { return too_big.all(); }));
  EXPECT_EQ(too_big.seen()[0].code(), StatusCode::kInvalidArgument);
}

TEST_P(TransportContract, AMessageSentFromFlushFindsTheBytesInPlace) {
  Join();
  const auto bytes = PatternBytes(42, 5'000'011);
  Transport* const prefill = prefill_.get();
  std::uint64_t seen = 0;
  decode_hears_.SetOnMessage(
      [&](const RecordingListener::Message&) { seen = Checksum64(arena_.subspan(17, bytes.size())); });
  Outcomes outcomes;
  for (int round = 0; round < 5; ++round) {
    std::memset(arena_.data(), 0, arena_.size());
    prefill_->Write(to_decode_, kTag, bytes, 17, outcomes.Next());
    prefill_->Flush(to_decode_, [prefill, peer = to_decode_, done = outcomes.Next()](const Status& status) {
      done(status);
      prefill->Send(peer, 1, {}, nullptr);
    });
    ASSERT_TRUE(Wait([&] { return decode_hears_.messages().size() == static_cast<std::size_t>(round) + 1; }));
    ASSERT_TRUE(outcomes.AllOk());
    EXPECT_EQ(seen, Checksum64(bytes));
  }
}

TEST_P(TransportContract, WritesOutsideTheArenaAreRefusedBeforeAnythingIsSent) {
  Join();
  const auto bytes = PatternBytes(1, 4096);
  Outcomes outcomes;
  for (const std::uint64_t offset : {kArenaBytes - 4095, kArenaBytes, ~std::uint64_t{0}, ~std::uint64_t{0} - 4095}) {
    prefill_->Write(to_decode_, kTag, bytes, offset, outcomes.Next());
  }
  ASSERT_TRUE(Wait([&] { return outcomes.all(); }));
  for (const Status& status : outcomes.seen()) EXPECT_EQ(status.code(), StatusCode::kOutOfRange) << status.ToString();
  EXPECT_EQ(prefill_->probe().Read().pieces_sent, 0u);
  Outcomes flushed;
  prefill_->Flush(to_decode_, flushed.Next());
  prefill_->Flush(to_decode_, flushed.Next());
  ASSERT_TRUE(Wait([&] { return flushed.all(); }));
  EXPECT_EQ(flushed.seen()[0].code(), StatusCode::kOutOfRange) << "a flush reports the failures before it";
  EXPECT_TRUE(flushed.seen()[1].ok()) << "and only once: " << flushed.seen()[1].ToString();
}

TEST_P(TransportContract, APieceOfARefusedGenerationNeverTouchesTheArena) {
  if (harness_->delivery() != Delivery::kActiveMessage) GTEST_SKIP() << "needs a receiver that can check (am)";
  Join();
  const auto late = PatternBytes(7, (3 << 20) + 5);
  const auto good = PatternBytes(8, 1000);
  Outcomes refused, placed, flushed;
  prefill_->Write(to_decode_, {kTag.lease_id, kTag.generation + 1}, late, 0, refused.Next());
  prefill_->Write(to_decode_, {kTag.lease_id + 1, kTag.generation}, late, 0, refused.Next());
  prefill_->Write(to_decode_, kTag, good, 12 << 20, placed.Next());
  prefill_->Flush(to_decode_, flushed.Next());
  ASSERT_TRUE(Wait([&] { return refused.all() && placed.all() && flushed.all() && decode_hears_.written() > 0; }));
  for (const Status& status : refused.seen()) {
    EXPECT_EQ(status.code(), StatusCode::kFailedPrecondition) << status.ToString();
    EXPECT_NE(status.message().find("decode-0"), std::string_view::npos) << status.ToString();
  }
  EXPECT_TRUE(placed.AllOk());
  EXPECT_EQ(flushed.seen()[0].code(), StatusCode::kFailedPrecondition);
  const std::vector<std::byte> untouched(12 << 20);
  EXPECT_EQ(std::memcmp(arena_.data(), untouched.data(), untouched.size()), 0);
  EXPECT_TRUE(std::equal(good.begin(), good.end(), arena_.begin() + (12 << 20)));
  EXPECT_GE(decode_->probe().Read().pieces_rejected, 2u);
  EXPECT_EQ(decode_hears_.accepted(), 1u);
}

TEST_P(TransportContract, AnOutdatedArenaKeyIsRefused) {
  Join();
  RemoteArena outdated = decode_->LocalArena();
  outdated.bytes += 4096;
  const auto peer = prefill_->Connect(decode_->LocalAddress(), outdated, "decode-0");
  ASSERT_TRUE(peer.ok());
  const auto bytes = PatternBytes(1, 4096);
  Outcomes outcomes;
  prefill_->Write(*peer, kTag, bytes, kArenaBytes, outcomes.Next());
  ASSERT_TRUE(Wait([&] { return outcomes.all() && prefill_hears_.failures().size() == 1; }));
  const StatusCode code = outcomes.seen()[0].code();  // kNotFound: the refusal was faster than this thread
  EXPECT_TRUE(code == StatusCode::kFailedPrecondition || code == StatusCode::kNotFound)
      << outcomes.seen()[0].ToString();
  EXPECT_EQ(prefill_hears_.failures()[*peer].code(), StatusCode::kFailedPrecondition);
  EXPECT_EQ(prefill_->probe().Read().pieces_sent, 0u);
  EXPECT_TRUE(prefill_->Describe(to_decode_).ok()) << "the good connection lives on";
}

TEST_P(TransportContract, AMessageNobodyKnowsIsCountedAndTheConnectionLives) {
  Join();
  Outcomes outcomes;
  prefill_->Send(to_decode_, RecordingListener::kUnknownType, TextBytes("?"), outcomes.Next());
  prefill_->Send(to_decode_, 1, TextBytes("known"), outcomes.Next());
  ASSERT_TRUE(
      Wait([&] { return decode_hears_.messages().size() == 1 && decode_hears_.protocol_errors().size() == 1; }));
  EXPECT_EQ(decode_hears_.protocol_errors()[0].code(), StatusCode::kUnimplemented);
  EXPECT_EQ(decode_->probe().Read().messages_rejected, 1u);
  EXPECT_TRUE(decode_hears_.failures().empty());
}

TEST_P(TransportContract, WritingToAPeerWithoutArenaFails) {
  Join();
  const auto bytes = PatternBytes(1, 10);
  Outcomes outcomes;
  decode_->Write(to_prefill_, kTag, bytes, 0, outcomes.Next());
  ASSERT_TRUE(Wait([&] { return outcomes.all(); }));
  EXPECT_EQ(outcomes.seen()[0].code(), StatusCode::kFailedPrecondition);
}

TEST_P(TransportContract, CloseEndsWhatIsPendingAndTheSameAddressConnectsAgain) {
  Join();
  const auto bytes = PatternBytes(3, kManyPieces);
  for (int round = 0; round < 8; ++round) {
    Outcomes outcomes, closed;
    for (int i = 0; i < 4; ++i) prefill_->Write(to_decode_, kTag, bytes, 0, outcomes.Next());
    prefill_->Flush(to_decode_, outcomes.Next());
    prefill_->Close(to_decode_, closed.Next());
    ASSERT_TRUE(Wait([&] { return outcomes.all() && closed.all(); })) << "round " << round;
    EXPECT_TRUE(closed.AllOk());
    for (const Status& status : outcomes.seen()) {
      EXPECT_TRUE(status.ok() || status.code() == StatusCode::kCancelled) << status.ToString();
    }
    Outcomes after;
    prefill_->Write(to_decode_, kTag, bytes, 0, after.Next());
    prefill_->Close(to_decode_, after.Next());
    ASSERT_TRUE(Wait([&] { return after.all(); }));
    for (const Status& status : after.seen()) EXPECT_EQ(status.code(), StatusCode::kNotFound);
    EXPECT_EQ(prefill_->Describe(to_decode_).status().code(), StatusCode::kNotFound);

    const auto again = prefill_->Connect(decode_->LocalAddress(), decode_->LocalArena(), "decode-0");
    ASSERT_TRUE(again.ok());
    EXPECT_NE(*again, to_decode_);
    to_decode_ = *again;
    const auto fresh = PatternBytes(static_cast<std::uint64_t>(round) + 50, 2'000'003);
    Outcomes second;
    prefill_->Write(to_decode_, kTag, fresh, 10 << 20, second.Next());
    prefill_->Flush(to_decode_, second.Next());
    ASSERT_TRUE(Wait([&] { return second.all(); })) << "round " << round;
    EXPECT_TRUE(second.AllOk()) << "round " << round;
    EXPECT_TRUE(std::equal(fresh.begin(), fresh.end(), arena_.begin() + (10 << 20)));
  }
  EXPECT_TRUE(prefill_hears_.failures().empty()) << "a local close is no failure";
  ASSERT_TRUE(Wait([&] { return decode_hears_.failures().size() == 8; })) << decode_hears_.failures().size();
  EXPECT_EQ(decode_hears_.failure_calls(), 8u) << "each peer fails once";
}

TEST_P(TransportContract, ADestroyedPeerFailsWhatIsPendingAndIsReportedOnce) {
  Join();
  const auto bytes = PatternBytes(3, kManyPieces);
  Outcomes outcomes;
  for (int i = 0; i < 10; ++i) prefill_->Write(to_decode_, kTag, bytes, 0, outcomes.Next());
  prefill_->Flush(to_decode_, outcomes.Next());
  decode_.reset();
  ASSERT_TRUE(Wait([&] { return outcomes.all() && prefill_hears_.failures().size() == 1; }));
  const Status failure = prefill_hears_.failures()[to_decode_];
  EXPECT_TRUE(failure.code() == StatusCode::kCancelled || failure.code() == StatusCode::kUnavailable)
      << failure.ToString();
  EXPECT_NE(failure.message().find("decode-0"), std::string_view::npos) << failure.ToString();
  Outcomes after;
  prefill_->Write(to_decode_, kTag, bytes, 0, after.Next());
  ASSERT_TRUE(Wait([&] { return after.all(); }));
  EXPECT_EQ(after.seen()[0].code(), StatusCode::kNotFound);
  EXPECT_EQ(prefill_hears_.failure_calls(), 1u);
  EXPECT_EQ(prefill_->probe().Read().peers_failed, 1u);
}

TEST_P(TransportContract, DestructionAnswersEveryCallback) {
  Join();
  const auto bytes = PatternBytes(3, kManyPieces);
  Outcomes outcomes;
  for (int i = 0; i < 10; ++i) prefill_->Write(to_decode_, kTag, bytes, 0, outcomes.Next());
  prefill_->Flush(to_decode_, outcomes.Next());
  prefill_->Send(to_decode_, 1, bytes.size() > 100 ? std::span(bytes).first(100) : std::span(bytes), outcomes.Next());
  prefill_.reset();
  EXPECT_EQ(outcomes.seen().size(), outcomes.expected());
  ASSERT_TRUE(Wait([&] { return decode_hears_.failures().size() == 1; }));
}

TEST_P(TransportContract, TwoWritersShareAnArena) {
  Join();
  RecordingListener second_hears;
  auto second = Make({.name = "prefill-1"}, second_hears);
  const auto peer = second->Connect(decode_->LocalAddress(), decode_->LocalArena(), "decode-0");
  ASSERT_TRUE(peer.ok());
  std::vector<std::byte> expected(kArenaBytes);
  const auto a = PatternBytes(1, 300'007), b = PatternBytes(2, 300'007);
  Outcomes outcomes;
  for (std::uint64_t i = 0; i < 20; ++i) {
    std::copy(a.begin(), a.end(), expected.begin() + static_cast<std::ptrdiff_t>(2 * i * 400'000));
    std::copy(b.begin(), b.end(), expected.begin() + static_cast<std::ptrdiff_t>((2 * i + 1) * 400'000));
    prefill_->Write(to_decode_, kTag, a, 2 * i * 400'000, outcomes.Next());
    second->Write(*peer, kTag, b, (2 * i + 1) * 400'000, outcomes.Next());
  }
  prefill_->Flush(to_decode_, outcomes.Next());
  second->Flush(*peer, outcomes.Next());
  ASSERT_TRUE(Wait([&] { return outcomes.all(); }));
  EXPECT_TRUE(outcomes.AllOk());
  EXPECT_EQ(Checksum64(arena_), Checksum64(expected));
}

TEST_P(TransportContract, ManyThreadsMayCallAtOnce) {
  if (!harness_->may_use_threads()) GTEST_SKIP() << "needs a transport with a thread of its own";
  Join();
  constexpr std::size_t kThreads = 4, kWrites = 100, kBytes = 10'001;
  std::vector<std::byte> expected(kArenaBytes);
  std::vector<std::vector<std::byte>> sources;
  std::vector<Outcomes> outcomes(kThreads);
  for (std::size_t t = 0; t < kThreads; ++t) sources.push_back(PatternBytes(t, kBytes));
  std::vector<std::thread> threads;
  for (std::size_t t = 0; t < kThreads; ++t) {
    for (std::size_t i = 0; i < kWrites; ++i) {
      std::copy(sources[t].begin(), sources[t].end(),
                expected.begin() + static_cast<std::ptrdiff_t>((i * kThreads + t) * 16'384));
    }
    threads.emplace_back([&, t] {
      for (std::size_t i = 0; i < kWrites; ++i) {
        prefill_->Write(to_decode_, kTag, sources[t], (i * kThreads + t) * 16'384, outcomes[t].Next());
        prefill_->Send(to_decode_, static_cast<std::uint16_t>(t), std::span(sources[t]).first(i), outcomes[t].Next());
        if (i % 10 == 0) prefill_->Flush(to_decode_, outcomes[t].Next());
      }
      prefill_->Flush(to_decode_, outcomes[t].Next());
    });
  }
  for (auto& thread : threads) thread.join();
  ASSERT_TRUE(Wait([&] {
    return std::all_of(outcomes.begin(), outcomes.end(), [](const Outcomes& o) { return o.all(); }) &&
           decode_hears_.messages().size() == kThreads * kWrites;
  }));
  for (const Outcomes& o : outcomes) EXPECT_TRUE(o.AllOk());
  EXPECT_EQ(Checksum64(arena_), Checksum64(expected));
}

TEST_P(TransportContract, ForeignAddressesAndBadOptionsAreErrors) {
  Join();
  EXPECT_EQ(prefill_->Connect({""}, {}, "x").status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(prefill_->Connect({std::string(kPeerAddressBytesMax + 1, 'a')}, {}, "x").status().code(),
            StatusCode::kInvalidArgument);
  EXPECT_EQ(prefill_->Connect(decode_->LocalAddress(), {.key = "", .base = 0, .bytes = 5}, "x").status().code(),
            StatusCode::kInvalidArgument);
  EXPECT_EQ(prefill_->Connect(decode_->LocalAddress(), {}, std::string(300, 'n')).status().code(),
            StatusCode::kInvalidArgument);
  // Not an address at all, and a damaged one: the peer fails, nothing crashes, nothing hangs.
  PeerAddress damaged = decode_->LocalAddress();
  damaged.bytes.back() = static_cast<char>(damaged.bytes.back() ^ 0x55);
  for (const PeerAddress& address : {PeerAddress{"garbage"}, damaged}) {
    const auto peer = prefill_->Connect(address, {}, "nobody");
    ASSERT_TRUE(peer.ok());
    Outcomes outcomes;
    prefill_->Send(*peer, 1, TextBytes("x"), outcomes.Next());
    ASSERT_TRUE(Wait([&] { return prefill_hears_.failures().contains(*peer) && outcomes.all(); }));
    EXPECT_FALSE(outcomes.seen()[0].ok());
  }
  EXPECT_FALSE(harness_->Make({.name = "n", .piece_bytes = 1}, prefill_hears_).ok());
  EXPECT_FALSE(harness_->Make({.name = "n", .pieces_in_flight_max = 0}, prefill_hears_).ok());
  EXPECT_FALSE(harness_->Make({.name = "n", .close_timeout_ms = 0}, prefill_hears_).ok());
  EXPECT_EQ(decode_->AllocateArena(4096).status().code(), StatusCode::kFailedPrecondition) << "only one arena";
}

TEST_P(TransportContract, CallersMemoryServesAsArena) {
  decode_ = Make({.name = "d"}, decode_hears_);
  prefill_ = Make({.name = "p"}, prefill_hears_);
  std::vector<std::byte> memory(5'000'017);
  ASSERT_TRUE(decode_->RegisterArena(memory).ok());
  EXPECT_EQ(decode_->LocalArena().bytes, memory.size());
  const auto peer = prefill_->Connect(decode_->LocalAddress(), decode_->LocalArena(), "decode-0");
  ASSERT_TRUE(peer.ok());
  const auto bytes = PatternBytes(77, memory.size());
  Outcomes outcomes;
  prefill_->Write(*peer, kTag, bytes, 0, outcomes.Next());
  prefill_->Flush(*peer, outcomes.Next());
  ASSERT_TRUE(Wait([&] { return outcomes.all(); }));
  EXPECT_TRUE(outcomes.AllOk());
  EXPECT_TRUE(memory == bytes);
  std::cout << "[ lanes    ] " << prefill_->Describe(*peer)->description << '\n';
  prefill_.reset();
  decode_.reset();  // before its memory
}

}  // namespace zeroc
