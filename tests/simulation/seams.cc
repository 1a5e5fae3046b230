#include "tests/simulation/seams.h"

#include <algorithm>

#include "libzeroc/handoff/byte_codec.h"

namespace zeroc::simulation {
namespace {

LeaseTable::Options AlterOptions(Mistake mistake, LeaseTable::Options options) {
  if (mistake == Mistake::kNoDeadWriterGrace) options.dead_writer_grace_ns = 0;
  return options;
}

// Appends what a follow-up event led to.
template <typename Actions>
void Append(Actions more, Actions* out) {
  for (auto& action : more) out->push_back(std::move(action));
}

}  // namespace

// --- decode ---

LeaseSeam::LeaseSeam(Mistake mistake, LeaseTable::Options options, std::uint64_t seed)
    : mistake_(mistake), table_(AlterOptions(mistake, options), seed) {}

LeaseSeam::Known* LeaseSeam::Find(const LeaseKey& key) {
  const auto it = known_.find(key.lease_id);
  return it != known_.end() && it->second.key == key ? &it->second : nullptr;
}

bool LeaseSeam::Covers(const Known& known, std::uint64_t offset, std::uint64_t bytes) const {
  std::uint64_t covered = 0;
  for (const BlockExtent& e : known.extents) {
    const std::uint64_t begin = std::max(e.offset, offset);
    const std::uint64_t end = std::min(e.offset + e.bytes, offset + bytes);
    if (begin < end) covered += end - begin;
  }
  return covered == bytes;
}

Result<LeaseKey> LeaseSeam::Create(const BlockTable& table, std::int64_t now) {
  ZEROC_ASSIGN_OR_RETURN(const LeaseKey key, table_.Create(table, now));
  known_[key.lease_id] = {key, table.Extents(), {}, 1, false, false, false};
  return key;
}

bool LeaseSeam::AcceptWrite(PeerId peer, const WriteTag& tag, std::uint64_t offset, std::uint64_t bytes,
                            std::int64_t now) {
  if (table_.AcceptWrite(peer, tag, offset, bytes, now)) {
    if (mistake_ == Mistake::kReuseUnderPiece) {
      not_reported_.insert({tag.lease_id, bytes});
      table_.OnWriteDone(tag, bytes, OkStatus(), now);
    }
    return true;
  }
  bool wrongly = false;
  if (mistake_ == Mistake::kAcceptStaleGeneration && Find({tag.lease_id, tag.generation}) == nullptr) {
    wrongly = std::any_of(known_.begin(), known_.end(),
                          [&](const auto& entry) { return Covers(entry.second, offset, bytes); });
  } else if (mistake_ == Mistake::kAcceptAfterCommit) {
    const Known* known = Find({tag.lease_id, tag.generation});
    wrongly = known != nullptr && known->admitted && Covers(*known, offset, bytes);
  }
  if (wrongly) not_reported_.insert({tag.lease_id, bytes});
  return wrongly;
}

LeaseActions LeaseSeam::OnWriteDone(const WriteTag& tag, std::uint64_t bytes, const Status& status, std::int64_t now) {
  if (const auto it = not_reported_.find({tag.lease_id, bytes}); it != not_reported_.end()) {
    not_reported_.erase(it);
    return {};
  }
  return Alter(table_.OnWriteDone(tag, bytes, status, now), now);
}

Result<LeaseActions> LeaseSeam::OnMessage(PeerId peer, const Message& message, std::int64_t now) {
  if (mistake_ == Mistake::kIgnoreReleased && std::holds_alternative<ReleasedMessage>(message)) return LeaseActions{};
  Known* known = Find(LeaseOf(message));
  if (const auto* attach = std::get_if<AttachMessage>(&message); attach != nullptr && known != nullptr) {
    known->writers.insert(peer);
    known->n_ranks = attach->n_ranks;
  }
  ZEROC_ASSIGN_OR_RETURN(LeaseActions actions, table_.OnMessage(peer, message, now));
  actions = Alter(std::move(actions), now);
  const auto* commit = std::get_if<CommitMessage>(&message);
  known = Find(LeaseOf(message));
  if (commit == nullptr || known == nullptr) return actions;
  if (mistake_ == Mistake::kAdmitBeforeAllCommits && commit->has_first_token && known->n_ranks > 1 && !known->forced) {
    known->forced = true;
    actions.push_back(LeaseReady{known->key, commit->first_token, {}});
  }
  if (mistake_ == Mistake::kAdmitOnEveryCommit && commit->has_first_token && known->admitted) {
    actions.push_back(LeaseReady{known->key, commit->first_token, {}});
  }
  return actions;
}

LeaseActions LeaseSeam::OnPeerFailure(PeerId peer, const Status& status, std::int64_t now) {
  if (mistake_ == Mistake::kIgnorePeerFailure) return {};
  return Alter(table_.OnPeerFailure(peer, status, now), now);
}

LeaseActions LeaseSeam::OnVerified(const LeaseKey& key, const Status& status, std::int64_t now) {
  return Alter(table_.OnVerified(key, mistake_ == Mistake::kIgnoreChecksums ? OkStatus() : status, now), now);
}

Status LeaseSeam::Admit(const LeaseKey& key) {
  Known* known = Find(key);
  if (known != nullptr && (known->forced || (known->admitted && may_start_again()))) return OkStatus();
  Status status = table_.Admit(key);
  if (status.ok() && known != nullptr) known->admitted = true;
  return status;
}

Status LeaseSeam::AdmitLocal(const LeaseKey& key) {
  Known* known = Find(key);
  Status status = table_.AdmitLocal(key);
  if (status.ok() && known != nullptr) known->admitted = true;
  return status;
}

LeaseActions LeaseSeam::Release(const LeaseKey& key, const Status& why, std::int64_t now) {
  return Alter(table_.Release(key, why, now), now);
}
LeaseActions LeaseSeam::Tick(std::int64_t now) { return Alter(table_.Tick(now), now); }

LeaseActions LeaseSeam::Alter(LeaseActions actions, std::int64_t now) {
  LeaseActions out;
  for (LeaseAction& action : actions) {
    if (const auto* ready = std::get_if<LeaseReady>(&action)) {
      const Known* known = Find(ready->lease);
      if (known != nullptr && known->forced) continue;
    }
    if (const auto* failed = std::get_if<LeaseFailed>(&action)) {
      const LeaseFailed copy = *failed;
      if (mistake_ == Mistake::kSwallowLeaseFailed) continue;
      out.push_back(std::move(action));
      Known* known = Find(copy.lease);
      if (known == nullptr || !copy.expired) continue;
      if (mistake_ == Mistake::kReuseAtExpiry) {
        known->returned = true;
        out.push_back(ReturnBlocks{copy.lease});
      }
      if (mistake_ == Mistake::kPausedWriterIsDead) {
        for (const PeerId writer : std::set<PeerId>(known->writers)) {
          Append(Alter(table_.OnPeerFailure(writer, Unavailable("silent"), now), now), &out);
        }
      }
      continue;
    }
    if (const auto* returned = std::get_if<ReturnBlocks>(&action)) {
      const Known* known = Find(returned->lease);
      const bool twice = known != nullptr && known->returned;
      if (known != nullptr) known_.erase(returned->lease.lease_id);
      if (twice) continue;
    }
    out.push_back(std::move(action));
  }
  return out;
}

// --- prefill ---

SenderActions SenderSeam::OnPeerUp(Delivery delivery, std::int64_t now) {
  SenderActions actions = Alter(sender_.OnPeerUp(delivery, now), now);
  if (mistake_ == Mistake::kWriteBeforeAttachAck) {
    Append(Alter(sender_.OnMessage(AttachAckMessage{sender_.lease(), 0, OkStatus()}, now), now), &actions);
  }
  return actions;
}

Result<SenderActions> SenderSeam::OnBlocksReady(const SequenceKv& kv, const FinalBlocks& blocks, std::int64_t now) {
  if (ended_) return SenderActions{};
  ZEROC_ASSIGN_OR_RETURN(SenderActions actions, sender_.OnBlocksReady(kv, blocks, now));
  return Alter(std::move(actions), now);
}

SenderActions SenderSeam::OnFirstToken(FirstToken token, std::int64_t now) {
  if (ended_) return {};
  SenderActions actions = Alter(sender_.OnFirstToken(std::move(token), now), now);
  if (mistake_ == Mistake::kFreeAtLastPost && !local_done_) {
    local_done_ = true;
    actions.push_back(LocalDone{});
  }
  return actions;
}

SenderActions SenderSeam::OnWriteDone(const Status& status, std::int64_t now) {
  return Alter(sender_.OnWriteDone(status, now), now);
}
SenderActions SenderSeam::OnFlushDone(const Status& status, std::int64_t now) {
  return Alter(sender_.OnFlushDone(status, now), now);
}
SenderActions SenderSeam::OnMessage(const Message& message, std::int64_t now) {
  if (std::holds_alternative<AttachAckMessage>(message)) attached_ = true;
  return Alter(sender_.OnMessage(message, now), now);
}
SenderActions SenderSeam::OnPeerFailure(const Status& status, std::int64_t now) {
  return Alter(sender_.OnPeerFailure(status, now), now);
}
SenderActions SenderSeam::Cancel(const Status& why, std::int64_t now) { return Alter(sender_.Cancel(why, now), now); }
SenderActions SenderSeam::Tick(std::int64_t now, std::int64_t link_progress) {
  return Alter(sender_.Tick(now, link_progress), now);
}

SenderActions SenderSeam::Alter(SenderActions actions, std::int64_t now) {
  if (ended_) return {};
  SenderActions out;
  for (SenderAction& action : actions) {
    if (std::holds_alternative<LocalDone>(action)) {
      if (std::exchange(local_done_, true)) continue;  // freed too early already
      out.push_back(action);
      if (mistake_ == Mistake::kEndWithoutReleased && sender_.stopping()) {
        ended_ = true;
        out.push_back(SenderEnded{Cancelled("ended by mistake")});
        return out;
      }
      continue;
    }
    if (std::holds_alternative<PostFlush>(action)) {
      const bool skip =
          sender_.stopping() ? mistake_ == Mistake::kReleasedBeforeFlush : mistake_ == Mistake::kSkipFlush;
      if (skip) {
        Append(Alter(sender_.OnFlushDone(OkStatus(), now), now), &out);
        continue;
      }
    }
    if (const auto* post = std::get_if<PostMessage>(&action)) {
      const Message message = ParseMessage(post->message.type, AsBytes(post->message.payload)).value();
      if (mistake_ == Mistake::kNoHeartbeat && attached_ && std::holds_alternative<AttachMessage>(message)) continue;
      if (mistake_ == Mistake::kSilentStop && sender_.stopping()) continue;
    }
    if (mistake_ == Mistake::kSilentStop && std::holds_alternative<ClosePeer>(action)) continue;
    out.push_back(std::move(action));
  }
  return out;
}

}  // namespace zeroc::simulation
