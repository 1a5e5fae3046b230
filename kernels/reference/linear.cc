#include <algorithm>

#include "kernels/bf16.h"
#include "kernels/checks.h"
#include "kernels/reference/reference.h"

namespace zeroc::kernels::reference {
namespace {

constexpr int kSums = 16;             // independent partial sums: the compiler can vectorise without reordering
constexpr std::int64_t kPanel = 512;  // weights converted at a time; reused by every row

float Dot(const float* x, const float* w, std::int64_t n) {
  float sums[kSums] = {};
  std::int64_t i = 0;
  for (; i + kSums <= n; i += kSums) {
    for (int j = 0; j < kSums; ++j) sums[j] += x[i + j] * w[i + j];
  }
  for (; i < n; ++i) sums[i % kSums] += x[i] * w[i];
  float total = 0.0f;
  for (float sum : sums) total += sum;
  return total;
}

}  // namespace

KernelStatus Linear(const LinearArgs& args) {
  if (!IsGood(args)) return KernelStatus::kBadShape;
  const auto* x = static_cast<const float*>(args.x);
  float w[kPanel];
  for (std::int64_t o = args.out_begin; o < args.out_end; ++o) {
    for (std::int64_t r = 0; r < args.n_rows; ++r) {
      float& y = args.y[r * args.y_stride + o];
      y = (args.accumulate ? y : 0.0f) + (args.bias != nullptr ? args.bias[o] : 0.0f);
    }
    for (std::int64_t begin = 0; begin < args.k; begin += kPanel) {
      const std::int64_t n = std::min(kPanel, args.k - begin);
      for (std::int64_t i = 0; i < n; ++i) w[i] = Bf16ToFloat(args.w[o * args.k + begin + i]);
      for (std::int64_t r = 0; r < args.n_rows; ++r) {
        args.y[r * args.y_stride + o] += Dot(x + r * args.k + begin, w, n);
      }
    }
  }
  return KernelStatus::kOk;
}

}  // namespace zeroc::kernels::reference
