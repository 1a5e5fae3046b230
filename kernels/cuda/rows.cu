// Embedding lookup, norms and activations: one block for each row (or head), memory-bound.
#include "kernels/checks.h"
#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/numbers.h"

namespace zeroc::kernels::cuda {
namespace {

constexpr int kRowThreads = 256;
constexpr int kWarps = kRowThreads / 32;

// Sum over the block's threads, for all of them. Uses kWarps floats of shared memory.
ZEROC_DEVICE float BlockSum(float x, float* shared) {
  for (int mask = 16; mask > 0; mask /= 2) x += ShuffleXor(x, mask);
  Sync();  // an earlier sum may still be read
  if (ThreadIdx() % 32 == 0) shared[ThreadIdx() / 32] = x;
  Sync();
  float sum = 0.0f;
  for (int warp = 0; warp < kWarps; ++warp) sum += shared[warp];
  return sum;
}

ZEROC_DEVICE float SumOfSquares(const float* x, std::int64_t n, float mean, float* shared) {
  float sum = 0.0f;
  for (std::int64_t i = ThreadIdx(); i < n; i += kRowThreads) sum += (x[i] - mean) * (x[i] - mean);
  return BlockSum(sum, shared);
}

ZEROC_KERNEL(kRowThreads) EmbedKernel(EmbedArgs args) {
  const std::int64_t row = BlockIdx();
  const Bf16* from = args.table + args.ids[row] * args.hidden;
  float* out = args.out + row * args.hidden;
  for (std::int64_t i = ThreadIdx(); i < args.hidden; i += kRowThreads) {
    const float value = FromBf16(from[i]);
    out[i] = args.accumulate ? out[i] + value : value;
  }
}

ZEROC_KERNEL(kRowThreads) RmsNormKernel(RmsNormArgs args) {
  auto* shared = reinterpret_cast<float*>(SharedMemory());
  const std::int64_t n = args.hidden;
  const float* x = args.x + BlockIdx() * n;
  Bf16* out = static_cast<Bf16*>(args.out) + BlockIdx() * n;
  const float norm = 1.0f / Sqrt(SumOfSquares(x, n, 0.0f, shared) / static_cast<float>(n) + args.eps);
  for (std::int64_t i = ThreadIdx(); i < n; i += kRowThreads) out[i] = ToBf16(x[i] * norm * FromBf16(args.gain[i]));
}

ZEROC_KERNEL(kRowThreads) LayerNormKernel(LayerNormArgs args) {
  auto* shared = reinterpret_cast<float*>(SharedMemory());
  const std::int64_t n = args.hidden;
  const float* x = args.x + BlockIdx() * n;
  Bf16* out = static_cast<Bf16*>(args.out) + BlockIdx() * n;
  float sum = 0.0f;
  for (std::int64_t i = ThreadIdx(); i < n; i += kRowThreads) sum += x[i];
  const float mean = BlockSum(sum, shared) / static_cast<float>(n);
  const float norm = 1.0f / Sqrt(SumOfSquares(x, n, mean, shared) / static_cast<float>(n) + args.eps);
  for (std::int64_t i = ThreadIdx(); i < n; i += kRowThreads) {
    out[i] = ToBf16((x[i] - mean) * norm * FromBf16(args.gain[i]) + args.bias[i]);
  }
}

// One warp for each head, heads are short.
ZEROC_KERNEL(kRowThreads) HeadNormKernel(HeadNormArgs args) {
  const int lane = ThreadIdx() % 32;
  const std::int64_t head = std::int64_t{BlockIdx()} * kWarps + ThreadIdx() / 32;
  if (head >= args.n_rows * args.n_heads) return;  // whole warps
  float* x = args.x + head / args.n_heads * args.stride + head % args.n_heads * args.head_dim;
  float sum = 0.0f;
  for (std::int64_t i = lane; i < args.head_dim; i += 32) sum += x[i] * x[i];
  for (int mask = 16; mask > 0; mask /= 2) sum += ShuffleXor(sum, mask);
  const float norm = 1.0f / Sqrt(sum / static_cast<float>(args.head_dim) + args.eps);
  for (std::int64_t i = lane; i < args.head_dim; i += 32) x[i] = x[i] * norm * FromBf16(args.gain[i]);
}

ZEROC_KERNEL(kRowThreads) SwiGluKernel(SwiGluArgs args) {
  const std::int64_t row = BlockIdx();
  const float* gate = args.gate + row * args.stride;
  const float* up = args.up + row * args.stride;
  Bf16* out = static_cast<Bf16*>(args.out) + row * args.width;
  for (std::int64_t i = ThreadIdx(); i < args.width; i += kRowThreads) {
    out[i] = ToBf16(gate[i] / (1.0f + Exp(-gate[i])) * up[i]);
  }
}

ZEROC_KERNEL(kRowThreads) ReluKernel(ReluArgs args) {
  const std::int64_t row = BlockIdx();
  const float* x = args.x + row * args.stride;
  Bf16* out = static_cast<Bf16*>(args.out) + row * args.width;
  for (std::int64_t i = ThreadIdx(); i < args.width; i += kRowThreads) out[i] = ToBf16(x[i] < 0.0f ? 0.0f : x[i]);
}

ZEROC_KERNEL(kRowThreads) AddBiasKernel(AddBiasArgs args) {
  float* y = args.y + BlockIdx() * args.y_stride;
  for (std::int64_t i = args.out_begin + ThreadIdx(); i < args.out_end; i += kRowThreads) {
    y[i] = args.accumulate ? y[i] + args.bias[i] : args.bias[i];
  }
}

constexpr int kSumBytes = kWarps * static_cast<int>(sizeof(float));

template <typename Args>
KernelStatus LaunchRows(void (*kernel)(Args), const Args& args, Stream stream, int shared_bytes = 0) {
  if (!IsGood(args)) return KernelStatus::kBadShape;
  return Launch(kernel, {args.n_rows, kRowThreads, shared_bytes}, stream, args);
}

}  // namespace

KernelStatus Embed(const EmbedArgs& args, Stream stream) { return LaunchRows(EmbedKernel, args, stream); }
KernelStatus RmsNorm(const RmsNormArgs& args, Stream stream) {
  return LaunchRows(RmsNormKernel, args, stream, kSumBytes);
}
KernelStatus LayerNorm(const LayerNormArgs& args, Stream stream) {
  return LaunchRows(LayerNormKernel, args, stream, kSumBytes);
}
KernelStatus HeadNorm(const HeadNormArgs& args, Stream stream) {
  if (!IsGood(args)) return KernelStatus::kBadShape;
  return Launch(HeadNormKernel, {(args.n_rows * args.n_heads + kWarps - 1) / kWarps, kRowThreads}, stream, args);
}
KernelStatus SwiGlu(const SwiGluArgs& args, Stream stream) { return LaunchRows(SwiGluKernel, args, stream); }
KernelStatus Relu(const ReluArgs& args, Stream stream) { return LaunchRows(ReluKernel, args, stream); }

KernelStatus AddBias(const AddBiasArgs& args, Stream stream) {
  if (args.bias == nullptr || args.y == nullptr || args.n_rows < 0 || args.out_begin < 0 ||
      args.out_begin > args.out_end || args.y_stride < args.out_end) {
    return KernelStatus::kBadShape;
  }
  return Launch(AddBiasKernel, {args.n_rows, kRowThreads}, stream, args);
}

}  // namespace zeroc::kernels::cuda
