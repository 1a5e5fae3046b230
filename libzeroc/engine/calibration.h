// Makes a plan for a model: moments over text, balanced bases, and the ladder measured on held-out text.
// Deterministic for given inputs. Uses the model's own forward pass, so every model the engine runs can be calibrated.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "libzeroc/base/status.h"
#include "libzeroc/compression/plan.h"
#include "libzeroc/engine/scoring.h"

namespace zeroc {

struct CalibrationSource {
  std::string name;                       // file name, for the plan's record
  std::string hash;                       // HashText of its bytes
  std::vector<std::int32_t> tokens;       // no BOS
  std::vector<std::int32_t> token_bytes;  // [tokens], bytes of text per token; only needed for held-out text
};

struct CalibrationOptions {
  int context = 2048;    // tokens of a calibration window, BOS included: calibrate at serving length
  int max_windows = 64;  // over all texts, taken evenly
  BasisOptions basis;
  ScoreOptions score{.context = 4096, .stride = 2048, .max_windows = 8};
  std::uint64_t seed = 0;  // recorded; nothing is random yet
};

// Stage names for progress: "moments", "bases", "measure", "recall"; done in [0, 1] within the stage.
using CalibrationProgress = std::function<bool(const char* stage, double done)>;

// kInvalidArgument: text too short for one window; errors of SolveLayer and ScoreText otherwise. recall_cases may be
// empty.
Result<Plan> Calibrate(std::shared_ptr<const Checkpoint> checkpoint, const kernels::Ops& ops, ThreadPool& threads,
                       std::span<const CalibrationSource> texts, const CalibrationSource& heldout,
                       std::span<const RecallCase> recall_cases, std::int32_t bos_id, const CalibrationOptions& options,
                       const CalibrationProgress& progress = nullptr);

}  // namespace zeroc
