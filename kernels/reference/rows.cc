// Embedding lookup, RMS norm and SwiGLU.
#include <cmath>

#include "kernels/bf16.h"
#include "kernels/checks.h"
#include "kernels/reference/reference.h"

namespace zeroc::kernels::reference {

KernelStatus Embed(const EmbedArgs& args) {
  if (!IsGood(args)) return KernelStatus::kBadShape;
  for (std::int64_t r = 0; r < args.n_rows; ++r) {
    const Bf16* row = args.table + args.ids[r] * args.hidden;
    for (std::int64_t i = 0; i < args.hidden; ++i) args.out[r * args.hidden + i] = Bf16ToFloat(row[i]);
  }
  return KernelStatus::kOk;
}

KernelStatus RmsNorm(const RmsNormArgs& args) {
  if (!IsGood(args)) return KernelStatus::kBadShape;
  auto* out = static_cast<float*>(args.out);
  for (std::int64_t r = 0; r < args.n_rows; ++r) {
    const float* x = args.x + r * args.hidden;
    double sum = 0.0;
    for (std::int64_t i = 0; i < args.hidden; ++i) sum += double{x[i]} * x[i];
    const auto norm = static_cast<float>(1.0 / std::sqrt(sum / static_cast<double>(args.hidden) + double{args.eps}));
    for (std::int64_t i = 0; i < args.hidden; ++i) out[r * args.hidden + i] = x[i] * norm * Bf16ToFloat(args.gain[i]);
  }
  return KernelStatus::kOk;
}

KernelStatus SwiGlu(const SwiGluArgs& args) {
  if (!IsGood(args)) return KernelStatus::kBadShape;
  auto* out = static_cast<float*>(args.out);
  for (std::int64_t r = 0; r < args.n_rows; ++r) {
    const float* gate = args.gate + r * args.stride;
    const float* up = args.up + r * args.stride;
    for (std::int64_t i = 0; i < args.width; ++i) {
      out[r * args.width + i] = gate[i] / (1.0f + std::exp(-gate[i])) * up[i];
    }
  }
  return KernelStatus::kOk;
}

}  // namespace zeroc::kernels::reference
