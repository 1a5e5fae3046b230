// Between the worker RPC messages and the engine's types. Pure; any thread.
#pragma once

#include "libzeroc/engine/decode_engine.h"
#include "libzeroc/engine/sampler.h"
#include "zeroc/v1/worker.pb.h"

namespace zeroc {

// The router has filled in every field; one that is absent takes the proto's default. kInvalidArgument when a number
// does not fit the engine's type; ranges are checked by SamplingParams::Validate.
Result<SamplingParams> SamplingFromProto(const v1::SamplingParams& proto);

// For tokens that were asked for with logprobs.
v1::TokenLogprobs LogprobsToProto(const SampledToken& token);

v1::FinishReason FinishToProto(FinishReason reason);

}  // namespace zeroc
