#include "libzeroc/comm/fake_transport.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <limits>
#include <new>
#include <set>
#include <utility>

#include "libzeroc/base/check.h"

namespace zeroc {
namespace {

constexpr char kPrefix[] = "fake:";

}  // namespace

class FakeWire final : public Wire {
 public:
  FakeWire(FakeNetwork& network, std::string name)
      : network_(network), name_(std::move(name)), address_{kPrefix + name_} {}

  double NowSeconds() const override { return network_.now_; }
  const PeerAddress& LocalAddress() const override { return address_; }

  Status Open(PeerId peer, const PeerAddress& address) override {
    if (!address.bytes.starts_with(kPrefix)) return InvalidArgument("fake: malformed address");
    const std::string to = address.bytes.substr(sizeof kPrefix - 1);
    links_[peer].to = to;
    links_[peer].to_incarnation = network_.Incarnation(to);  // a successor of the same name is another process
    if (network_.FindNode(to) == nullptr) {
      network_.At(network_.detection_seconds_, name_, [this, peer] { Fail(peer, "no such peer"); });
    }
    return OkStatus();
  }

  Result<Delivery> ChooseDelivery(PeerId, const RemoteArena&) override { return network_.delivery_; }
  std::string Describe(PeerId) const override { return "fake network"; }

  void SendFrame(PeerId peer, const FrameHeader& header, std::span<const std::byte> payload, Done done) override {
    auto packet = std::make_shared<FakeNetwork::Packet>();
    packet->header = header;
    Launch(peer, std::move(packet), payload, std::move(done));
  }

  void Put(PeerId peer, std::span<const std::byte> local, std::uint64_t remote_offset, Done done) override {
    auto packet = std::make_shared<FakeNetwork::Packet>();
    packet->is_put = true;
    packet->header.kind = FrameKind::kPiece;
    packet->remote_offset = remote_offset;
    const std::uint64_t put = links_[peer].next_put++;
    links_[peer].puts_under_way.insert(put);
    Launch(peer, std::move(packet), local, std::move(done), put);
  }

  void FlushPuts(PeerId peer, Done done) override {
    links_[peer].flushes.emplace_back(links_[peer].next_put, std::move(done));
    FinishFlushes(links_[peer]);
  }

  void Close(PeerId peer, Done closed) override {
    auto node = links_.extract(peer);
    if (!node.empty()) {
      for (auto& [id, open] : node.mapped().open) {
        open.packet->Detach();
        open.done(Cancelled("fake: closed"));
      }
      for (const auto& [barrier, done] : node.mapped().flushes) done(Cancelled("fake: closed"));
      LeaveOtherEnd(node.mapped());
    }
    closed(OkStatus());
  }

  // The sender is dead: what it sent must not read its memory any more.
  void DetachAll() {
    for (auto& [peer, link] : links_) {
      for (auto& [id, open] : link.open) open.packet->Detach();
    }
  }

  std::vector<PeerId> LinksTo(const std::string& name) const {
    std::vector<PeerId> found;
    for (const auto& [peer, link] : links_) {
      if (link.to == name) found.push_back(peer);
    }
    return found;
  }
  void FailLinks(const std::vector<PeerId>& peers, const std::string& why) {
    for (const PeerId peer : peers) Fail(peer, why);
  }

  // From here on frames are let go of at once: the transport is being destroyed and nothing steps the network.
  void SetDraining() {
    draining_ = true;
    std::vector<Done> open_dones;
    for (auto& [peer, link] : links_) {
      for (auto& [id, open] : link.open) {
        open.packet->Detach();
        open_dones.push_back(std::move(open.done));
      }
      link.open.clear();
    }
    for (const Done& done : open_dones) done(OkStatus());
  }

 private:
  struct Outstanding {
    std::shared_ptr<FakeNetwork::Packet> packet;
    Done done;
  };
  struct Link {
    std::string to;
    std::uint64_t to_incarnation = 0;
    std::uint64_t connection = 0;  // both ends know it; 0 until a frame was sent
    std::map<std::uint64_t, Outstanding> open;
    std::uint64_t next = 0;
    std::uint64_t next_put = 0;
    std::set<std::uint64_t> puts_under_way;              // lost ones for ever
    std::deque<std::pair<std::uint64_t, Done>> flushes;  // each waits for the puts below its number
  };

  void Launch(PeerId peer, std::shared_ptr<FakeNetwork::Packet> packet, std::span<const std::byte> local, Done done,
              std::uint64_t put = 0) {
    Link& link = links_[peer];
    packet->from = name_;
    packet->to = link.to;
    packet->to_incarnation = link.to_incarnation;
    packet->local = local;
    if (!packet->is_put) link.connection = packet->header.connection;
    if (draining_) {
      packet->Detach();
      network_.Launch(
          packet, [] {}, [](bool) {});
      return done(OkStatus());
    }
    const std::uint64_t id = link.next++;
    link.open[id] = {packet, std::move(done)};
    network_.Launch(
        packet, [this, peer, id] { Sent(peer, id); },
        [this, peer, put](bool delivered) {
          if (delivered) PutLanded(peer, put);
        });
  }

  void Sent(PeerId peer, std::uint64_t id) {
    const auto it = links_.find(peer);
    if (it == links_.end()) return;
    const auto node = it->second.open.extract(id);
    if (!node.empty()) node.mapped().done(OkStatus());
  }
  void PutLanded(PeerId peer, std::uint64_t put) {
    const auto it = links_.find(peer);
    if (it == links_.end()) return;
    it->second.puts_under_way.erase(put);
    FinishFlushes(it->second);
  }

  void FinishFlushes(Link& link) {
    std::vector<Done> over;
    while (!link.flushes.empty() &&
           (link.puts_under_way.empty() || *link.puts_under_way.begin() >= link.flushes.front().first)) {
      over.push_back(std::move(link.flushes.front().second));
      link.flushes.pop_front();
    }
    for (const Done& done : over) done(OkStatus());
  }

  // What a real transport's keepalive finds when the farewell got lost.
  void LeaveOtherEnd(const Link& link) {
    if (link.connection == 0) return;
    network_.At(network_.detection_seconds_, link.to, [&network = network_, to = link.to, c = link.connection] {
      if (FakeTransport* other = network.FindNode(to)) other->wire_->FailConnection(c);
    });
  }
  void FailConnection(std::uint64_t connection) {
    for (const auto& [peer, link] : links_) {
      if (link.connection == connection) return Fail(peer, "the other end has closed the connection");
    }
  }

  void Fail(PeerId peer, const std::string& why);

  FakeNetwork& network_;
  const std::string name_;
  const PeerAddress address_;
  std::map<PeerId, Link> links_;
  bool draining_ = false;
};

void FakeWire::Fail(PeerId peer, const std::string& why) {
  FakeTransport* self = network_.FindNode(name_);
  if (self != nullptr && links_.contains(peer)) self->core().OnLinkFailed(peer, Unavailable(why));
}

// ---- network ----

FakeNetwork::FakeNetwork(std::uint64_t seed, Delivery delivery) : rng_(seed), delivery_(delivery) {}
FakeNetwork::~FakeNetwork() { ZEROC_CHECK(nodes_.empty(), nodes_.size()); }

void FakeNetwork::Packet::Detach() {
  if (!copy.empty() || local.empty()) return;
  copy.assign(local.begin(), local.end());
  local = copy;
}

Result<std::unique_ptr<FakeTransport>> FakeNetwork::Create(const TransportOptions& options,
                                                           TransportListener& listener) {
  ZEROC_RETURN_IF_ERROR(ValidateTransportOptions(options));
  if (options.name.empty() || nodes_.contains(options.name)) {
    return InvalidArgument("fake: the name '" + options.name + "' is empty or taken");
  }
  return std::unique_ptr<FakeTransport>(new FakeTransport(*this, options, listener));
}

FakeTransport* FakeNetwork::FindNode(const std::string& name) {
  const auto it = nodes_.find(name);
  return it == nodes_.end() || !it->second->alive_ ? nullptr : it->second;
}

void FakeNetwork::At(double delay_seconds, const std::string& node, std::function<void()> event) {
  events_[{now_ + delay_seconds, next_event_++}] = {node, Incarnation(node), std::move(event)};
}

std::uint64_t FakeNetwork::Incarnation(const std::string& name) {
  const FakeTransport* node = FindNode(name);
  return node == nullptr ? 0 : node->incarnation_;
}

double FakeNetwork::Delay() {
  std::uniform_real_distribution<double> chance(0, 1);
  return faults_.delay_min_seconds + chance(rng_) * (faults_.delay_max_seconds - faults_.delay_min_seconds);
}

bool FakeNetwork::Chance(double probability) {
  return probability > 0 && std::uniform_real_distribution<double>(0, 1)(rng_) < probability;
}

void FakeNetwork::Launch(const std::shared_ptr<Packet>& packet, std::function<void()> sent,
                         std::function<void(bool)> landed) {
  FakeFate fate;
  if (script_) fate = script_(packet->from, packet->to, packet->header);
  packet->from_incarnation = Incarnation(packet->from);
  const bool drop = fate.drop || Chance(faults_.drop_probability);
  const bool is_data = packet->header.kind == FrameKind::kPiece && !packet->local.empty();
  const double arrival = Delay() + fate.extra_delay_seconds;
  const std::string receiver = packet->is_put ? std::string() : packet->to;  // the network card takes puts by itself
  const auto copy = [&packet] {
    auto second = std::make_shared<Packet>(*packet);
    second->copy.assign(packet->local.begin(), packet->local.end());
    second->local = second->copy;
    return second;
  };
  std::shared_ptr<Packet> arriving = packet;
  if (is_data && (fate.corrupt || Chance(faults_.corrupt_probability))) {
    arriving = copy();
    arriving->copy[rng_() % arriving->copy.size()] ^= std::byte{1} << static_cast<int>(rng_() % 8);
  }
  if (fate.duplicate || Chance(faults_.duplicate_probability)) {
    At(arrival + Delay(), receiver, [this, second = copy()] { Land(*second); });
  }
  if (!drop) At(arrival, receiver, [this, arriving] { Land(*arriving); });
  // A put leaves its sender before it lands. A frame is let go of once it has arrived; a stalled receiver still holds
  // it, so it gets a copy.
  const double leaves = packet->is_put ? arrival * std::uniform_real_distribution<double>(0, 1)(rng_) : arrival;
  At(leaves, packet->from, [packet, sent = std::move(sent)] {
    packet->Detach();
    sent();
  });
  if (packet->is_put) At(arrival, packet->from, [drop, landed = std::move(landed)] { landed(!drop); });
}

void FakeNetwork::Land(const Packet& packet) {
  FakeTransport* to = FindNode(packet.to);
  if (to == nullptr || to->incarnation_ != packet.to_incarnation) return;
  if (packet.is_put) {
    ZEROC_CHECK(packet.remote_offset + packet.local.size() <= to->arena_.size(), packet.remote_offset);
    std::memcpy(to->arena_.data() + packet.remote_offset, packet.local.data(), packet.local.size());
  } else if (packet.header.kind == FrameKind::kPiece && Chance(faults_.rendezvous_probability)) {
    LandByRendezvous(*to, packet);
  } else {
    to->core().OnFrame(EncodeFrameHeader(packet.header), packet.local);
  }
}

void FakeNetwork::LandByRendezvous(FakeTransport& to, const Packet& packet) {
  const auto target = to.core().BeginPiece(EncodeFrameHeader(packet.header), packet.local.size());
  if (!target) return;
  const std::size_t half = packet.local.size() / 2;
  std::memcpy(target->to, packet.local.data(), half);
  std::vector<std::byte> rest(packet.local.begin() + static_cast<std::ptrdiff_t>(half), packet.local.end());
  At(Delay(), packet.to,
     [this, target, half, rest = std::move(rest), name = packet.to, from = packet.from,
      life = packet.from_incarnation] {
       FakeTransport* node = FindNode(name);
       if (Incarnation(from) != life) {
         return node->core().EndPiece(*target, Unavailable("fake: the sender died during the copy"));
       }
       std::memcpy(target->to + half, rest.data(), rest.size());
       node->core().EndPiece(*target, OkStatus());
     });
}

void FakeNetwork::RunNodes() {
  // Callbacks may create and destroy transports, so the place is kept by name.
  for (auto it = nodes_.begin(); it != nodes_.end();) {
    const std::string name = it->first;
    FakeTransport* node = it->second;
    if (node->alive_ && !node->stalled_) {
      node->RunCommands();
      if (FindNode(name) == node) node->core().Settle();
    }
    it = nodes_.upper_bound(name);
  }
}

double FakeNetwork::NextTimer() const {
  double next = std::numeric_limits<double>::infinity();
  for (const auto& [name, node] : nodes_) {
    if (node->alive_ && !node->stalled_) next = std::min(next, node->core().NextDeadlineSeconds());
  }
  return next;
}

bool FakeNetwork::Step() {
  ++steps_;
  if (const auto it = kills_.find(steps_); it != kills_.end()) {
    for (const std::string& name : it->second) Kill(name);
  }
  RunNodes();
  const auto work_left = [this] {
    return std::any_of(nodes_.begin(), nodes_.end(), [](const auto& entry) {
      return entry.second->alive_ && !entry.second->stalled_ && entry.second->HasCommands();
    });
  };
  if (work_left()) return true;
  const double timer = NextTimer();
  const bool has_event = !events_.empty();
  if (!has_event && timer == std::numeric_limits<double>::infinity()) return false;
  if (!has_event || timer < events_.begin()->first.first) {
    now_ = std::max(now_, timer);
    RunNodes();
    return true;
  }
  auto event = events_.extract(events_.begin());
  now_ = std::max(now_, event.key().first);
  const std::string& name = event.mapped().node;
  FakeTransport* node = FindNode(name);
  const bool alive = node != nullptr && node->incarnation_ == event.mapped().incarnation;
  if (alive && node->stalled_) {
    node->held_.push_back(std::move(event.mapped().run));
  } else if (alive || name.empty()) {
    event.mapped().run();
  }
  RunNodes();
  return true;
}

std::uint64_t FakeNetwork::RunUntilIdle(std::uint64_t steps_max) {
  std::uint64_t made = 0;
  while (made < steps_max && Step()) ++made;
  return made;
}

void FakeNetwork::RunFor(double seconds) {
  bool over = false;
  At(seconds, {}, [&over] { over = true; });
  while (!over && Step()) {
  }
}

void FakeNetwork::Kill(const std::string& name) {
  FakeTransport* node = FindNode(name);
  if (node == nullptr) return;
  node->wire_->DetachAll();
  node->alive_ = false;
  node->held_.clear();
  nodes_.erase(name);  // the name is free for a successor
  std::vector<std::string> others;
  for (const auto& [other, transport] : nodes_) others.push_back(other);
  for (const std::string& other : others) {
    // Only the links that exist now: a successor of the same name is not hurt.
    At(detection_seconds_, other, [this, other, failed = nodes_[other]->wire_->LinksTo(name)] {
      if (FakeTransport* survivor = FindNode(other)) survivor->wire_->FailLinks(failed, "the peer died");
    });
  }
}

void FakeNetwork::Stall(const std::string& name) {
  if (FakeTransport* node = FindNode(name)) node->stalled_ = true;
}

void FakeNetwork::Resume(const std::string& name) {
  FakeTransport* node = FindNode(name);
  if (node == nullptr || !node->stalled_) return;
  node->stalled_ = false;
  for (auto& event : std::exchange(node->held_, {})) At(0, name, std::move(event));
}

void FakeNetwork::Cut(const std::string& a, const std::string& b) {
  for (const auto& [from, to] : {std::pair(a, b), std::pair(b, a)}) {
    At(0, from, [this, from = from, to = to] {
      if (FakeTransport* node = FindNode(from)) node->wire_->FailLinks(node->wire_->LinksTo(to), "the link was cut");
    });
  }
}

// ---- transport ----

FakeTransport::FakeTransport(FakeNetwork& network, const TransportOptions& options, TransportListener& listener)
    : network_(network),
      name_(options.name),
      incarnation_(network.next_incarnation_++),
      wire_(std::make_unique<FakeWire>(network, options.name)) {
  Start(options, listener, *wire_, network.rng_());
  network.nodes_[name_] = this;
}

FakeTransport::~FakeTransport() {
  if (!alive_) return;  // a dead process calls nobody back
  wire_->SetDraining();
  stalled_ = false;
  Shutdown([] {});
  network_.nodes_.erase(name_);
}

Result<std::span<std::byte>> FakeTransport::AllocateArena(std::uint64_t bytes) {
  if (bytes == 0 || !arena_.empty()) return FailedPrecondition("fake: the arena is empty or there is one already");
  owned_arena_.reset(new (std::nothrow) Line[(bytes + sizeof(Line) - 1) / sizeof(Line)]());
  if (!owned_arena_) return ResourceExhausted("fake: no memory for an arena of " + std::to_string(bytes) + " bytes");
  const std::span<std::byte> arena(owned_arena_[0].bytes, bytes);
  ZEROC_RETURN_IF_ERROR(RegisterArena(arena));
  return arena;
}

Status FakeTransport::RegisterArena(std::span<std::byte> arena) {
  if (arena.empty() || !arena_.empty()) return FailedPrecondition("fake: the arena is empty or there is one already");
  arena_ = arena;
  core().SetArena(arena, {"fake", reinterpret_cast<std::uintptr_t>(arena.data()), arena.size()});
  return OkStatus();
}

}  // namespace zeroc
