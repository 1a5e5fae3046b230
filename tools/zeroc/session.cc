#include "tools/zeroc/session.h"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <filesystem>

#include "libzeroc/baselines/methods.h"
#include "libzeroc/model/cuda/cuda_transformer.h"
#include "tools/zeroc/text_input.h"

namespace zeroc {
namespace {

// Calibration of the baselines that need it: windows of a text, or shorter ones that the model writes (token by token).
constexpr int kCalibrationContext = 2048;  // tokens of a window
constexpr int kCalibrationWindows = 16;
constexpr int kWrittenContext = 512;
constexpr int kWrittenWindows = 32;

std::vector<std::string> Methods() {
  std::vector<std::string> names = {"none"};
  names.insert(names.end(), BaselineNames().begin(), BaselineNames().end());
  names.push_back("zeroc");
  return names;
}

std::vector<std::string> FreeSizeMethods() {
  std::vector<std::string> names;
  std::copy_if(BaselineNames().begin(), BaselineNames().end(), std::back_inserter(names), HasFreeSize);
  return names;
}

bool Contains(const std::vector<std::string>& list, const std::string& name) {
  return std::find(list.begin(), list.end(), name) != list.end();
}

std::string Join(const std::vector<std::string>& list) {
  std::string text;
  for (const std::string& name : list) text += (text.empty() ? "" : ", ") + name;
  return text;
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
  app.add_option("--method", method, "one of " + Join(Methods()) + " [none; zeroc with --profile]")
      ->option_text("NAME");
  app.add_option("--kv-bits", kv_bits,
                 "bits per KV element, for methods with a free size (" + Join(FreeSizeMethods()) + ")")
      ->check(CLI::Range(0.1, 16.0))
      ->option_text("X");
  app.add_option("--calibration-text", calibration_text,
                 "text for the bases of palu and zeroc-paper, FILE or FILE@A:B; without it the model writes it itself")
      ->option_text("FILE");
}

void ModelOptions::AddBackend(CLI::App& app) {
  app.add_option("--backend", backend, "ref (scalar float32), cpu or cuda [cpu]")
      ->check(CLI::IsMember({"ref", "cpu", "cuda"}))
      ->option_text("NAME");
}

Status ModelOptions::CheckUsage() const {
  if (!method.empty() && !Contains(Methods(), method)) {
    return InvalidArgument("--method " + method + " is not a method; there are " + Join(Methods()));
  }
  if (!profile.empty() && !method.empty() && method != "zeroc") {
    return InvalidArgument("--profile belongs to method zeroc and cannot go with --method " + method);
  }
  if (method == "zeroc" && profile.empty()) {
    return InvalidArgument("--method zeroc needs --profile NAME (zeroc plan FILE lists them)");
  }
  if (!plan_path.empty() && profile.empty()) return InvalidArgument("--plan has no meaning without --profile NAME");
  if (kv_bits > 0 && !HasFreeSize(method)) {
    return InvalidArgument("--kv-bits goes only with --method " + Join(FreeSizeMethods()));
  }
  if (!calibration_text.empty()) {
    if (!NeedsCalibration(method))
      return InvalidArgument("--calibration-text goes only with --method palu, zeroc-paper");
    ZEROC_RETURN_IF_ERROR(ParseTextSlice(calibration_text).status());
  }
  return OkStatus();
}

Status ModelOptions::RefuseBaselines(const char* command) const {
  if (!baseline()) return OkStatus();
  return Unimplemented("method " + method + ": zeroc " + command + " runs none and zeroc only");
}

Session::Session(const ModelOptions& options, std::shared_ptr<const Checkpoint> checkpoint, const kernels::Ops& ops)
    : options_(options), checkpoint_(std::move(checkpoint)), ops_(&ops), threads_(options.threads) {}

Result<std::unique_ptr<Session>> Session::Open(const ModelOptions& options) {
  const kernels::Ops& ops = options.backend == "ref" ? kernels::ReferenceOps() : kernels::CpuOps();
  ZEROC_ASSIGN_OR_RETURN(std::unique_ptr<Checkpoint> checkpoint, Checkpoint::Open(options.model_dir));
  return std::unique_ptr<Session>(new Session(options, std::shared_ptr<const Checkpoint>(std::move(checkpoint)), ops));
}

Result<std::unique_ptr<Transformer>> Session::OpenModel(std::shared_ptr<const Plan> plan) {
  if (options_.backend == "cuda") return OpenCudaTransformer(checkpoint_, std::move(plan));
  return Transformer::Open(checkpoint_, std::move(plan), *ops_, threads_);
}

Result<ScoredMethod> Session::Uncompressed() {
  if (plain_ == nullptr) {
    ZEROC_ASSIGN_OR_RETURN(plain_, OpenModel(nullptr));
  }
  ZEROC_ASSIGN_OR_RETURN(std::shared_ptr<const KvFormat> format, plain_->Format("none"));
  return ScoredMethod{.model = plain_.get(), .format = std::move(format)};
}

// Windows of kCalibrationContext tokens, evenly over the text.
Result<std::vector<std::vector<std::int32_t>>> Session::CalibrationWindows(Transformer& model,
                                                                           const ProgressFn& progress) const {
  const int context = static_cast<int>(std::min<std::int64_t>(kCalibrationContext, model.config().max_positions));
  ZEROC_ASSIGN_OR_RETURN(const std::unique_ptr<Tokenizer> tokenizer, OpenTokenizer());
  ZEROC_ASSIGN_OR_RETURN(const std::int32_t bos_id, BosId(*tokenizer));
  if (options_.calibration_text.empty()) {
    return SampleWindows(model, bos_id, kWrittenWindows, std::min(context, kWrittenContext), /*seed=*/0, progress);
  }
  ZEROC_ASSIGN_OR_RETURN(const TextSlice slice, ParseTextSlice(options_.calibration_text));
  ZEROC_ASSIGN_OR_RETURN(const std::string text, ReadTextSlice(slice));
  ZEROC_ASSIGN_OR_RETURN(const std::vector<std::int32_t> tokens, tokenizer->Encode(text));
  ZEROC_RETURN_IF_ERROR(CheckIds(tokens, "tokens of " + options_.calibration_text));
  const std::size_t body = static_cast<std::size_t>(context) - 1;
  const std::size_t n_all = tokens.size() / body;
  if (n_all == 0) {
    return InvalidArgument("--calibration-text " + options_.calibration_text + " has " + std::to_string(tokens.size()) +
                           " tokens; a window takes " + std::to_string(body));
  }
  const std::size_t n = std::min<std::size_t>(n_all, kCalibrationWindows);
  std::vector<std::vector<std::int32_t>> windows;
  for (std::size_t w = 0; w < n; ++w) {
    const auto begin = tokens.begin() + static_cast<std::ptrdiff_t>(w * n_all / n * body);
    windows.push_back({bos_id});
    windows.back().insert(windows.back().end(), begin, begin + static_cast<std::ptrdiff_t>(body));
  }
  return windows;
}

Result<ScoredMethod> Session::Asked(const ProgressFn& progress) {
  if (options_.baseline()) {
    ZEROC_ASSIGN_OR_RETURN(ScoredMethod method, Uncompressed());
    BaselineOptions baseline{.name = options_.method, .kv_bits = options_.kv_bits, .progress = progress};
    if (NeedsCalibration(options_.method)) {
      ZEROC_ASSIGN_OR_RETURN(baseline.calibration, CalibrationWindows(*method.model, progress));
    }
    ZEROC_ASSIGN_OR_RETURN(method.attention, MakeBaseline(*method.model, baseline));
    return method;
  }
  if (!options_.compressed()) return Uncompressed();
  if (folded_ == nullptr) {
    ZEROC_ASSIGN_OR_RETURN(std::shared_ptr<const Plan> plan, OpenPlan(options_, *checkpoint_));
    ZEROC_ASSIGN_OR_RETURN(folded_, OpenModel(std::move(plan)));
  }
  ZEROC_ASSIGN_OR_RETURN(std::shared_ptr<const KvFormat> format, folded_->Format(options_.profile));
  return ScoredMethod{.model = folded_.get(), .format = std::move(format)};
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
