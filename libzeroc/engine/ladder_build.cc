#include "libzeroc/engine/ladder_build.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <numeric>
#include <sstream>

#include "libzeroc/base/check.h"

namespace zeroc {
namespace {

using kernels::KvRun;

// Errors of one side (nats per token) that no rung worth having will choose, and that no rung can feel.
constexpr double kHopeless = 0.05;
constexpr double kNegligible = 1e-5;
// The ratio of direct increase to KL is taken from probes of at most this KL, the range that rungs use.
constexpr double kRatioKlMax = 0.01;
constexpr double kMaxDirectOverKl = 4;
constexpr double kMassStrengths[] = {1.0, 2.0};

bool SameLayers(const Profile& x, const Profile& y) {
  return x.sink_tokens == y.sink_tokens && x.recent_tokens == y.recent_tokens && x.layers == y.layers &&
         x.young == y.young;
}

// The final shapes with no quantised or dropped run below `bits`: the same runs, so that the rotation stays.
std::vector<KvShape> YoungLayers(std::vector<KvShape> layers, int bits) {
  for (KvShape& shape : layers) {
    shape.mass.clear();
    for (TierShape* side : {&shape.k, &shape.v}) {
      for (KvRun& run : side->runs) {
        if (run.bits < bits) run.scale = kernels::KvScaleKind::kAffine;
        run.bits = std::max(run.bits, bits);
      }
    }
  }
  return layers;
}

std::string NameOf(double bits) {
  std::ostringstream name;
  name << 'z' << std::round(bits * 100) / 100;
  return std::move(name).str();
}

}  // namespace

LadderBuilder::LadderBuilder(const Plan& plan, LadderProbe& probe, const MassTable* masses, LadderOptions options,
                             LadderProgress progress)
    : plan_(plan), probe_(probe), masses_(masses), options_(std::move(options)), progress_(std::move(progress)) {
  ZEROC_CHECK(!options_.windows.empty() && options_.first_probes >= 2 && options_.second_probes >= 0,
              options_.windows.size(), options_.first_probes, options_.second_probes);
  sides_ = MakeSides();
}

std::vector<LadderBuilder::Side> LadderBuilder::MakeSides() const {
  std::vector<int> all(static_cast<std::size_t>(plan_.geometry().n_layers));
  std::iota(all.begin(), all.end(), 0);
  std::vector<Side> sides;
  for (const bool is_key : {true, false}) {
    for (const int layer : all) {
      if (!options_.layer_axis && layer > 0) continue;
      Side& side = sides.emplace_back();
      side.is_key = is_key;
      side.layers = options_.layer_axis ? std::vector<int>{layer} : all;
      for (const int l : side.layers) {
        const LayerMaps& maps = plan_.layer(l);
        const std::vector<float>& s = is_key ? maps.s_qk : maps.s_vo;
        side.spectra.insert(side.spectra.end(), s.begin(), s.end());
      }
    }
  }
  return sides;
}

Profile LadderBuilder::Exact() const {
  Profile profile;
  profile.name = "exact";
  profile.sink_tokens = options_.windows.front().sink_tokens;
  profile.recent_tokens = options_.windows.front().recent_tokens;
  const TierShape exact{{KvRun{16, plan_.geometry().head_dim}}};
  profile.layers.assign(static_cast<std::size_t>(plan_.geometry().n_layers), KvShape{exact, exact, {}});
  return profile;
}

Result<std::vector<float>> LadderBuilder::MassOf(int layer, const TierShape& k_shape, const Profile& windows) {
  std::ostringstream text;
  text << layer << ':' << windows.sink_tokens << ':' << windows.recent_tokens;
  for (const KvRun& run : k_shape.runs)
    text << ':' << run.bits << 'x' << run.width << 'x' << static_cast<int>(run.scale);
  const std::string key = std::move(text).str();
  const auto found = mass_cache_.find(key);
  if (found != mass_cache_.end()) return found->second;
  ZEROC_ASSIGN_OR_RETURN(std::vector<float> mass,
                         masses_->Fit(plan_, layer, k_shape, windows.sink_tokens, windows.recent_tokens));
  return mass_cache_[key] = std::move(mass);
}

// Of the strength that each key side has.
Status LadderBuilder::AddMass(Profile& profile) {
  for (const Side& side : sides_) {
    if (!side.is_key) continue;
    for (const int layer : side.layers) {
      KvShape& shape = profile.layers[static_cast<std::size_t>(layer)];
      shape.mass.clear();
      const bool exact =
          std::all_of(shape.k.runs.begin(), shape.k.runs.end(), [](const KvRun& run) { return run.bits == 16; });
      const double strength = side.mass_strength;
      if (masses_ == nullptr || strength == 0 || exact) continue;
      ZEROC_ASSIGN_OR_RETURN(shape.mass, MassOf(layer, shape.k, profile));
      for (float& value : shape.mass) value = std::clamp(value * static_cast<float>(strength), -kMaxMass, kMaxMass);
    }
  }
  return OkStatus();
}

Profile LadderBuilder::ProbeOf(const Side& side, const TierShape& shape) const {
  Profile profile = Exact();
  for (const int layer : side.layers) {
    KvShape& layer_shape = profile.layers[static_cast<std::size_t>(layer)];
    (side.is_key ? layer_shape.k : layer_shape.v) = shape;
  }
  return profile;
}

// Measures the options of every side that are not measured yet.
Status LadderBuilder::MeasureOptions(double stage_begin, double stage_end) {
  std::vector<Profile> profiles;
  for (const Side& side : sides_) {
    for (std::size_t i = side.direct.size(); i < side.options.size(); ++i) {
      profiles.push_back(ProbeOf(side, side.options[i].shape));
    }
  }
  const auto on_done = [&](std::size_t n) {
    const double share = static_cast<double>(n) / static_cast<double>(profiles.size());
    return progress_ == nullptr || progress_("probe", stage_begin + (stage_end - stage_begin) * share);
  };
  ZEROC_ASSIGN_OR_RETURN(const std::vector<ProbeResult> results, probe_.Measure(profiles, on_done));
  std::size_t next = 0;
  for (Side& side : sides_) {
    for (std::size_t i = side.direct.size(); i < side.options.size(); ++i, ++next) {
      side.options[i].error = std::max(results[next].kl - floor_.kl, 0.0);
      side.direct.push_back(results[next].nll_increase - floor_.nll_increase);
    }
  }
  return OkStatus();
}

// Per key side, at the option nearest to one tenth of the largest error that counts.
Status LadderBuilder::ChooseMass() {
  if (masses_ == nullptr) return OkStatus();
  for (Side& side : sides_) {
    if (!side.is_key) continue;
    const auto distance = [](const ShapeOption& o) { return std::abs(std::log(std::max(o.error, 1e-9) / 2e-3)); };
    const auto option = std::min_element(side.options.begin(), side.options.end(),
                                         [&](const auto& x, const auto& y) { return distance(x) < distance(y); });
    std::vector<Profile> tried{ProbeOf(side, option->shape)};
    for (const double strength : kMassStrengths) {
      side.mass_strength = strength;
      ZEROC_RETURN_IF_ERROR(AddMass(tried.emplace_back(tried[0])));
    }
    // By KL alone: on a few windows the perplexity's own change is chance, and the best of several chances wins.
    ZEROC_ASSIGN_OR_RETURN(const std::vector<ProbeResult> results, probe_.Measure(tried, nullptr));
    const auto less = [](const ProbeResult& a, const ProbeResult& b) { return a.kl < b.kl; };
    const auto best = std::min_element(results.begin(), results.end(), less) - results.begin();
    side.mass_strength = best == 0 ? 0 : kMassStrengths[best - 1];
  }
  return OkStatus();
}

Status LadderBuilder::ProbeSides() {
  const Profile exact = Exact();
  ZEROC_ASSIGN_OR_RETURN(const std::vector<ProbeResult> floor, probe_.Measure({&exact, 1}, nullptr));
  floor_ = floor[0];
  const ModelGeometry& geometry = plan_.geometry();
  const auto add = [&](Side& side, const ErrorModel& model, double low, double high, int n) {
    std::vector<ShapeOption> more =
        CandidateShapes(geometry.head_dim, side.spectra, options_.shapes, model, low, high, n, side.options);
    std::move(more.begin(), more.end(), std::back_inserter(side.options));
  };
  for (Side& side : sides_) {
    const double heads = static_cast<double>(side.spectra.size()) / geometry.head_dim;
    // From one cell at one bit to 8 bits everywhere.
    add(side, {}, heads * 2.6, heads * (geometry.head_dim + 2.0), options_.first_probes);
  }
  ZEROC_RETURN_IF_ERROR(MeasureOptions(0, 0.4));
  for (Side& side : sides_) {
    // Where the side's error is neither hopeless nor nothing.
    double low = side.options.front().bytes, high = side.options.back().bytes;
    for (const ShapeOption& option : side.options) {
      if (option.error > kHopeless) low = std::max(low, option.bytes);
      if (option.error < kNegligible) high = std::min(high, option.bytes);
    }
    add(side, FitErrorModel(side.options, side.spectra), std::min(low, high), high, options_.second_probes);
  }
  ZEROC_RETURN_IF_ERROR(MeasureOptions(0.4, 0.9));
  ZEROC_RETURN_IF_ERROR(ChooseMass());
  std::vector<std::vector<ShapeOption>> hulls;
  for (Side& side : sides_) {
    double direct = 0, kl = 0;
    for (std::size_t i = 0; i < side.options.size(); ++i) {
      if (side.options[i].error > kRatioKlMax) continue;
      direct += side.direct[i];
      kl += side.options[i].error;
    }
    side.direct_over_kl = kl > 0 ? std::clamp(direct / kl, 1.0, kMaxDirectOverKl) : 1.0;
    for (ShapeOption& option : side.options) option.error *= side.direct_over_kl;
    side.options = LowerHull(std::move(side.options));
    hulls.push_back(side.options);
  }
  path_ = EfficientAllocations(hulls);
  return OkStatus();
}

Profile LadderBuilder::ProfileOf(const Allocation& allocation, const WindowChoice& window) const {
  Profile profile = Exact();
  profile.sink_tokens = window.sink_tokens;
  profile.recent_tokens = window.recent_tokens;
  for (std::size_t s = 0; s < sides_.size(); ++s) {
    const TierShape& shape = sides_[s].options[static_cast<std::size_t>(allocation.choice[s])].shape;
    for (const int layer : sides_[s].layers) {
      KvShape& layer_shape = profile.layers[static_cast<std::size_t>(layer)];
      (sides_[s].is_key ? layer_shape.k : layer_shape.v) = shape;
    }
  }
  for (const YoungChoice& tier : window.young) {
    profile.young.push_back({tier.blocks, YoungLayers(profile.layers, tier.bits)});
  }
  return profile;
}

// Bytes rise along the path (but for a few bytes of padding). The smallest when none fits.
Profile LadderBuilder::LargestProfile(double bytes_max, const WindowChoice& window) const {
  std::size_t low = 0, high = path_.size();
  while (high - low > 1) {
    const std::size_t middle = low + (high - low) / 2;
    const double bytes = KvBytesPerToken(ProfileOf(path_[middle], window), plan_.geometry(), kCostContext);
    (bytes <= bytes_max ? low : high) = middle;
  }
  return ProfileOf(path_[low], window);
}

// Those of the rungs next to these bytes, below and above.
std::vector<WindowChoice> LadderBuilder::WindowsFor(double bytes_max) const {
  if (chosen_.empty()) return options_.windows;
  const auto above = chosen_.lower_bound(bytes_max);
  std::vector<WindowChoice> windows;
  if (above != chosen_.end()) windows.push_back(above->second);
  if (above != chosen_.begin()) windows.push_back(std::prev(above)->second);
  if (windows.size() == 2 && windows[0] == windows[1]) windows.pop_back();
  return windows;
}

Result<std::vector<double>> LadderBuilder::Promises(std::span<const Profile> profiles) {
  ZEROC_ASSIGN_OR_RETURN(const std::vector<ProbeResult> results, probe_.Measure(profiles, nullptr));
  std::vector<double> promises;
  for (const ProbeResult& result : results) promises.push_back(Promise(result));
  return promises;
}

Result<Profile> LadderBuilder::Best(double bytes_max, std::span<const WindowChoice> windows, WindowChoice* chosen) {
  std::vector<Profile> tried;
  std::vector<WindowChoice> choices;
  for (const WindowChoice& window : windows) {
    Profile profile = LargestProfile(bytes_max, window);
    const bool too_large = KvBytesPerToken(profile, plan_.geometry(), kCostContext) > bytes_max;
    if (too_large && (&window != &windows.back() || !tried.empty())) continue;
    tried.push_back(profile);
    choices.push_back(window);
    if (masses_ == nullptr) continue;
    // What helps one side alone need not help all of them together.
    ZEROC_RETURN_IF_ERROR(AddMass(profile));
    tried.push_back(std::move(profile));
    choices.push_back(window);
  }
  ZEROC_ASSIGN_OR_RETURN(const std::vector<double> costs, Promises(tried));
  const auto best = static_cast<std::size_t>(std::min_element(costs.begin(), costs.end()) - costs.begin());
  *chosen = choices[best];
  return tried[best];
}

// The best of the windows, then that one with the other sinks.
Result<Profile> LadderBuilder::BestOfAll(double bytes_max, WindowChoice* chosen) {
  ZEROC_RETURN_IF_ERROR(Best(bytes_max, options_.windows, chosen).status());
  std::vector<WindowChoice> windows{*chosen};
  for (const int sink_tokens : options_.sinks) {
    if (sink_tokens == chosen->sink_tokens) continue;
    windows.push_back(*chosen);
    windows.back().sink_tokens = sink_tokens;
  }
  return Best(bytes_max, windows, chosen);
}

Result<Profile> LadderBuilder::Rung(double bytes_max) {
  WindowChoice ignored;
  return Best(bytes_max, WindowsFor(bytes_max), &ignored);
}

Result<std::vector<Profile>> LadderBuilder::Rungs() {
  const ModelGeometry& geometry = plan_.geometry();
  const double elements = 2.0 * geometry.n_layers * geometry.n_kv_heads * geometry.head_dim;
  std::vector<double> bits = options_.rungs;
  std::sort(bits.begin(), bits.end(), std::greater<>());
  std::vector<Profile> all(bits.size());
  std::size_t n_done = 0;
  for (const bool all_windows : {true, false}) {
    std::map<double, WindowChoice> chosen;
    for (std::size_t i = 0; i < bits.size(); ++i) {
      if ((i % 2 == 0 || i + 1 == bits.size()) != all_windows) continue;
      const double bytes_max = bits[i] * elements / 8;
      WindowChoice& choice = chosen[bytes_max];
      ZEROC_ASSIGN_OR_RETURN(
          all[i], all_windows ? BestOfAll(bytes_max, &choice) : Best(bytes_max, WindowsFor(bytes_max), &choice));
      all[i].name = NameOf(bits[i]);
      const double done = static_cast<double>(++n_done) / static_cast<double>(bits.size());
      if (progress_ != nullptr && !progress_("rungs", done)) return Cancelled("calibration was stopped");
    }
    chosen_.merge(chosen);
  }
  std::vector<Profile> rungs;
  for (std::size_t i = 0; i < bits.size(); ++i) {
    const bool fits = KvBytesPerToken(all[i], geometry, kCostContext) <= bits[i] * elements / 8;
    if (fits && (rungs.empty() || !SameLayers(rungs.back(), all[i]))) rungs.push_back(std::move(all[i]));
  }
  return rungs;
}

}  // namespace zeroc
