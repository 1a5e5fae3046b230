// A gRPC server with what every ZeroC service has: grpc.health.v1, reflection, keepalive, message limits.
//
// Start, SetServing and Shutdown may be called from any thread. The services must outlive the server.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "libzeroc/base/status.h"
#include "services/common/security.h"

namespace grpc {
class Service;
class Server;
class Channel;
}  // namespace grpc

namespace zeroc {

struct GrpcLimits {
  // A prompt of 1 million token ids is about 5 MB; the block table of such a request about as much.
  std::int64_t message_bytes_max = 32 << 20;
  std::int64_t keepalive_ms = 10'000;          // ping an idle peer this often ..
  std::int64_t keepalive_timeout_ms = 10'000;  // .. and give it up after this long
  std::int64_t streams_max = 1024;             // calls of one connection at a time; more wait at the client
  std::int64_t metadata_bytes_max = 16 << 10;  // of one call
};

class GrpcServer {
 public:
  // address: host:port, port 0 takes a free one. kUnavailable naming the address when it cannot be bound (port in use).
  // Health answers NOT_SERVING until SetServing(true).
  static Result<std::unique_ptr<GrpcServer>> Start(const std::string& address, const GrpcLimits& limits,
                                                   const std::vector<grpc::Service*>& services,
                                                   const GrpcSecurity& security = {});
  ~GrpcServer();  // Shutdown at once

  int port() const { return port_; }
  void SetServing(bool serving);
  // Refuses new calls, lets running ones end for up to `grace`, cancels the rest, and returns when none is left.
  void Shutdown(std::chrono::milliseconds grace);

 private:
  GrpcServer() = default;

  std::unique_ptr<grpc::Server> server_;
  int port_ = 0;
};

// A channel with our limits and keepalive that shares its connection with no other channel, reconnects within a second,
// and never goes through a proxy.
std::shared_ptr<grpc::Channel> MakeGrpcChannel(const std::string& address, const GrpcLimits& limits,
                                               const GrpcSecurity& security = {});

}  // namespace zeroc
