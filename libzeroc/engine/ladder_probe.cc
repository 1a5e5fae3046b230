#include "libzeroc/engine/ladder_probe.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "libzeroc/compression/canonical.h"

namespace zeroc {
namespace {

// Profiles measured side by side: the base's share of the work is one in nine, the caches stay small.
constexpr std::size_t kBatch = 8;

void HashShape(const TierShape& shape, CanonicalHash& hash) {
  hash.Int(static_cast<std::int64_t>(shape.runs.size()));
  for (const kernels::KvRun& run : shape.runs) {
    hash.Int(run.bits);
    hash.Int(run.width);
    hash.Int(static_cast<std::int64_t>(run.scale));
  }
}

void HashLayers(const std::vector<KvShape>& layers, CanonicalHash& hash) {
  hash.Int(static_cast<std::int64_t>(layers.size()));
  for (const KvShape& shape : layers) {
    HashShape(shape.k, hash);
    HashShape(shape.v, hash);
    hash.Floats(shape.mass);
  }
}

}  // namespace

std::string ProfileHash(const Profile& profile) {
  CanonicalHash hash;
  hash.Int(profile.sink_tokens);
  hash.Int(profile.recent_tokens);
  HashLayers(profile.layers, hash);
  for (const YoungTier& tier : profile.young) {
    hash.Int(tier.n_blocks);
    HashLayers(tier.layers, hash);
  }
  return hash.Hex();
}

Result<std::vector<std::shared_ptr<const KvFormat>>> FormatsOf(const Transformer& model, const Plan& plan,
                                                               std::span<const Profile> profiles) {
  PlanContents contents = plan.contents();
  contents.ladder = StandardLadder(contents.geometry);
  for (std::size_t i = 0; i < profiles.size(); ++i) {
    Profile& probe = contents.ladder.emplace_back(profiles[i]);
    probe.name = "probe" + std::to_string(i);
    probe.cost = {};
  }
  ZEROC_ASSIGN_OR_RETURN(const Plan probes, Plan::Create(std::move(contents)));
  const int exact_bits = model.ops().act_bytes == 4 ? 32 : 16;
  std::vector<std::shared_ptr<const KvFormat>> formats;
  for (std::size_t i = 0; i < profiles.size(); ++i) {
    ZEROC_ASSIGN_OR_RETURN(auto format,
                           KvFormat::FromPlan(model.config(), probes, "probe" + std::to_string(i), exact_bits));
    formats.push_back(std::move(format));
  }
  return formats;
}

double Promise(const ProbeResult& result) { return std::expm1(std::max({result.kl, result.nll_increase, 0.0})); }

LadderProbe::LadderProbe(Models models, WindowedText text, std::int32_t bos_id, ScoreOptions score,
                         std::string log_prefix, CalibrationLog& log)
    : models_(std::move(models)),
      text_(std::move(text)),
      token_bytes_(text_.tokens.size(), 1),
      bos_id_(bos_id),
      score_(std::move(score)),
      log_prefix_(std::move(log_prefix)),
      log_(log) {
  score_.through_decode = false;
  score_.window_begins = text_.begins;
}

std::string LadderProbe::LogName(const Profile& profile) const { return log_prefix_ + ":" + ProfileHash(profile); }

Status LadderProbe::Run(std::span<const Profile* const> profiles) {
  std::vector<Profile> copies;
  for (const Profile* profile : profiles) copies.push_back(*profile);
  ZEROC_ASSIGN_OR_RETURN(const auto formats, FormatsOf(*models_.folded, *models_.plan, copies));
  ScoredMethod base;
  base.model = models_.plain;
  ZEROC_ASSIGN_OR_RETURN(base.format, models_.plain->Format("none"));
  std::vector<ScoredMethod> methods;
  for (const auto& format : formats) {
    ScoredMethod& method = methods.emplace_back();
    method.model = models_.folded;
    method.format = format;
  }
  ZEROC_ASSIGN_OR_RETURN(const std::vector<TextScore> scores,
                         ScoreText(text_.tokens, token_bytes_, bos_id_, base, methods, score_));
  for (std::size_t i = 0; i < copies.size(); ++i) {
    ZEROC_RETURN_IF_ERROR(log_.Add(LogName(copies[i]), {scores[i + 1].kl, scores[i + 1].nll - scores[0].nll}));
    ++n_measured_;
  }
  return OkStatus();
}

Result<std::vector<ProbeResult>> LadderProbe::Measure(std::span<const Profile> profiles,
                                                      const std::function<bool(std::size_t)>& on_done) {
  std::vector<const Profile*> missing;
  std::vector<std::string> names;
  for (const Profile& profile : profiles) {
    const std::string name = LogName(profile);
    const bool listed = std::find(names.begin(), names.end(), name) != names.end();
    if (log_.Find(name) == nullptr && !listed) missing.push_back(&profile);
    names.push_back(name);
  }
  const std::size_t n_known = profiles.size() - missing.size();
  for (std::size_t begin = 0; begin < missing.size(); begin += kBatch) {
    const std::size_t n = std::min(kBatch, missing.size() - begin);
    ZEROC_RETURN_IF_ERROR(Run(std::span(missing).subspan(begin, n)));
    if (on_done != nullptr && !on_done(n_known + begin + n)) return Cancelled("calibration was stopped");
  }
  std::vector<ProbeResult> results;
  for (const std::string& name : names) {
    const std::vector<double>* figures = log_.Find(name);
    if (figures == nullptr || figures->size() != 2) return DataLoss("calibration log: " + name + " is damaged");
    results.push_back({(*figures)[0], (*figures)[1]});
  }
  return results;
}

Result<double> LadderProbe::BasePerplexity() {
  const std::string name = log_prefix_ + ":base";
  if (log_.Find(name) == nullptr) {
    ScoredMethod base;
    base.model = models_.plain;
    ZEROC_ASSIGN_OR_RETURN(base.format, models_.plain->Format("none"));
    ZEROC_ASSIGN_OR_RETURN(const std::vector<TextScore> scores,
                           ScoreText(text_.tokens, token_bytes_, bos_id_, base, {}, score_));
    ZEROC_RETURN_IF_ERROR(log_.Add(name, {scores[0].ppl}));
  }
  return (*log_.Find(name))[0];
}

}  // namespace zeroc
