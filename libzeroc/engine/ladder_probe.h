// Runs candidate profiles through the packed engine and measures what they cost on calibration text.
//
// Profiles that begin with exact layers share these: they run once for all profiles of a batch. The uncompressed
// model's logits are kept in score.base_logits_file where that is set.
//
// A probe need not be in the plan: maps and folded weights are the same for every profile, so any shapes can be tried
// on one opened model. Scored as prefill chunks (ScoreOptions::through_decode = false): the visibility rule, and so the
// result up to rounding, is that of decode. Figures go through the log, so a stopped calibration does not repeat them.
// Not thread-safe; the models and the log must outlive the object.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "libzeroc/base/status.h"
#include "libzeroc/compression/plan.h"
#include "libzeroc/engine/calibration_log.h"
#include "libzeroc/engine/scoring.h"

namespace zeroc {

struct ProbeResult {
  double kl = 0;            // nats per token
  double nll_increase = 0;  // nats per token on the text itself; may be negative
};

// The larger of the two measures of the perplexity increase (design section 2), relative to the perplexity.
double Promise(const ProbeResult& result);

// Full windows of text, one after the other. BOS stands before each of them when they are run.
struct WindowedText {
  std::vector<std::int32_t> tokens;
  std::vector<std::int64_t> begins;
};

class LadderProbe {
 public:
  struct Models {
    Transformer* plain = nullptr;
    Transformer* folded = nullptr;
    std::shared_ptr<const Plan> plan;  // the folded model's
  };

  // score.through_decode and score.window_begins are set here.
  LadderProbe(Models models, WindowedText text, std::int32_t bos_id, ScoreOptions score, std::string log_prefix,
              CalibrationLog& log);

  // One result per profile. on_done(n) after each batch, with the number of profiles done; false cancels.
  Result<std::vector<ProbeResult>> Measure(std::span<const Profile> profiles,
                                           const std::function<bool(std::size_t)>& on_done);

  const WindowedText& text() const { return text_; }
  std::size_t n_measured() const { return n_measured_; }  // not found in the log

 private:
  Status Run(std::span<const Profile* const> profiles, int n_exact_layers);
  std::string LogName(const Profile& profile) const;

  Models models_;
  WindowedText text_;
  std::vector<std::int32_t> token_bytes_;
  std::int32_t bos_id_;
  ScoreOptions score_;
  std::string log_prefix_;
  CalibrationLog& log_;
  std::size_t n_measured_ = 0;
};

// The formats of profiles that need not be in the plan, in their order.
Result<std::vector<std::shared_ptr<const KvFormat>>> FormatsOf(const Transformer& model, const Plan& plan,
                                                               std::span<const Profile> profiles);

// XXH3 over windows, shapes and mass corrections: what a measurement depends on. The name is left out.
std::string ProfileHash(const Profile& profile);

}  // namespace zeroc
