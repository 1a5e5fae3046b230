#include "libzeroc/comm/transport_core.h"

#include <algorithm>

#include "libzeroc/comm/transport_core_peer.h"

namespace zeroc {
namespace {

// splitmix64: spreads a counter over all 64 bits, so that connections of different processes do not meet.
std::uint64_t Mix(std::uint64_t& state) {
  std::uint64_t z = (state += 0x9e3779b97f4a7c15ull);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

}  // namespace

TransportCore::TransportCore(const TransportOptions& options, TransportListener& listener, Wire& wire,
                             std::uint64_t seed)
    : options_(options), listener_(listener), wire_(wire), seed_(seed) {}

TransportCore::~TransportCore() = default;

// ---- any thread ----

void TransportCore::Announce(PeerId peer, std::string name) {
  MutexLock lock(mu_);
  published_[peer].info.name = std::move(name);
}

Result<PeerInfo> TransportCore::Describe(PeerId peer) const {
  MutexLock lock(mu_);
  const auto it = published_.find(peer);
  if (it == published_.end()) return NotUsable(peer);
  if (!it->second.up) return Unavailable("transport: " + it->second.info.name + " is still connecting");
  return it->second.info;
}

Result<PeerStats> TransportCore::Stats(PeerId peer) const {
  MutexLock lock(mu_);
  const auto it = published_.find(peer);
  if (it == published_.end()) return NotUsable(peer);
  return it->second.stats;
}

RemoteArena TransportCore::LocalArena() const {
  MutexLock lock(mu_);
  return published_arena_;
}

Status TransportCore::NotUsable(PeerId id) const {
  return NotFound("transport: peer " + std::to_string(static_cast<std::uint64_t>(id)) + " is closed or unknown");
}

void TransportCore::Publish(Peer& peer) {
  PeerStats stats = peer.stats;
  if (!peer.writes.empty()) stats.busy_seconds += wire_.NowSeconds() - peer.busy_since;
  MutexLock lock(mu_);
  published_[peer.id] = {peer.info, stats, peer.state == Peer::State::kUp};
}

// ---- calls of the owner ----

void TransportCore::SetArena(std::span<std::byte> arena, RemoteArena published) {
  arena_ = arena;
  MutexLock lock(mu_);
  published_arena_ = std::move(published);
}

TransportCore::Peer* TransportCore::Find(PeerId id) {
  const auto it = peers_.find(id);
  return it == peers_.end() ? nullptr : it->second.get();
}

TransportCore::Peer* TransportCore::FindConnection(const FrameHeader& header) {
  const auto it = connections_.find({header.connection, !header.from_connector});
  return it == connections_.end() ? nullptr : Find(it->second);
}

TransportCore::Peer& TransportCore::AddPeer(PeerId id, std::uint64_t connection, bool incoming, std::string name) {
  auto peer = std::make_unique<Peer>();
  peer->id = id;
  peer->connection = connection;
  peer->info.name = std::move(name);
  peer->info.incoming = incoming;
  connections_[{connection, !incoming}] = id;
  Peer& added = *peer;
  peers_[id] = std::move(peer);
  Publish(added);
  return added;
}

void TransportCore::Connect(PeerId id, const PeerAddress& address, RemoteArena arena, std::string name) {
  Peer& peer = AddPeer(id, Mix(seed_), /*incoming=*/false, std::move(name));
  peer.arena = std::move(arena);
  peer.deadline = wire_.NowSeconds() + options_.connect_timeout_ms * 1e-3;
  Status status;
  if (peers_.size() > static_cast<std::size_t>(options_.peers_max)) {
    status = ResourceExhausted("transport: peers_max = " + std::to_string(options_.peers_max) + " reached");
  } else {
    status = wire_.Open(id, address);
  }
  if (!status.ok()) {
    peer.state = Peer::State::kClosing;
    peer.end = status.WithContext("transport: connect to " + peer.info.name);
    closed_.push_back(id);
    return;
  }
  FrameHeader hello = MakeHeader(peer, FrameKind::kHello);
  hello.offset = peer.arena.base;
  hello.bytes = peer.arena.bytes;
  SendControl(peer, hello, EncodeHello({options_.name, wire_.LocalAddress()}));
}

void TransportCore::Write(PeerId id, const WriteTag& tag, std::span<const std::byte> local, std::uint64_t remote_offset,
                          Callback done) {
  Peer* peer = Find(id);
  if (peer == nullptr) return done(NotUsable(id));
  if (!peer->usable()) return done(peer->end);
  if (peer->arena.bytes == 0 || !InRange(remote_offset, local.size(), peer->arena.bytes)) {
    const Status status =
        peer->arena.bytes == 0
            ? FailedPrecondition("transport: " + peer->info.name + " has no arena to write to")
            : OutOfRange("transport: write of " + Range(remote_offset, local.size()) + " to " + peer->info.name +
                         ", whose arena has " + std::to_string(peer->arena.bytes) + " bytes");
    peer->write_failures.emplace(peer->next_write++, status);
    return done(status);
  }
  if (local.empty()) return done(OkStatus());
  auto write = std::make_shared<WriteOp>();
  write->index = peer->next_write++;
  write->tag = tag;
  write->local = local;
  write->remote_offset = remote_offset;
  write->done = std::move(done);
  if (peer->writes.empty()) peer->busy_since = wire_.NowSeconds();
  peer->writes[write->index] = write;
  peer->queued_writes.push_back(std::move(write));
  dirty_.insert(id);
}

void TransportCore::Flush(PeerId id, Callback done) {
  Peer* peer = Find(id);
  if (peer == nullptr) return done(NotUsable(id));
  if (!peer->usable()) return done(peer->end);
  peer->flushes.push_back({peer->next_write, std::move(done)});
  dirty_.insert(id);
}

void TransportCore::Send(PeerId id, std::uint16_t type, std::vector<std::byte> payload, Callback done) {
  Peer* peer = Find(id);
  if (peer == nullptr) return done(NotUsable(id));
  if (!peer->usable()) return done(peer->end);
  if (payload.size() > kMessageBytesMax) {
    return done(InvalidArgument("transport: message of " + std::to_string(payload.size()) + " bytes, at most " +
                                std::to_string(kMessageBytesMax)));
  }
  if (peer->state == Peer::State::kConnecting) {
    peer->queued_sends.push_back({type, std::move(payload), std::move(done)});
    return;
  }
  SendMessageFrame(*peer, type, std::move(payload), std::move(done));
}

void TransportCore::Close(PeerId id, Callback done) {
  Peer* peer = Find(id);
  if (peer == nullptr) return done(NotUsable(id));
  peer->closers.push_back(std::move(done));
  if (!peer->usable()) return;  // ends anyway, and bounded
  peer->local_close = true;
  Leave(*peer, Cancelled("transport: " + peer->info.name + ": closed locally"), MakeHeader(*peer, FrameKind::kBye), {});
}

void TransportCore::CloseAll() {
  for (auto& [id, peer] : peers_) {
    if (peer->usable()) Close(id, [](const Status&) {});
  }
}

// ---- ending a peer ----

// Says one last thing, then breaks the link; not longer than half of the time to close, the rest is the wire's.
void TransportCore::Leave(Peer& peer, Status end, FrameHeader last_frame, std::vector<std::byte> payload) {
  const bool can_hear = peer.state == Peer::State::kUp || last_frame.kind == FrameKind::kRefuse;
  if (!can_hear) return BeginClose(peer, std::move(end));
  peer.state = Peer::State::kLeaving;
  peer.end = std::move(end);
  peer.deadline = wire_.NowSeconds() + std::min(options_.close_timeout_ms * 0.5e-3, 0.2);
  SendControl(peer, last_frame, std::move(payload), [this, id = peer.id](const Status&) {
    if (Peer* leaving = Find(id); leaving != nullptr && leaving->state == Peer::State::kLeaving) {
      BeginClose(*leaving, leaving->end);
    }
  });
}

void TransportCore::BeginClose(Peer& peer, Status end) {
  if (peer.state == Peer::State::kClosing) return;
  peer.state = Peer::State::kClosing;
  peer.end = std::move(end);
  peer.deadline = kNever;
  wire_.Close(peer.id, [this, id = peer.id](const Status&) { closed_.push_back(id); });
}

// The wire has let go of everything: now, and not before, the callers may reuse their bytes.
void TransportCore::FinishPeer(PeerId id) {
  const auto it = peers_.find(id);
  if (it == peers_.end()) return;
  const std::unique_ptr<Peer> peer = std::move(it->second);
  peers_.erase(it);
  connections_.erase({peer->connection, !peer->info.incoming});
  {
    MutexLock lock(mu_);
    published_.erase(id);
  }
  for (auto& [index, write] : peer->writes) write->done(write->status.ok() ? peer->end : write->status);
  for (auto& flush : peer->flushes) flush.done(peer->end);
  for (auto& [sequence, done] : peer->sends) done(peer->end);
  for (auto& send : peer->queued_sends) send.done(peer->end);
  for (auto& done : peer->closers) done(OkStatus());
  if (!peer->local_close) {
    probe_.CountPeerFailed();
    listener_.OnPeerFailure(id, peer->end);
  }
}

void TransportCore::CheckDeadline(Peer& peer, double now) {
  if (now < peer.deadline) return;
  if (peer.state == Peer::State::kConnecting) {
    BeginClose(peer,
               Status(StatusCode::kDeadlineExceeded, "transport: connect to " + peer.info.name + ": no answer in " +
                                                         std::to_string(options_.connect_timeout_ms) + " ms"));
  } else if (peer.state == Peer::State::kLeaving) {
    BeginClose(peer, peer.end);
  }
}

void TransportCore::OnLinkFailed(PeerId id, const Status& status) {
  Peer* peer = Find(id);
  if (peer == nullptr || peer->state == Peer::State::kClosing) return;
  if (peer->state == Peer::State::kLeaving) return BeginClose(*peer, peer->end);
  BeginClose(*peer, Unavailable("transport: " + peer->info.name + ": " + std::string(status.message())));
}

// ---- deferred work ----

void TransportCore::Settle() {
  const double now = wire_.NowSeconds();
  for (auto& [id, peer] : peers_) {
    if (peer->deadline <= now) CheckDeadline(*peer, now);
  }
  while (!dirty_.empty() || !closed_.empty()) {
    std::set<PeerId> dirty;
    dirty.swap(dirty_);
    for (const PeerId id : dirty) {
      Peer* peer = Find(id);
      if (peer == nullptr || peer->state != Peer::State::kUp) continue;
      SendAcks(*peer);
      Pump(*peer);
      AdvanceFlushes(*peer);
    }
    std::vector<PeerId> closed;
    closed.swap(closed_);
    for (const PeerId id : closed) FinishPeer(id);
  }
}

double TransportCore::NextDeadlineSeconds() const {
  double next = kNever;
  for (const auto& [id, peer] : peers_) next = std::min(next, peer->deadline);
  return next;
}

// ---- writing ----

void TransportCore::Pump(Peer& peer) {
  while (!peer.queued_writes.empty() && peer.pieces.size() < static_cast<std::size_t>(options_.pieces_in_flight_max)) {
    const std::shared_ptr<WriteOp> write = peer.queued_writes.front();
    if (!write->status.ok()) {  // a piece was refused: the rest stays here
      peer.queued_writes.pop_front();
      FinishWriteIfOver(peer, write);
      continue;
    }
    PostPiece(peer, write);
    if (!peer.queued_writes.empty() && peer.queued_writes.front() == write &&
        write->posted_bytes == write->local.size()) {
      peer.queued_writes.pop_front();
    }
    if (peer.state != Peer::State::kUp) return;
  }
}

void TransportCore::PostPiece(Peer& peer, const std::shared_ptr<WriteOp>& write) {
  const std::uint64_t at = write->posted_bytes;
  const std::uint64_t bytes = std::min<std::uint64_t>(options_.piece_bytes, write->local.size() - at);
  const std::uint64_t sequence = peer.next_sequence++;
  const bool put = peer.info.delivery == Delivery::kPut;
  peer.pieces[sequence] = {write, bytes, wire_.NowSeconds(), /*sent=*/false, /*acked=*/put};
  write->posted_bytes += bytes;
  ++write->open_pieces;
  probe_.CountPieceSent();
  auto done = [this, id = peer.id, sequence](const Status& status) { OnPieceSent(id, sequence, status); };
  const auto local = write->local.subspan(at, bytes);
  if (put) return wire_.Put(peer.id, local, write->remote_offset + at, std::move(done));
  FrameHeader header = MakeHeader(peer, FrameKind::kPiece);
  header.sequence = sequence;
  header.tag = write->tag;
  header.offset = write->remote_offset + at;
  header.bytes = bytes;
  wire_.SendFrame(peer.id, header, local, std::move(done));
}

void TransportCore::OnPieceSent(PeerId id, std::uint64_t sequence, const Status& status) {
  Peer* peer = Find(id);
  if (peer == nullptr || peer->state == Peer::State::kClosing) return;  // FinishPeer completes the write
  const auto it = peer->pieces.find(sequence);
  if (it == peer->pieces.end()) return;
  it->second.sent = true;
  if (!status.ok()) return OnLinkFailed(id, status);
  FinishPieceIfOver(*peer, sequence);
}

void TransportCore::FinishPieceIfOver(Peer& peer, std::uint64_t sequence) {
  const auto it = peer.pieces.find(sequence);
  if (!it->second.sent || !it->second.acked) return;
  const Piece piece = std::move(it->second);
  peer.pieces.erase(it);
  --piece.write->open_pieces;
  if (piece.write->status.ok()) {
    peer.stats.bytes_written += piece.bytes;
    probe_.CountWritten(piece.bytes);
  }
  FinishWriteIfOver(peer, piece.write);
  dirty_.insert(peer.id);
}

void TransportCore::FinishWriteIfOver(Peer& peer, const std::shared_ptr<WriteOp>& write) {
  const bool all_posted = write->posted_bytes == write->local.size();
  const bool queued = !peer.queued_writes.empty() && peer.queued_writes.front() == write;
  if (write->open_pieces > 0 || (write->status.ok() && !all_posted) || (!all_posted && queued)) return;
  if (peer.writes.erase(write->index) == 0) return;
  if (peer.writes.empty()) peer.stats.busy_seconds += wire_.NowSeconds() - peer.busy_since;
  if (!write->status.ok()) peer.write_failures.emplace(write->index, write->status);
  Publish(peer);
  write->done(write->status);
}

void TransportCore::AdvanceFlushes(Peer& peer) {
  while (!peer.flushes.empty()) {
    Peer::FlushOp& flush = peer.flushes.front();
    if (flush.posted) return;
    if (!peer.writes.empty() && peer.writes.begin()->first < flush.barrier) return;
    flush.posted = true;
    if (peer.info.delivery == Delivery::kActiveMessage) {
      FinishFlush(peer, OkStatus());
      continue;
    }
    wire_.FlushPuts(peer.id, [this, id = peer.id](const Status& status) {
      Peer* flushed = Find(id);
      if (flushed == nullptr || flushed->state == Peer::State::kClosing) return;
      if (!status.ok()) return OnLinkFailed(id, status);
      FinishFlush(*flushed, status);
      dirty_.insert(id);
    });
  }
}

void TransportCore::FinishFlush(Peer& peer, const Status& status) {
  const Peer::FlushOp flush = std::move(peer.flushes.front());
  peer.flushes.pop_front();
  Status first = status;
  const auto end = peer.write_failures.lower_bound(flush.barrier);
  if (peer.write_failures.begin() != end) first = peer.write_failures.begin()->second;
  peer.write_failures.erase(peer.write_failures.begin(), end);
  flush.done(first);
}

void TransportCore::OnAck(Peer& peer, std::span<const std::byte> payload) {
  const auto acks = DecodeAcks(payload);
  if (!acks.ok()) return Reject(std::string(acks.status().message()), peer.id);
  for (const AckEntry& ack : *acks) {
    const auto it = peer.pieces.find(ack.sequence);
    if (it == peer.pieces.end() || it->second.acked) continue;  // a duplicate
    it->second.acked = true;
    WriteOp& write = *it->second.write;
    if (ack.verdict != PieceVerdict::kPlaced && write.status.ok()) {
      const std::string what = "transport: write of " + Range(write.remote_offset, write.local.size()) + " for lease " +
                               std::to_string(write.tag.lease_id) + " generation " +
                               std::to_string(write.tag.generation) + " refused by " + peer.info.name;
      if (ack.verdict == PieceVerdict::kOutOfRange) {
        write.status = OutOfRange(what + ": outside its arena");
      } else {
        write.status =
            FailedPrecondition(what + (ack.verdict == PieceVerdict::kRefused ? ": not accepted" : ": copy failed"));
      }
    }
    FinishPieceIfOver(peer, ack.sequence);
  }
}

}  // namespace zeroc
