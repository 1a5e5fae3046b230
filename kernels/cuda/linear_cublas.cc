#include <cublas_v2.h>

#include <limits>
#include <utility>

#include "kernels/checks.h"
#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/linear.h"

namespace zeroc::kernels::cuda {

struct Linear::Impl {
  cublasHandle_t handle;
  Stream stream;
};

Linear::Linear(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Linear::~Linear() { cublasDestroy(impl_->handle); }

std::unique_ptr<Linear> Linear::Open(Stream stream, const char** error) {
  cublasHandle_t handle;
  cublasStatus_t status = cublasCreate(&handle);
  if (status != CUBLAS_STATUS_SUCCESS) {
    *error = cublasGetStatusString(status);
    return nullptr;
  }
  status = cublasSetStream(handle, static_cast<cudaStream_t>(stream));
  if (status != CUBLAS_STATUS_SUCCESS) {
    *error = cublasGetStatusString(status);
    cublasDestroy(handle);
    return nullptr;
  }
  return std::unique_ptr<Linear>(new Linear(std::make_unique<Impl>(Impl{handle, stream})));
}

// Row-major Y = X W^T is column-major Y^T = W X^T: with W as it lies transposed and X as it lies not.
KernelStatus Linear::Run(const LinearArgs& args) {
  constexpr std::int64_t kLargest = std::numeric_limits<int>::max();
  if (!IsGood(args)) return KernelStatus::kBadShape;
  if (args.n_rows > kLargest || args.k > kLargest || args.n_out > kLargest || args.y_stride > kLargest) {
    return KernelStatus::kBadShape;
  }
  const std::int64_t n_out = args.out_end - args.out_begin;
  if (args.n_rows == 0 || n_out == 0) return KernelStatus::kOk;
  float beta = args.accumulate ? 1.0f : 0.0f;
  if (args.bias != nullptr) {
    const KernelStatus added = AddBias(
        {args.bias, args.out_begin, args.out_end, args.n_rows, args.y, args.y_stride, args.accumulate}, impl_->stream);
    if (added != KernelStatus::kOk) return added;
    beta = 1.0f;
  }
  const float alpha = 1.0f;
  const int k = static_cast<int>(args.k);
  const cublasStatus_t status = cublasGemmEx(
      impl_->handle, CUBLAS_OP_T, CUBLAS_OP_N, static_cast<int>(n_out), static_cast<int>(args.n_rows), k, &alpha,
      args.w + args.out_begin * args.k, CUDA_R_16BF, k, args.x, CUDA_R_16BF, k, &beta, args.y + args.out_begin,
      CUDA_R_32F, static_cast<int>(args.y_stride), CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
  return status == CUBLAS_STATUS_SUCCESS ? KernelStatus::kOk : KernelStatus::kUnsupported;
}

}  // namespace zeroc::kernels::cuda
