// What the two kinds of workers have in common at the edge: settings, start, readiness, registration, drain.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "libzeroc/base/status.h"
#include "libzeroc/comm/transport.h"
#include "services/common/metrics.h"
#include "services/common/options.h"
#include "services/common/security.h"
#include "services/worker/worker_model.h"

namespace grpc {
class Service;
}

namespace zeroc {

namespace v1 {
class WorkerLoad;
}

struct WorkerOptions {
  std::string model;
  std::string plan;
  std::string backend = "cpu";
  std::string grpc_listen = "127.0.0.1:0";
  std::string http_listen = "127.0.0.1:0";
  std::string router;
  std::string name;
  std::string advertise;
  std::string log_level = "info";
  std::string transport_tls = "auto";
  std::string transport_net_devices = "auto";
  std::int64_t kv_memory_mib = 1024;
  std::int64_t threads = 0;
  std::int64_t router_resolve_ms = 5000;
  std::int64_t drain_delay_ms = 200;
  bool prefix_cache = true;
  double prefix_cache_share = 1.0;
  std::int64_t drain_timeout_ms = 10'000;
  SecurityOptions security;
};

// The KV transport of a worker; made by the service, which is its listener.
using TransportFactory = std::function<Result<std::unique_ptr<Transport>>(TransportListener&)>;

// One worker's service behind its RPC edge. Any thread.
class WorkerService {
 public:
  virtual ~WorkerService() = default;
  virtual grpc::Service* service() = 0;
  virtual void FillLoad(v1::WorkerLoad* load) = 0;  // never blocks
  virtual void UpdateGauges(Metrics& metrics) = 0;  // before every scrape
  virtual std::string Describe() const = 0;         // transport and memory, for the start log
  virtual std::uint64_t kv_bytes_total() const = 0;
  virtual std::size_t in_flight() const = 0;  // requests that are not over on this worker
  virtual void StopAccepting() = 0;           // new requests are refused with kUnavailable
  virtual void CancelAll(const Status& why) = 0;
};

enum class WorkerKind { kPrefill, kDecode };

struct WorkerParts {
  WorkerModel& model;
  Metrics& metrics;
  const WorkerOptions& options;
  TransportFactory transport;
};
using MakeService = std::function<Result<std::unique_ptr<WorkerService>>(const WorkerParts&)>;

// main() of a worker: parses flags (add_options may add the kind's own, check_usage what ranges cannot say), opens
// everything (with --backend cuda the model by open_cuda), serves until SIGTERM or SIGINT, drains. Exit code: 0, 1 for
// a failure, 2 for bad usage. Nothing is announced before everything works.
int WorkerMain(int argc, char** argv, WorkerKind kind, WorkerOptions* options,
               const std::function<void(OptionSet*)>& add_options, const std::function<Status()>& check_usage,
               const MakeService& make_service, const OpenDevice& open_cuda);

}  // namespace zeroc
