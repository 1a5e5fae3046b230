// Scripted failures of the hand-off, one test each: what stops, dies, gets lost or comes late, and what must not come
// of it. Every drill runs one-sided and by active messages, and ends with World::Finish: all requests ended, all blocks
// back, no late write, every pair of workers serving.
#include <gtest/gtest.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "tests/simulation/decode_node.h"
#include "tests/simulation/model.h"
#include "tests/simulation/prefill_node.h"
#include "tests/simulation/router_node.h"
#include "tests/simulation/test_simulation.h"
#include "tests/simulation/world.h"

namespace zeroc::simulation {
namespace {

// Types of messages on the wire.
enum Wanted : std::uint16_t {
  kAttach = kFirstMessageType,
  kAttachAck,
  kCommit,
  kCommitAck,
  kAbort,
  kReleased,
  kLeaseEnded,
  kPieces = 1,  // pieces and puts
};

bool Is(const FrameHeader& header, Wanted wanted) {
  if (wanted == kPieces) return header.kind == FrameKind::kPiece;
  return header.kind == FrameKind::kMessage && header.type == wanted;
}

class Drill : public ::testing::TestWithParam<Delivery> {
 protected:
  WorldOptions Options(int n_decode, int n_prefill) {
    WorldOptions options;
    options.delivery = GetParam();
    options.n_decode = n_decode;
    options.n_prefill = n_prefill;
    options.calm = false;
    options.log = true;
    return options;
  }
  RequestSpec Request(int n_prompt = 200, int n_output = 5) {
    RequestSpec spec;
    spec.n_prompt = n_prompt;
    spec.n_output = n_output;
    return spec;
  }
  // Once, when the first frame of that kind leaves `from`.
  void When(World& world, const std::string& from, Wanted wanted, std::function<void()> then) {
    world.network().set_script([&world, from, wanted, then, done = false](const std::string& sender, const std::string&,
                                                                          const FrameHeader& header) mutable {
      if (!done && sender == from && Is(header, wanted)) {
        done = true;
        world.network().At(0, {}, then);
      }
      return FakeFate{};
    });
  }
  WorldReport Finish(World& world) {
    WorldReport report = world.Finish();
    if (report.violation.has_value()) {
      ADD_FAILURE() << report.violation->kind << ": " << report.violation->text;
      for (const std::string& line : world.log()) std::printf("  %s\n", line.c_str());
    }
    return report;
  }
  bool put() const { return GetParam() == Delivery::kPut; }
};

// --- a writer that stops ---

TEST_P(Drill, AStoppedWriterWhoseLeaseExpiresCannotTouchReusedBlocks) {
  WorldOptions options = Options(1, 2);
  options.decode_arena_bytes = 512 << 10;
  World world(options);
  RequestSpec victim = Request();
  victim.prefill = "p0";
  const std::uint64_t id = world.Submit(victim);
  When(world, "p0", kPieces, [&] { world.Apply({.fault = Fault::kStall, .node = "p0", .seconds = 12}); });
  world.RunFor(0.1);
  for (int burst = 0; burst < 20; ++burst) {  // the pool fills, over and over
    for (int i = 0; i < 10; ++i) {
      RequestSpec other = Request(250, 3);
      other.prefill = "p1";
      world.Submit(other);
    }
    world.RunFor(0.4);
  }
  world.RunFor(12);
  const WorldReport report = Finish(world);
  EXPECT_GE(report.n_lease_failures, 1);
  EXPECT_GT(report.n_refused, 0) << "the pool was never full";
  EXPECT_EQ(report.n_quarantined > 0, put());
  EXPECT_TRUE(world.router().outcome(id).ok()) << world.router().outcome(id).ToString();
}

TEST_P(Drill, AStoppedDecodeWorkerResumesIntoACleanState) {
  World world(Options(2, 2));
  for (int i = 0; i < 30; ++i) {
    RequestSpec spec = Request(150, 8);
    spec.decode = "d0";
    world.Submit(spec);
  }
  When(world, "p0", kCommit, [&] { world.Apply({.fault = Fault::kStall, .node = "d0", .seconds = 9}); });
  world.RunFor(10);
  const WorldReport report = Finish(world);
  EXPECT_EQ(report.n_ok, report.n_requests);
  EXPECT_GT(report.n_attempts, report.n_requests);
}

// Every connection carries 40 KB/s, less than is asked of it: writes queue for longer than any time-out. Those of
// cancelled requests wait behind the others', and nobody may take that for a peer that is silent.
WorldReport CancelsOnASlowLink(WorldOptions options, int busy_link_factor) {
  options.decode_arena_bytes = options.prefill_arena_bytes = 8 << 20;
  options.network.delay_min_seconds = 0.1;
  options.network.delay_max_seconds = 0.3;
  options.pieces_in_flight_max = 2;
  options.calm = true;
  options.sender.busy_link_factor = busy_link_factor;
  World world(options);
  for (int i = 0; i < 20; ++i) {
    RequestSpec spec;
    spec.n_prompt = 100;
    spec.n_output = 3;
    if (i % 2 == 1) spec.cancel_after = 1 + 0.1 * i;
    world.Submit(spec);
  }
  return world.Finish();
}

TEST_P(Drill, ACancelOnASlowLinkCostsNobodyElse) {
  const WorldReport report = CancelsOnASlowLink(Options(1, 1), Sender::Options().busy_link_factor);
  EXPECT_FALSE(report.violation.has_value()) << report.violation->kind << ": " << report.violation->text;
  EXPECT_GE(report.n_ok, 10);
  EXPECT_GT(report.n_cancelled, 5);
  EXPECT_GT(report.seconds, 6) << "the link was not slow";
}

TEST_P(Drill, ImpatienceOnASlowLinkWouldBeNoticed) {
  const WorldReport report = CancelsOnASlowLink(Options(1, 1), 1);
  ASSERT_TRUE(report.violation.has_value());
  EXPECT_EQ(report.violation->kind, "collateral");
}

// --- late and repeated ---

TEST_P(Drill, WritesThatComeAfterAnAbortDoNotTouchReusedBlocks) {
  WorldOptions options = Options(1, 1);
  options.decode_arena_bytes = 512 << 10;
  World world(options);
  int n_late = 0;
  world.network().set_script([&](const std::string&, const std::string&, const FrameHeader& header) {
    const bool late = Is(header, kPieces) && world.rng()() % 4 == 0;
    n_late += late ? 1 : 0;
    return FakeFate{.extra_delay_seconds = late ? 0.9 : 0};
  });
  for (int i = 0; i < 100; ++i) {
    RequestSpec spec = Request(200, 4);
    if (i % 2 == 0) spec.cancel_after = 0.02 + 0.001 * i;
    world.Submit(spec);
    world.RunFor(0.05);
  }
  const WorldReport report = Finish(world);
  EXPECT_GT(n_late, 50);
  EXPECT_GT(report.n_cancelled, 30);
}

TEST_P(Drill, ADuplicateCommitAdmitsOnce) {
  World world(Options(2, 3));
  world.network().set_script([](const std::string&, const std::string&, const FrameHeader& header) {
    return FakeFate{.duplicate = Is(header, kCommit) || Is(header, kAttach), .extra_delay_seconds = 0.01};
  });
  for (int i = 0; i < 50; ++i) {
    RequestSpec spec = Request(100 + i, 6);
    spec.n_ranks = 1 + i % 3;
    world.Submit(spec);
  }
  const WorldReport report = Finish(world);
  EXPECT_EQ(report.n_ok, report.n_requests);
  EXPECT_EQ(report.n_attempts, report.n_requests);
}

// --- lost messages ---

// One rank's commit never arrives: the lease must not be admitted by the others, and must end.
TEST_P(Drill, PartialCommitsAdmitNobody) {
  World world(Options(1, 3));
  int n_dropped = 0;
  world.network().set_script([&](const std::string& from, const std::string&, const FrameHeader& header) {
    const bool drop = from == "p1" && Is(header, kCommit);
    n_dropped += drop ? 1 : 0;
    return FakeFate{.drop = drop};
  });
  RequestSpec spec = Request();
  spec.n_ranks = 3;
  spec.prefill = "p0";
  const std::uint64_t id = world.Submit(spec);
  world.RunFor(8);
  EXPECT_GT(n_dropped, 2) << "the commit is sent again and again";
  EXPECT_EQ(world.report().n_steps_checked, 0u) << "decode ran without all commits";
  world.network().set_script({});
  const WorldReport report = Finish(world);
  EXPECT_GE(report.n_lease_failures, 1);
  EXPECT_TRUE(world.router().outcome(id).ok());
}

TEST_P(Drill, EveryMessageOfOneKindLostForAWhileEndsWell) {
  for (const Wanted kind : {kAttach, kAttachAck, kCommit, kCommitAck, kAbort, kReleased, kLeaseEnded}) {
    SCOPED_TRACE("message type " + std::to_string(kind));
    World world(Options(2, 2));
    int n_dropped = 0;
    world.network().set_script([&](const std::string&, const std::string&, const FrameHeader& header) {
      const bool drop = Is(header, kind);
      n_dropped += drop ? 1 : 0;
      return FakeFate{.drop = drop};
    });
    for (int i = 0; i < 40; ++i) {
      RequestSpec spec = Request(100 + i, 3);
      if (i % 2 == 0) spec.cancel_after = 0.005 * i;
      world.Submit(spec);
    }
    world.RunFor(10);
    EXPECT_GT(n_dropped, 0);
    world.network().set_script({});
    Finish(world);
  }
}

TEST_P(Drill, AllTerminalMessagesOfOneDirectionLost) {
  for (const bool from_prefill : {true, false}) {
    SCOPED_TRACE(from_prefill ? "prefill's" : "decode's");
    World world(Options(1, 2));
    world.network().set_script([&](const std::string& from, const std::string&, const FrameHeader& header) {
      const bool terminal =
          Is(header, kCommitAck) || Is(header, kAbort) || Is(header, kReleased) || Is(header, kLeaseEnded);
      return FakeFate{.drop = terminal && (from[0] == 'p') == from_prefill};
    });
    for (int i = 0; i < 60; ++i) {
      RequestSpec spec = Request(100, 4);
      if (i % 3 == 0) spec.cancel_after = 0.01 * i;
      world.Submit(spec);
      world.RunFor(0.1);
    }
    world.RunFor(5);
    Finish(world);
  }
}

// --- deaths ---

TEST_P(Drill, PrefillDiesBeforeDuringAndAfterItsTransfer) {
  for (const Wanted moment : {kAttach, kPieces, kCommit}) {
    SCOPED_TRACE("message type " + std::to_string(moment));
    World world(Options(1, 2));
    When(world, "p0", moment, [&] { world.Apply({.fault = Fault::kKill, .node = "p0", .seconds = 3}); });
    RequestSpec spec = Request();
    spec.prefill = "p0";
    const std::uint64_t id = world.Submit(spec);
    for (int i = 0; i < 10; ++i) world.Submit(Request());
    world.RunFor(5);
    Finish(world);
    EXPECT_TRUE(world.router().outcome(id).ok()) << world.router().outcome(id).ToString();
  }
}

TEST_P(Drill, DecodeDiesReservedReceivingAndDecoding) {
  for (const Wanted moment : {kAttachAck, kCommitAck, kPieces}) {
    for (const double after : {0.0, 0.05}) {
      SCOPED_TRACE("message type " + std::to_string(moment));
      World world(Options(2, 1));
      When(world, moment == kPieces ? "p0" : "d0", moment, [&world, after] {
        world.network().At(after, {}, [&world] { world.Apply({.fault = Fault::kKill, .node = "d0", .seconds = 2}); });
      });
      std::vector<std::uint64_t> ids;
      for (int i = 0; i < 10; ++i) {
        RequestSpec spec = Request(120, 20);
        spec.decode = "d0";
        ids.push_back(world.Submit(spec));
      }
      world.RunFor(5);
      const WorldReport report = Finish(world);
      for (const std::uint64_t id : ids) EXPECT_TRUE(world.router().outcome(id).ok());
      if (moment == kCommitAck && after > 0) {
        EXPECT_GT(report.n_migrations, 0) << "nothing was streamed before the death";
      }
    }
  }
}

// The old writer's lease is of the process that died; the new one has the same address, memory and arena key, and a
// lease of the same shape.
std::optional<Violation> RestartWithOldWriterAlive(WorldOptions options, Mistake mistake) {
  options.mistake = mistake;
  World world(options);
  const std::string d = "d0";
  const auto reserve = [&](std::uint64_t request) {
    GrantedLease lease;
    const CallPtr call = world.NewCall(d);
    call->on_event = [&lease](const RpcEvent& event) { lease = event.lease; };
    call->Start([&world, d, request, call] { world.decode(d)->Reserve(request, 100, 4, 0, call); });
    world.RunFor(0.1);
    return lease;
  };
  const auto run = [&](const std::string& p, std::uint64_t content, const GrantedLease& lease) {
    PrefillArgs args;
    args.request = content;
    args.content = content;
    args.n_prompt = 100;
    args.lease = lease;
    const CallPtr call = world.NewCall(p);
    call->Start([&world, p, args, call] { world.prefill(p)->Run(args, call); });
  };
  const GrantedLease old_lease = reserve(1);
  world.Apply({.fault = Fault::kKill, .node = d, .seconds = 0.01});
  world.RunFor(0.1);
  const GrantedLease lease = reserve(2);
  EXPECT_EQ(lease.arena.base, old_lease.arena.base);
  const CallPtr generate = world.NewCall(d);
  std::vector<std::int32_t> tokens;
  Status end = Internal("none");
  generate->on_event = [&tokens](const RpcEvent& event) {
    if (event.kind == RpcEvent::Kind::kToken) tokens.push_back(event.token);
  };
  generate->on_done = [&end](const Status& status) { end = status; };
  generate->Start([&world, d, lease, generate] { world.decode(d)->Generate(lease.key, 2, 4, generate); });
  run("p0", 111, old_lease);
  world.RunFor(0.02);
  run("p1", 222, lease);
  world.RunFor(2);
  WorldReport report = world.Finish();
  std::optional<Violation> violation = report.violation;
  const std::vector<std::int32_t> expected = {TokenAt(222, 101), TokenAt(222, 102), TokenAt(222, 103)};
  if (!violation.has_value() && tokens != expected) {
    violation = Violation{tokens.empty() ? "collateral" : "wrong token", end.ToString(), world.network().now_seconds()};
  }
  return violation;
}

TEST_P(Drill, DecodeRestartsOnTheSameAddressWhileAnOldWriterLives) {
  const auto violation = RestartWithOldWriterAlive(Options(1, 2), Mistake::kNone);
  EXPECT_FALSE(violation.has_value()) << violation->kind << ": " << violation->text;
}

TEST_P(Drill, RepeatedLeaseKeysWouldMixUpTwoLives) {
  const auto violation = RestartWithOldWriterAlive(Options(1, 2), Mistake::kRepeatLeaseKeys);
  ASSERT_TRUE(violation.has_value());
  EXPECT_TRUE(violation->kind == "wrong token" || violation->kind == "collateral") << violation->kind;
}

// --- clients, queues, bytes, clocks ---

TEST_P(Drill, CancelBetweenPrefillsEndAndDecodesStart) {
  World world(Options(1, 1));
  const std::uint64_t id = world.Submit(Request());
  When(world, "d0", kCommitAck, [&] { world.router().Cancel(id); });
  world.RunFor(1);
  const WorldReport report = Finish(world);
  EXPECT_EQ(report.n_cancelled, 1);
}

TEST_P(Drill, CancelStormsLeaveNothing) {
  WorldOptions options = Options(2, 3);
  options.ranks_max = 3;
  World world(options);
  for (int storm = 0; storm < 4; ++storm) {
    for (int i = 0; i < 100; ++i) world.Submit(world.RandomRequest());
    world.RunFor(0.05 + 0.1 * storm);
    world.Apply({.fault = Fault::kCancelStorm, .share = 1});
  }
  const WorldReport report = Finish(world);
  EXPECT_GT(report.n_cancelled, 100);
}

TEST_P(Drill, AQueueLongerThanTheLeaseExpiresNobody) {
  WorldOptions options = Options(1, 1);
  options.decode_arena_bytes = 4 << 20;
  options.compute_seconds = 0.05;  // 6 steps a request: 20 requests take three leases
  options.calm = true;             // every first attempt succeeds
  World world(options);
  for (int i = 0; i < 20; ++i) world.Submit(Request());
  const WorldReport report = Finish(world);
  EXPECT_EQ(report.n_ok, 20);
  EXPECT_GT(report.seconds, 5);
}

TEST_P(Drill, OneCorruptPieceCostsOneAttempt) {
  WorldOptions options = Options(1, 1);
  options.network.corrupt_probability = 1e-12;  // bad checksums are expected
  World world(options);
  world.network().set_script([n = 0](const std::string&, const std::string&, const FrameHeader& header) mutable {
    return FakeFate{.corrupt = Is(header, kPieces) && n++ == 3};
  });
  const std::uint64_t id = world.Submit(Request());
  world.RunFor(3);
  const WorldReport report = Finish(world);
  EXPECT_EQ(report.n_bad_checksums, 1);
  EXPECT_TRUE(world.router().outcome(id).ok());
}

TEST_P(Drill, AClockThatJumpsEndsLeasesButLosesNothing) {
  WorldOptions options = Options(1, 2);
  options.compute_seconds = 0.05;
  World world(options);
  for (int i = 0; i < 10; ++i) world.Submit(Request());
  world.RunFor(0.5);
  world.Apply({.fault = Fault::kClockJump, .node = "d0", .seconds = 1000});
  world.RunFor(0.5);
  world.Apply({.fault = Fault::kClockJump, .node = "p0", .seconds = 1000});
  const WorldReport report = Finish(world);
  EXPECT_GT(report.n_lease_expiries, 0);
  EXPECT_EQ(report.n_ok, report.n_requests);
}

// The link breaks with writes under way; decode's clock jumps. The writes land one after the other up to 1.8 s later,
// in whatever state the blocks' next owners are then: one that lands before the block's own bytes does no harm.
WorldReport ClockJumpsUnderADeadWriter(WorldOptions options) {
  options.decode_arena_bytes = 512 << 10;
  World world(options);
  int n_late = 0;
  world.network().set_script([&](const std::string& from, const std::string&, const FrameHeader& header) {
    if (from != "p0" || !Is(header, kPieces)) return FakeFate{};
    if (n_late++ == 0) {
      world.network().At(0.2, {}, [&] { world.Apply({.fault = Fault::kCut, .node = "p0", .other = "d0"}); });
      world.network().At(0.25, {}, [&] { world.Apply({.fault = Fault::kClockJump, .node = "d0", .seconds = 1000}); });
    }
    return FakeFate{.extra_delay_seconds = 0.6 + 0.13 * (n_late % 10)};
  });
  for (int i = 0; i < 30; ++i) {
    RequestSpec spec;
    spec.n_prompt = 200;
    spec.n_output = 5;
    spec.prefill = std::string(i == 0 ? "p0" : "p1");
    world.Submit(spec);
    world.RunFor(0.1);
  }
  EXPECT_GT(n_late, 3);
  world.network().set_script({});
  return world.Finish();
}

TEST_P(Drill, AClockThatJumpsDoesNotFreeBlocksUnderADeadWriter) {
  const WorldReport report = ClockJumpsUnderADeadWriter(Options(1, 2));
  EXPECT_FALSE(report.violation.has_value()) << report.violation->kind << ": " << report.violation->text;
}

TEST_P(Drill, AQuarantineThatBelievesAJumpWouldBeNoticed) {
  if (!put()) GTEST_SKIP() << "pieces are refused by their tag";
  WorldOptions options = Options(1, 2);
  options.leases.grace_step_ns = std::int64_t{1} << 60;
  const WorldReport report = ClockJumpsUnderADeadWriter(options);
  ASSERT_TRUE(report.violation.has_value());
  EXPECT_TRUE(report.violation->kind == "late write" || report.violation->kind == "checksum" ||
              report.violation->kind == "wrong token")
      << report.violation->kind;
}

TEST_P(Drill, GrantsThatNobodyTakesExpire) {
  World world(Options(2, 2));
  for (int i = 0; i < 20; ++i) world.Submit(Request());
  world.RunFor(0.004);  // reservations are under way, or just granted
  world.Apply({.fault = Fault::kRouterRestart});
  world.RunFor(1);
  const WorldReport report = Finish(world);
  EXPECT_EQ(report.n_ok, report.n_requests - 20);
}

INSTANTIATE_TEST_SUITE_P(Deliveries, Drill, ::testing::Values(Delivery::kActiveMessage, Delivery::kPut),
                         [](const ::testing::TestParamInfo<Delivery>& param) {
                           return std::string(param.param == Delivery::kPut ? "Put" : "ActiveMessage");
                         });

}  // namespace
}  // namespace zeroc::simulation
