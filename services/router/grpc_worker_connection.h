// WorkerConnection over gRPC.
#pragma once

#include <memory>
#include <string>

#include "services/common/grpc_server.h"
#include "services/router/worker_connection.h"

namespace zeroc {

// Never null; connects lazily, so an unreachable address shows in the first call.
std::shared_ptr<WorkerConnection> DialWorker(const std::string& address, const GrpcLimits& limits,
                                             const GrpcSecurity& security = {});

}  // namespace zeroc
