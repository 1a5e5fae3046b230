// A model opened as the flags say: which weights, which KV format, which ops. Shared by the commands that compute.
//
// Not thread-safe. The session owns everything; models refer to its ops and threads.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "libzeroc/base/status.h"
#include "libzeroc/base/thread_pool.h"
#include "libzeroc/checkpoint/checkpoint.h"
#include "libzeroc/compression/plan.h"
#include "libzeroc/engine/scoring.h"
#include "libzeroc/model/transformer.h"
#include "libzeroc/tokenizer/tokenizer.h"

namespace CLI {  // NOLINT(readability-identifier-naming): CLI11's name
class App;
}

namespace zeroc {

struct ModelOptions {
  std::string model_dir;
  std::string plan_path;         // empty: zeroc.plan in the model's directory
  std::string profile;           // empty: method none
  std::string method;            // empty: zeroc with a profile, none without
  double kv_bits = 0;            // 0: not given
  std::string calibration_text;  // empty: text that the model writes
  std::string backend = "cpu";
  int threads = 0;  // 0: all processors of this process
  bool json = false;

  void AddModel(CLI::App& app);                       // --model
  void AddThreads(CLI::App& app);                     // --threads
  void AddJson(CLI::App& app);                        // --json
  void AddProfile(CLI::App& app);                     // --profile, --plan
  void AddMethod(CLI::App& app);                      // --method, --kv-bits, --calibration-text
  void AddBackend(CLI::App& app);                     // --backend
  Status CheckUsage() const;                          // combinations of the above
  Status RefuseBaselines(const char* command) const;  // kUnimplemented, for commands that need the engine's own cache
  bool compressed() const { return !profile.empty() || baseline(); }
  bool baseline() const { return !method.empty() && method != "none" && method != "zeroc"; }
};

class Session {
 public:
  // Checkpoint, ops and threads.
  static Result<std::unique_ptr<Session>> Open(const ModelOptions& options);

  const Checkpoint& checkpoint() const { return *checkpoint_; }
  const std::shared_ptr<const Checkpoint>& shared_checkpoint() const { return checkpoint_; }
  const kernels::Ops& ops() const { return *ops_; }  // of the host, for work of its own
  ThreadPool& threads() { return threads_; }

  // The plain model, bf16 KV. Here and below, what keeps a backend from opening it: kUnimplemented in a build without,
  // kFailedPrecondition on a machine without.
  Result<ScoredMethod> Uncompressed();
  // What the flags ask for: the folded model with the profile's format, the plain one, or that with a baseline, which
  // is calibrated here where it needs to be. Models are opened once.
  Result<ScoredMethod> Asked(const ProgressFn& progress = nullptr);

  Result<std::unique_ptr<Tokenizer>> OpenTokenizer() const;
  // The id that starts every text: the tokenizer's, else the configuration's. kFailedPrecondition when neither has one.
  Result<std::int32_t> BosId(const Tokenizer& tokenizer) const;
  // kInvalidArgument naming `where` and the first id that the model does not have.
  Status CheckIds(const std::vector<std::int32_t>& ids, const std::string& where) const;

 private:
  Session(const ModelOptions& options, std::shared_ptr<const Checkpoint> checkpoint, const kernels::Ops& ops);

  // On the backend that was asked for. plan may be null.
  Result<std::unique_ptr<Transformer>> OpenModel(std::shared_ptr<const Plan> plan);
  Result<std::vector<std::vector<std::int32_t>>> CalibrationWindows(Transformer& model,
                                                                    const ProgressFn& progress) const;

  ModelOptions options_;
  std::shared_ptr<const Checkpoint> checkpoint_;
  const kernels::Ops* ops_;
  ThreadPool threads_;
  std::unique_ptr<Transformer> plain_;
  std::unique_ptr<Transformer> folded_;
};

// The bytes of text behind each id.
std::vector<std::int32_t> TokenBytes(const Tokenizer& tokenizer, const std::vector<std::int32_t>& ids);

}  // namespace zeroc
