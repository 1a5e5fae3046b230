// linear.h without a GPU: the same sequence of steps, the product as a plain loop.
#include <utility>

#include "kernels/bf16.h"
#include "kernels/checks.h"
#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/host_simt/queue.h"
#include "kernels/cuda/linear.h"

namespace zeroc::kernels::cuda {

namespace {

void Multiply(const LinearArgs& args) {
  const auto* x = static_cast<const Bf16*>(args.x);
  for (std::int64_t r = 0; r < args.n_rows; ++r) {
    for (std::int64_t o = args.out_begin; o < args.out_end; ++o) {
      float sum = 0.0f;
      for (std::int64_t i = 0; i < args.k; ++i) {
        sum += Bf16ToFloat(x[r * args.k + i]) * Bf16ToFloat(args.w[o * args.k + i]);
      }
      float& y = args.y[r * args.y_stride + o];
      y = (args.accumulate || args.bias != nullptr ? y : 0.0f) + sum;
    }
  }
}

}  // namespace

struct Linear::Impl {
  Stream stream;
};

Linear::Linear(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Linear::~Linear() = default;

std::unique_ptr<Linear> Linear::Open(Stream stream, const char**) {
  return std::unique_ptr<Linear>(new Linear(std::make_unique<Impl>(Impl{stream})));
}

KernelStatus Linear::Run(const LinearArgs& args) {
  if (!IsGood(args)) return KernelStatus::kBadShape;
  if (args.n_rows == 0) return KernelStatus::kOk;
  if (args.bias != nullptr) {
    const KernelStatus added = AddBias(
        {args.bias, args.out_begin, args.out_end, args.n_rows, args.y, args.y_stride, args.accumulate}, impl_->stream);
    if (added != KernelStatus::kOk) return added;
  }
  simt::Enqueue(impl_->stream, [args] { Multiply(args); });
  return KernelStatus::kOk;
}

}  // namespace zeroc::kernels::cuda
