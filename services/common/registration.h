// A worker's membership in the router's pool: one Register stream, heartbeats as often as the router asks for them,
// reconnects for ever with bounded back-off.
//
// Owns one thread. Thread-safe. A worker serves without it (tests, hand-run), the router just does not know it.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "libzeroc/base/status.h"
#include "services/common/security.h"

namespace zeroc {

namespace v1 {
class WorkerInfo;
class WorkerLoad;
}  // namespace v1

struct RegistrationOptions {
  std::string router_address;  // host:port of the router's gRPC
  GrpcSecurity security;
  std::int64_t heartbeat_ms = 1000;    // until the router's directive says otherwise
  std::int64_t backoff_ms_max = 5000;  // between attempts: 100 ms, doubled up to this
};

class Registration {
 public:
  // `load` is called on the registration's thread for every heartbeat and must not block.
  static std::unique_ptr<Registration> Start(RegistrationOptions options, const v1::WorkerInfo& info,
                                             std::function<void(v1::WorkerLoad*)> load);
  ~Registration();  // leaves the pool

  // The router has accepted this worker and the stream lives.
  bool registered() const;
  // Why not: the last refusal or connection error; OK while registered.
  Status last_error() const;
  // Sends a heartbeat now; after SetDraining(true) every heartbeat says so and the router gives no new work.
  void SetDraining(bool draining);

 private:
  struct Impl;
  explicit Registration(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace zeroc
