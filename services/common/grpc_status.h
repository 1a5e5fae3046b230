// zeroc::Status to grpc::Status and back; the codes carry the same numbers.
#pragma once

#include <grpcpp/support/status.h>

#include "libzeroc/base/status.h"

namespace zeroc {

grpc::Status ToGrpc(const Status& status);
// A code that gRPC does not define becomes kUnknown.
Status FromGrpc(const grpc::Status& status);

}  // namespace zeroc
