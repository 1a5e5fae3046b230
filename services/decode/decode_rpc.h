// The decode worker's gRPC service over its core.
#pragma once

#include <memory>

#include "services/decode/decode_core.h"
#include "services/worker/worker.h"

namespace zeroc {

std::unique_ptr<WorkerService> MakeDecodeService(std::unique_ptr<DecodeCore> core);

}  // namespace zeroc
