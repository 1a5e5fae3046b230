// Reads the values of a weight tensor as float32, whatever of BF16, F16 and F32 the file keeps. Any thread.
#pragma once

#include <cstdint>

#include "libzeroc/checkpoint/safetensors.h"

namespace zeroc {

// The dtypes that ReadFloats takes.
bool IsWeightType(DType dtype);

// IEEE binary16 to float32, exact.
float HalfToFloat(std::uint16_t bits);

// Values [first, first + n) in row-major order; the range is inside the tensor and IsWeightType holds (both checked).
// The data need not be aligned.
void ReadFloats(const TensorView& tensor, std::int64_t first, std::int64_t n, float* out);

}  // namespace zeroc
