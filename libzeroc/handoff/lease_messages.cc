// What the messages of writers do to a LeaseTable's leases.
#include <algorithm>
#include <utility>

#include "libzeroc/base/check.h"
#include "libzeroc/handoff/lease.h"

namespace zeroc {

Result<LeaseActions> LeaseTable::OnMessage(PeerId peer, const Message& message, std::int64_t now_ns) {
  LeaseActions out;
  if (const auto* attach = std::get_if<AttachMessage>(&message)) {
    OnAttach(peer, *attach, now_ns, &out);
  } else if (const auto* commit = std::get_if<CommitMessage>(&message)) {
    OnCommit(peer, *commit, now_ns, &out);
  } else if (const auto* abort = std::get_if<AbortMessage>(&message)) {
    OnAbort(peer, *abort, now_ns, &out);
  } else if (const auto* released = std::get_if<ReleasedMessage>(&message)) {
    OnReleased(peer, *released, now_ns, &out);
  } else {
    return InvalidArgument("hand-off message of type " + std::to_string(kFirstMessageType + message.index()) +
                           " is not for a decode worker");
  }
  return out;
}

void LeaseTable::OnAttach(PeerId peer, const AttachMessage& message, std::int64_t now_ns, LeaseActions* out) {
  Lease* lease = Find(message.lease);
  Status status = lease != nullptr ? Attach(*lease, peer, message) : EndedStatus(message.lease);
  if (lease == nullptr && status.ok())
    status = FailedPrecondition(LeaseName(message.lease) + " was committed and is over");
  if (lease != nullptr && status.ok()) {
    lease->last_sign_ns = now_ns;
    if (lease->facts.first_write_ns == 0) lease->facts.first_write_ns = now_ns;
  }
  SendToWriter(peer, AttachAckMessage{message.lease, message.rank, status}, out);
}

Status LeaseTable::Attach(Lease& lease, PeerId peer, const AttachMessage& message) {
  if (lease.state == LeaseState::kQuarantined) return lease.end_status;
  if (message.n_prompt_tokens != static_cast<std::uint32_t>(lease.n_prompt_tokens) ||
      message.layout_hash != lease.layout_hash) {
    return FailedPrecondition(LeaseName(lease.key) + ": the writer has another prompt length or KV layout");
  }
  if (lease.n_ranks != 0 && lease.n_ranks != message.n_ranks) {
    return FailedPrecondition(LeaseName(lease.key) + ": the ranks disagree on their number");
  }
  for (const Writer& writer : lease.writers) {
    if (writer.rank != message.rank) continue;
    if (writer.peer == peer) return writer.quiet && !writer.committed ? Cancelled("the writer has let go") : OkStatus();
    return FailedPrecondition(LeaseName(lease.key) + ": rank " + std::to_string(message.rank) +
                              " is another connection's");
  }
  if (lease.state != LeaseState::kReserved && lease.state != LeaseState::kReceiving) {
    return FailedPrecondition(LeaseName(lease.key) + " is " + LeaseStateName(lease.state));
  }
  lease.n_ranks = message.n_ranks;
  lease.writers.push_back({message.rank, peer, message.delivery, 0, {}, false, false, 0, 0});
  lease.state = LeaseState::kReceiving;
  return OkStatus();
}

void LeaseTable::OnCommit(PeerId peer, const CommitMessage& message, std::int64_t now_ns, LeaseActions* out) {
  Lease* lease = Find(message.lease);
  const auto answer = [&](const Status& status) {
    SendToWriter(peer, CommitAckMessage{message.lease, message.rank, status}, out);
  };
  if (lease == nullptr) return answer(EndedStatus(message.lease));
  Writer* writer = FindWriter(*lease, peer, message.rank);
  if (writer == nullptr)
    return answer(FailedPrecondition(LeaseName(lease->key) + ": commit of a rank that never attached"));
  switch (lease->state) {
    case LeaseState::kVerifying:
      return;  // answered when the verdict is in
    case LeaseState::kCommitted:
    case LeaseState::kAdmitted:
      return answer(OkStatus());
    case LeaseState::kReserved:
    case LeaseState::kQuarantined:
      return answer(lease->end_status);
    case LeaseState::kReceiving:
      break;
  }
  lease->last_sign_ns = now_ns;
  if (writer->quiet && !writer->committed) return answer(Cancelled("the writer has let go"));
  if (Status status = TakePart(*lease, *writer, message); !status.ok()) {
    answer(status);
    return Fail(*lease, status, false, false, now_ns, out);
  }
  const auto n_committed =
      std::count_if(lease->writers.begin(), lease->writers.end(), [](const Writer& w) { return w.committed; });
  if (n_committed == lease->n_ranks) BeginVerify(*lease, now_ns, out);
}

Status LeaseTable::TakePart(Lease& lease, Writer& writer, const CommitMessage& message) {
  const std::string where = LeaseName(lease.key) + ": commit of rank " + std::to_string(message.rank);
  if (writer.n_parts == 0) {
    writer.n_parts = message.n_parts;
    writer.parts_seen.assign(message.n_parts, false);
  }
  if (writer.n_parts != message.n_parts) return FailedPrecondition(where + " changes its number of parts");
  if (writer.parts_seen[message.part]) return OkStatus();
  for (const BlockChecksum& block : message.blocks) {
    if (block.block_idx >= lease.blocks.size()) return FailedPrecondition(where + " names a block that is not there");
    if (lease.named[block.block_idx]) {
      return FailedPrecondition(where + " names block " + std::to_string(block.block_idx) + " a second time");
    }
    lease.named[block.block_idx] = true;
    lease.checksums[block.block_idx] = block.checksum;
    ++lease.n_named;
  }
  if (message.has_first_token) {
    if (message.rank != 0 || lease.has_first_token) return FailedPrecondition(where + " has a first token too many");
    if (message.first_token.position != static_cast<std::uint32_t>(lease.n_prompt_tokens)) {
      return FailedPrecondition(where + ": the first token's position is not the prompt's length");
    }
    lease.has_first_token = true;
    lease.first_token = message.first_token;
  }
  writer.parts_seen[message.part] = true;
  writer.committed = std::find(writer.parts_seen.begin(), writer.parts_seen.end(), false) == writer.parts_seen.end();
  writer.quiet = writer.committed;  // it flushed before it committed
  return OkStatus();
}

void LeaseTable::BeginVerify(Lease& lease, std::int64_t now_ns, LeaseActions* out) {
  Status status;
  if (lease.n_named != lease.blocks.size()) {
    status = FailedPrecondition(LeaseName(lease.key) + ": the commits name " + std::to_string(lease.n_named) + " of " +
                                std::to_string(lease.blocks.size()) + " blocks");
  } else if (!lease.has_first_token) {
    status = FailedPrecondition(LeaseName(lease.key) + ": the commits have no first token");
  } else if (lease.pieces_in_flight != 0) {
    status = FailedPrecondition(LeaseName(lease.key) + ": committed before its writes were over");
  }
  if (!status.ok()) return Fail(lease, status, false, false, now_ns, out);
  lease.facts.committed_ns = now_ns;
  if (lease.facts.last_write_ns == 0) lease.facts.last_write_ns = now_ns;
  lease.state = LeaseState::kVerifying;
  VerifyLease verify{lease.key, {}};
  verify.blocks.reserve(lease.blocks.size());
  for (std::size_t i = 0; i < lease.blocks.size(); ++i) verify.blocks.push_back({lease.blocks[i], lease.checksums[i]});
  out->push_back(std::move(verify));
}

void LeaseTable::OnAbort(PeerId peer, const AbortMessage& message, std::int64_t now_ns, LeaseActions* out) {
  Lease* lease = Find(message.lease);
  if (lease == nullptr || (lease->state != LeaseState::kReserved && lease->state != LeaseState::kReceiving)) return;
  for (const Writer& writer : lease->writers) {
    if (writer.rank == message.rank && writer.peer != peer) return;  // not its lease to give up
  }
  Fail(*lease, message.status.WithContext("prefill gave up"), false, false, now_ns, out);
}

void LeaseTable::OnReleased(PeerId peer, const ReleasedMessage& message, std::int64_t now_ns, LeaseActions* out) {
  Lease* lease = Find(message.lease);
  const auto answer_ended = [&](Status status) {
    if (status.ok()) return SendToWriter(peer, CommitAckMessage{message.lease, message.rank, status}, out);
    SendToWriter(peer, LeaseEndedMessage{message.lease, message.rank, std::move(status), false}, out);
  };
  if (lease == nullptr) return answer_ended(EndedStatus(message.lease));
  Writer* writer = FindWriter(*lease, peer, message.rank);
  if (writer == nullptr) return answer_ended(FailedPrecondition(LeaseName(lease->key) + ": not a writer of it"));
  switch (lease->state) {
    case LeaseState::kVerifying:
      return;
    case LeaseState::kCommitted:
    case LeaseState::kAdmitted:
      return answer_ended(OkStatus());
    case LeaseState::kReserved:
    case LeaseState::kReceiving:
      writer->quiet = true;
      if (writer->committed) return answer_ended(OkStatus());
      answer_ended(Cancelled("the writer has let go"));
      return Fail(*lease, Cancelled("prefill let go of the lease before its commit"), false, false, now_ns, out);
    case LeaseState::kQuarantined:
      writer->quiet = true;
      answer_ended(lease->end_status);
      return EndIfQuiet(*lease, out);
  }
}

}  // namespace zeroc
