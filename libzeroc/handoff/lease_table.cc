#include "libzeroc/handoff/lease_table.h"

#include <algorithm>
#include <utility>

#include "libzeroc/base/check.h"
#include "libzeroc/comm/checksum.h"
#include "libzeroc/handoff/lease.h"

namespace zeroc {

namespace {

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

Status LeaseTable::EndedStatus(const LeaseKey& key) const {
  const auto it = ended_.find(key.lease_id);
  if (it != ended_.end() && it->second.generation == key.generation) return it->second.status;
  return FailedPrecondition(LeaseName(key) + ": no such lease, or its generation is over");
}

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
    Fail(*lease, status.WithContext(LeaseName(key)), lease->owner_released, false, now_ns, &out);
    return out;
  }
  if (lease->owner_released) {
    Fail(*lease, Status(lease->end_status), true, false, now_ns, &out);
    return out;
  }
  lease->state = LeaseState::kCommitted;
  lease->last_sign_ns = now_ns;
  for (const Writer& writer : lease->writers)
    SendToWriter(writer.peer, CommitAckMessage{key, writer.rank, OkStatus()}, &out);
  out.push_back(LeaseReady{key, lease->first_token, lease->facts});
  return out;
}

Status LeaseTable::Admit(const LeaseKey& key) { return AdmitFrom(LeaseState::kCommitted, key); }
Status LeaseTable::AdmitLocal(const LeaseKey& key) { return AdmitFrom(LeaseState::kReserved, key); }

Status LeaseTable::AdmitFrom(LeaseState state, const LeaseKey& key) {
  Lease* lease = Find(key);
  if (lease == nullptr) return FailedPrecondition(LeaseName(key) + " is over");
  if (lease->state != state) {
    return FailedPrecondition(LeaseName(key) + " is " + LeaseStateName(lease->state) + ", not " +
                              LeaseStateName(state));
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
      out.push_back(
          LeaseFailed{lease->key, DeadlineExceeded(LeaseName(lease->key) + " expired unclaimed, " + age), true});
      End(*lease, &out);
    } else {
      Fail(*lease,
           DeadlineExceeded(LeaseName(lease->key) + " expired while " + LeaseStateName(lease->state) + ", " + age),
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
    if (writer.committed) SendToWriter(writer.peer, CommitAckMessage{lease.key, writer.rank, status}, out);
  }
  TellWriters(lease, now_ns, out);
  EndIfQuiet(lease, out);
}

void LeaseTable::TellWriters(Lease& lease, std::int64_t now_ns, LeaseActions* out) {
  lease.last_resend_ns = now_ns;
  for (const Writer& writer : lease.writers) {
    if (writer.quiet || writer.gone_ns != 0) continue;
    SendToWriter(writer.peer, LeaseEndedMessage{lease.key, writer.rank, lease.end_status, true}, out);
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
