// The gRPC front: zeroc.v1.Inference over the router.
#pragma once

#include <memory>

#include "services/common/access.h"
#include "services/router/router.h"

namespace grpc {
class Service;
}

namespace zeroc {

// The router outlives the service; the service outlives its server. A client that is more than `queued_bytes_max`
// behind its stream is cut off with CANCELLED.
std::unique_ptr<grpc::Service> MakeInferenceService(Router& router, std::size_t queued_bytes_max,
                                                    AccessControl* access = nullptr);

}  // namespace zeroc
