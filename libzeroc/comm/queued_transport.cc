#include "libzeroc/comm/queued_transport.h"

#include <utility>
#include <vector>

namespace zeroc {
namespace {

Transport::Callback OrNothing(Transport::Callback done) {
  if (done) return done;
  return [](const Status&) {};
}

Status CheckRange(const char* what, std::int64_t value, std::int64_t min, std::int64_t max) {
  if (value >= min && value <= max) return OkStatus();
  return InvalidArgument(std::string("transport options: ") + what + " = " + std::to_string(value) + " is not in " +
                         std::to_string(min) + ".." + std::to_string(max));
}

}  // namespace

Status ValidateTransportOptions(const TransportOptions& options) {
  if (options.name.size() > kPeerNameBytesMax) {
    return InvalidArgument("transport options: name has " + std::to_string(options.name.size()) + " bytes, at most " +
                           std::to_string(kPeerNameBytesMax));
  }
  ZEROC_RETURN_IF_ERROR(CheckRange("piece_bytes", static_cast<std::int64_t>(options.piece_bytes), 4 << 10, 64 << 20));
  ZEROC_RETURN_IF_ERROR(CheckRange("pieces_in_flight_max", options.pieces_in_flight_max, 1, 1024));
  ZEROC_RETURN_IF_ERROR(CheckRange("connect_timeout_ms", options.connect_timeout_ms, 1, 600'000));
  ZEROC_RETURN_IF_ERROR(CheckRange("close_timeout_ms", options.close_timeout_ms, 1, 60'000));
  return CheckRange("peers_max", options.peers_max, 1, 65'536);
}

void QueuedTransport::Start(const TransportOptions& options, TransportListener& listener, Wire& wire,
                            std::uint64_t seed) {
  core_ = std::make_unique<TransportCore>(options, listener, wire, seed);
}

void QueuedTransport::Post(Command command) {
  {
    MutexLock lock(queue_mu_);
    commands_.push_back(std::move(command));
  }
  Wake();
}

bool QueuedTransport::HasCommands() const {
  MutexLock lock(queue_mu_);
  return !commands_.empty();
}

bool QueuedTransport::RunCommands() {
  std::deque<Command> commands;
  {
    MutexLock lock(queue_mu_);
    commands.swap(commands_);
  }
  for (const Command& command : commands) command(*core_);
  return !commands.empty();
}

void QueuedTransport::Shutdown(const std::function<void()>& progress) {
  RunCommands();
  core_->CloseAll();
  core_->Settle();
  while (!core_->idle()) {  // bounded by close_timeout_ms
    progress();
    core_->Settle();
  }
  // Callbacks of the closing may have posted more; they are answered (kNotFound), unless somebody retries for ever.
  for (int round = 0; round < 1000 && RunCommands(); ++round) core_->Settle();
}

Result<PeerId> QueuedTransport::Connect(const PeerAddress& address, const RemoteArena& arena, std::string name) {
  const auto too_big = [&name](const char* what, std::size_t bytes, std::size_t max) {
    return InvalidArgument("transport: connect to " + name + ": " + what + " has " + std::to_string(bytes) +
                           " bytes, must be 1 to " + std::to_string(max));
  };
  if (name.size() > kPeerNameBytesMax) {
    name.resize(64);
    return too_big("name", name.size(), kPeerNameBytesMax);
  }
  if (address.bytes.empty() || address.bytes.size() > kPeerAddressBytesMax) {
    return too_big("address", address.bytes.size(), kPeerAddressBytesMax);
  }
  if (arena.bytes > 0 && (arena.key.empty() || arena.key.size() > kArenaKeyBytesMax)) {
    return too_big("arena key", arena.key.size(), kArenaKeyBytesMax);
  }
  const PeerId id = core_->NewPeerId();
  core_->Announce(id, name);
  Post([id, address, arena, name = std::move(name)](TransportCore& core) { core.Connect(id, address, arena, name); });
  return id;
}

void QueuedTransport::Write(PeerId peer, const WriteTag& tag, std::span<const std::byte> local,
                            std::uint64_t remote_offset, Callback done) {
  Post([=, done = OrNothing(std::move(done))](TransportCore& core) {
    core.Write(peer, tag, local, remote_offset, done);
  });
}

void QueuedTransport::Flush(PeerId peer, Callback done) {
  Post([peer, done = OrNothing(std::move(done))](TransportCore& core) { core.Flush(peer, done); });
}

void QueuedTransport::Send(PeerId peer, std::uint16_t type, std::span<const std::byte> payload, Callback done) {
  // An oversized message is refused by the core; its bytes need not be copied for that.
  std::vector<std::byte> copy(payload.size() > kMessageBytesMax ? kMessageBytesMax + 1 : payload.size());
  if (payload.size() <= kMessageBytesMax) copy.assign(payload.begin(), payload.end());
  Post([peer, type, copy = std::move(copy), done = OrNothing(std::move(done))](TransportCore& core) {
    core.Send(peer, type, copy, done);
  });
}

void QueuedTransport::Close(PeerId peer, Callback done) {
  Post([peer, done = OrNothing(std::move(done))](TransportCore& core) { core.Close(peer, done); });
}

}  // namespace zeroc
