// Embedding lookup, norms and activations.
#include <cmath>

#include "kernels/bf16.h"
#include "kernels/checks.h"
#include "kernels/reference/reference.h"

namespace zeroc::kernels::reference {

KernelStatus Embed(const EmbedArgs& args) {
  if (!IsGood(args)) return KernelStatus::kBadShape;
  for (std::int64_t r = 0; r < args.n_rows; ++r) {
    const Bf16* row = args.table + args.ids[r] * args.hidden;
    float* out = args.out + r * args.hidden;
    for (std::int64_t i = 0; i < args.hidden; ++i) {
      const float value = Bf16ToFloat(row[i]);
      out[i] = args.accumulate ? out[i] + value : value;
    }
  }
  return KernelStatus::kOk;
}

namespace {

// x and out may be the same.
void RmsNormRow(const float* x, const Bf16* gain, std::int64_t n, float eps, float* out) {
  double sum = 0.0;
  for (std::int64_t i = 0; i < n; ++i) sum += double{x[i]} * x[i];
  const auto norm = static_cast<float>(1.0 / std::sqrt(sum / static_cast<double>(n) + double{eps}));
  for (std::int64_t i = 0; i < n; ++i) out[i] = x[i] * norm * Bf16ToFloat(gain[i]);
}

}  // namespace

KernelStatus RmsNorm(const RmsNormArgs& args) {
  if (!IsGood(args)) return KernelStatus::kBadShape;
  auto* out = static_cast<float*>(args.out);
  for (std::int64_t r = 0; r < args.n_rows; ++r) {
    RmsNormRow(args.x + r * args.hidden, args.gain, args.hidden, args.eps, out + r * args.hidden);
  }
  return KernelStatus::kOk;
}

KernelStatus LayerNorm(const LayerNormArgs& args) {
  if (!IsGood(args)) return KernelStatus::kBadShape;
  for (std::int64_t r = 0; r < args.n_rows; ++r) {
    const float* x = args.x + r * args.hidden;
    float* out = static_cast<float*>(args.out) + r * args.hidden;
    const auto n = static_cast<double>(args.hidden);
    double mean = 0.0, squares = 0.0;
    for (std::int64_t i = 0; i < args.hidden; ++i) mean += x[i] / n;
    for (std::int64_t i = 0; i < args.hidden; ++i) squares += (x[i] - mean) * (x[i] - mean);
    const double norm = 1.0 / std::sqrt(squares / n + double{args.eps});
    for (std::int64_t i = 0; i < args.hidden; ++i) {
      out[i] = static_cast<float>((x[i] - mean) * norm) * Bf16ToFloat(args.gain[i]) + args.bias[i];
    }
  }
  return KernelStatus::kOk;
}

KernelStatus HeadNorm(const HeadNormArgs& args) {
  if (!IsGood(args)) return KernelStatus::kBadShape;
  for (std::int64_t r = 0; r < args.n_rows; ++r) {
    for (std::int64_t h = 0; h < args.n_heads; ++h) {
      float* head = args.x + r * args.stride + h * args.head_dim;
      RmsNormRow(head, args.gain, args.head_dim, args.eps, head);
    }
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

KernelStatus Relu(const ReluArgs& args) {
  if (!IsGood(args)) return KernelStatus::kBadShape;
  auto* out = static_cast<float*>(args.out);
  for (std::int64_t r = 0; r < args.n_rows; ++r) {
    for (std::int64_t i = 0; i < args.width; ++i) {
      const float x = args.x[r * args.stride + i];
      out[r * args.width + i] = x < 0.0f ? 0.0f : x;
    }
  }
  return KernelStatus::kOk;
}

}  // namespace zeroc::kernels::reference
