// Embedding lookup, norms, activations and the merge of attention parts.
#include <cmath>

#include "kernels/bf16.h"
#include "kernels/checks.h"
#include "kernels/cpu/cpu.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/rows.cc"
// clang-format off
#include "hwy/foreach_target.h"
#include "kernels/cpu/simd-inl.h"
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace zeroc::kernels::cpu::HWY_NAMESPACE {

void EmbedRows(const EmbedArgs& args) {
  const auto n = static_cast<std::size_t>(args.hidden);
  for (std::int64_t r = 0; r < args.n_rows; ++r) {
    const Bf16* row = args.table + args.ids[r] * args.hidden;
    float* out = args.out + r * args.hidden;
    std::size_t i = 0;
    if (args.accumulate) {
      for (; i + kLanes <= n; i += kLanes) {
        hn::StoreU(hn::Add(hn::LoadU(DF(), out + i), LoadBf16(row + i)), DF(), out + i);
      }
    } else {
      for (; i + kLanes <= n; i += kLanes) hn::StoreU(LoadBf16(row + i), DF(), out + i);
    }
    for (; i < n; ++i) out[i] = args.accumulate ? out[i] + Bf16ToFloat(row[i]) : Bf16ToFloat(row[i]);
  }
}

HWY_INLINE float SumOf(const float* x, std::size_t n) {
  const DF df;
  VF sum0 = hn::Zero(df), sum1 = sum0;
  std::size_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    sum0 = hn::Add(sum0, hn::LoadU(df, x + i));
    sum1 = hn::Add(sum1, hn::LoadU(df, x + i + kLanes));
  }
  float sum = Sum(hn::Add(sum0, sum1));
  for (; i < n; ++i) sum += x[i];
  return sum;
}

// sum (x - mean)^2.
HWY_INLINE float SumOfSquares(const float* x, std::size_t n, float mean) {
  const DF df;
  const VF means = hn::Set(df, mean);
  // Four sums: the add's latency is four cycles.
  VF sum0 = hn::Zero(df), sum1 = sum0, sum2 = sum0, sum3 = sum0;
  std::size_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    const VF x0 = hn::Sub(hn::LoadU(df, x + i), means), x1 = hn::Sub(hn::LoadU(df, x + i + kLanes), means);
    const VF x2 = hn::Sub(hn::LoadU(df, x + i + 2 * kLanes), means);
    const VF x3 = hn::Sub(hn::LoadU(df, x + i + 3 * kLanes), means);
    sum0 = hn::MulAdd(x0, x0, sum0);
    sum1 = hn::MulAdd(x1, x1, sum1);
    sum2 = hn::MulAdd(x2, x2, sum2);
    sum3 = hn::MulAdd(x3, x3, sum3);
  }
  float sum = Sum(hn::Add(hn::Add(sum0, sum1), hn::Add(sum2, sum3)));
  for (; i < n; ++i) sum += (x[i] - mean) * (x[i] - mean);
  return sum;
}

HWY_INLINE float RmsScale(const float* x, std::size_t n, float eps) {
  return 1.0f / sqrtf(SumOfSquares(x, n, 0.0f) / static_cast<float>(n) + eps);
}

void RmsNormRow(const float* x, const Bf16* gain, std::size_t n, float eps, Bf16* out) {
  const DF df;
  const float norm = RmsScale(x, n, eps);
  const VF norms = hn::Set(df, norm);
  std::size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    StoreBf16(hn::Mul(hn::Mul(hn::LoadU(df, x + i), norms), LoadBf16(gain + i)), out + i);
  }
  for (; i < n; ++i) out[i] = FloatToBf16(x[i] * norm * Bf16ToFloat(gain[i]));
}

void RmsNormRows(const RmsNormArgs& args) {
  auto* out = static_cast<Bf16*>(args.out);
  for (std::int64_t r = 0; r < args.n_rows; ++r) {
    RmsNormRow(args.x + r * args.hidden, args.gain, static_cast<std::size_t>(args.hidden), args.eps,
               out + r * args.hidden);
  }
}

void LayerNormRow(const float* x, const Bf16* gain, const float* bias, std::size_t n, float eps, Bf16* out) {
  const DF df;
  const float mean = SumOf(x, n) / static_cast<float>(n);
  const float norm = 1.0f / sqrtf(SumOfSquares(x, n, mean) / static_cast<float>(n) + eps);
  const VF means = hn::Set(df, mean), norms = hn::Set(df, norm);
  std::size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const VF centred = hn::Mul(hn::Sub(hn::LoadU(df, x + i), means), norms);
    StoreBf16(hn::MulAdd(centred, LoadBf16(gain + i), hn::LoadU(df, bias + i)), out + i);
  }
  for (; i < n; ++i) out[i] = FloatToBf16((x[i] - mean) * norm * Bf16ToFloat(gain[i]) + bias[i]);
}

void LayerNormRows(const LayerNormArgs& args) {
  auto* out = static_cast<Bf16*>(args.out);
  for (std::int64_t r = 0; r < args.n_rows; ++r) {
    LayerNormRow(args.x + r * args.hidden, args.gain, args.bias, static_cast<std::size_t>(args.hidden), args.eps,
                 out + r * args.hidden);
  }
}

void HeadNormRows(const HeadNormArgs& args) {
  const DF df;
  const auto n = static_cast<std::size_t>(args.head_dim);
  for (std::int64_t r = 0; r < args.n_rows; ++r) {
    for (std::int64_t h = 0; h < args.n_heads; ++h) {
      float* x = args.x + r * args.stride + h * args.head_dim;
      const float norm = RmsScale(x, n, args.eps);
      std::size_t i = 0;
      for (; i + kLanes <= n; i += kLanes) {
        hn::StoreU(hn::Mul(hn::Mul(hn::LoadU(df, x + i), hn::Set(df, norm)), LoadBf16(args.gain + i)), df, x + i);
      }
      for (; i < n; ++i) x[i] = x[i] * norm * Bf16ToFloat(args.gain[i]);
    }
  }
}

// silu(g) = g / (1 + e^-g); for g < 0 as g e^g / (1 + e^g), so that the exponential never overflows.
HWY_INLINE VF Silu(VF g) {
  const DF df;
  const VF e = ExpOfNegative(hn::Neg(hn::Abs(g)));
  const VF top = hn::IfThenElse(hn::Lt(g, hn::Zero(df)), hn::Mul(g, e), g);
  return hn::Div(top, hn::Add(hn::Set(df, 1.0f), e));
}

void SwiGluRows(const SwiGluArgs& args) {
  const DF df;
  const auto n = static_cast<std::size_t>(args.width);
  for (std::int64_t r = 0; r < args.n_rows; ++r) {
    const float* gate = args.gate + r * args.stride;
    const float* up = args.up + r * args.stride;
    Bf16* out = static_cast<Bf16*>(args.out) + r * args.width;
    std::size_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      StoreBf16(hn::Mul(Silu(hn::LoadU(df, gate + i)), hn::LoadU(df, up + i)), out + i);
    }
    for (; i < n; ++i) {
      out[i] = FloatToBf16(hn::GetLane(Silu(hn::Set(df, gate[i]))) * up[i]);
    }
  }
}

void ReluRows(const ReluArgs& args) {
  const DF df;
  const auto n = static_cast<std::size_t>(args.width);
  for (std::int64_t r = 0; r < args.n_rows; ++r) {
    const float* x = args.x + r * args.stride;
    Bf16* out = static_cast<Bf16*>(args.out) + r * args.width;
    std::size_t i = 0;
    // A comparison, since Max may drop a NaN.
    for (; i + kLanes <= n; i += kLanes) {
      const VF v = hn::LoadU(df, x + i);
      StoreBf16(hn::IfThenElse(hn::Lt(v, hn::Zero(df)), hn::Zero(df), v), out + i);
    }
    for (; i < n; ++i) out[i] = FloatToBf16(x[i] < 0.0f ? 0.0f : x[i]);
  }
}

void MergeRow(const AttentionMergeArgs& args, std::int64_t r, Bf16* dst) {
  const DF df;
  const auto d = static_cast<std::size_t>(args.head_dim);
  constexpr float kNone = -HUGE_VALF;
  float top = kNone;
  for (int p = 0; p < args.n_parts; ++p) top = args.row_max[p][r] > top ? args.row_max[p][r] : top;
  VF sums[kMaxHeadDim / kLanes];
  for (std::size_t i = 0; i < d / kLanes; ++i) sums[i] = hn::Zero(df);
  float total = 0.0f;
  for (int p = 0; p < args.n_parts; ++p) {
    // A row that saw nothing in a part weighs nothing. A NaN sum must come through, whatever the maximum says.
    if (args.row_max[p][r] == kNone && args.row_sum[p][r] == 0.0f) continue;
    const float weight = ExpOfNegative(args.row_max[p][r] - top);
    const float* part = args.out[p] + r * args.head_dim;
    total += weight * args.row_sum[p][r];
    for (std::size_t i = 0; i < d / kLanes; ++i) {
      sums[i] = hn::MulAdd(hn::Set(df, weight), hn::LoadU(df, part + i * kLanes), sums[i]);
    }
  }
  const VF norm = hn::Set(df, total == 0.0f ? 0.0f : 1.0f / total);
  for (std::size_t i = 0; i < d / kLanes; ++i) StoreBf16(hn::Mul(sums[i], norm), dst + i * kLanes);
}

void MergeRows(const AttentionMergeArgs& args) {
  for (std::int64_t r = 0; r < args.n_rows; ++r) {
    const std::int64_t head = std::int64_t{args.kv_head} * args.group + r % args.group;
    MergeRow(args, r, static_cast<Bf16*>(args.dst) + r / args.group * args.dst_stride + head * args.head_dim);
  }
}

const char* TargetName() { return hwy::TargetName(HWY_TARGET); }

}  // namespace zeroc::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace zeroc::kernels::cpu {

HWY_EXPORT(EmbedRows);
HWY_EXPORT(RmsNormRows);
HWY_EXPORT(LayerNormRows);
HWY_EXPORT(HeadNormRows);
HWY_EXPORT(SwiGluRows);
HWY_EXPORT(ReluRows);
HWY_EXPORT(MergeRows);
HWY_EXPORT(TargetName);

KernelStatus Embed(const EmbedArgs& args) {
  if (!IsGood(args)) return KernelStatus::kBadShape;
  HWY_DYNAMIC_DISPATCH(EmbedRows)(args);
  return KernelStatus::kOk;
}

KernelStatus RmsNorm(const RmsNormArgs& args) {
  if (!IsGood(args)) return KernelStatus::kBadShape;
  HWY_DYNAMIC_DISPATCH(RmsNormRows)(args);
  return KernelStatus::kOk;
}

KernelStatus LayerNorm(const LayerNormArgs& args) {
  if (!IsGood(args)) return KernelStatus::kBadShape;
  HWY_DYNAMIC_DISPATCH(LayerNormRows)(args);
  return KernelStatus::kOk;
}

KernelStatus HeadNorm(const HeadNormArgs& args) {
  if (!IsGood(args)) return KernelStatus::kBadShape;
  HWY_DYNAMIC_DISPATCH(HeadNormRows)(args);
  return KernelStatus::kOk;
}

KernelStatus SwiGlu(const SwiGluArgs& args) {
  if (!IsGood(args)) return KernelStatus::kBadShape;
  HWY_DYNAMIC_DISPATCH(SwiGluRows)(args);
  return KernelStatus::kOk;
}

KernelStatus Relu(const ReluArgs& args) {
  if (!IsGood(args)) return KernelStatus::kBadShape;
  HWY_DYNAMIC_DISPATCH(ReluRows)(args);
  return KernelStatus::kOk;
}

KernelStatus AttentionMerge(const AttentionMergeArgs& args) {
  if (!IsGood(args)) return KernelStatus::kBadShape;
  HWY_DYNAMIC_DISPATCH(MergeRows)(args);
  return KernelStatus::kOk;
}

const char* IsaName() { return HWY_DYNAMIC_DISPATCH(TargetName)(); }

}  // namespace zeroc::kernels::cpu
#endif
