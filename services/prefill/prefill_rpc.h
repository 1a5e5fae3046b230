// The prefill worker's gRPC service over its core.
#pragma once

#include <memory>

#include "services/prefill/prefill_core.h"
#include "services/worker/worker.h"

namespace zeroc {

std::unique_ptr<WorkerService> MakePrefillService(std::unique_ptr<PrefillCore> core);

}  // namespace zeroc
