#include "kernels/checks.h"
#include "kernels/cpu/cpu.h"

namespace zeroc::kernels::cpu {

KernelStatus Linear(const LinearArgs& args) {
  if (!IsGood(args)) return KernelStatus::kBadShape;
  if (args.n_rows == 0 || args.out_begin == args.out_end) return KernelStatus::kOk;
  if (args.n_rows <= kMatVecRowsMax) {
    LinearMatVec(args);
    return KernelStatus::kOk;
  }
  if (LinearAmx(args) || LinearSgemm(args)) return KernelStatus::kOk;
  return KernelStatus::kUnsupported;
}

}  // namespace zeroc::kernels::cpu
