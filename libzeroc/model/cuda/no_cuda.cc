// OpenCudaTransformer of a build without CUDA: everything above asks, and is told.
#include "libzeroc/model/cuda/cuda_transformer.h"

namespace zeroc {

Result<std::unique_ptr<Transformer>> OpenCudaTransformer(std::shared_ptr<const Checkpoint>,
                                                         std::shared_ptr<const Plan>) {
  return Unimplemented(
      "backend cuda: this program was built without CUDA; configure with -DZEROC_CUDA=ON (docs/cuda.md), or use "
      "--backend cpu");
}

}  // namespace zeroc
