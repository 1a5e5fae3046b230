// A plan: the maps of one model and its ladder of profiles, as `zeroc calibrate` writes them (zeroc.plan).
//
// The file is a safetensors container whose metadata holds a JSON part; docs/plan_format.md is the full text. A Plan
// is immutable and has passed every check, so readers on any thread may trust its sizes and widths.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "libzeroc/base/status.h"
#include "libzeroc/compression/fold.h"
#include "libzeroc/compression/profile.h"

namespace zeroc {

class Checkpoint;

// A text that calibration read, so that a figure can be traced to its data.
struct CalibrationText {
  std::string name;
  std::string hash;  // HashText of its bytes
  std::int64_t n_tokens = 0;
};

struct CalibrationFacts {
  std::vector<CalibrationText> texts;    // the moments come from these
  std::vector<CalibrationText> heldout;  // the perplexities come from these
  std::int64_t context_tokens = 0;       // length of one calibration window
  std::int64_t skip_tokens = 0;          // leading positions left out of the moments
  std::int64_t n_windows = 0;
  std::uint64_t seed = 0;
  double damping = 0;
};

// XXH3-128 of the bytes as 32 hex digits (what `xxhsum -H2` prints).
std::string HashText(std::string_view bytes);

struct PlanContents {
  std::string model_fingerprint;  // Checkpoint::fingerprint()
  ModelGeometry geometry;
  std::vector<LayerMaps> layers;  // [n_layers]
  CalibrationFacts calibration;
  double ppl_base = 0;          // decode-scored, uncompressed model, held-out text; 0: not measured
  std::vector<Profile> ladder;  // StandardLadder's five and any more, names unique
};

// A profile's own key and query maps of one layer, [n_kv_heads, head_dim, head_dim] each; both empty for a profile
// that packs nothing (identity: kernels take null).
struct KeyMaps {
  std::vector<float> a;  // A Hd, for QueryPrepArgs::q_map
  std::vector<float> b;  // B Hd, for KvWriteArgs::k_map
};

class Plan {
 public:
  // kInvalidArgument naming the field: sizes, map sizes, numbers that are not finite, A B^T or M N^T far from I,
  // a profile that ValidateProfile refuses, a standard profile missing or not uniform, names not unique.
  // Fills each profile's byte costs, so callers need not.
  static Result<Plan> Create(PlanContents contents);

  // kNotFound, kInvalidArgument (not a plan, unknown version, a field out of range), kDataLoss (hash mismatch).
  static Result<Plan> Open(const std::string& path);
  // As above, and kFailedPrecondition naming both fingerprints when the plan belongs to another model.
  static Result<Plan> Open(const std::string& path, const Checkpoint& checkpoint);
  // The same from bytes in memory; `name` stands for the path in messages. The bytes need not outlive the call.
  static Result<Plan> Parse(std::span<const std::byte> bytes, const std::string& name);

  // Writes a temporary file beside `path`, then renames: a reader sees the old plan or the new one.
  Status Save(const std::string& path) const;

  // 32 hex digits: XXH3-128 over everything that decides the KV bytes (model fingerprint, geometry, maps, names, tier
  // shapes, mass corrections and windows of the ladder). Measured costs, spectra and calibration facts are left out,
  // so that measuring again does not invalidate cached KV.
  const std::string& plan_id() const { return plan_id_; }

  const std::string& model_fingerprint() const { return contents_.model_fingerprint; }
  const ModelGeometry& geometry() const { return contents_.geometry; }
  const LayerMaps& layer(int layer_idx) const { return contents_.layers[static_cast<std::size_t>(layer_idx)]; }
  const CalibrationFacts& calibration() const { return contents_.calibration; }
  double ppl_base() const { return contents_.ppl_base; }
  const std::vector<Profile>& ladder() const { return contents_.ladder; }
  const PlanContents& contents() const { return contents_; }  // copy, change the ladder, Create again

  // nullptr when there is none of that name.
  const Profile* FindProfile(std::string_view name) const;
  // The measured profile with the fewest bytes per token whose ppl_increase is at most the bound (absolute);
  // bf16 when no other qualifies.
  const Profile& SmallestWithin(double max_ppl_increase) const;

  // The profile is one of this plan's ladder (or shaped like one): its runs sum to head_dim.
  KeyMaps KeyMapsOf(const Profile& profile, int layer_idx) const;

 private:
  Plan(PlanContents contents, std::string plan_id);

  PlanContents contents_;
  std::string plan_id_;
};

}  // namespace zeroc
