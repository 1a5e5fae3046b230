// The baselines by name, as `zeroc --method` takes them.
//
// Each is a published way to hold the KV cache, run in this engine with the same weights, tokens and windows; what each
// does to the prompt and to decoded tokens, and how its bytes are counted, stands at its cache (quantized_caches.h,
// evicting_caches.h, low_rank_caches.h). docs/baselines.md sets them beside their papers' figures.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "libzeroc/base/status.h"
#include "libzeroc/model/sequence_attention.h"
#include "libzeroc/model/transformer.h"

namespace zeroc {

// All names, "exact" left out: bf16 in the baselines' own attention, the control for tests.
std::span<const char* const> BaselineNames();
bool IsBaseline(const std::string& name);
// Whether its size is a choice, and what it is without one: the share of 16-bit KV that its paper leads with.
bool HasFreeSize(const std::string& name);
double DefaultBits(const std::string& name);
// Whether its bases come from text.
bool NeedsCalibration(const std::string& name);

struct BaselineOptions {
  std::string name;
  double kv_bits = 0;  // 0: DefaultBits
  // Ids of calibration windows, BOS included; used when NeedsCalibration.
  std::vector<std::vector<std::int32_t>> calibration;
  std::function<bool(double)> progress;  // of the calibration; false cancels
};

// model is used for calibration during the call and not kept. kInvalidArgument: unknown name, bits for a method of one
// size or beyond those of an exact number, no calibration text where it is needed.
Result<std::shared_ptr<const AttentionMethod>> MakeBaseline(Transformer& model, const BaselineOptions& options);

// Calibration text for want of a file: what the model says after BOS at temperature 1. Deterministic for a seed.
Result<std::vector<std::vector<std::int32_t>>> SampleWindows(Transformer& model, std::int32_t bos_id, int n_windows,
                                                             int context, std::uint64_t seed,
                                                             const std::function<bool(double)>& progress = nullptr);

}  // namespace zeroc
