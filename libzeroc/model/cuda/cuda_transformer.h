// A model on a GPU: weights, KV blocks and activations in device memory, every layer of a step enqueued on one stream.
// The host makes a step's tables (DeviceStep), enqueues, and waits once, for the logits.
//
// The same source runs on the emulation (kernels/cuda/host_simt), where it is tested. docs/cuda.md, docs/adr/0010.
#pragma once

#include <memory>

#include "libzeroc/base/status.h"
#include "libzeroc/checkpoint/checkpoint.h"
#include "libzeroc/compression/plan.h"
#include "libzeroc/model/transformer.h"

namespace zeroc {

// Transformer::Open on the current device. Its sequences' pools are made in its kv_memory(), and go before the model.
// kFailedPrecondition without a usable device (in the runtime's words), kResourceExhausted where its memory does not
// hold the weights, else as Transformer::Open.
//
// What Forward does not take here is kUnimplemented: sequences that attend for themselves, groups of ranks, and
// observers of projections. kInternal when the device fails, kResourceExhausted when it has no memory for a step's
// activations or tables; the sequences of that step are then worth nothing.
Result<std::unique_ptr<Transformer>> OpenCudaTransformer(std::shared_ptr<const Checkpoint> checkpoint,
                                                         std::shared_ptr<const Plan> plan);

}  // namespace zeroc
