// The Hadamard rotation inside a run of coordinates: block-diagonal over power-of-two cells.
//
// A run of width w is cut greedily into the largest power-of-two cells (48 = 32 + 16), each multiplied by the
// orthonormal Sylvester-Hadamard matrix of its size, so the transform is its own inverse. Spreads outliers before
// coarse quantisation at d log2 d additions (QuaRot, arXiv 2404.00456, uses the same matrix for the same reason).
#pragma once

#include "kernels/kv_block.h"

namespace zeroc::kernels {

// In place on x [width] f32, width a multiple of 16. Any thread.
void HadamardRun(float* x, int width);

// The quantised runs of one head's coordinates [head_dim]; null leaves them as they are.
void HadamardRuns(float* x, const KvSideLayout* side);

}  // namespace zeroc::kernels
