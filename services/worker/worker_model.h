// The model of one worker: weights, plan, compute threads and every KV format it serves, opened once at start.
//
// formats() and the identity are constant and may be read from any thread; model() belongs to the engine's loop.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>

#include "libzeroc/base/status.h"
#include "libzeroc/base/thread_pool.h"
#include "libzeroc/kv/kv_format.h"
#include "libzeroc/model/transformer.h"

namespace zeroc {

// Opens a model on a device (OpenCudaTransformer).
using OpenDevice =
    std::function<Result<std::unique_ptr<Transformer>>(std::shared_ptr<const Checkpoint>, std::shared_ptr<const Plan>)>;

class WorkerModel {
 public:
  // plan_path empty: zeroc.plan in the directory if it is there; without a plan only the profile bf16 is served.
  // threads 0: all processors of this process. device: instead of the processors, perhaps none. Errors name the file
  // and the field.
  static Result<std::unique_ptr<WorkerModel>> Open(const std::string& dir, const std::string& plan_path, int threads,
                                                   const OpenDevice& device = nullptr);

  Transformer& model() { return *model_; }
  const ModelConfig& config() const { return model_->config(); }
  const std::string& fingerprint() const { return checkpoint_->fingerprint(); }
  const std::string& plan_id() const { return plan_id_; }  // empty without a plan
  const std::string& plan_path() const { return plan_path_; }
  const kernels::Ops& ops() const { return model_->ops(); }
  int n_threads() const { return threads_.size(); }

  // kFailedPrecondition when the request is for another model or plan, kNotFound for an unknown profile.
  Result<std::shared_ptr<const KvFormat>> FormatFor(const std::string& fingerprint, const std::string& plan_id,
                                                    const std::string& profile) const;
  const std::map<std::string, std::shared_ptr<const KvFormat>>& formats() const { return formats_; }

  // Of the pool that serves all formats.
  std::size_t SlabBytes() const;
  // What bf16 would take for n tokens, without block padding.
  std::uint64_t RawKvBytes(std::int64_t n_tokens) const;

 private:
  explicit WorkerModel(int threads) : threads_(threads) {}

  ThreadPool threads_;
  std::shared_ptr<const Checkpoint> checkpoint_;
  std::string plan_id_;
  std::string plan_path_;
  std::unique_ptr<Transformer> model_;
  std::map<std::string, std::shared_ptr<const KvFormat>> formats_;
};

}  // namespace zeroc
