// The real LeaseTable and Sender behind a seam at which a Mistake may alter what passes. With Mistake::kNone everything
// passes as it is.
#pragma once

#include <cstdint>
#include <map>
#include <set>
#include <utility>
#include <vector>

#include "libzeroc/handoff/lease_table.h"
#include "libzeroc/handoff/sender.h"
#include "tests/simulation/mutation.h"

namespace zeroc::simulation {

class LeaseSeam {
 public:
  LeaseSeam(Mistake mistake, LeaseTable::Options options, std::uint64_t seed);

  Result<LeaseKey> Create(const BlockTable& table, std::int64_t now);
  bool AcceptWrite(PeerId peer, const WriteTag& tag, std::uint64_t offset, std::uint64_t bytes, std::int64_t now);
  LeaseActions OnWriteDone(const WriteTag& tag, std::uint64_t bytes, const Status& status, std::int64_t now);
  Result<LeaseActions> OnMessage(PeerId peer, const Message& message, std::int64_t now);
  LeaseActions OnPeerFailure(PeerId peer, const Status& status, std::int64_t now);
  LeaseActions OnVerified(const LeaseKey& key, const Status& status, std::int64_t now);
  Status Admit(const LeaseKey& key);
  Status AdmitLocal(const LeaseKey& key);
  LeaseActions Release(const LeaseKey& key, const Status& why, std::int64_t now);
  LeaseActions Tick(std::int64_t now);

  // The guard of a service against a second start gives way to the mistake that is about it.
  bool may_start_again() const { return mistake_ == Mistake::kAdmitOnEveryCommit; }
  std::size_t n_leases() const { return table_.n_leases(); }
  std::size_t n_in(LeaseState state) const { return table_.n_in(state); }

 private:
  struct Known {
    LeaseKey key;
    std::vector<BlockExtent> extents;
    std::set<PeerId> writers;
    int n_ranks = 1;
    bool forced = false;    // admitted by mistake
    bool admitted = false;  // and rightly so
    bool returned = false;  // by mistake
  };
  Known* Find(const LeaseKey& key);
  bool Covers(const Known& known, std::uint64_t offset, std::uint64_t bytes) const;
  LeaseActions Alter(LeaseActions actions, std::int64_t now);

  const Mistake mistake_;
  LeaseTable table_;
  std::map<std::uint64_t, Known> known_;                                 // until ReturnBlocks
  std::multiset<std::pair<std::uint64_t, std::uint64_t>> not_reported_;  // pieces whose end the table must not hear
};

class SenderSeam {
 public:
  SenderSeam(Mistake mistake, Sender sender) : mistake_(mistake), sender_(std::move(sender)) {}

  SenderActions OnPeerUp(Delivery delivery, std::int64_t now);
  Result<SenderActions> OnBlocksReady(const SequenceKv& kv, const FinalBlocks& blocks, std::int64_t now);
  SenderActions OnFirstToken(FirstToken token, std::int64_t now);
  SenderActions OnWriteDone(const Status& status, std::int64_t now);
  SenderActions OnFlushDone(const Status& status, std::int64_t now);
  SenderActions OnMessage(const Message& message, std::int64_t now);
  SenderActions OnPeerFailure(const Status& status, std::int64_t now);
  SenderActions Cancel(const Status& why, std::int64_t now);
  SenderActions Tick(std::int64_t now, std::int64_t link_progress);

  bool ended() const { return ended_ || sender_.ended(); }
  bool stopping() const { return sender_.stopping(); }
  const LeaseKey& lease() const { return sender_.lease(); }

 private:
  SenderActions Alter(SenderActions actions, std::int64_t now);

  const Mistake mistake_;
  Sender sender_;
  bool attached_ = false;
  bool local_done_ = false;
  bool ended_ = false;  // by mistake
};

}  // namespace zeroc::simulation
