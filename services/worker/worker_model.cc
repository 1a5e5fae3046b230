#include "services/worker/worker_model.h"

#include <algorithm>
#include <filesystem>
#include <utility>
#include <vector>

namespace zeroc {
namespace {

// Large enough that a slab of small blocks wastes little, small enough that many block sizes share an arena.
constexpr std::size_t kSlabBytesMin = 1 << 20;

constexpr char kWithoutPlan[] = "bf16";  // the one profile that needs no plan

}  // namespace

Result<std::unique_ptr<WorkerModel>> WorkerModel::Open(const std::string& dir, const std::string& plan_path,
                                                       int threads, const OpenDevice& device) {
  std::unique_ptr<WorkerModel> worker(new WorkerModel(threads));
  ZEROC_ASSIGN_OR_RETURN(std::unique_ptr<Checkpoint> checkpoint, Checkpoint::Open(dir));
  worker->checkpoint_ = std::move(checkpoint);
  std::string path = plan_path;
  std::error_code error;
  const std::string beside = (std::filesystem::path(dir) / "zeroc.plan").string();
  if (path.empty() && std::filesystem::exists(beside, error)) path = beside;
  std::shared_ptr<const Plan> plan;
  if (!path.empty()) {
    ZEROC_ASSIGN_OR_RETURN(Plan opened, Plan::Open(path, *worker->checkpoint_));
    plan = std::make_shared<Plan>(std::move(opened));
    worker->plan_id_ = plan->plan_id();
    worker->plan_path_ = path;
  }
  if (device) {
    ZEROC_ASSIGN_OR_RETURN(worker->model_, device(worker->checkpoint_, plan));
  } else {
    ZEROC_ASSIGN_OR_RETURN(worker->model_,
                           Transformer::Open(worker->checkpoint_, plan, kernels::CpuOps(), worker->threads_));
  }
  std::vector<std::string> profiles;
  if (plan == nullptr) profiles.push_back(kWithoutPlan);
  if (plan != nullptr) {
    for (const Profile& profile : plan->ladder()) profiles.push_back(profile.name);
  }
  for (const std::string& profile : profiles) {
    ZEROC_ASSIGN_OR_RETURN(worker->formats_[profile], worker->model_->Format(profile));
  }
  return worker;
}

Result<std::shared_ptr<const KvFormat>> WorkerModel::FormatFor(const std::string& fingerprint,
                                                               const std::string& plan_id,
                                                               const std::string& profile) const {
  if (fingerprint != this->fingerprint()) {
    return FailedPrecondition("the request is for model " + fingerprint + ", this worker serves " +
                              this->fingerprint());
  }
  if (plan_id != plan_id_) {
    return FailedPrecondition("the request is for plan '" + plan_id + "', this worker has '" + plan_id_ + "'");
  }
  const auto found = formats_.find(profile);
  if (found == formats_.end()) {
    return NotFound("no profile '" + profile +
                    (plan_id_.empty() ? "': without a plan there is only bf16" : "' in the plan"));
  }
  return found->second;
}

std::size_t WorkerModel::SlabBytes() const {
  std::size_t bytes = kSlabBytesMin;
  for (const auto& [name, format] : formats_) {
    bytes = std::max(bytes, static_cast<std::size_t>(format->exact.block_bytes));
  }
  return bytes;
}

std::uint64_t WorkerModel::RawKvBytes(std::int64_t n_tokens) const {
  const ModelConfig& c = config();
  return static_cast<std::uint64_t>(2 * 2 * c.n_layers * c.n_kv_heads * c.head_dim * n_tokens);
}

}  // namespace zeroc
