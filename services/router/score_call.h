// The gRPC call Score: one request whose whole answer is forced, collected into one message.
#pragma once

#include <grpcpp/grpcpp.h>

#include <memory>

#include "services/router/router.h"
#include "zeroc/v1/inference.pb.h"

namespace zeroc {

// The reactor deletes itself when the call is over, and lets go of `pass`; `response` is gRPC's and lives as long as
// the call.
grpc::ServerUnaryReactor* StartScore(Router& router, grpc::CallbackServerContext* context,
                                     const v1::ScoreRequest& request, v1::ScoreResponse* response,
                                     std::shared_ptr<const void> pass);

}  // namespace zeroc
