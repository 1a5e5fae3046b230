// Makes a plan for a model: moments over text, balanced bases, a ladder searched on that text (ladder_build.h), and
// every rung measured on held-out text. Deterministic for given inputs, whether it runs through or is resumed. Uses
// the model's own forward pass, so every model the engine runs can be calibrated.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "libzeroc/base/status.h"
#include "libzeroc/compression/plan.h"
#include "libzeroc/engine/ladder_build.h"
#include "libzeroc/engine/scoring.h"

namespace zeroc {

struct CalibrationSource {
  std::string name;                       // file name, for the plan's record
  std::string hash;                       // HashText of its bytes
  std::vector<std::int32_t> tokens;       // no BOS
  std::vector<std::int32_t> token_bytes;  // [tokens], bytes of text per token; only needed for held-out text
};

struct CalibrationOptions {
  int context = 4096;    // tokens of a calibration window, BOS included: calibrate at serving length
  int max_windows = 32;  // for the moments, over all texts, taken evenly
  BasisOptions basis;
  int probe_windows = 2;  // of calibration text, over all texts, that the ladder is searched on
  LadderOptions ladder;
  // The ladder gets a rung that just meets each of these increases on the held-out text: absolute, and relative (1.8 %
  // is what +0.1 is at perplexity 5.5).
  double budget = 0.1;
  double budget_rel = 0.018;
  ScoreOptions score{.context = 4096, .stride = 2048, .max_windows = 4};  // held-out windows are spread over the text
  std::uint64_t seed = 0;                                                 // recorded; nothing is random
  // Results of the stages are kept in this file (and the maps in the same name + ".maps") until the plan is complete,
  // so that a calibration that was stopped goes on; empty: nothing is kept.
  std::string partial_path;
};

// Stage names for progress: "moments", "bases", "probe", "rungs", "measure", "budget", "recall"; done in [0, 1] within
// the stage.
using CalibrationProgress = std::function<bool(const char* stage, double done)>;

// kInvalidArgument: a text too short for one window; kDataLoss: the model computes NaN; errors of SolveLayer and
// ScoreText otherwise. recall_cases may be empty. Leftovers at partial_path that belong to other inputs are replaced.
Result<Plan> Calibrate(std::shared_ptr<const Checkpoint> checkpoint, const kernels::Ops& ops, ThreadPool& threads,
                       std::span<const CalibrationSource> texts, const CalibrationSource& heldout,
                       std::span<const RecallCase> recall_cases, std::int32_t bos_id, const CalibrationOptions& options,
                       const CalibrationProgress& progress = nullptr);

// Deletes what a stopped or finished calibration left at partial_path.
void RemovePartial(const std::string& partial_path);

}  // namespace zeroc
