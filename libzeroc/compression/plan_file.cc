#include "libzeroc/compression/plan_file.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <utility>

#include "libzeroc/checkpoint/safetensors.h"
#include "libzeroc/compression/canonical.h"
#include "libzeroc/compression/plan.h"

namespace zeroc {
namespace {

using nlohmann::json;

constexpr std::string_view kVersion = "2";
constexpr std::size_t kMaxTextBytes = std::size_t{4} << 20;  // 40 profiles of 80 layers of 8 heads with mass stay below
constexpr int kMaxDepth = 10;  // the format needs 9; a parsed tree costs up to 64 bytes per level of nesting
constexpr std::size_t kMaxString = 4096;

// In the order of the content hash.
struct MapTensor {
  const char* name;
  std::vector<float> LayerMaps::*member;
  bool is_spectrum;  // [n_layers, n_kv_heads, head_dim] instead of [.., head_dim, head_dim]
};
constexpr std::array<MapTensor, 6> kTensors = {{{"qk.a", &LayerMaps::a, false},
                                                {"qk.b", &LayerMaps::b, false},
                                                {"qk.s", &LayerMaps::s_qk, true},
                                                {"vo.m", &LayerMaps::m, false},
                                                {"vo.n", &LayerMaps::n, false},
                                                {"vo.s", &LayerMaps::s_vo, true}}};

std::vector<std::int64_t> TensorShape(const MapTensor& tensor, const ModelGeometry& geometry) {
  std::vector<std::int64_t> shape = {geometry.n_layers, geometry.n_kv_heads, geometry.head_dim};
  if (!tensor.is_spectrum) shape.push_back(geometry.head_dim);
  return shape;
}

// ---- writing ----

json ShapeJson(const TierShape& shape) {
  json runs = json::array();
  for (const kernels::KvRun& run : shape.runs) {
    json entry = {run.bits, run.width};
    if (run.scale != kernels::KvScaleKind::kAffine) entry.push_back(static_cast<int>(run.scale));
    runs.push_back(std::move(entry));
  }
  return runs;
}

// The flat numbers as one array per KV head.
json MassJson(const KvShape& shape) {
  if (shape.mass.empty()) return nullptr;
  const auto per_head = static_cast<std::ptrdiff_t>(1 + shape.k.runs.size());
  json heads = json::array();
  for (auto it = shape.mass.begin(); it != shape.mass.end(); it += per_head) {
    heads.push_back(std::vector<float>(it, it + per_head));
  }
  return heads;
}

json CostJson(const ProfileCost& cost) {
  if (!cost.measured) return nullptr;
  return {{"ppl_increase_direct", cost.ppl_increase_direct},
          {"kl", cost.kl},
          {"recall", cost.recall ? json(*cost.recall) : json(nullptr)}};
}

json LayersJson(const std::vector<KvShape>& shapes) {
  json layers = json::array();
  for (const KvShape& shape : shapes) {
    layers.push_back({{"k", ShapeJson(shape.k)}, {"v", ShapeJson(shape.v)}, {"mass", MassJson(shape)}});
  }
  return layers;
}

json ProfileJson(const Profile& profile) {
  json young = json::array();
  for (const YoungTier& tier : profile.young) {
    young.push_back({{"n_blocks", tier.n_blocks}, {"layers", LayersJson(tier.layers)}});
  }
  return {{"name", profile.name},      {"sink_tokens", profile.sink_tokens},   {"recent_tokens", profile.recent_tokens},
          {"young", std::move(young)}, {"layers", LayersJson(profile.layers)}, {"measured", CostJson(profile.cost)}};
}

json TextsJson(const std::vector<CalibrationText>& texts) {
  json out = json::array();
  for (const CalibrationText& text : texts) {
    out.push_back({{"name", text.name}, {"xxh3", text.hash}, {"n_tokens", text.n_tokens}});
  }
  return out;
}

json PlanJson(const Plan& plan) {
  const ModelGeometry& geometry = plan.geometry();
  const CalibrationFacts& facts = plan.calibration();
  json ladder = json::array();
  for (const Profile& profile : plan.ladder()) ladder.push_back(ProfileJson(profile));
  return {{"plan_id", plan.plan_id()},
          {"model",
           {{"fingerprint", plan.model_fingerprint()},
            {"n_layers", geometry.n_layers},
            {"n_heads", geometry.n_heads},
            {"n_kv_heads", geometry.n_kv_heads},
            {"head_dim", geometry.head_dim},
            {"hidden", geometry.hidden}}},
          {"calibration",
           {{"texts", TextsJson(facts.texts)},
            {"heldout", TextsJson(facts.heldout)},
            {"context_tokens", facts.context_tokens},
            {"skip_tokens", facts.skip_tokens},
            {"n_windows", facts.n_windows},
            {"seed", facts.seed},
            {"damping", facts.damping}}},
          {"ppl_base", plan.ppl_base()},
          {"ladder", std::move(ladder)}};
}

// ---- reading ----

// Reads the fields of one JSON object. The first error stays; later reads give zeros. Every key must be read (Done).
class Fields {
 public:
  Fields(const json& object, std::string where, Status& status)
      : object_(object), where_(std::move(where)), status_(status) {
    if (!object_.is_object()) Fail("", "is not an object");
  }

  std::uint64_t Unsigned(const char* key, std::uint64_t max) {
    const json* value = Take(key);
    if (value == nullptr) return 0;
    if (value->is_number_unsigned() && value->get<std::uint64_t>() <= max) return value->get<std::uint64_t>();
    Fail(key, "is not a whole number from 0 to " + std::to_string(max));
    return 0;
  }
  int Int(const char* key) { return static_cast<int>(Unsigned(key, std::numeric_limits<int>::max())); }
  std::int64_t Int64(const char* key) {
    return static_cast<std::int64_t>(Unsigned(key, std::numeric_limits<std::int64_t>::max()));
  }

  double Number(const char* key) {
    const json* value = Take(key);
    if (value == nullptr) return 0;
    if (value->is_number()) return value->get<double>();
    Fail(key, "is not a number");
    return 0;
  }

  std::string Text(const char* key) {
    const json* value = Take(key);
    if (value == nullptr) return {};
    if (value->is_string() && value->get_ref<const std::string&>().size() <= kMaxString)
      return value->get<std::string>();
    Fail(key, "is not a text of at most 4096 bytes");
    return {};
  }

  // An empty array when the key is missing or another type.
  const json& Array(const char* key) {
    static const json kEmpty = json::array();
    const json* value = Take(key);
    if (value == nullptr) return kEmpty;
    if (value->is_array()) return *value;
    Fail(key, "is not an array");
    return kEmpty;
  }

  // nullptr when the key is missing.
  const json* Take(const char* key) {
    if (!status_.ok()) return nullptr;
    const auto it = object_.find(key);
    if (it == object_.end()) {
      Fail(key, "is missing");
      return nullptr;
    }
    ++n_taken_;
    return &*it;
  }

  void Done() {
    if (status_.ok() && n_taken_ != object_.size()) Fail("", "has a key that format version 2 does not know");
  }

  void Fail(const std::string& key, const std::string& cause) {
    if (status_.ok()) status_ = InvalidArgument(where_ + (key.empty() ? "" : "." + key) + " " + cause);
  }

 private:
  const json& object_;
  std::string where_;
  Status& status_;
  std::size_t n_taken_ = 0;
};

TierShape ReadShape(const json& runs, const std::string& where, Status& status) {
  TierShape shape;
  const auto is_small = [](const json& x) { return x.is_number_unsigned() && x.get<std::uint64_t>() <= 1024; };
  for (const json& run : runs) {
    const bool is_shared = run.is_array() && run.size() == 3 && run[2].is_number_unsigned() && run[2] == 1;
    if (!run.is_array() || (run.size() != 2 && !is_shared) || !is_small(run[0]) || !is_small(run[1])) {
      if (status.ok())
        status = InvalidArgument(where + " holds something that is not [bits, width] or [bits, width, 1]");
      return {};
    }
    shape.runs.push_back({run[0].get<std::int32_t>(), run[1].get<std::int32_t>(),
                          is_shared ? kernels::KvScaleKind::kShared : kernels::KvScaleKind::kAffine});
  }
  return shape;
}

// The file states the numbers by head; how many heads there are is checked with the profile.
std::vector<float> ReadMass(const json* value, std::size_t per_head, const std::string& where, Status& status) {
  std::vector<float> mass;
  if (value == nullptr || value->is_null()) return mass;
  const auto is_head = [&](const json& head) {
    return head.is_array() && head.size() == per_head && std::all_of(head.begin(), head.end(), [](const json& x) {
             return x.is_number() && std::abs(x.get<double>()) <= kMaxMass;
           });
  };
  if (!value->is_array() || value->empty() || !std::all_of(value->begin(), value->end(), is_head)) {
    if (status.ok()) {
      status = InvalidArgument(where + " is neither null nor one array of " + std::to_string(per_head) +
                               " numbers in -1000..1000 per KV head");
    }
    return mass;
  }
  for (const json& head : *value) {
    for (const json& x : head) mass.push_back(x.get<float>());
  }
  return mass;
}

ProfileCost ReadCost(const json& value, const std::string& where, Status& status) {
  ProfileCost cost;
  if (value.is_null()) return cost;
  Fields fields(value, where, status);
  cost.measured = true;
  cost.ppl_increase_direct = fields.Number("ppl_increase_direct");
  cost.kl = fields.Number("kl");
  const json* recall = fields.Take("recall");
  if (recall != nullptr && !recall->is_null()) {
    if (!recall->is_number()) fields.Fail("recall", "is neither a number nor null");
    if (status.ok()) cost.recall = recall->get<double>();
  }
  fields.Done();
  return cost;
}

std::vector<KvShape> ReadLayers(const json& array, const std::string& where, Status& status) {
  std::vector<KvShape> layers;
  for (const json& layer : array) {
    const std::string at = where + "[" + std::to_string(layers.size()) + "]";
    Fields sides(layer, at, status);
    KvShape shape;
    shape.k = ReadShape(sides.Array("k"), at + ".k", status);
    shape.v = ReadShape(sides.Array("v"), at + ".v", status);
    shape.mass = ReadMass(sides.Take("mass"), 1 + shape.k.runs.size(), at + ".mass", status);
    sides.Done();
    if (!status.ok()) return {};
    layers.push_back(std::move(shape));
  }
  return layers;
}

Profile ReadProfile(const json& value, const std::string& where, Status& status) {
  Profile profile;
  Fields fields(value, where, status);
  profile.name = fields.Text("name");
  profile.sink_tokens = fields.Int("sink_tokens");
  profile.recent_tokens = fields.Int("recent_tokens");
  for (const json& tier : fields.Array("young")) {
    const std::string at = where + ".young[" + std::to_string(profile.young.size()) + "]";
    Fields of_tier(tier, at, status);
    YoungTier young;
    young.n_blocks = of_tier.Int("n_blocks");
    young.layers = ReadLayers(of_tier.Array("layers"), at + ".layers", status);
    of_tier.Done();
    if (!status.ok()) return {};
    profile.young.push_back(std::move(young));
  }
  profile.layers = ReadLayers(fields.Array("layers"), where + ".layers", status);
  const json* cost = fields.Take("measured");
  if (cost != nullptr) profile.cost = ReadCost(*cost, where + ".measured", status);
  fields.Done();
  return profile;
}

std::vector<CalibrationText> ReadTexts(const json& array, const std::string& where, Status& status) {
  std::vector<CalibrationText> texts;
  for (const json& value : array) {
    Fields fields(value, where, status);
    CalibrationText text;
    text.name = fields.Text("name");
    text.hash = fields.Text("xxh3");
    text.n_tokens = fields.Int64("n_tokens");
    fields.Done();
    if (!status.ok()) return {};
    texts.push_back(std::move(text));
  }
  return texts;
}

void ReadModel(const json& value, PlanContents& contents, Status& status) {
  Fields fields(value, "model", status);
  contents.model_fingerprint = fields.Text("fingerprint");
  ModelGeometry& geometry = contents.geometry;
  geometry.n_layers = fields.Int("n_layers");
  geometry.n_heads = fields.Int("n_heads");
  geometry.n_kv_heads = fields.Int("n_kv_heads");
  geometry.head_dim = fields.Int("head_dim");
  geometry.hidden = fields.Int("hidden");
  fields.Done();
}

void ReadCalibration(const json& value, CalibrationFacts& facts, Status& status) {
  Fields fields(value, "calibration", status);
  facts.texts = ReadTexts(fields.Array("texts"), "calibration.texts", status);
  facts.heldout = ReadTexts(fields.Array("heldout"), "calibration.heldout", status);
  facts.context_tokens = fields.Int64("context_tokens");
  facts.skip_tokens = fields.Int64("skip_tokens");
  facts.n_windows = fields.Int64("n_windows");
  facts.seed = fields.Unsigned("seed", std::numeric_limits<std::uint64_t>::max());
  facts.damping = fields.Number("damping");
  fields.Done();
}

// Everything but the tensors. plan_id is the one the text states.
Status ReadText(const std::string& text, PlanContents& contents, std::string& plan_id) {
  const json::parser_callback_t bounded = [](int depth, json::parse_event_t, json&) -> bool {
    if (depth > kMaxDepth) throw std::length_error("nested too deeply");
    return true;
  };
  json root;
  try {
    root = json::parse(text, bounded);
  } catch (const std::exception&) {
    return InvalidArgument("the metadata text zeroc_plan is not JSON of the plan format");
  }
  Status status;
  Fields fields(root, "plan", status);
  plan_id = fields.Text("plan_id");
  if (const json* model = fields.Take("model")) ReadModel(*model, contents, status);
  if (const json* calibration = fields.Take("calibration")) ReadCalibration(*calibration, contents.calibration, status);
  contents.ppl_base = fields.Number("ppl_base");
  for (const json& profile : fields.Array("ladder")) {
    const std::string where = "ladder[" + std::to_string(contents.ladder.size()) + "]";
    contents.ladder.push_back(ReadProfile(profile, where, status));
    if (!status.ok()) return status;
  }
  fields.Done();
  return status;
}

Status ReadMaps(const TensorMap& tensors, PlanContents& contents) {
  ZEROC_RETURN_IF_ERROR(ValidateGeometry(contents.geometry).WithContext("model"));
  const auto n_layers = static_cast<std::size_t>(contents.geometry.n_layers);
  contents.layers.resize(n_layers);
  for (const MapTensor& tensor : kTensors) {
    const TensorView& view = tensors.find(tensor.name)->second;  // PlanContentHash has seen it
    const std::vector<std::int64_t> shape = TensorShape(tensor, contents.geometry);
    if (view.shape != shape) {
      return InvalidArgument(std::string("tensor ") + tensor.name + " has shape " + ShapeToString(view.shape) +
                             ", the model's sizes ask for " + ShapeToString(shape));
    }
    const std::size_t layer_bytes = view.bytes / n_layers;
    for (std::size_t l = 0; l < n_layers; ++l) {
      std::vector<float>& values = contents.layers[l].*tensor.member;
      values.resize(layer_bytes / sizeof(float));
      std::memcpy(values.data(), view.data + l * layer_bytes, layer_bytes);
    }
  }
  return OkStatus();
}

Result<Plan> Read(const SafetensorsFile& file) {
  const auto& metadata = file.metadata();
  const auto version = metadata.find(internal::kPlanVersionKey);
  if (version == metadata.end()) return InvalidArgument("not a ZeroC plan: no metadata zeroc_plan_version");
  if (version->second != kVersion) return InvalidArgument("not plan format version 2, the only one this program reads");
  const auto text = metadata.find(internal::kPlanTextKey);
  const auto hash = metadata.find(internal::kPlanHashKey);
  if (text == metadata.end() || hash == metadata.end() || metadata.size() != 3) {
    return InvalidArgument("the metadata must be zeroc_plan_version, zeroc_plan and zeroc_plan_xxh3");
  }
  if (text->second.size() > kMaxTextBytes) return InvalidArgument("the metadata text zeroc_plan is over 4 MiB");
  ZEROC_ASSIGN_OR_RETURN(const std::string found, internal::PlanContentHash(text->second, file.tensors()));
  if (found != hash->second) return DataLoss("the content does not match its hash: the plan is damaged");
  PlanContents contents;
  std::string stated_id;
  ZEROC_RETURN_IF_ERROR(ReadText(text->second, contents, stated_id));
  ZEROC_RETURN_IF_ERROR(ReadMaps(file.tensors(), contents));
  ZEROC_ASSIGN_OR_RETURN(Plan plan, Plan::Create(std::move(contents)));
  if (plan.plan_id() != stated_id) return DataLoss("plan_id does not match the plan's content");
  return plan;
}

}  // namespace

Result<std::string> internal::PlanContentHash(std::string_view text, const TensorMap& tensors) {
  if (tensors.size() != kTensors.size()) {
    return InvalidArgument(std::to_string(tensors.size()) + " tensors; a plan has 6 tensors");
  }
  CanonicalHash hash;
  hash.Text(text);
  for (const MapTensor& tensor : kTensors) {
    const auto it = tensors.find(tensor.name);
    if (it == tensors.end()) return InvalidArgument(std::string("tensor ") + tensor.name + " is missing");
    const TensorView& view = it->second;
    if (view.dtype != DType::kF32) return InvalidArgument(std::string("tensor ") + tensor.name + " is not F32");
    // Laid out like CanonicalHash::Floats; a foreign file need not align its floats.
    hash.Int(static_cast<std::int64_t>(view.bytes / sizeof(float)));
    hash.Bytes({reinterpret_cast<const char*>(view.data), view.bytes});
  }
  return hash.Hex();
}

Result<Plan> Plan::Open(const std::string& path) {
  ZEROC_ASSIGN_OR_RETURN(const std::unique_ptr<SafetensorsFile> file, SafetensorsFile::Open(path));
  Result<Plan> plan = Read(*file);
  if (!plan.ok()) return plan.status().WithContext(path);
  return plan;
}

Result<Plan> Plan::Parse(std::span<const std::byte> bytes, const std::string& name) {
  ZEROC_ASSIGN_OR_RETURN(const std::unique_ptr<SafetensorsFile> file, SafetensorsFile::Parse(bytes, name));
  Result<Plan> plan = Read(*file);
  if (!plan.ok()) return plan.status().WithContext(name);
  return plan;
}

Status Plan::Save(const std::string& path) const {
  std::string text;
  try {
    text = PlanJson(*this).dump();
  } catch (const json::exception&) {
    return InvalidArgument(path + ": the name of a calibration text is not UTF-8");
  }
  if (text.size() > kMaxTextBytes) return InvalidArgument(path + ": the ladder is too large for the plan format");
  std::array<std::vector<float>, kTensors.size()> values;
  TensorMap tensors;
  for (std::size_t i = 0; i < kTensors.size(); ++i) {
    for (const LayerMaps& maps : contents_.layers) {
      const std::vector<float>& part = maps.*kTensors[i].member;
      values[i].insert(values[i].end(), part.begin(), part.end());
    }
    const std::span<const std::byte> bytes = std::as_bytes(std::span(values[i]));
    tensors[kTensors[i].name] = TensorView{.dtype = DType::kF32,
                                           .shape = TensorShape(kTensors[i], contents_.geometry),
                                           .data = bytes.data(),
                                           .bytes = bytes.size()};
  }
  ZEROC_ASSIGN_OR_RETURN(std::string hash, internal::PlanContentHash(text, tensors));
  return WriteSafetensors(path, tensors,
                          {{internal::kPlanVersionKey, std::string(kVersion)},
                           {internal::kPlanTextKey, std::move(text)},
                           {internal::kPlanHashKey, std::move(hash)}});
}

}  // namespace zeroc
