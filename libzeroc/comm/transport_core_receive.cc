// The receiving half of TransportCore: foreign frames in, answers out. Nothing here trusts a byte of them.
#include <algorithm>
#include <cstring>

#include "libzeroc/comm/transport_core.h"
#include "libzeroc/comm/transport_core_peer.h"

namespace zeroc {
namespace {

constexpr std::size_t kReasonBytesMax = 1024;

std::span<const std::byte> AsBytes(const std::string& text) { return std::as_bytes(std::span(text)); }

std::string PrintableReason(std::span<const std::byte> payload) {
  const std::size_t size = std::min(payload.size(), kReasonBytesMax);
  std::string reason(reinterpret_cast<const char*>(payload.data()), size);
  for (char& c : reason) {
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) c = '?';
  }
  return reason;
}

}  // namespace

// ---- sending control frames and messages ----

FrameHeader TransportCore::MakeHeader(const Peer& peer, FrameKind kind) const {
  FrameHeader header;
  header.kind = kind;
  header.from_connector = !peer.info.incoming;
  header.connection = peer.connection;
  return header;
}

void TransportCore::SendControl(Peer& peer, const FrameHeader& header, std::vector<std::byte> payload,
                                Wire::Done then) {
  auto data = std::make_shared<std::vector<std::byte>>(std::move(payload));
  wire_.SendFrame(peer.id, header, *data, [this, data, id = peer.id, then = std::move(then)](const Status& status) {
    if (then) return then(status);
    if (!status.ok()) OnLinkFailed(id, status);
  });
}

void TransportCore::SendMessageFrame(Peer& peer, std::uint16_t type, std::vector<std::byte> payload, Callback done) {
  FrameHeader header = MakeHeader(peer, FrameKind::kMessage);
  header.type = type;
  const std::uint64_t send = peer.next_send++;
  peer.sends[send] = std::move(done);
  auto data = std::make_shared<std::vector<std::byte>>(std::move(payload));
  wire_.SendFrame(peer.id, header, *data, [this, data, send, id = peer.id](const Status& status) {
    Peer* sender = Find(id);
    if (sender == nullptr || sender->state == Peer::State::kClosing) return;  // FinishPeer answers
    if (!status.ok()) return OnLinkFailed(id, status);
    const auto it = sender->sends.find(send);
    const Callback callback = std::move(it->second);
    sender->sends.erase(it);
    probe_.CountMessageSent();
    callback(OkStatus());
  });
}

void TransportCore::SendAcks(Peer& peer) {
  for (std::size_t at = 0; at < peer.acks.size(); at += kAckEntriesMax) {
    const std::size_t count = std::min(kAckEntriesMax, peer.acks.size() - at);
    SendControl(peer, MakeHeader(peer, FrameKind::kAck), EncodeAcks(std::span(peer.acks).subspan(at, count)));
    if (peer.state != Peer::State::kUp) break;
  }
  peer.acks.clear();
}

// ---- frames ----

void TransportCore::Reject(const std::string& why, PeerId peer) {
  probe_.CountFrameDropped();
  listener_.OnProtocolError(peer, InvalidArgument(why));
}

void TransportCore::OnFrame(std::span<const std::byte> header_bytes, std::span<const std::byte> payload) {
  const auto header = DecodeFrameHeader(header_bytes);
  if (!header.ok()) return Reject(std::string(header.status().message()), PeerId::kNone);
  if (header->kind == FrameKind::kHello) return OnHello(*header, payload);
  if (header->kind == FrameKind::kPiece) {
    const auto target = BeginPiece(header_bytes, payload.size());
    if (!target) return;
    std::memcpy(target->to, payload.data(), payload.size());
    return EndPiece(*target, OkStatus());
  }
  Peer* peer = FindConnection(*header);
  if (peer == nullptr || !peer->usable()) return probe_.CountFrameDropped();  // late, of a connection that is gone
  // Frames may overtake the answer to our hello; a message proves as well that the other side is there.
  if (peer->state == Peer::State::kConnecting && header->kind == FrameKind::kMessage) {
    GoUp(*peer);
    if (peer->state != Peer::State::kUp) return;
  }
  if (header->kind == FrameKind::kMessage) return OnMessage(*peer, *header, payload);
  OnControl(*peer, *header, payload);
}

void TransportCore::OnControl(Peer& peer, const FrameHeader& header, std::span<const std::byte> payload) {
  switch (header.kind) {
    case FrameKind::kHelloAck:
      if (peer.state == Peer::State::kConnecting) GoUp(peer);
      return;
    case FrameKind::kRefuse:
      if (peer.state == Peer::State::kConnecting) {
        BeginClose(peer, FailedPrecondition("transport: " + peer.info.name + " refuses: " + PrintableReason(payload)));
      }
      return;
    case FrameKind::kAck:
      return OnAck(peer, payload);
    case FrameKind::kPing: {
      FrameHeader pong = MakeHeader(peer, FrameKind::kPong);
      pong.sequence = header.sequence;
      return SendControl(peer, pong, {});
    }
    case FrameKind::kPong:
      return OnPong(peer, header);
    case FrameKind::kBye:
      return BeginClose(peer, Cancelled("transport: " + peer.info.name + ": closed by the peer"));
    case FrameKind::kHello:
    case FrameKind::kMessage:
    case FrameKind::kPiece:
      return;  // OnFrame has them
  }
}

void TransportCore::OnHello(const FrameHeader& header, std::span<const std::byte> payload) {
  auto hello = DecodeHello(payload);
  if (!hello.ok() || !header.from_connector) {
    return Reject(hello.ok() ? "transport hello: wrong direction" : std::string(hello.status().message()),
                  PeerId::kNone);
  }
  if (Peer* known = FindConnection(header); known != nullptr) {  // a repeated hello gets the same answer
    if (known->usable()) SendControl(*known, MakeHeader(*known, FrameKind::kHelloAck), {});
    return;
  }
  if (peers_.size() >= static_cast<std::size_t>(options_.peers_max)) {
    return Reject(
        "transport hello of " + hello->name + ": peers_max = " + std::to_string(options_.peers_max) + " reached",
        PeerId::kNone);
  }
  const RemoteArena arena = LocalArena();
  Peer& peer = AddPeer(NewPeerId(), header.connection, /*incoming=*/true, hello->name);
  if (const Status status = wire_.Open(peer.id, hello->address); !status.ok()) {
    Reject("transport hello of " + hello->name + ": " + std::string(status.message()), PeerId::kNone);
    peer.state = Peer::State::kClosing;
    peer.local_close = true;  // it never was up, so nobody is told
    closed_.push_back(peer.id);
    return;
  }
  if (header.bytes != 0 && (header.offset != arena.base || header.bytes != arena.bytes)) {
    peer.local_close = true;
    const std::string reason = "the arena of " + std::to_string(header.bytes) +
                               " bytes is not what this worker has now (" + std::to_string(arena.bytes) +
                               " bytes): outdated key";
    const auto bytes = AsBytes(reason);
    return Leave(peer, FailedPrecondition(reason), MakeHeader(peer, FrameKind::kRefuse), {bytes.begin(), bytes.end()});
  }
  SendControl(peer, MakeHeader(peer, FrameKind::kHelloAck), {});
  if (peer.state == Peer::State::kConnecting) GoUp(peer);
}

void TransportCore::GoUp(Peer& peer) {
  if (peer.arena.bytes > 0) {
    const auto delivery = wire_.ChooseDelivery(peer.id, peer.arena);
    if (!delivery.ok()) {
      return BeginClose(peer, delivery.status().WithContext("transport: arena of " + peer.info.name));
    }
    peer.info.delivery = *delivery;
  }
  peer.info.description = (peer.info.delivery == Delivery::kPut ? "put over " : "am over ") + wire_.Describe(peer.id);
  peer.state = Peer::State::kUp;
  peer.deadline = kNever;
  Publish(peer);
  listener_.OnPeerUp(peer.id, peer.info);
  for (Peer::SendOp& send : peer.queued_sends) {
    SendMessageFrame(peer, send.type, std::move(send.payload), std::move(send.done));
  }
  peer.queued_sends.clear();
  dirty_.insert(peer.id);
  if (peer.info.incoming || peer.state != Peer::State::kUp) return;
  FrameHeader ping = MakeHeader(peer, FrameKind::kPing);
  ping.sequence = 1;
  peer.ping = {ping.sequence, wire_.NowSeconds()};
  SendControl(peer, ping, {});
}

void TransportCore::OnPong(Peer& peer, const FrameHeader& header) {
  if (peer.ping.first == 0 || header.sequence != peer.ping.first) return;
  const double seconds = wire_.NowSeconds() - peer.ping.second;
  peer.ping.first = 0;
  peer.stats.round_trip_seconds = seconds;
  Publish(peer);
}

void TransportCore::OnMessage(Peer& peer, const FrameHeader& header, std::span<const std::byte> payload) {
  if (payload.size() > kMessageBytesMax) {
    return Reject("transport message of " + std::to_string(payload.size()) + " bytes, at most " +
                      std::to_string(kMessageBytesMax),
                  peer.id);
  }
  probe_.CountMessageReceived();
  const Status status = listener_.OnMessage(peer.id, header.type, payload);
  if (status.ok()) return;
  probe_.CountMessageRejected();
  listener_.OnProtocolError(
      peer.id, status.WithContext("message of type " + std::to_string(header.type) + " from " + peer.info.name));
}

// ---- pieces ----

std::optional<TransportCore::PieceTarget> TransportCore::BeginPiece(std::span<const std::byte> header_bytes,
                                                                    std::uint64_t payload_bytes) {
  const auto header = DecodeFrameHeader(header_bytes);
  if (!header.ok() || header->kind != FrameKind::kPiece) {
    Reject(header.ok() ? "transport frame: a bulk payload on a frame that is no piece"
                       : std::string(header.status().message()),
           PeerId::kNone);
    return std::nullopt;
  }
  Peer* peer = FindConnection(*header);
  if (peer == nullptr || peer->state != Peer::State::kUp || !peer->info.incoming) {
    probe_.CountPieceRejected();
    probe_.CountFrameDropped();
    return std::nullopt;
  }
  PieceVerdict verdict = PieceVerdict::kPlaced;
  if (header->bytes != payload_bytes || payload_bytes == 0 || !InRange(header->offset, payload_bytes, arena_.size())) {
    verdict = PieceVerdict::kOutOfRange;
    listener_.OnProtocolError(peer->id,
                              InvalidArgument("transport piece " + Range(header->offset, header->bytes) + " with " +
                                              std::to_string(payload_bytes) + " bytes from " + peer->info.name +
                                              ": outside the arena of " + std::to_string(arena_.size()) + " bytes"));
  } else if (!listener_.AcceptWrite(peer->id, header->tag, header->offset, payload_bytes)) {
    verdict = PieceVerdict::kRefused;
  }
  if (verdict == PieceVerdict::kPlaced) return PieceTarget{peer->id, *header, arena_.data() + header->offset};
  probe_.CountPieceRejected();
  peer->acks.push_back({header->sequence, verdict});
  dirty_.insert(peer->id);
  return std::nullopt;
}

void TransportCore::EndPiece(const PieceTarget& target, const Status& status) {
  const FrameHeader& header = target.header;
  if (status.ok()) probe_.CountPieceReceived(header.bytes);
  listener_.OnWriteDone(target.peer, header.tag, header.offset, header.bytes, status);
  Peer* peer = Find(target.peer);
  if (peer == nullptr || peer->state != Peer::State::kUp) return;
  peer->acks.push_back({header.sequence, status.ok() ? PieceVerdict::kPlaced : PieceVerdict::kFailed});
  dirty_.insert(target.peer);
}

}  // namespace zeroc
