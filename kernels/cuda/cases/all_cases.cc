#include "kernels/cuda/cases/cases.h"

namespace zeroc::kernels::cuda {

std::vector<Case> AllCases() {
  std::vector<Case> all;
  for (const auto& some : {RowCases(), KvCases(), DecodeCases(), PrefillCases(), BlockCases(), SamplingCases()})
    all.insert(all.end(), some.begin(), some.end());
  return all;
}

}  // namespace zeroc::kernels::cuda
