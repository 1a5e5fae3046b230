#include "libzeroc/engine/ladder_probe.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <tuple>
#include <utility>

#include "libzeroc/compression/canonical.h"

namespace zeroc {
namespace {

// Profiles measured side by side: what they share is a small part of the work, the caches stay small.
constexpr std::size_t kBatch = 8;

bool IsExact(const KvShape& shape) {
  const auto exact = [](const TierShape& side) {
    return std::all_of(side.runs.begin(), side.runs.end(), [](const kernels::KvRun& run) { return run.bits == 16; });
  };
  return exact(shape.k) && exact(shape.v) && shape.mass.empty();
}

// Layers in front of the first that is not exact; 0 for profiles whose blocks age, and for one that is exact all over.
int CountExactLayers(const Profile& profile) {
  const auto first = std::find_if_not(profile.layers.begin(), profile.layers.end(), IsExact);
  if (first == profile.layers.end() || !profile.young.empty()) return 0;
  return static_cast<int>(first - profile.layers.begin());
}

// The exact profile with the windows of `profile`, whose first layer is exact.
Profile TrunkOf(Profile profile) {
  std::fill(profile.layers.begin(), profile.layers.end(), KvShape(profile.layers.front()));
  return profile;
}

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

// All of the same windows, and of n_exact_layers at least.
Status LadderProbe::Run(std::span<const Profile* const> profiles, int n_exact_layers) {
  std::vector<Profile> copies;
  for (const Profile* profile : profiles) copies.push_back(*profile);
  if (n_exact_layers > 0) copies.push_back(TrunkOf(copies.front()));
  ZEROC_ASSIGN_OR_RETURN(auto formats, FormatsOf(*models_.folded, *models_.plan, copies));
  score_.trunk_layers = n_exact_layers;
  score_.trunk = {};
  if (n_exact_layers > 0) {
    score_.trunk.model = models_.folded;
    score_.trunk.format = formats.back();
    formats.pop_back();
    copies.pop_back();
  }
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
  std::map<std::tuple<int, int, int>, std::vector<const Profile*>> missing;  // by what a batch has in common
  std::vector<std::string> names;
  std::size_t n_done = profiles.size();
  for (const Profile& profile : profiles) {
    const std::string name = LogName(profile);
    const bool listed = std::find(names.begin(), names.end(), name) != names.end();
    names.push_back(name);
    if (log_.Find(name) != nullptr || listed) continue;
    missing[{CountExactLayers(profile), profile.sink_tokens, profile.recent_tokens}].push_back(&profile);
    --n_done;
  }
  for (const auto& [common, group] : missing) {
    for (std::size_t begin = 0; begin < group.size(); begin += kBatch) {
      const std::size_t n = std::min(kBatch, group.size() - begin);
      ZEROC_RETURN_IF_ERROR(Run(std::span(group).subspan(begin, n), std::get<0>(common)));
      n_done += n;
      if (on_done != nullptr && !on_done(n_done)) return Cancelled("calibration was stopped");
    }
  }
  std::vector<ProbeResult> results;
  for (const std::string& name : names) {
    const std::vector<double>* figures = log_.Find(name);
    if (figures == nullptr || figures->size() != 2) return DataLoss("calibration log: " + name + " is damaged");
    results.push_back({(*figures)[0], (*figures)[1]});
  }
  return results;
}

}  // namespace zeroc
