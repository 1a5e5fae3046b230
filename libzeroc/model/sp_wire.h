// Rows of queries and attention outputs as ranks send them to each other: as activations are (float32 or bf16), or as
// 8-bit integers under one scale for each row. Pure functions; any thread.
#pragma once

#include <cstddef>
#include <cstdint>

#include "libzeroc/model/sp_scheme.h"

namespace zeroc {

// QueryRowBytes(scheme, d, act_bytes) bytes each.
void EncodeSpRow(SpScheme scheme, int act_bytes, const float* row, int d, std::byte* to);
void DecodeSpRow(SpScheme scheme, int act_bytes, const std::byte* from, int d, float* row);

}  // namespace zeroc
