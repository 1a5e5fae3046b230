// What the plan file's reader, its writer and its fuzz test share. docs/plan_format.md is the text of the format.
// Pure functions, any thread.
#pragma once

#include <string>
#include <string_view>

#include "libzeroc/base/status.h"
#include "libzeroc/checkpoint/safetensors.h"

namespace zeroc::internal {

inline constexpr const char* kPlanVersionKey = "zeroc_plan_version";
inline constexpr const char* kPlanTextKey = "zeroc_plan";
inline constexpr const char* kPlanHashKey = "zeroc_plan_xxh3";

// The value of kPlanHashKey for this text and these tensors, 32 hex digits. kInvalidArgument unless the tensors are the
// six of the format, all F32; their shapes are not looked at.
Result<std::string> PlanContentHash(std::string_view text, const TensorMap& tensors);

}  // namespace zeroc::internal
