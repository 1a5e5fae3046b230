#include "kernels/hadamard.h"

#include <bit>
#include <cmath>

namespace zeroc::kernels {

void HadamardRun(float* x, int width) {
  while (width > 0) {
    const int cell = static_cast<int>(std::bit_floor(static_cast<unsigned>(width)));
    for (int half = 1; half < cell; half *= 2) {
      for (int start = 0; start < cell; start += 2 * half) {
        for (int i = start; i < start + half; ++i) {
          const float a = x[i];
          const float b = x[i + half];
          x[i] = a + b;
          x[i + half] = a - b;
        }
      }
    }
    const float norm = 1.0f / std::sqrt(static_cast<float>(cell));
    for (int i = 0; i < cell; ++i) x[i] *= norm;
    x += cell;
    width -= cell;
  }
}

void HadamardRuns(float* x, const KvSideLayout* side) {
  if (side == nullptr) return;
  for (int r = 0; r < side->n_runs; ++r) {
    if (IsQuantised(side->runs[r].bits)) HadamardRun(x + side->first_coord[r], side->runs[r].width);
  }
}

}  // namespace zeroc::kernels
