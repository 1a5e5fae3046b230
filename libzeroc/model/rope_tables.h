// cos and sin of every row of a step, for kernels::RopeRows. Nothing for models without RoPE.
// Not thread-safe: filled once per step, then read from any thread.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "kernels/ops.h"
#include "libzeroc/checkpoint/rope.h"

namespace zeroc {

class RopeTables {
 public:
  void Open(const ModelConfig& config) {
    if (config.has_rope()) inv_freq_ = RopeInverseFrequencies(config);
  }

  // Room for a step's rows; it only grows.
  void Resize(std::int64_t n_rows) {
    const std::size_t n = static_cast<std::size_t>(n_rows) * inv_freq_.size();
    if (cos_.size() < n) cos_.resize(n);
    if (sin_.size() < n) sin_.resize(n);
  }

  // Rows [begin, end) hold consecutive positions from first_pos on. Disjoint rows may be filled at the same time.
  void Fill(std::int64_t begin, std::int64_t end, int first_pos) {
    std::size_t at = static_cast<std::size_t>(begin) * inv_freq_.size();
    for (std::int64_t row = begin; row < end; ++row) {
      const double pos = static_cast<double>(first_pos + (row - begin));
      for (const double frequency : inv_freq_) {
        cos_[at] = static_cast<float>(std::cos(pos * frequency));
        sin_[at++] = static_cast<float>(std::sin(pos * frequency));
      }
    }
  }

  // From one row on.
  kernels::RopeRows At(std::int64_t row) const {
    if (inv_freq_.empty()) return {};
    const std::size_t at = static_cast<std::size_t>(row) * inv_freq_.size();
    return {cos_.data() + at, sin_.data() + at};
  }

 private:
  std::vector<double> inv_freq_;  // [head_dim / 2]
  std::vector<float> cos_, sin_;  // [rows, head_dim / 2]
};

}  // namespace zeroc
