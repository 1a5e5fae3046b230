// FakeNetwork and FakeTransport: the real transport protocol over a scripted network with a virtual clock, for
// simulation tests. One thread, no sleeping; the same seed and the same calls give the same run.
//
// Callbacks run inside FakeNetwork::Step (or a transport's destructor). The network must outlive its transports.
// What it can do to the traffic, besides the faults below: kill a node, stall it (SIGSTOP) and resume it, cut a link.
// Bytes on their way stay on their way: a piece or a put that was sent before its sender died or closed still lands,
// late; that is the case that leases and quarantine exist for.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "libzeroc/base/status.h"
#include "libzeroc/comm/frame.h"
#include "libzeroc/comm/queued_transport.h"
#include "libzeroc/comm/transport.h"

namespace zeroc {

class FakeTransport;
class FakeWire;

// Applied to each frame and each put that is sent. A random delay inside [min, max] reorders.
struct FakeFaults {
  double delay_min_seconds = 10e-6;
  double delay_max_seconds = 10e-6;
  double drop_probability = 0;       // lost for ever, as when its sender died right after: nothing is sent again
  double duplicate_probability = 0;  // delivered a second time later; harsher than any real transport
  double corrupt_probability = 0;    // one bit of a piece or a put flips; messages and control frames stay whole
  // A piece is accepted when it arrives and its second half is copied a delay later, as UCX does by rendezvous. A
  // sender that died meanwhile leaves it half written.
  double rendezvous_probability = 0;
};

// What happens to one frame; chosen by a script that looks at it.
struct FakeFate {
  bool drop = false;
  bool duplicate = false;
  bool corrupt = false;
  double extra_delay_seconds = 0;
};

class FakeNetwork {
 public:
  // Called for every frame on sending; `from` and `to` are names of transports. A put comes as a kPiece without a
  // connection. Empty: only FakeFaults act.
  using Script = std::function<FakeFate(const std::string& from, const std::string& to, const FrameHeader& header)>;

  explicit FakeNetwork(std::uint64_t seed, Delivery delivery = Delivery::kActiveMessage);
  ~FakeNetwork();

  void set_faults(const FakeFaults& faults) { faults_ = faults; }
  void set_script(Script script) { script_ = std::move(script); }
  // Of killed nodes, and of a link whose other end has closed though its farewell was lost; default 1 s.
  void set_failure_detection_seconds(double seconds) { detection_seconds_ = seconds; }

  // `options.name` names the node and must be unique among the living. kInvalidArgument.
  Result<std::unique_ptr<FakeTransport>> Create(const TransportOptions& options, TransportListener& listener);

  // Does the next thing that is due: commands posted since, then the earliest event, advancing the clock to it. False
  // when nothing will ever happen again without a new call.
  bool Step();
  // Steps until nothing is due, or `steps_max`. Returns the steps made.
  std::uint64_t RunUntilIdle(std::uint64_t steps_max = 1'000'000);
  // Everything due until now + seconds; the clock ends there.
  void RunFor(double seconds);

  // The test's own work on the same clock, run inside Step. With a name it belongs to that node: held while the node is
  // stalled, forgotten when it dies.
  void At(double delay_seconds, const std::string& node, std::function<void()> event);

  double now_seconds() const { return now_; }
  std::uint64_t steps() const { return steps_; }

  // The node is gone at once: it computes nothing more and calls nothing back; peers notice after the detection time.
  // Its transport object may be destroyed at any time later, silently.
  void Kill(const std::string& name);
  void KillAtStep(std::uint64_t step, std::string name) { kills_[step].push_back(std::move(name)); }
  // The node neither computes nor reads; what it sent is on its way and one-sided puts into its memory land.
  void Stall(const std::string& name);
  void Resume(const std::string& name);
  // Both ends see their links to the other fail.
  void Cut(const std::string& a, const std::string& b);

 private:
  friend class FakeTransport;
  friend class FakeWire;

  // A frame or a put on its way. `local` is the sender's memory until it lets go of it (Detach).
  struct Packet {
    std::string from, to;
    FrameHeader header;
    std::uint64_t from_incarnation = 0, to_incarnation = 0;
    bool is_put = false;
    std::uint64_t remote_offset = 0;
    std::span<const std::byte> local;
    std::vector<std::byte> copy;
    void Detach();
  };

  double Delay();
  bool Chance(double probability);
  // `sent`: the local bytes may be reused. `landed`: of puts, at the sender, once they have arrived or were lost.
  void Launch(const std::shared_ptr<Packet>& packet, std::function<void()> sent, std::function<void(bool)> landed);
  void Land(const Packet& packet);
  void LandByRendezvous(FakeTransport& to, const Packet& packet);
  void RunNodes();
  double NextTimer() const;
  FakeTransport* FindNode(const std::string& name);
  std::uint64_t Incarnation(const std::string& name);  // 0: no such node

  std::mt19937_64 rng_;
  const Delivery delivery_;
  FakeFaults faults_;
  Script script_;
  double detection_seconds_ = 1.0;
  double now_ = 0;
  std::uint64_t steps_ = 0;
  std::uint64_t next_event_ = 0;
  std::uint64_t next_incarnation_ = 1;
  struct Event {
    std::string node;               // held while that node is stalled; empty: the network's own
    std::uint64_t incarnation = 0;  // an event dies with its node, a successor of the same name does not inherit it
    std::function<void()> run;
  };
  std::map<std::pair<double, std::uint64_t>, Event> events_;
  std::map<std::string, FakeTransport*> nodes_;
  std::map<std::uint64_t, std::vector<std::string>> kills_;
};

class FakeTransport final : public QueuedTransport {
 public:
  ~FakeTransport() override;

  Result<std::span<std::byte>> AllocateArena(std::uint64_t bytes) override;
  Status RegisterArena(std::span<std::byte> arena) override;
  PeerAddress LocalAddress() const override { return {"fake:" + name_}; }
  const std::string& name() const { return name_; }

 private:
  friend class FakeNetwork;
  friend class FakeWire;
  FakeTransport(FakeNetwork& network, const TransportOptions& options, TransportListener& listener);
  void Wake() override {}

  FakeNetwork& network_;
  const std::string name_;
  const std::uint64_t incarnation_;
  std::unique_ptr<FakeWire> wire_;
  struct alignas(64) Line {
    std::byte bytes[64];
  };
  std::unique_ptr<Line[]> owned_arena_;  // aligned as KV blocks are
  std::span<std::byte> arena_;
  bool alive_ = true;
  bool stalled_ = false;
  std::vector<std::function<void()>> held_;  // events that came while stalled
};

}  // namespace zeroc
