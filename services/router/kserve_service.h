// The second gRPC front: inference.GRPCInferenceService (Open Inference Protocol, with Triton's stream) over the
// router.
#pragma once

#include <cstddef>
#include <memory>

#include "services/common/access.h"
#include "services/router/router.h"

namespace grpc {
class Service;
}

namespace zeroc {

// As MakeInferenceService. ServerLive, ServerReady and ModelReady are probes and need no API key.
std::unique_ptr<grpc::Service> MakeKserveService(Router& router, std::size_t queued_bytes_max,
                                                 AccessControl* access = nullptr);

}  // namespace zeroc
