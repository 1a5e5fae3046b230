// A worker's membership in the pools of all its routers: one Registration for each address that the settings name.
//
// A name with several addresses (a headless service) stands for several routers. Names are resolved again and again: a
// new address is registered with at once, and one that its name no longer has is let go when its stream has broken, so
// a router that drains keeps its workers. A name that cannot be resolved changes nothing: a failing name server takes
// no worker out of service.
//
// Owns a thread. Thread-safe. With TLS the certificate of every router holds the name that was resolved.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "libzeroc/base/status.h"
#include "services/common/options.h"
#include "services/common/registration.h"

namespace zeroc {

// "host:port" or several of them with commas between.
Result<std::vector<HostPort>> ParseHostPorts(std::string_view text);

// The addresses of a host as "a.b.c.d:port" or "[v6]:port", sorted. Where it has addresses of both families only those
// of IPv4 count: the same router must not be registered with twice. Blocks for as long as the resolver's time-outs.
Result<std::vector<std::string>> ResolveAddresses(const HostPort& router);

struct RegistrationsOptions {
  std::vector<HostPort> routers;
  RegistrationOptions each;  // its router_address is ignored
  std::int64_t resolve_ms = 5000;
  std::function<Result<std::vector<std::string>>(const HostPort&)> resolve = ResolveAddresses;
};

class Registrations {
 public:
  // `load` is called on the thread of every registration, at the same time perhaps, and must not block.
  static std::unique_ptr<Registrations> Start(RegistrationsOptions options, const v1::WorkerInfo& info,
                                              std::function<void(v1::WorkerLoad*)> load);
  ~Registrations();  // leaves all pools

  // Routers that have accepted this worker and whose streams live.
  std::size_t n_registered() const;
  // OK when there is one; else why there is none.
  Status Ready() const;
  void SetDraining(bool draining);

 private:
  struct Impl;
  explicit Registrations(std::shared_ptr<Impl> impl);
  std::shared_ptr<Impl> impl_;
};

}  // namespace zeroc
