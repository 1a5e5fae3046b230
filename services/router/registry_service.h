// The gRPC side of worker registration: zeroc.v1.Registry in front of the pool.
#pragma once

#include <chrono>
#include <memory>

#include "services/common/metrics.h"
#include "services/common/timers.h"
#include "services/router/worker_pool.h"

namespace grpc {
class Service;
}

namespace zeroc {

struct RegistryConfig {
  std::chrono::milliseconds heartbeat{1'000};
  std::chrono::milliseconds expiry{5'000};
  // A worker is taken only after the router has reached its advertised address itself.
  std::chrono::milliseconds dial_timeout{2'000};
};

// Also sweeps the pool for workers whose heartbeats have stopped. Everything given outlives the service.
class RegistryService {
 public:
  virtual ~RegistryService() = default;
  virtual grpc::Service* service() = 0;
  // Ends every worker's stream, so that the server can shut down.
  virtual void CloseAll() = 0;
};
std::unique_ptr<RegistryService> MakeRegistryService(const RegistryConfig& config, WorkerPool& pool,
                                                     WorkerDialer dialer, Metrics& metrics, Timers& timers);

}  // namespace zeroc
