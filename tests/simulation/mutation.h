// Deliberate mistakes, applied at the seams between the state machines and the simulated world: they drop, alter or add
// events and actions, the state machines themselves are those of the binaries. A simulation that is worth anything
// notices each of them.
#pragma once

#include <array>
#include <cstdint>

namespace zeroc::simulation {

enum class Mistake : std::uint8_t {
  kNone,
  // decode
  kReuseAtExpiry,
  kAdmitBeforeAllCommits,
  kAcceptStaleGeneration,
  kAcceptAfterCommit,
  kIgnoreChecksums,
  kNoDeadWriterGrace,
  kPausedWriterIsDead,
  kReuseUnderPiece,
  kIgnorePeerFailure,
  kSwallowLeaseFailed,
  kIgnoreReleased,
  kRepeatLeaseKeys,  // in handoff_drills_test.cc
  kAdmitOnEveryCommit,
  kLocalBlockNotComputed,
  // prefill
  kSkipFlush,
  kReleasedBeforeFlush,
  kWriteBeforeAttachAck,
  kEndWithoutReleased,
  kNoHeartbeat,
  kFreeAtLastPost,
  kSilentStop,
  // router
  kRepeatStreamedTokens,
  kRepeatDecodeTokens,
};

struct Mutation {
  Mistake mistake = Mistake::kNone;
  const char* name = "";
  const char* what = "";       // is broken
  const char* caught_by = "";  // kinds of violation, separated by '|'
  int requests_max = 0;        // by when
};

inline constexpr std::array kMutations = {
    Mutation{Mistake::kReuseAtExpiry, "ReuseAtExpiry", "blocks of an expired lease are free at once",
             "late write|wrong token|checksum", 4000},
    Mutation{Mistake::kAdmitBeforeAllCommits, "AdmitBeforeAllCommits", "the first rank's commit admits the request",
             "wrong token|caller not told|collateral", 1000},
    Mutation{Mistake::kAcceptStaleGeneration, "AcceptStaleGeneration",
             "a piece is copied wherever some living lease has room for it, whatever its tag says",
             "late write|wrong token|checksum", 20000},
    Mutation{Mistake::kAcceptAfterCommit, "AcceptAfterCommit", "duplicate pieces are copied into an admitted request",
             "wrong token", 20000},
    Mutation{Mistake::kIgnoreChecksums, "IgnoreChecksums", "the verdict over the bytes is always good", "wrong token",
             20000},
    Mutation{Mistake::kNoDeadWriterGrace, "NoDeadWriterGrace", "a dead one-sided writer ends the quarantine at once",
             "late write|wrong token|checksum", 20000},
    Mutation{Mistake::kPausedWriterIsDead, "PausedWriterIsDead", "a writer that was silent too long counts as dead",
             "late write|wrong token|checksum", 20000},
    Mutation{Mistake::kReuseUnderPiece, "ReuseUnderPiece", "a piece counts as over when it was accepted",
             "late write|wrong token|checksum", 10000},
    Mutation{Mistake::kIgnorePeerFailure, "IgnorePeerFailure", "decode does not hear that a writer died",
             "leases left|blocks leaked", 10000},
    Mutation{Mistake::kSwallowLeaseFailed, "SwallowLeaseFailed", "the caller of Generate never hears of a failed lease",
             "caller not told", 4000},
    Mutation{Mistake::kIgnoreReleased, "IgnoreReleased", "decode does not hear Released", "collateral", 10000},
    Mutation{Mistake::kAdmitOnEveryCommit, "AdmitOnEveryCommit", "a duplicate commit admits the request again",
             "admitted twice|wrong token", 4000},
    Mutation{Mistake::kSkipFlush, "SkipFlush", "the commit does not wait for the flush", "checksum|late write", 4000},
    Mutation{Mistake::kReleasedBeforeFlush, "ReleasedBeforeFlush", "Released does not wait for the flush",
             "late write|wrong token|checksum", 10000},
    Mutation{Mistake::kWriteBeforeAttachAck, "WriteBeforeAttachAck", "writes are posted before the lease is attached",
             "collateral|late write", 4000},
    Mutation{Mistake::kEndWithoutReleased, "EndWithoutReleased", "a stopping sender ends with its last local byte",
             "late write|wrong token|checksum", 10000},
    Mutation{Mistake::kNoHeartbeat, "NoHeartbeat", "Attach is not repeated while prefill queues", "collateral", 10000},
    Mutation{Mistake::kFreeAtLastPost, "FreeAtLastPost", "prefill's blocks are free once everything is posted",
             "local bytes", 1000},
    Mutation{Mistake::kSilentStop, "SilentStop", "a stopping sender says nothing and closes nothing",
             "sender left|leases left|blocks leaked|no end", 10000},
    Mutation{Mistake::kLocalBlockNotComputed, "LocalBlockNotComputed",
             "decode forgets the last block of its own prompt", "wrong token", 1000},
    Mutation{Mistake::kRepeatStreamedTokens, "RepeatStreamedTokens", "behind a migration the answer begins again",
             "wrong token|stream", 10000},
    Mutation{Mistake::kRepeatDecodeTokens, "RepeatDecodeTokens", "every token of decode comes twice",
             "wrong token|stream|collateral", 1000},
};

}  // namespace zeroc::simulation
