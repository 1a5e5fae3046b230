// Rotary position embedding frequencies of a model (Su et al., arXiv 2104.09864), with the stretched variants.
// Pure function, thread-safe.
#pragma once

#include <vector>

#include "libzeroc/checkpoint/model_config.h"

namespace zeroc {

// [head_dim / 2], radians per token, computed in double and rounded once:
//   plain    f_i = theta^(-2 i / head_dim)
//   linear   f_i / factor
//   llama3   f_i where the wavelength 2 pi / f_i is below original_max / high_freq_factor, f_i / factor where it is
//            above original_max / low_freq_factor, and in between linear in original_max / wavelength
// Which two coordinates share frequency i (half-split in Hugging Face checkpoints: i and i + head_dim / 2) is the
// caller's convention. The config must be valid.
std::vector<double> RopeInverseFrequencies(const ModelConfig& config);

}  // namespace zeroc
