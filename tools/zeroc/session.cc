#include "tools/zeroc/session.h"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <filesystem>

namespace zeroc {
namespace {

constexpr const char* kMethods[] = {"none",   "fp8",  "int8", "kivi4",       "kivi2", "h2o",
                                    "snapkv", "palu", "hack", "zeroc-paper", "zeroc"};
// Methods whose size is a free choice and not part of their name.
constexpr const char* kFreeSizeMethods[] = {"h2o", "snapkv", "palu", "zeroc-paper"};

template <typename List>
bool Contains(const List& list, const std::string& name) {
  return std::find(std::begin(list), std::end(list), name) != std::end(list);
}

template <typename List>
std::string Join(const List& list) {
  std::string text;
  for (const char* name : list) text += (text.empty() ? "" : ", ") + std::string(name);
  return text;
}

Result<const kernels::Ops*> OpsOf(const std::string& backend) {
  if (backend == "ref") return &kernels::ReferenceOps();
  if (backend == "cpu") return &kernels::CpuOps();
  return Unimplemented("backend cuda: this build has no CUDA support; use --backend cpu");
}

Result<std::shared_ptr<const Plan>> OpenPlan(const ModelOptions& options, const Checkpoint& checkpoint) {
  const bool given = !options.plan_path.empty();
  const std::string path =
      given ? options.plan_path : (std::filesystem::path(options.model_dir) / "zeroc.plan").string();
  std::error_code error;
  if (!std::filesystem::exists(path, error)) {
    return NotFound(path + ": no such plan, and profile '" + options.profile +
                    "' needs one; make it with zeroc calibrate" + (given ? "" : " or name another with --plan"));
  }
  ZEROC_ASSIGN_OR_RETURN(Plan plan, Plan::Open(path, checkpoint));
  return std::shared_ptr<const Plan>(std::make_shared<Plan>(std::move(plan)));
}

}  // namespace

void ModelOptions::AddModel(CLI::App& app) {
  app.add_option("--model", model_dir, "directory of a Hugging Face checkpoint")->required()->option_text("DIR");
}

void ModelOptions::AddThreads(CLI::App& app) {
  app.add_option("--threads", threads, "compute threads; 0: one per processor of this process [0]")
      ->check(CLI::Range(0, 4096))
      ->option_text("N");
}

void ModelOptions::AddJson(CLI::App& app) { app.add_flag("--json", json, "print one JSON object on stdout"); }

void ModelOptions::AddProfile(CLI::App& app) {
  app.add_option("--profile", profile, "profile of the plan, e.g. q4; without it: original weights, bf16 KV")
      ->option_text("NAME");
  app.add_option("--plan", plan_path, "plan with the profile [DIR/zeroc.plan]")->option_text("FILE");
}

void ModelOptions::AddMethod(CLI::App& app) {
  app.add_option("--method", method, "one of " + Join(kMethods) + " [none; zeroc with --profile]")->option_text("NAME");
  app.add_option("--kv-bits", kv_bits,
                 "bits per KV element, for methods with a free size (" + Join(kFreeSizeMethods) + ")")
      ->check(CLI::Range(0.1, 16.0))
      ->option_text("X");
}

void ModelOptions::AddBackend(CLI::App& app) {
  app.add_option("--backend", backend, "ref (scalar float32), cpu or cuda [cpu]")
      ->check(CLI::IsMember({"ref", "cpu", "cuda"}))
      ->option_text("NAME");
}

Status ModelOptions::CheckUsage() const {
  if (!method.empty() && !Contains(kMethods, method)) {
    return InvalidArgument("--method " + method + " is not a method; there are " + Join(kMethods));
  }
  if (!profile.empty() && !method.empty() && method != "zeroc") {
    return InvalidArgument("--profile belongs to method zeroc and cannot go with --method " + method);
  }
  if (method == "zeroc" && profile.empty()) {
    return InvalidArgument("--method zeroc needs --profile NAME (zeroc plan FILE lists them)");
  }
  if (!plan_path.empty() && profile.empty()) return InvalidArgument("--plan has no meaning without --profile NAME");
  if (kv_bits > 0 && !Contains(kFreeSizeMethods, method)) {
    return InvalidArgument("--kv-bits goes only with --method " + Join(kFreeSizeMethods));
  }
  return OkStatus();
}

Session::Session(const ModelOptions& options, std::shared_ptr<const Checkpoint> checkpoint, const kernels::Ops& ops)
    : options_(options), checkpoint_(std::move(checkpoint)), ops_(&ops), threads_(options.threads) {}

Result<std::unique_ptr<Session>> Session::Open(const ModelOptions& options) {
  if (!options.method.empty() && options.method != "none" && options.method != "zeroc") {
    return Unimplemented("method " + options.method +
                         " is not built yet; this version has none and zeroc (--profile NAME)");
  }
  ZEROC_ASSIGN_OR_RETURN(const kernels::Ops* ops, OpsOf(options.backend));
  ZEROC_ASSIGN_OR_RETURN(std::unique_ptr<Checkpoint> checkpoint, Checkpoint::Open(options.model_dir));
  return std::unique_ptr<Session>(new Session(options, std::shared_ptr<const Checkpoint>(std::move(checkpoint)), *ops));
}

Result<ScoredMethod> Session::Uncompressed() {
  if (plain_ == nullptr) {
    ZEROC_ASSIGN_OR_RETURN(plain_, LlamaModel::Open(checkpoint_, nullptr, *ops_, threads_));
  }
  ZEROC_ASSIGN_OR_RETURN(std::shared_ptr<const KvFormat> format, plain_->Format("none"));
  return ScoredMethod{plain_.get(), std::move(format)};
}

Result<ScoredMethod> Session::Asked() {
  if (!options_.compressed()) return Uncompressed();
  if (folded_ == nullptr) {
    ZEROC_ASSIGN_OR_RETURN(std::shared_ptr<const Plan> plan, OpenPlan(options_, *checkpoint_));
    ZEROC_ASSIGN_OR_RETURN(folded_, LlamaModel::Open(checkpoint_, std::move(plan), *ops_, threads_));
  }
  ZEROC_ASSIGN_OR_RETURN(std::shared_ptr<const KvFormat> format, folded_->Format(options_.profile));
  return ScoredMethod{folded_.get(), std::move(format)};
}

Result<std::unique_ptr<Tokenizer>> Session::OpenTokenizer() const { return Tokenizer::Open(checkpoint_->dir()); }

Result<std::int32_t> Session::BosId(const Tokenizer& tokenizer) const {
  if (tokenizer.bos_id().has_value()) return *tokenizer.bos_id();
  if (checkpoint_->config().bos_id >= 0) return checkpoint_->config().bos_id;
  return FailedPrecondition(checkpoint_->dir() + ": neither tokenizer.json nor config.json names a BOS token");
}

Status Session::CheckIds(const std::vector<std::int32_t>& ids, const std::string& where) const {
  const std::int64_t vocab_size = checkpoint_->config().vocab_size;
  for (std::size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] < 0 || ids[i] >= vocab_size) {
      return InvalidArgument(where + ": ids[" + std::to_string(i) + "] = " + std::to_string(ids[i]) +
                             " is not in the model's vocabulary [0, " + std::to_string(vocab_size) + ")");
    }
  }
  return OkStatus();
}

std::vector<std::int32_t> TokenBytes(const Tokenizer& tokenizer, const std::vector<std::int32_t>& ids) {
  std::vector<std::int32_t> bytes;
  bytes.reserve(ids.size());
  for (const std::int32_t id : ids) bytes.push_back(static_cast<std::int32_t>(tokenizer.IdToBytes(id).size()));
  return bytes;
}

}  // namespace zeroc
