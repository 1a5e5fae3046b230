// Matrix products in float32 through oneDNN's sgemm, for processors without AMX.
//
// oneDNN 2.6 also multiplies bf16 matrices where they lie, but is not used for it. Its brgemm takes the tile palette
// from CPUID leaf 0x1D; where a hypervisor hides that leaf it loads an all-zero tile configuration and dies of SIGILL.
// And without AMX its bf16 rate is half of the float32 one (vdpbf16ps). See docs/adr/0004-own-amx-product.md.
#include <omp.h>
#include <oneapi/dnnl/dnnl.h>

#include <algorithm>
#include <array>
#include <new>
#include <vector>

#include "kernels/bf16.h"
#include "kernels/cpu/cpu.h"

namespace zeroc::kernels::cpu {
namespace {

// oneDNN starts OpenMP threads of its own unless the calling thread's setting says one; put back afterwards.
class OneOpenMpThread {
 public:
  OneOpenMpThread() : before_(omp_get_max_threads()) { omp_set_num_threads(1); }
  ~OneOpenMpThread() { omp_set_num_threads(before_); }
  OneOpenMpThread(const OneOpenMpThread&) = delete;
  OneOpenMpThread& operator=(const OneOpenMpThread&) = delete;

 private:
  int before_;
};

constexpr std::int64_t kPanelOuts = 64;   // a panel of w in float32 stays in the L2 cache for k up to 4096
constexpr std::int64_t kPanelRows = 256;  // rows of x converted at a time
// With fewer rows sgemm adds the products in another order. Rows of zeros fill up to here, so that a row's result does
// not depend on which others it is multiplied with: the same seed gives the same tokens in any company.
constexpr std::int64_t kSameOrderRowsMin = 16;

void ToFloats(const Bf16* from, std::int64_t n, float* to) {
  for (std::int64_t i = 0; i < n; ++i) to[i] = Bf16ToFloat(from[i]);
}

// Rows [row, row + rows) of y, x of them already in float32, followed by zeros up to kSameOrderRowsMin rows.
bool MultiplyRows(const LinearArgs& args, const float* x, std::int64_t row, std::int64_t rows, float* w) {
  const bool filled = rows < kSameOrderRowsMin;
  std::array<float, kSameOrderRowsMin* kPanelOuts> few = {};
  for (std::int64_t o = args.out_begin; o < args.out_end; o += kPanelOuts) {
    const std::int64_t outs = std::min(kPanelOuts, args.out_end - o);
    ToFloats(args.w + o * args.k, outs * args.k, w);
    float* y = args.y + row * args.y_stride + o;
    for (std::int64_t i = 0; filled && args.accumulate && i < rows; ++i) {
      std::copy_n(y + i * args.y_stride, outs, few.data() + i * kPanelOuts);
    }
    float* const to = filled ? few.data() : y;
    const std::int64_t to_stride = filled ? kPanelOuts : args.y_stride;
    const float beta = args.accumulate ? 1.0f : 0.0f;
    if (dnnl_sgemm('N', 'T', std::max(rows, kSameOrderRowsMin), outs, args.k, 1.0f, x, args.k, w, args.k, beta, to,
                   to_stride) != dnnl_success) {
      return false;
    }
    for (std::int64_t i = 0; i < rows; ++i) {
      if (filled) std::copy_n(few.data() + i * kPanelOuts, outs, y + i * args.y_stride);
      for (std::int64_t j = 0; args.bias != nullptr && j < outs; ++j) y[i * args.y_stride + j] += args.bias[o + j];
    }
  }
  return true;
}

}  // namespace

bool LinearSgemm(const LinearArgs& args) {
  try {
    const OneOpenMpThread one_thread;
    std::vector<float> w(static_cast<std::size_t>(kPanelOuts * args.k));
    std::vector<float> x(static_cast<std::size_t>(std::clamp(args.n_rows, kSameOrderRowsMin, kPanelRows) * args.k));
    for (std::int64_t row = 0; row < args.n_rows; row += kPanelRows) {
      const std::int64_t rows = std::min(kPanelRows, args.n_rows - row);
      if (rows < kSameOrderRowsMin) std::fill(x.begin() + rows * args.k, x.begin() + kSameOrderRowsMin * args.k, 0.0f);
      ToFloats(static_cast<const Bf16*>(args.x) + row * args.k, rows * args.k, x.data());
      if (!MultiplyRows(args, x.data(), row, rows, w.data())) return false;
    }
    return true;
  } catch (const std::bad_alloc&) {
    return false;
  }
}

}  // namespace zeroc::kernels::cpu
