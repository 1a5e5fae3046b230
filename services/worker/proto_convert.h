// Between the worker RPC messages and the engine's types. Pure; any thread.
#pragma once

#include <cstdint>
#include <vector>

#include "libzeroc/engine/decode_engine.h"
#include "libzeroc/engine/sampler.h"
#include "zeroc/v1/worker.pb.h"

namespace zeroc {

// The router has filled in every field; one that is absent takes the proto's default. kInvalidArgument when a number
// does not fit the engine's type; ranges are checked by SamplingParams::Validate.
Result<SamplingParams> SamplingFromProto(const v1::SamplingParams& proto);

// Ids beyond the engine's type become -1, which the engine refuses by name.
std::vector<std::int32_t> IdsFromProto(const google::protobuf::RepeatedField<std::uint32_t>& ids);

// For tokens that were asked for with logprobs.
v1::TokenLogprobs LogprobsToProto(const SampledToken& token);

v1::FinishReason FinishToProto(FinishReason reason);

}  // namespace zeroc
