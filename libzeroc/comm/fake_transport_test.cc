// What the fake network adds to the contract: faults on a virtual clock. And the receiving half against hostile frames.
#include "libzeroc/comm/fake_transport.h"

#include <algorithm>

#include "libzeroc/comm/transport_testing.h"

namespace zeroc {
namespace {

constexpr WriteTag kTag{5, 1};
constexpr std::uint64_t kArenaBytes = 8 << 20;

struct Pair {
  explicit Pair(std::uint64_t seed, Delivery delivery = Delivery::kActiveMessage) : network(seed, delivery) {
    decode_hears.Allow(kTag);
    decode = std::move(network.Create({.name = "d"}, decode_hears)).value();
    prefill = std::move(network.Create({.name = "p"}, prefill_hears)).value();
    arena = *decode->AllocateArena(kArenaBytes);
    peer = *prefill->Connect(decode->LocalAddress(), decode->LocalArena(), "d");
  }
  FakeNetwork network;
  RecordingListener decode_hears, prefill_hears;
  std::unique_ptr<FakeTransport> decode, prefill;
  std::span<std::byte> arena;
  PeerId peer;
};

TEST(FakeTransport, TheSameSeedGivesTheSameRun) {
  const auto run = [](std::uint64_t seed) {
    Pair pair(seed);
    pair.network.set_faults({.delay_min_seconds = 1e-6, .delay_max_seconds = 1e-3, .duplicate_probability = 0.2});
    const auto bytes = PatternBytes(1, 3'000'000);
    Outcomes outcomes;
    pair.prefill->Write(pair.peer, kTag, bytes, 1, outcomes.Next());
    pair.prefill->Flush(pair.peer, outcomes.Next());
    pair.network.RunUntilIdle();
    EXPECT_TRUE(outcomes.AllOk());
    EXPECT_TRUE(std::equal(bytes.begin(), bytes.end(), pair.arena.begin() + 1));
    return std::pair(pair.network.now_seconds(), pair.network.steps());
  };
  EXPECT_EQ(run(7), run(7));
  EXPECT_NE(run(7), run(8));
}

// The drill behind leases: the writer stalls with bytes on their way, its lease ends, the bytes arrive.
TEST(FakeTransport, ALatePieceOfAnEndedLeaseIsRefusedInAmAndLandsInPut) {
  for (const Delivery delivery : {Delivery::kActiveMessage, Delivery::kPut}) {
    Pair pair(3, delivery);
    pair.network.RunFor(0.01);
    pair.network.set_faults({.delay_min_seconds = 5, .delay_max_seconds = 5});
    const auto bytes = PatternBytes(1, 4096);
    const auto expired = WriteTag{kTag.lease_id, kTag.generation + 1};
    Outcomes outcomes;
    pair.prefill->Write(pair.peer, expired, bytes, 0, outcomes.Next());
    pair.network.RunFor(1);
    pair.network.Kill("p");
    pair.network.RunFor(10);
    const bool landed = std::equal(bytes.begin(), bytes.end(), pair.arena.begin());
    EXPECT_EQ(landed, delivery == Delivery::kPut) << "which is why put needs quarantine";
    EXPECT_EQ(pair.decode_hears.failures().size(), 1u);
    EXPECT_TRUE(outcomes.seen().empty()) << "a dead process hears nothing";
  }
}

TEST(FakeTransport, AStalledPeerCompletesNothingUntilItResumes) {
  Pair pair(4);
  pair.network.RunFor(0.01);
  const auto bytes = PatternBytes(1, 5'000'000);
  Outcomes outcomes;
  pair.network.Stall("d");
  pair.prefill->Write(pair.peer, kTag, bytes, 0, outcomes.Next());
  pair.network.RunFor(100);
  EXPECT_TRUE(outcomes.seen().empty());
  EXPECT_TRUE(pair.prefill_hears.failures().empty());
  pair.network.Resume("d");
  pair.network.RunUntilIdle();
  EXPECT_TRUE(outcomes.AllOk());
  EXPECT_TRUE(std::equal(bytes.begin(), bytes.end(), pair.arena.begin()));
}

TEST(FakeTransport, ClosedWritersMemoryIsNotReadAgain) {
  Pair pair(5);
  pair.network.RunFor(0.01);
  pair.network.Stall("d");
  auto bytes = PatternBytes(1, 1 << 20);
  const auto original = bytes;
  Outcomes outcomes;
  pair.prefill->Write(pair.peer, kTag, bytes, 0, outcomes.Next());
  pair.prefill->Close(pair.peer, outcomes.Next());
  pair.network.RunFor(10);
  ASSERT_TRUE(outcomes.all());
  std::fill(bytes.begin(), bytes.end(), std::byte{0xee});
  pair.network.Resume("d");
  pair.network.RunUntilIdle();
  EXPECT_TRUE(std::none_of(pair.arena.begin(), pair.arena.end(), [](std::byte b) { return b == std::byte{0xee}; }) ||
              std::equal(original.begin(), original.end(), pair.arena.begin()));
}

TEST(FakeTransport, AHandshakeThatIsLostEndsAtItsDeadline) {
  Pair pair(6);
  pair.network.set_script([](const std::string&, const std::string&, const FrameHeader& header) {
    return FakeFate{.drop = header.kind == FrameKind::kHelloAck};
  });
  Outcomes outcomes;
  pair.prefill->Send(pair.peer, 1, TextBytes("x"), outcomes.Next());
  pair.network.RunFor(9.5);
  EXPECT_TRUE(outcomes.seen().empty());
  pair.network.RunFor(1);
  ASSERT_EQ(outcomes.seen().size(), 1u);
  EXPECT_EQ(outcomes.seen()[0].code(), StatusCode::kDeadlineExceeded) << outcomes.seen()[0].ToString();
}

TEST(FakeTransport, KillAtEveryStepAnswersEveryCallback) {
  for (std::uint64_t step = 1; step < 120; step += 3) {
    Pair pair(step);
    const auto bytes = PatternBytes(1, 6'000'000);
    Outcomes outcomes;
    pair.prefill->Write(pair.peer, kTag, bytes, 0, outcomes.Next());
    pair.prefill->Flush(pair.peer, outcomes.Next());
    pair.prefill->Send(pair.peer, 2, TextBytes("commit"), outcomes.Next());
    pair.network.KillAtStep(step, "d");
    pair.network.RunUntilIdle();
    EXPECT_EQ(outcomes.seen().size(), outcomes.expected()) << "step " << step;
    EXPECT_LE(pair.prefill_hears.failure_calls(), 1u);
    EXPECT_EQ(pair.decode_hears.accepted(), pair.decode_hears.written()) << "step " << step;
  }
}

// A wire that goes nowhere, to feed the core frames that no honest peer sends.
class NullWire final : public Wire {
 public:
  double NowSeconds() const override { return 0; }
  const PeerAddress& LocalAddress() const override { return address_; }
  Status Open(PeerId, const PeerAddress&) override { return OkStatus(); }
  Result<Delivery> ChooseDelivery(PeerId, const RemoteArena&) override { return Delivery::kActiveMessage; }
  std::string Describe(PeerId) const override { return "nowhere"; }
  void SendFrame(PeerId, const FrameHeader&, std::span<const std::byte>, Done done) override { done(OkStatus()); }
  void Put(PeerId, std::span<const std::byte>, std::uint64_t, Done done) override { done(OkStatus()); }
  void FlushPuts(PeerId, Done done) override { done(OkStatus()); }
  void Close(PeerId, Done closed) override { closed(OkStatus()); }

 private:
  PeerAddress address_{"null"};
};

TEST(TransportCore, HostilePiecesNeverReachTheListenerOrTheArena) {
  NullWire wire;
  RecordingListener hears;
  hears.Allow(kTag);
  TransportCore core({.peers_max = 3}, hears, wire, 1);
  std::vector<std::byte> arena(4096);
  core.SetArena(arena, {"key", 1, arena.size()});
  FrameHeader hello{.kind = FrameKind::kHello, .from_connector = true, .connection = 77};
  core.OnFrame(EncodeFrameHeader(hello), EncodeHello({"evil", {"somewhere"}}));
  core.Settle();
  ASSERT_EQ(hears.up().size(), 1u);

  const std::vector<std::byte> payload(100, std::byte{0xaa});
  FrameHeader piece{.kind = FrameKind::kPiece, .from_connector = true, .connection = 77, .tag = kTag};
  const auto send = [&](std::uint64_t offset, std::uint64_t bytes) {
    piece.offset = offset;
    piece.bytes = bytes;
    ++piece.sequence;
    core.OnFrame(EncodeFrameHeader(piece), payload);
    core.Settle();
  };
  send(3997, 100);  // one byte too far
  send(4096, 100);
  send(~std::uint64_t{0} - 50, 100);  // offset + bytes wraps to 49
  send(0, 99);                        // less than the payload
  send(0, ~std::uint64_t{0});
  EXPECT_EQ(hears.accepted(), 0u);
  EXPECT_EQ(core.probe().Read().pieces_rejected, 5u);
  EXPECT_TRUE(std::all_of(arena.begin(), arena.end(), [](std::byte b) { return b == std::byte{0}; }));
  send(3996, 100);  // exactly to the end
  EXPECT_EQ(hears.accepted(), 1u);
  EXPECT_EQ(hears.written(), 1u);
  EXPECT_EQ(arena.back(), std::byte{0xaa});

  piece.connection = 78;  // no such connection
  send(0, 100);
  EXPECT_EQ(hears.accepted(), 1u);
  EXPECT_FALSE(core.BeginPiece(EncodeFrameHeader(hello), 100).has_value()) << "a bulk payload that is no piece";
  core.OnFrame({}, payload);
  core.OnFrame(payload, payload);
  for (std::uint64_t connection = 100; connection < 110; ++connection) {  // a flood of hellos is bounded
    hello.connection = connection;
    core.OnFrame(EncodeFrameHeader(hello), EncodeHello({"evil", {"somewhere"}}));
  }
  core.Settle();
  EXPECT_EQ(hears.up().size(), 3u);
  EXPECT_GE(core.probe().Read().frames_dropped, 10u);
  core.CloseAll();
  core.Settle();
  EXPECT_TRUE(core.idle());
}

}  // namespace
}  // namespace zeroc
