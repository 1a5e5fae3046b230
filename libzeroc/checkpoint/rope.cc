#include "libzeroc/checkpoint/rope.h"

#include <cmath>
#include <numbers>

namespace zeroc {
namespace {

double Scaled(double frequency, const RopeScaling& scaling) {
  if (scaling.kind == RopeScaling::Kind::kNone) return frequency;
  const double slow = frequency / scaling.factor;
  if (scaling.kind == RopeScaling::Kind::kLinear) return slow;
  const double wavelength = 2.0 * std::numbers::pi / frequency;  // tokens per turn
  const double turns = static_cast<double>(scaling.original_max_positions) / wavelength;
  if (turns < scaling.low_freq_factor) return slow;
  if (turns > scaling.high_freq_factor) return frequency;
  const double blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor);
  return (1.0 - blend) * slow + blend * frequency;
}

}  // namespace

std::vector<double> RopeInverseFrequencies(const ModelConfig& config) {
  std::vector<double> out(static_cast<std::size_t>(config.head_dim / 2));
  for (std::size_t i = 0; i < out.size(); ++i) {
    const double exponent = -2.0 * static_cast<double>(i) / static_cast<double>(config.head_dim);
    out[i] = Scaled(std::pow(config.rope_theta, exponent), config.rope_scaling);
  }
  return out;
}

}  // namespace zeroc
