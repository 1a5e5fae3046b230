#include "kernels/checks.h"
#include "kernels/cpu/cpu.h"

namespace zeroc::kernels::cpu {

KernelStatus Linear(const LinearArgs& args) {
  if (!IsGood(args)) return KernelStatus::kBadShape;
  if (args.n_rows == 0 || args.out_begin == args.out_end) return KernelStatus::kOk;
  // From four rows on the float32 kernels are bound by arithmetic, tiles still by memory: 14 against 9 to 11 GB/s of
  // weights on one Sapphire Rapids core.
  constexpr std::int64_t kTileRowsMin = 4;
  if (args.n_rows >= kTileRowsMin && LinearAmx(args)) return KernelStatus::kOk;
  if (args.n_rows <= kMatVecRowsMax) {
    LinearMatVec(args);
    return KernelStatus::kOk;
  }
  if (LinearSgemm(args)) return KernelStatus::kOk;
  return KernelStatus::kUnsupported;
}

}  // namespace zeroc::kernels::cpu
