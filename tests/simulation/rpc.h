// Calls between the simulated router and workers, as gRPC streams behave: one request, then events in order, then one
// end. A call ends by its worker, by Cancel, or by its worker's death, which the router learns a while later.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "libzeroc/base/status.h"
#include "libzeroc/comm/fake_transport.h"
#include "libzeroc/handoff/messages.h"

namespace zeroc::simulation {

// What Reserve grants, as v1::Lease.
struct GrantedLease {
  LeaseKey key;
  std::string layout;
  std::string decode;
  PeerAddress address;
  RemoteArena arena;
};

struct RpcEvent {
  enum class Kind : std::uint8_t { kLease, kFirstToken, kAdmitted, kToken, kFinal, kDone };
  Kind kind = Kind::kDone;
  std::int32_t token = 0;
  bool last = false;  // kFirstToken: decode is not needed
  GrantedLease lease;
};

class Call : public std::enable_shared_from_this<Call> {
 public:
  // delay: of each message, drawn anew.
  Call(FakeNetwork& network, std::string worker, std::function<double()> delay)
      : network_(network), worker_(std::move(worker)), delay_(std::move(delay)) {}

  // --- the router's end; nothing is heard after `on_done` or Cancel ---
  std::function<void(const RpcEvent&)> on_event;
  std::function<void(const Status&)> on_done;
  void Cancel();
  // The connection broke: the router hears `why`, the worker sees the call cancelled.
  void Break(const Status& why);
  bool over() const { return over_; }
  const std::string& worker() const { return worker_; }
  // Drops the handlers, which hold an attempt or a job that holds the call. Each end's go by themselves when it is
  // over.
  void ForgetAll();

  // Runs `serve` at the worker, unless it dies first.
  void Start(std::function<void()> serve);

  // --- the worker's end ---
  std::function<void()> on_cancel;
  void Send(RpcEvent event);
  void End(const Status& status);  // the first one counts
  bool ended_by_worker() const { return served_; }

 private:
  void ForgetRouter();
  void Later(std::function<void()> at_router);

  FakeNetwork& network_;
  const std::string worker_;
  const std::function<double()> delay_;
  bool over_ = false;    // at the router
  bool served_ = false;  // at the worker
  double last_arrival_ = 0;
};
using CallPtr = std::shared_ptr<Call>;

}  // namespace zeroc::simulation
