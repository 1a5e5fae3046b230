#include "libzeroc/handoff/lease_table.h"

#include <algorithm>
#include <utility>

#include "libzeroc/base/check.h"
#include "libzeroc/comm/checksum.h"

namespace zeroc {

struct LeaseTable::Lease {
  LeaseKey key;
  LeaseState state = LeaseState::kReserved;
  int n_prompt_tokens = 0;
  std::uint64_t layout_hash = 0;
  std::vector<BlockExtent> blocks;       // by block index
  std::vector<BlockExtent> regions;      // the same bytes, sorted and merged: where a write may go
  std::vector<std::uint64_t> checksums;  // by block index, once named
  std::vector<bool> named;
  std::uint32_t n_named = 0;

  std::uint16_t n_ranks = 0;  // 0 until the first Attach
  std::vector<Writer> writers;
  int pieces_in_flight = 0;
  bool has_first_token = false;
  FirstToken first_token;
  TransferFacts facts;

  std::int64_t created_ns = 0;
  std::int64_t last_sign_ns = 0;    // of life from a writer
  std::int64_t last_resend_ns = 0;  // of LeaseEnded
  bool owner_released = false;      // while verifying
  Status end_status;                // OK while it may still end well
};

namespace {

std::string Name(const LeaseKey& key) { return "lease " + std::to_string(key.lease_id); }

std::vector<BlockExtent> MergedRegions(std::vector<BlockExtent> blocks) {
  std::sort(blocks.begin(), blocks.end(),
            [](const BlockExtent& a, const BlockExtent& b) { return a.offset < b.offset; });
  std::vector<BlockExtent> regions;
  for (const BlockExtent& block : blocks) {
    if (!regions.empty() && regions.back().offset + regions.back().bytes == block.offset) {
      regions.back().bytes += block.bytes;
    } else {
      regions.push_back(block);
    }
  }
  return regions;
}

bool Contains(const std::vector<BlockExtent>& regions, std::uint64_t offset, std::uint64_t bytes) {
  auto after = std::upper_bound(regions.begin(), regions.end(), offset,
                                [](std::uint64_t at, const BlockExtent& region) { return at < region.offset; });
  if (after == regions.begin()) return false;
  const BlockExtent& region = *std::prev(after);
  const std::uint64_t skip = offset - region.offset;
  return skip <= region.bytes && bytes <= region.bytes - skip;
}

void Send(PeerId peer, const Message& message, LeaseActions* out) {
  out->push_back(SendMessage{peer, EncodeMessage(message)});
}

}  // namespace

const char* LeaseStateName(LeaseState state) {
  switch (state) {
    case LeaseState::kReserved:
      return "reserved";
    case LeaseState::kReceiving:
      return "receiving";
    case LeaseState::kVerifying:
      return "verifying";
    case LeaseState::kCommitted:
      return "committed";
    case LeaseState::kAdmitted:
      return "admitted";
    case LeaseState::kQuarantined:
      return "quarantined";
  }
  return "";
}

Status VerifyBlocks(std::span<const std::byte> arena, std::span<const ExpectedBlock> blocks) {
  for (std::size_t i = 0; i < blocks.size(); ++i) {
    const BlockExtent& extent = blocks[i].extent;
    ZEROC_CHECK(extent.offset + extent.bytes <= arena.size(), extent.offset, extent.bytes, arena.size());
    if (Checksum64(arena.subspan(extent.offset, extent.bytes)) != blocks[i].checksum) {
      return DataLoss("KV block " + std::to_string(i) + " of " + std::to_string(blocks.size()) +
                      " differs from what prefill computed (checksum)");
    }
  }
  return OkStatus();
}

LeaseTable::LeaseTable(const Options& options, std::uint64_t seed) : options_(options), next_id_(seed) {
  // splitmix64: the two sequences start far apart.
  std::uint64_t z = seed + 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  next_generation_ = z ^ (z >> 31);
}

LeaseTable::~LeaseTable() = default;

LeaseTable::Lease* LeaseTable::Find(const LeaseKey& key) {
  const auto it = leases_.find(key.lease_id);
  return it != leases_.end() && it->second->key == key ? it->second.get() : nullptr;
}
const LeaseTable::Lease* LeaseTable::Find(const LeaseKey& key) const {
  return const_cast<LeaseTable*>(this)->Find(key);
}

LeaseTable::Writer* LeaseTable::FindWriter(Lease& lease, PeerId peer, std::uint16_t rank) {
  for (Writer& writer : lease.writers) {
    if (writer.rank == rank && writer.peer == peer) return &writer;
  }
  return nullptr;
}

std::size_t LeaseTable::n_in(LeaseState state) const {
  return static_cast<std::size_t>(
      std::count_if(leases_.begin(), leases_.end(), [&](const auto& entry) { return entry.second->state == state; }));
}

std::uint64_t LeaseTable::blocks_in(LeaseState state) const {
  std::uint64_t n = 0;
  for (const auto& [id, lease] : leases_) {
    if (lease->state == state) n += lease->blocks.size();
  }
  return n;
}

Result<LeaseKey> LeaseTable::Create(const BlockTable& table, std::int64_t now_ns) {
  ZEROC_RETURN_IF_ERROR(table.CheckPlaces(UINT64_MAX));
  auto lease = std::make_unique<Lease>();
  while (leases_.contains(next_id_) || ended_.contains(next_id_)) ++next_id_;
  lease->key = {next_id_++, next_generation_++};
  lease->n_prompt_tokens = table.n_prompt_tokens();
  lease->layout_hash = table.identity().layout_hash;
  lease->blocks = table.Extents();
  lease->regions = MergedRegions(lease->blocks);
  lease->checksums.resize(lease->blocks.size());
  lease->named.resize(lease->blocks.size());
  lease->created_ns = lease->last_sign_ns = now_ns;
  const LeaseKey key = lease->key;
  leases_.emplace(key.lease_id, std::move(lease));
  return key;
}

bool LeaseTable::AcceptWrite(PeerId peer, const WriteTag& tag, std::uint64_t offset, std::uint64_t bytes,
                             std::int64_t now_ns) {
  Lease* lease = Find({tag.lease_id, tag.generation});
  if (lease == nullptr || lease->state != LeaseState::kReceiving) return false;
  const bool may_write = std::any_of(lease->writers.begin(), lease->writers.end(),
                                     [&](const Writer& w) { return w.peer == peer && !w.quiet && w.n_parts == 0; });
  if (!may_write || !Contains(lease->regions, offset, bytes)) return false;
  if (lease->facts.bytes_received == 0 && lease->pieces_in_flight == 0) lease->facts.first_write_ns = now_ns;
  ++lease->pieces_in_flight;
  lease->last_sign_ns = now_ns;
  return true;
}

LeaseActions LeaseTable::OnWriteDone(const WriteTag& tag, std::uint64_t bytes, const Status& status,
                                     std::int64_t now_ns) {
  LeaseActions out;
  Lease* lease = Find({tag.lease_id, tag.generation});
  ZEROC_CHECK(lease != nullptr && lease->pieces_in_flight > 0, tag.lease_id);  // End waits for accepted pieces
  --lease->pieces_in_flight;
  if (status.ok()) {
    lease->facts.bytes_received += bytes;
    lease->facts.last_write_ns = now_ns;
  }
  EndIfQuiet(*lease, &out);
  return out;
}

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

Status LeaseTable::EndedStatus(const LeaseKey& key) const {
  const auto it = ended_.find(key.lease_id);
  if (it != ended_.end() && it->second.generation == key.generation) return it->second.status;
  return FailedPrecondition(Name(key) + ": no such lease, or its generation is over");
}

// --- messages ---

void LeaseTable::OnAttach(PeerId peer, const AttachMessage& message, std::int64_t now_ns, LeaseActions* out) {
  Lease* lease = Find(message.lease);
  Status status = lease != nullptr ? Attach(*lease, peer, message) : EndedStatus(message.lease);
  if (lease == nullptr && status.ok()) status = FailedPrecondition(Name(message.lease) + " was committed and is over");
  if (lease != nullptr && status.ok()) {
    lease->last_sign_ns = now_ns;
    if (lease->facts.first_write_ns == 0) lease->facts.first_write_ns = now_ns;
  }
  Send(peer, AttachAckMessage{message.lease, message.rank, status}, out);
}

Status LeaseTable::Attach(Lease& lease, PeerId peer, const AttachMessage& message) {
  if (lease.state == LeaseState::kQuarantined) return lease.end_status;
  if (message.n_prompt_tokens != static_cast<std::uint32_t>(lease.n_prompt_tokens) ||
      message.layout_hash != lease.layout_hash) {
    return FailedPrecondition(Name(lease.key) + ": the writer has another prompt length or KV layout");
  }
  if (lease.n_ranks != 0 && lease.n_ranks != message.n_ranks) {
    return FailedPrecondition(Name(lease.key) + ": the ranks disagree on their number");
  }
  for (const Writer& writer : lease.writers) {
    if (writer.rank != message.rank) continue;
    if (writer.peer == peer) return writer.quiet && !writer.committed ? Cancelled("the writer has let go") : OkStatus();
    return FailedPrecondition(Name(lease.key) + ": rank " + std::to_string(message.rank) + " is another connection's");
  }
  if (lease.state != LeaseState::kReserved && lease.state != LeaseState::kReceiving) {
    return FailedPrecondition(Name(lease.key) + " is " + LeaseStateName(lease.state));
  }
  lease.n_ranks = message.n_ranks;
  lease.writers.push_back({message.rank, peer, message.delivery, 0, {}, false, false, 0, 0});
  lease.state = LeaseState::kReceiving;
  return OkStatus();
}

void LeaseTable::OnCommit(PeerId peer, const CommitMessage& message, std::int64_t now_ns, LeaseActions* out) {
  Lease* lease = Find(message.lease);
  const auto answer = [&](const Status& status) {
    Send(peer, CommitAckMessage{message.lease, message.rank, status}, out);
  };
  if (lease == nullptr) return answer(EndedStatus(message.lease));
  Writer* writer = FindWriter(*lease, peer, message.rank);
  if (writer == nullptr) return answer(FailedPrecondition(Name(lease->key) + ": commit of a rank that never attached"));
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
  const std::string where = Name(lease.key) + ": commit of rank " + std::to_string(message.rank);
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
    status = FailedPrecondition(Name(lease.key) + ": the commits name " + std::to_string(lease.n_named) + " of " +
                                std::to_string(lease.blocks.size()) + " blocks");
  } else if (!lease.has_first_token) {
    status = FailedPrecondition(Name(lease.key) + ": the commits have no first token");
  } else if (lease.pieces_in_flight != 0) {
    status = FailedPrecondition(Name(lease.key) + ": committed before its writes were over");
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
    if (status.ok()) return Send(peer, CommitAckMessage{message.lease, message.rank, status}, out);
    Send(peer, LeaseEndedMessage{message.lease, message.rank, std::move(status), false}, out);
  };
  if (lease == nullptr) return answer_ended(EndedStatus(message.lease));
  Writer* writer = FindWriter(*lease, peer, message.rank);
  if (writer == nullptr) return answer_ended(FailedPrecondition(Name(lease->key) + ": not a writer of it"));
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

// --- other events ---

LeaseActions LeaseTable::OnPeerFailure(PeerId peer, const Status& status, std::int64_t now_ns) {
  LeaseActions out;
  std::vector<std::uint64_t> touched;
  for (auto& [id, lease] : leases_) {
    for (Writer& writer : lease->writers) {
      if (writer.peer != peer || writer.quiet || writer.gone_ns != 0) continue;
      writer.gone_ns = now_ns;
      if (writer.delivery == Delivery::kActiveMessage) writer.quiet = true;
      touched.push_back(id);
    }
  }
  for (const std::uint64_t id : touched) {
    const auto it = leases_.find(id);
    if (it == leases_.end()) continue;  // it had two writers behind that peer
    if (it->second->state == LeaseState::kReceiving) {
      Fail(*it->second, Unavailable("prefill was lost during the transfer: " + std::string(status.message())), false,
           false, now_ns, &out);
    } else {
      EndIfQuiet(*it->second, &out);
    }
  }
  return out;
}

LeaseActions LeaseTable::OnVerified(const LeaseKey& key, const Status& status, std::int64_t now_ns) {
  LeaseActions out;
  Lease* lease = Find(key);
  ZEROC_CHECK(lease != nullptr && lease->state == LeaseState::kVerifying, key.lease_id);
  if (!status.ok()) {
    Fail(*lease, status.WithContext(Name(key)), lease->owner_released, false, now_ns, &out);
    return out;
  }
  if (lease->owner_released) {
    Fail(*lease, Status(lease->end_status), true, false, now_ns, &out);
    return out;
  }
  lease->state = LeaseState::kCommitted;
  lease->last_sign_ns = now_ns;
  for (const Writer& writer : lease->writers) Send(writer.peer, CommitAckMessage{key, writer.rank, OkStatus()}, &out);
  out.push_back(LeaseReady{key, lease->first_token, lease->facts});
  return out;
}

Status LeaseTable::Admit(const LeaseKey& key) { return AdmitFrom(LeaseState::kCommitted, key); }
Status LeaseTable::AdmitLocal(const LeaseKey& key) { return AdmitFrom(LeaseState::kReserved, key); }

Status LeaseTable::AdmitFrom(LeaseState state, const LeaseKey& key) {
  Lease* lease = Find(key);
  if (lease == nullptr) return FailedPrecondition(Name(key) + " is over");
  if (lease->state != state) {
    return FailedPrecondition(Name(key) + " is " + LeaseStateName(lease->state) + ", not " + LeaseStateName(state));
  }
  lease->state = LeaseState::kAdmitted;
  return OkStatus();
}

LeaseActions LeaseTable::Release(const LeaseKey& key, const Status& why, std::int64_t now_ns) {
  LeaseActions out;
  Lease* lease = Find(key);
  if (lease == nullptr) return out;
  switch (lease->state) {
    case LeaseState::kQuarantined:
      break;                      // on its way already
    case LeaseState::kVerifying:  // its bytes are being read
      if (!lease->owner_released) lease->end_status = why.ok() ? Cancelled("released") : why;
      lease->owner_released = true;
      break;
    case LeaseState::kCommitted:
    case LeaseState::kAdmitted:
      End(*lease, &out);
      break;
    case LeaseState::kReserved:
    case LeaseState::kReceiving:
      Fail(*lease, why.ok() ? Cancelled("released") : why, true, false, now_ns, &out);
      break;
  }
  return out;
}

LeaseActions LeaseTable::Tick(std::int64_t now_ns) {
  LeaseActions out;
  std::vector<Lease*> expired;
  std::vector<Lease*> waited_enough;
  for (auto& [id, lease] : leases_) {
    const std::int64_t silent_ns = now_ns - lease->last_sign_ns;
    switch (lease->state) {
      case LeaseState::kReserved:
      case LeaseState::kReceiving:
        if (silent_ns < options_.expiry_ns && now_ns - lease->created_ns < options_.lifetime_max_ns) break;
        expired.push_back(lease.get());
        break;
      case LeaseState::kCommitted:
        if (silent_ns >= options_.expiry_ns) expired.push_back(lease.get());
        break;
      case LeaseState::kQuarantined:
        for (Writer& writer : lease->writers) {
          if (writer.quiet || writer.gone_ns == 0) continue;
          const std::int64_t since_ns = now_ns - std::max(writer.gone_ns, last_tick_ns_);
          writer.gone_for_ns += std::clamp<std::int64_t>(since_ns, 0, options_.grace_step_ns);
          if (writer.gone_for_ns < options_.dead_writer_grace_ns) continue;
          writer.quiet = true;
          if (waited_enough.empty() || waited_enough.back() != lease.get()) waited_enough.push_back(lease.get());
        }
        if (now_ns - lease->last_resend_ns >= options_.resend_ns) TellWriters(*lease, now_ns, &out);
        break;
      case LeaseState::kVerifying:
      case LeaseState::kAdmitted:
        break;
    }
  }
  last_tick_ns_ = now_ns;
  for (Lease* lease : waited_enough) EndIfQuiet(*lease, &out);
  for (Lease* lease : expired) {
    const std::string age = std::to_string((now_ns - lease->created_ns) / 1'000'000) + " ms after its reservation";
    if (lease->state == LeaseState::kCommitted) {
      out.push_back(LeaseFailed{lease->key, DeadlineExceeded(Name(lease->key) + " expired unclaimed, " + age), true});
      End(*lease, &out);
    } else {
      Fail(*lease, DeadlineExceeded(Name(lease->key) + " expired while " + LeaseStateName(lease->state) + ", " + age),
           false, true, now_ns, &out);
    }
  }
  return out;
}

// --- the end ---

void LeaseTable::Fail(Lease& lease, const Status& status, bool owner_knows, bool expired, std::int64_t now_ns,
                      LeaseActions* out) {
  if (!owner_knows) out->push_back(LeaseFailed{lease.key, status, expired});
  lease.end_status = status;
  lease.state = LeaseState::kQuarantined;
  for (const Writer& writer : lease.writers) {
    if (writer.committed) Send(writer.peer, CommitAckMessage{lease.key, writer.rank, status}, out);
  }
  TellWriters(lease, now_ns, out);
  EndIfQuiet(lease, out);
}

void LeaseTable::TellWriters(Lease& lease, std::int64_t now_ns, LeaseActions* out) {
  lease.last_resend_ns = now_ns;
  for (const Writer& writer : lease.writers) {
    if (writer.quiet || writer.gone_ns != 0) continue;
    Send(writer.peer, LeaseEndedMessage{lease.key, writer.rank, lease.end_status, true}, out);
  }
}

void LeaseTable::EndIfQuiet(Lease& lease, LeaseActions* out) {
  if (lease.state != LeaseState::kQuarantined || lease.pieces_in_flight > 0) return;
  // Pieces of active messages are refused from here on; what was posted one-sidedly before cannot be.
  const bool quiet = std::all_of(lease.writers.begin(), lease.writers.end(), [](const Writer& writer) {
    return writer.quiet || writer.delivery == Delivery::kActiveMessage;
  });
  if (quiet) End(lease, out);
}

void LeaseTable::End(Lease& lease, LeaseActions* out) {
  out->push_back(ReturnBlocks{lease.key});
  ended_[lease.key.lease_id] = {lease.key.generation, lease.end_status};
  ended_order_.push_back(lease.key.lease_id);
  if (ended_order_.size() > options_.ended_kept) {
    ended_.erase(ended_order_.front());
    ended_order_.pop_front();
  }
  leases_.erase(lease.key.lease_id);  // destroys `lease`
}

}  // namespace zeroc
