#include "libzeroc/comm/transport_communicator.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <map>
#include <string_view>
#include <utility>

#include "libzeroc/base/check.h"
#include "libzeroc/base/mutex.h"

namespace zeroc {
namespace {

constexpr std::uint16_t kPieceType = 0x5301;
constexpr std::uint16_t kAbortType = 0x5302;
constexpr std::size_t kHeaderBytes = 48;
constexpr std::size_t kPieceBytesMax = kMessageBytesMax - kHeaderBytes;
constexpr std::size_t kReasonBytesMax = 512;

// version, epoch, rank of the sender, tag, bytes of the whole message, offset of the piece (of an abort: status code);
// u64 each, little-endian.
struct Header {
  std::uint64_t version = 1, epoch = 0, from = 0, tag = 0, bytes = 0, offset = 0;
};

void Encode(const Header& header, std::byte* to) {
  for (const std::uint64_t value :
       {header.version, header.epoch, header.from, header.tag, header.bytes, header.offset}) {
    for (int i = 0; i < 8; ++i) *to++ = static_cast<std::byte>(value >> (8 * i));
  }
}

Result<Header> Decode(std::span<const std::byte> bytes) {
  if (bytes.size() < kHeaderBytes) return InvalidArgument("group message: truncated header");
  std::array<std::uint64_t, 6> values{};
  for (std::size_t i = 0; i < kHeaderBytes; ++i) {
    values[i / 8] |= std::uint64_t{std::to_integer<std::uint8_t>(bytes[i])} << (8 * (i % 8));
  }
  const Header header{values[0], values[1], values[2], values[3], values[4], values[5]};
  if (header.version != 1) return InvalidArgument("group message: version " + std::to_string(header.version));
  return header;
}

// Copies a message that lies in pieces, bit by bit.
class Gatherer {
 public:
  explicit Gatherer(const Communicator::Parts& parts) : parts_(parts) {}

  // The next to.size() bytes, which are there.
  void Take(std::span<std::byte> to) {
    while (!to.empty()) {
      const std::span<const std::byte> left = parts_[part_].subspan(offset_);
      const std::size_t n = std::min(to.size(), left.size());
      if (n > 0) std::memcpy(to.data(), left.data(), n);
      to = to.subspan(n);
      offset_ += n;
      if (n < left.size()) continue;
      ++part_;
      offset_ = 0;
    }
  }

 private:
  const Communicator::Parts& parts_;
  std::size_t part_ = 0, offset_ = 0;
};

}  // namespace

// Shared with the communicator of the latest epoch and with the transport's callbacks.
class CommPort::Impl final : public TransportListener {
 public:
  explicit Impl(const Options& options) : options_(options) {}
  ~Impl() override { transport_.reset(); }  // until then it calls this object

  Status Open(const MakeTransport& make_transport) {
    ZEROC_ASSIGN_OR_RETURN(transport_, make_transport(*this));
    return OkStatus();
  }
  PeerAddress address() const { return transport_->LocalAddress(); }

  Status Join(std::uint64_t epoch, int rank, const std::vector<CommMember>& members);
  CommOp Send(std::uint64_t epoch, int to, std::uint64_t tag, const Communicator::Parts& parts);
  CommOp Recv(std::uint64_t epoch, int from, std::uint64_t tag, Communicator::Places places);
  Status Wait(std::uint64_t epoch, CommOp op, Communicator::TimePoint deadline);
  bool Test(std::uint64_t epoch, CommOp op);
  void Abort(std::uint64_t epoch, const Status& why);
  Status Check(std::uint64_t epoch);

  // --- the transport's thread ---
  void OnPeerUp(PeerId, const PeerInfo&) override {}
  bool AcceptWrite(PeerId, const WriteTag&, std::uint64_t, std::uint64_t) override { return false; }
  void OnWriteDone(PeerId, const WriteTag&, std::uint64_t, std::uint64_t, const Status&) override {}
  void OnProtocolError(PeerId, const Status&) override {}
  Status OnMessage(PeerId peer, std::uint16_t type, std::span<const std::byte> payload) override;
  void OnPeerFailure(PeerId peer, const Status& status) override;

 private:
  struct Operation {
    int peer;
    bool done = false;
  };
  struct Receive {
    CommOp op;
    Communicator::Places places;
    std::uint64_t bytes, n_left;
  };
  // Came before anybody waited for it.
  struct Piece {
    std::uint64_t message_bytes, offset;
    std::vector<std::byte> bytes;
  };
  using Key = std::pair<int, std::uint64_t>;  // from, tag
  struct Member {
    CommMember who;
    PeerId peer = PeerId::kNone;
  };

  bool Place(const Key& key, std::uint64_t message_bytes, std::uint64_t offset, std::span<const std::byte> bytes)
      ZEROC_REQUIRES(mu_);
  void Fail(const Status& why, bool tell) ZEROC_REQUIRES(mu_);
  Status WhyOf(std::uint64_t epoch) const ZEROC_REQUIRES(mu_);
  std::string NameOf(int rank) const ZEROC_REQUIRES(mu_) {
    return "rank " + std::to_string(rank) + " (" + members_[static_cast<std::size_t>(rank)].who.name + ")";
  }

  const Options options_;
  Mutex mu_;
  CondVar changed_;
  std::uint64_t epoch_ ZEROC_GUARDED_BY(mu_) = 0;
  int rank_ ZEROC_GUARDED_BY(mu_) = 0;
  std::vector<Member> members_ ZEROC_GUARDED_BY(mu_);
  Status why_ ZEROC_GUARDED_BY(mu_);  // of the epoch
  std::uint64_t last_epoch_ ZEROC_GUARDED_BY(mu_) = 0;
  Status last_why_ ZEROC_GUARDED_BY(mu_);  // of the one before: a rank may hear of its end late
  std::map<CommOp, Operation> ops_ ZEROC_GUARDED_BY(mu_);
  std::map<Key, Receive> receives_ ZEROC_GUARDED_BY(mu_);
  std::map<Key, std::vector<Piece>> unexpected_ ZEROC_GUARDED_BY(mu_);
  std::uint64_t unexpected_bytes_ ZEROC_GUARDED_BY(mu_) = 0;
  std::uint64_t n_ops_ ZEROC_GUARDED_BY(mu_) = 0;
  std::map<std::string, PeerId> connections_ ZEROC_GUARDED_BY(mu_);  // by address; they outlive epochs
  std::unique_ptr<Transport> transport_;
};

// --- calls of the rank's thread ---

Status CommPort::Impl::Join(std::uint64_t epoch, int rank, const std::vector<CommMember>& members) {
  MutexLock lock(mu_);
  ZEROC_CHECK(rank >= 0 && rank < std::ssize(members) && std::ssize(members) <= Communicator::kRanksMax, rank,
              members.size());
  if (epoch == 0 || epoch == epoch_) return InvalidArgument("a group's epoch is new and not 0");
  last_epoch_ = epoch_;
  last_why_ = why_.ok() ? Cancelled("the group was formed anew") : why_;
  epoch_ = epoch;
  rank_ = rank;
  why_ = OkStatus();
  members_.clear();
  receives_.clear();
  unexpected_.clear();
  unexpected_bytes_ = 0;
  for (int i = 0; i < std::ssize(members); ++i) {
    const CommMember& member = members[static_cast<std::size_t>(i)];
    members_.push_back({member, PeerId::kNone});
    if (i == rank) continue;
    const auto known = connections_.find(member.address.bytes);
    if (known != connections_.end()) {
      members_.back().peer = known->second;
      continue;
    }
    ZEROC_ASSIGN_OR_RETURN(members_.back().peer,
                           transport_->Connect(member.address, {}, member.name.substr(0, kPeerNameBytesMax)));
    connections_[member.address.bytes] = members_.back().peer;
  }
  return OkStatus();
}

CommOp CommPort::Impl::Send(std::uint64_t epoch, int to, std::uint64_t tag, const Communicator::Parts& parts) {
  CommOp op;
  PeerId peer;
  Header header{1, epoch, 0, tag, CountBytes(parts), 0};
  {
    MutexLock lock(mu_);
    op = CommOp{++n_ops_};
    const bool usable = epoch == epoch_ && why_.ok();
    ops_[op] = {to, usable};  // the transport copies what it is given
    if (!usable) return op;
    ZEROC_CHECK(to >= 0 && to < std::ssize(members_) && to != rank_, to);
    peer = members_[static_cast<std::size_t>(to)].peer;
    header.from = static_cast<std::uint64_t>(rank_);
  }
  Gatherer gatherer(parts);
  do {
    const auto n = static_cast<std::size_t>(std::min<std::uint64_t>(header.bytes - header.offset, kPieceBytesMax));
    std::vector<std::byte> piece(kHeaderBytes + n);
    Encode(header, piece.data());
    gatherer.Take(std::span(piece).subspan(kHeaderBytes));
    transport_->Send(peer, kPieceType, piece, [](const Status&) {});  // OnPeerFailure tells of failures
    header.offset += n;
  } while (header.offset < header.bytes);
  return op;
}

CommOp CommPort::Impl::Recv(std::uint64_t epoch, int from, std::uint64_t tag, Communicator::Places places) {
  MutexLock lock(mu_);
  const CommOp op{++n_ops_};
  ops_[op] = {from, false};
  if (epoch != epoch_ || !why_.ok()) return op;
  ZEROC_CHECK(from >= 0 && from < std::ssize(members_) && from != rank_, from);
  const std::uint64_t n_bytes = CountBytes(places);
  const auto [receive, is_new] = receives_.try_emplace({from, tag}, Receive{op, std::move(places), n_bytes, n_bytes});
  ZEROC_CHECK(is_new, from, tag);  // a tag is used once
  const auto early = unexpected_.find({from, tag});
  if (early == unexpected_.end()) return op;
  const std::vector<Piece> pieces = std::move(early->second);
  unexpected_.erase(early);
  for (const Piece& piece : pieces) {
    unexpected_bytes_ -= piece.bytes.size();
    if (!Place({from, tag}, piece.message_bytes, piece.offset, piece.bytes)) break;
  }
  return op;
}

Status CommPort::Impl::Wait(std::uint64_t epoch, CommOp op, Communicator::TimePoint deadline) {
  MutexLock lock(mu_);
  const auto found = ops_.find(op);
  ZEROC_CHECK(found != ops_.end(), static_cast<std::uint64_t>(op));
  Operation& operation = found->second;
  while (!operation.done && epoch == epoch_ && why_.ok()) {
    if (changed_.WaitUntil(mu_, deadline)) continue;
    if (operation.done || epoch != epoch_ || !why_.ok()) continue;
    Fail(DeadlineExceeded(NameOf(rank_) + " waited in vain for " + NameOf(operation.peer)), /*tell=*/true);
  }
  const Status status = operation.done ? OkStatus() : WhyOf(epoch);
  ops_.erase(found);
  return status;
}

bool CommPort::Impl::Test(std::uint64_t epoch, CommOp op) {
  MutexLock lock(mu_);
  const auto found = ops_.find(op);
  ZEROC_CHECK(found != ops_.end(), static_cast<std::uint64_t>(op));
  return found->second.done || !WhyOf(epoch).ok();
}

Status CommPort::Impl::Check(std::uint64_t epoch) {
  MutexLock lock(mu_);
  return WhyOf(epoch);
}

void CommPort::Impl::Abort(std::uint64_t epoch, const Status& why) {
  MutexLock lock(mu_);
  if (epoch == epoch_) Fail(why, /*tell=*/true);
}

// --- with the mutex ---

Status CommPort::Impl::WhyOf(std::uint64_t epoch) const {
  return epoch == epoch_ ? why_ : epoch == last_epoch_ ? last_why_ : Cancelled("the group was formed anew");
}

// False when the message cannot be what the receive waits for; then the group has ended.
bool CommPort::Impl::Place(const Key& key, std::uint64_t message_bytes, std::uint64_t offset,
                           std::span<const std::byte> bytes) {
  const auto found = receives_.find(key);
  if (found == receives_.end()) return false;  // done: bytes that nobody waits for
  Receive& receive = found->second;
  if (message_bytes != receive.bytes || bytes.size() > receive.n_left) {
    Fail(Internal(NameOf(key.first) + " sent " + std::to_string(message_bytes) + " bytes, " + NameOf(rank_) +
                  " waits for " + std::to_string(receive.bytes)),
         /*tell=*/true);
    return false;
  }
  Scatter(bytes, offset, receive.places);
  receive.n_left -= bytes.size();
  if (receive.n_left > 0) return true;
  const auto op = ops_.find(receive.op);
  if (op != ops_.end()) op->second.done = true;
  receives_.erase(found);
  changed_.NotifyAll();
  return true;
}

// Memory that others gave is forgotten: it is touched under the mutex alone.
void CommPort::Impl::Fail(const Status& why, bool tell) {
  if (!why_.ok() || epoch_ == 0) return;
  why_ = why;
  receives_.clear();
  unexpected_.clear();
  unexpected_bytes_ = 0;
  changed_.NotifyAll();
  if (!tell) return;
  const std::string_view text = why.message().substr(0, kReasonBytesMax);
  std::vector<std::byte> message(kHeaderBytes + text.size());
  Encode({1, epoch_, static_cast<std::uint64_t>(rank_), 0, text.size(), static_cast<std::uint64_t>(why.code())},
         message.data());
  if (!text.empty()) std::memcpy(message.data() + kHeaderBytes, text.data(), text.size());
  for (std::size_t i = 0; i < members_.size(); ++i) {
    if (static_cast<int>(i) == rank_) continue;
    transport_->Send(members_[i].peer, kAbortType, message, [](const Status&) {});
  }
}

// --- the transport's thread ---

Status CommPort::Impl::OnMessage(PeerId, std::uint16_t type, std::span<const std::byte> payload) {
  if (type != kPieceType && type != kAbortType) return InvalidArgument("group message: type " + std::to_string(type));
  ZEROC_ASSIGN_OR_RETURN(const Header header, Decode(payload));
  const std::span<const std::byte> body = payload.subspan(kHeaderBytes);
  MutexLock lock(mu_);
  if (header.epoch != epoch_ || !why_.ok()) return OkStatus();  // late
  if (header.from >= members_.size() || header.from == static_cast<std::uint64_t>(rank_)) {
    return InvalidArgument("group message: from rank " + std::to_string(header.from));
  }
  const int from = static_cast<int>(header.from);
  if (type == kAbortType) {
    const bool known = header.offset > 0 && header.offset <= static_cast<std::uint64_t>(StatusCode::kUnauthenticated);
    const std::string text(reinterpret_cast<const char*>(body.data()), std::min(body.size(), kReasonBytesMax));
    Fail(Status(known ? static_cast<StatusCode>(header.offset) : StatusCode::kUnknown, text), /*tell=*/false);
    return OkStatus();
  }
  if (header.offset > header.bytes || body.size() > header.bytes - header.offset) {
    return InvalidArgument("group message: a piece leaves its message");
  }
  const Key key{from, header.tag};
  if (receives_.contains(key)) {
    Place(key, header.bytes, header.offset, body);
    return OkStatus();
  }
  unexpected_bytes_ += body.size();
  if (unexpected_bytes_ > options_.unexpected_bytes_max) {
    Fail(ResourceExhausted(NameOf(rank_) + " got more than " + std::to_string(options_.unexpected_bytes_max) +
                           " bytes that it does not wait for"),
         /*tell=*/true);
    return OkStatus();
  }
  unexpected_[key].push_back({header.bytes, header.offset, {body.begin(), body.end()}});
  return OkStatus();
}

void CommPort::Impl::OnPeerFailure(PeerId peer, const Status& status) {
  MutexLock lock(mu_);
  std::erase_if(connections_, [&](const auto& entry) { return entry.second == peer; });
  for (std::size_t i = 0; i < members_.size(); ++i) {
    if (members_[i].peer != peer) continue;
    const StatusCode code = status.code() == StatusCode::kCancelled ? StatusCode::kUnavailable : status.code();
    Fail(Status(code, NameOf(static_cast<int>(i)) + " is lost: " + std::string(status.message())), /*tell=*/true);
  }
}

namespace {

class TransportCommunicator final : public Communicator {
 public:
  TransportCommunicator(CommPort::Impl& port, std::uint64_t epoch, int rank, int size)
      : Communicator(rank, size), port_(port), epoch_(epoch) {}
  ~TransportCommunicator() override { port_.Abort(epoch_, Cancelled("rank " + std::to_string(rank()) + " has left")); }

  CommOp Recv(int from, std::uint64_t tag, Places places) override {
    return port_.Recv(epoch_, from, tag, std::move(places));
  }
  Status Wait(CommOp op, TimePoint deadline) override { return port_.Wait(epoch_, op, deadline); }
  bool Test(CommOp op) override { return port_.Test(epoch_, op); }
  void Abort(const Status& why) override { port_.Abort(epoch_, why); }
  Status Check() override { return port_.Check(epoch_); }

 protected:
  CommOp PostSend(int to, std::uint64_t tag, Parts parts) override { return port_.Send(epoch_, to, tag, parts); }

 private:
  CommPort::Impl& port_;
  const std::uint64_t epoch_;
};

}  // namespace

CommPort::CommPort(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
CommPort::~CommPort() = default;

Result<std::unique_ptr<CommPort>> CommPort::Open(const MakeTransport& make_transport, const Options& options) {
  auto impl = std::make_unique<Impl>(options);
  ZEROC_RETURN_IF_ERROR(impl->Open(make_transport));
  return std::unique_ptr<CommPort>(new CommPort(std::move(impl)));
}

PeerAddress CommPort::address() const { return impl_->address(); }

Result<std::unique_ptr<Communicator>> CommPort::Join(std::uint64_t epoch, int rank,
                                                     const std::vector<CommMember>& members) {
  ZEROC_RETURN_IF_ERROR(impl_->Join(epoch, rank, members));
  return std::unique_ptr<Communicator>(
      std::make_unique<TransportCommunicator>(*impl_, epoch, rank, static_cast<int>(members.size())));
}

}  // namespace zeroc
