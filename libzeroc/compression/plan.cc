#include "libzeroc/compression/plan.h"

#include <algorithm>
#include <cmath>
#include <set>
#include <utility>

#include "libzeroc/base/check.h"
#include "libzeroc/checkpoint/checkpoint.h"
#include "libzeroc/compression/canonical.h"

namespace zeroc {
namespace {

constexpr int kIdentityVersion = 2;
constexpr std::size_t kMaxProfiles = 256;
constexpr std::size_t kMaxTexts = 256;
constexpr std::size_t kMaxTextName = 4096;
constexpr std::size_t kMaxFingerprint = 128;
// exp(kl) stays finite far beyond any profile worth keeping.
constexpr double kMaxKl = 100;
// Float32 maps of a basis damped at 1e-2 miss A B^T = I by about 1e-3 at worst; a wrong pair misses by the order of 1.
constexpr double kDualityTolerance = 2e-2;

bool AllFinite(const std::vector<float>& values) {
  return std::all_of(values.begin(), values.end(), [](float x) { return std::isfinite(x); });
}

// max |A B^T x - x| for one fixed vector of signs: d^2 work instead of d^3, and a wrong pair cannot hide from it but by
// a coincidence of measure zero.
double DualityError(const float* a, const float* b, int dim) {
  const auto d = static_cast<std::size_t>(dim);
  std::vector<double> x(d), y(d, 0.0);
  std::uint32_t state = 1;
  for (double& value : x) {
    state = state * 1664525u + 1013904223u;  // Numerical Recipes' generator; any fixed one will do
    value = (state >> 31) != 0 ? 1.0 : -1.0;
  }
  for (std::size_t i = 0; i < d; ++i) {
    for (std::size_t j = 0; j < d; ++j) y[j] += static_cast<double>(b[i * d + j]) * x[i];
  }
  double error = 0;
  for (std::size_t i = 0; i < d; ++i) {
    double z = 0;
    for (std::size_t j = 0; j < d; ++j) z += static_cast<double>(a[i * d + j]) * y[j];
    error = std::max(error, std::abs(z - x[i]));
  }
  return error;
}

Status ValidatePair(const char* what, const std::vector<float>& a, const std::vector<float>& b,
                    const std::vector<float>& s, const ModelGeometry& geometry) {
  const std::size_t n_spectrum =
      static_cast<std::size_t>(geometry.n_kv_heads) * static_cast<std::size_t>(geometry.head_dim);
  const std::size_t n_map = n_spectrum * static_cast<std::size_t>(geometry.head_dim);
  if (a.size() != n_map || b.size() != n_map || s.size() != n_spectrum) {
    return InvalidArgument(std::string(what) + ": " + std::to_string(a.size()) + ", " + std::to_string(b.size()) +
                           " and " + std::to_string(s.size()) + " values, not " + std::to_string(n_map) + ", " +
                           std::to_string(n_map) + " and " + std::to_string(n_spectrum));
  }
  if (!AllFinite(a) || !AllFinite(b) || !AllFinite(s)) {
    return InvalidArgument(std::string(what) + ": NaN or infinity");
  }
  for (int g = 0; g < geometry.n_kv_heads; ++g) {
    const std::ptrdiff_t at = std::ptrdiff_t{g} * geometry.head_dim * geometry.head_dim;
    const double error = DualityError(a.data() + at, b.data() + at, geometry.head_dim);
    if (!(error <= kDualityTolerance)) {
      return InvalidArgument(std::string(what) + ": KV head " + std::to_string(g) +
                             ": the two maps are not dual (off by " + std::to_string(error) + ")");
    }
  }
  return OkStatus();
}

Status ValidateTexts(const char* what, const std::vector<CalibrationText>& texts) {
  if (texts.size() > kMaxTexts) return InvalidArgument(std::string(what) + ": more than 256 texts");
  for (const CalibrationText& text : texts) {
    if (text.name.size() > kMaxTextName || text.hash.size() > kMaxFingerprint || text.n_tokens < 0) {
      return InvalidArgument(std::string(what) + ": a name or hash is too long, or a token count negative");
    }
  }
  return OkStatus();
}

Status ValidateFacts(const CalibrationFacts& facts) {
  ZEROC_RETURN_IF_ERROR(ValidateTexts("calibration texts", facts.texts));
  ZEROC_RETURN_IF_ERROR(ValidateTexts("held-out texts", facts.heldout));
  if (facts.context_tokens < 0 || facts.skip_tokens < 0 || facts.n_windows < 0) {
    return InvalidArgument("calibration: a negative count");
  }
  if (!std::isfinite(facts.damping) || facts.damping < 0) return InvalidArgument("calibration: damping out of range");
  return OkStatus();
}

Status ValidateCost(const Profile& profile, double ppl_base) {
  const ProfileCost& cost = profile.cost;
  if (!cost.measured) return OkStatus();
  const std::string context = "profile " + profile.name + ": cost: ";
  if (!(ppl_base > 0)) return InvalidArgument(context + "measured, but the plan has no ppl_base");
  if (!std::isfinite(cost.ppl_increase_direct)) return InvalidArgument(context + "ppl_increase_direct is not finite");
  if (!(cost.kl >= 0 && cost.kl <= kMaxKl)) return InvalidArgument(context + "kl is not in 0..100");
  if (cost.recall && !(*cost.recall >= 0 && *cost.recall <= 1))
    return InvalidArgument(context + "recall is not in 0..1");
  return OkStatus();
}

const Profile* Find(const std::vector<Profile>& ladder, std::string_view name) {
  const auto it = std::find_if(ladder.begin(), ladder.end(), [&](const Profile& p) { return p.name == name; });
  return it == ladder.end() ? nullptr : &*it;
}

// A standard profile may carry a mass correction.
bool SameWidths(const std::vector<KvShape>& x, const std::vector<KvShape>& y) {
  return std::equal(x.begin(), x.end(), y.begin(), y.end(),
                    [](const KvShape& a, const KvShape& b) { return a.k == b.k && a.v == b.v; });
}

Status ValidateLadder(const PlanContents& contents) {
  if (contents.ladder.size() > kMaxProfiles) return InvalidArgument("more than 256 profiles");
  std::set<std::string_view> names;
  for (const Profile& profile : contents.ladder) {
    ZEROC_RETURN_IF_ERROR(ValidateProfile(profile, contents.geometry));
    ZEROC_RETURN_IF_ERROR(ValidateCost(profile, contents.ppl_base));
    if (!names.insert(profile.name).second) return InvalidArgument("two profiles are named " + profile.name);
  }
  for (const Profile& standard : StandardLadder(contents.geometry)) {
    const Profile* profile = Find(contents.ladder, standard.name);
    if (profile == nullptr) return InvalidArgument("the ladder lacks the standard profile " + standard.name);
    if (!SameWidths(profile->layers, standard.layers) || !profile->young.empty()) {
      return InvalidArgument("profile " + standard.name + " is not of the uniform width that its name stands for");
    }
  }
  return OkStatus();
}

Status Validate(const PlanContents& contents) {
  const std::string& print = contents.model_fingerprint;
  if (print.empty() || print.size() > kMaxFingerprint ||
      !std::all_of(print.begin(), print.end(), [](char c) { return c > ' ' && c < 127; })) {
    return InvalidArgument("the model fingerprint is not 1 to 128 printable characters");
  }
  ZEROC_RETURN_IF_ERROR(ValidateGeometry(contents.geometry));
  if (contents.layers.size() != static_cast<std::size_t>(contents.geometry.n_layers)) {
    return InvalidArgument("maps for " + std::to_string(contents.layers.size()) + " layers, the model has " +
                           std::to_string(contents.geometry.n_layers));
  }
  for (std::size_t l = 0; l < contents.layers.size(); ++l) {
    const LayerMaps& maps = contents.layers[l];
    const std::string context = "layer " + std::to_string(l);
    ZEROC_RETURN_IF_ERROR(ValidatePair("key maps", maps.a, maps.b, maps.s_qk, contents.geometry).WithContext(context));
    ZEROC_RETURN_IF_ERROR(
        ValidatePair("value maps", maps.n, maps.m, maps.s_vo, contents.geometry).WithContext(context));
  }
  ZEROC_RETURN_IF_ERROR(ValidateFacts(contents.calibration));
  if (!std::isfinite(contents.ppl_base) || contents.ppl_base < 0) return InvalidArgument("ppl_base is out of range");
  return ValidateLadder(contents);
}

void FillCosts(PlanContents& contents) {
  for (Profile& profile : contents.ladder) {
    ProfileCost cost;
    if (profile.cost.measured) {
      cost = MeasuredCost(contents.ppl_base, profile.cost.ppl_increase_direct, profile.cost.kl, profile.cost.recall);
    }
    cost.kv_bytes_per_token = KvBytesPerToken(profile, contents.geometry, kCostContext);
    cost.bits_per_element = BitsPerElement(profile, contents.geometry, kCostContext);
    profile.cost = cost;
  }
}

void HashShape(const TierShape& shape, CanonicalHash& hash) {
  hash.Int(static_cast<std::int64_t>(shape.runs.size()));
  for (const kernels::KvRun& run : shape.runs) {
    hash.Int(run.bits);
    hash.Int(run.width);
    hash.Int(static_cast<int>(run.scale));
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

// The ladder's order says nothing about bytes, so profiles are taken by name.
std::string IdentityOf(const PlanContents& contents) {
  CanonicalHash hash;
  hash.Text("zeroc-plan-identity");
  hash.Int(kIdentityVersion);
  hash.Text(contents.model_fingerprint);
  const ModelGeometry& geometry = contents.geometry;
  for (const int size :
       {geometry.n_layers, geometry.n_heads, geometry.n_kv_heads, geometry.head_dim, geometry.hidden}) {
    hash.Int(size);
  }
  for (const LayerMaps& maps : contents.layers) {
    for (const std::vector<float>* map : {&maps.a, &maps.b, &maps.m, &maps.n}) hash.Floats(*map);
  }
  std::vector<const Profile*> profiles;
  for (const Profile& profile : contents.ladder) profiles.push_back(&profile);
  std::sort(profiles.begin(), profiles.end(), [](const Profile* x, const Profile* y) { return x->name < y->name; });
  for (const Profile* profile : profiles) {
    hash.Text(profile->name);
    hash.Int(profile->sink_tokens);
    hash.Int(profile->recent_tokens);
    HashLayers(profile->layers, hash);
    hash.Int(static_cast<std::int64_t>(profile->young.size()));
    for (const YoungTier& tier : profile->young) {
      hash.Int(tier.n_blocks);
      HashLayers(tier.layers, hash);
    }
  }
  return hash.Hex();
}

}  // namespace

std::string HashText(std::string_view bytes) {
  CanonicalHash hash;
  hash.Bytes(bytes);
  return hash.Hex();
}

Plan::Plan(PlanContents contents, std::string plan_id) : contents_(std::move(contents)), plan_id_(std::move(plan_id)) {}

Result<Plan> Plan::Create(PlanContents contents) {
  ZEROC_RETURN_IF_ERROR(Validate(contents).WithContext("plan"));
  FillCosts(contents);
  std::string plan_id = IdentityOf(contents);
  return Plan(std::move(contents), std::move(plan_id));
}

Result<Plan> Plan::Open(const std::string& path, const Checkpoint& checkpoint) {
  ZEROC_ASSIGN_OR_RETURN(Plan plan, Open(path));
  if (plan.model_fingerprint() != checkpoint.fingerprint()) {
    return FailedPrecondition(path + ": the plan was calibrated for the model with fingerprint " +
                              plan.model_fingerprint() + ", " + checkpoint.dir() + " has " + checkpoint.fingerprint());
  }
  if (plan.geometry() != GeometryOf(checkpoint.config())) {
    return FailedPrecondition(path + ": the plan's sizes differ from those of " + checkpoint.dir());
  }
  return plan;
}

const Profile* Plan::FindProfile(std::string_view name) const { return Find(contents_.ladder, name); }

const Profile& Plan::SmallestWithin(double max_ppl_increase) const {
  const Profile* best = FindProfile("bf16");
  ZEROC_CHECK(best != nullptr);  // Create refuses a ladder without it
  for (const Profile& profile : contents_.ladder) {
    const bool fits = profile.cost.measured && profile.cost.ppl_increase <= max_ppl_increase;
    if (fits && profile.cost.kv_bytes_per_token < best->cost.kv_bytes_per_token) best = &profile;
  }
  return *best;
}

KeyMaps Plan::KeyMapsOf(const Profile& profile, int layer_idx) const {
  ZEROC_CHECK(layer_idx >= 0 && layer_idx < contents_.geometry.n_layers, layer_idx);
  if (!profile.packs()) return {};
  const std::size_t at = static_cast<std::size_t>(layer_idx);
  KeyMaps maps{contents_.layers[at].a, contents_.layers[at].b};
  RotateColumns(maps.a, profile.layers[at].k.runs);
  RotateColumns(maps.b, profile.layers[at].k.runs);
  return maps;
}

}  // namespace zeroc
