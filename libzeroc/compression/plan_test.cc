#include "libzeroc/compression/plan.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <functional>
#include <limits>
#include <nlohmann/json.hpp>

#include "libzeroc/checkpoint/checkpoint.h"
#include "libzeroc/compression/canonical.h"
#include "libzeroc/compression/test_moments.h"

namespace zeroc {
namespace {

using kernels::KvScaleKind;
using nlohmann::json;

constexpr ModelGeometry kGeometry = {.n_layers = 2, .n_heads = 4, .n_kv_heads = 2, .head_dim = 16, .hidden = 64};

LayerMaps RandomMaps(const ModelGeometry& geometry, std::mt19937& rng) {
  LayerMaps maps;
  const auto append = [](const std::vector<double>& from, std::vector<float>& to) {
    to.insert(to.end(), from.begin(), from.end());
  };
  for (int g = 0; g < geometry.n_kv_heads; ++g) {
    const auto solve = [&] {
      return SolveBalancedBasis(testing::MomentOf(testing::RandomMoment(geometry.head_dim, 100, rng)),
                                testing::MomentOf(testing::RandomMoment(geometry.head_dim, 100, rng)))
          .value();
    };
    const BalancedBasis qk = solve();
    const BalancedBasis vo = solve();
    append(qk.a, maps.a);
    append(qk.b, maps.b);
    append(qk.s, maps.s_qk);
    append(vo.b, maps.m);
    append(vo.a, maps.n);
    append(vo.s, maps.s_vo);
  }
  return maps;
}

PlanContents MakeContents(const ModelGeometry& geometry = kGeometry, std::string fingerprint = "f00d") {
  std::mt19937 rng(21);
  PlanContents contents;
  contents.model_fingerprint = std::move(fingerprint);
  contents.geometry = geometry;
  for (int l = 0; l < geometry.n_layers; ++l) contents.layers.push_back(RandomMaps(geometry, rng));
  contents.calibration = {.texts = {{"train.txt", HashText("train"), 1000}, {"more.txt", HashText("more"), 5}},
                          .heldout = {{"test.txt", HashText("test"), 77}},
                          .context_tokens = 4096,
                          .skip_tokens = 16,
                          .n_windows = 12,
                          .seed = std::numeric_limits<std::uint64_t>::max(),
                          .damping = 1e-2};
  contents.ppl_base = 31.57;
  contents.ladder = StandardLadder(geometry);
  Profile mixed = UniformProfile("z2.5", 2, geometry.n_layers, geometry.head_dim);
  mixed.recent_tokens = 64;
  mixed.layers[1].v.runs = {{1, geometry.head_dim, KvScaleKind::kShared}};
  mixed.layers[1].mass = {0.1F, -2.5F, 1e-7F, 1000.0F};  // two KV heads, a constant and one K run each
  mixed.cost = MeasuredCost(31.57, 0.3, 0.0035, 0.95);
  contents.ladder.push_back(mixed);
  contents.ladder[2].cost = MeasuredCost(31.57, -0.05, 0.0018, std::nullopt);  // q4
  return contents;
}

std::string TempPath(const char* name) {
  return (std::filesystem::path(::testing::TempDir()) / (std::to_string(::getpid()) + name)).string();
}

std::vector<char> ReadAll(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

Status ParseStatus(const std::vector<char>& bytes) {
  return Plan::Parse(std::as_bytes(std::span(bytes)), "test.plan").status();
}

TEST(Plan, RoundTripsEverything) {
  const Result<Plan> made = Plan::Create(MakeContents());
  ASSERT_TRUE(made.ok()) << made.status().ToString();
  const std::string path = TempPath("round_trip.plan");
  ASSERT_TRUE(made->Save(path).ok());
  const Result<Plan> read = Plan::Open(path);
  ASSERT_TRUE(read.ok()) << read.status().ToString();

  EXPECT_EQ(read->plan_id(), made->plan_id());
  EXPECT_EQ(read->plan_id().size(), 32U);
  EXPECT_EQ(read->model_fingerprint(), "f00d");
  EXPECT_EQ(read->geometry(), kGeometry);
  EXPECT_EQ(read->ppl_base(), 31.57);
  for (int l = 0; l < 2; ++l) {
    EXPECT_EQ(read->layer(l).a, made->layer(l).a);
    EXPECT_EQ(read->layer(l).b, made->layer(l).b);
    EXPECT_EQ(read->layer(l).m, made->layer(l).m);
    EXPECT_EQ(read->layer(l).n, made->layer(l).n);
    EXPECT_EQ(read->layer(l).s_qk, made->layer(l).s_qk);
    EXPECT_EQ(read->layer(l).s_vo, made->layer(l).s_vo);
  }
  const CalibrationFacts& facts = read->calibration();
  ASSERT_EQ(facts.texts.size(), 2U);
  EXPECT_EQ(facts.texts[1].name, "more.txt");
  EXPECT_EQ(facts.texts[1].hash, HashText("more"));
  EXPECT_EQ(facts.heldout[0].n_tokens, 77);
  EXPECT_EQ(facts.seed, std::numeric_limits<std::uint64_t>::max());
  EXPECT_EQ(facts.damping, 1e-2);
  ASSERT_EQ(read->ladder().size(), made->ladder().size());
  for (std::size_t i = 0; i < read->ladder().size(); ++i) {
    const Profile& x = read->ladder()[i];
    const Profile& y = made->ladder()[i];
    EXPECT_EQ(x.name, y.name);
    EXPECT_EQ(x.recent_tokens, y.recent_tokens);
    EXPECT_EQ(x.layers, y.layers);
    EXPECT_EQ(x.cost.measured, y.cost.measured);
    EXPECT_EQ(x.cost.ppl_increase, y.cost.ppl_increase);
    EXPECT_EQ(x.cost.ppl_increase_rel, y.cost.ppl_increase_rel);
    EXPECT_EQ(x.cost.kl, y.cost.kl);
    EXPECT_EQ(x.cost.recall, y.cost.recall);
    EXPECT_EQ(x.cost.kv_bytes_per_token, y.cost.kv_bytes_per_token);
    EXPECT_GT(x.cost.kv_bytes_per_token, 0);
  }

  // Equal plans give equal files.
  const std::string second = TempPath("second.plan");
  ASSERT_TRUE(read->Save(second).ok());
  EXPECT_EQ(ReadAll(second), ReadAll(path));
  std::filesystem::remove(path);
  std::filesystem::remove(second);
}

TEST(Plan, HashTextIsThePlainXxh3OfTheBytes) {
  EXPECT_EQ(HashText(""), "99aa06d3014798d86001c324468d497f");  // the published value for no bytes, seed 0
  EXPECT_NE(HashText("a"), HashText("b"));
}

TEST(Plan, IdentityCoversWhatDecidesBytesAndNothingElse) {
  const std::string id = Plan::Create(MakeContents())->plan_id();
  const auto id_after = [](const std::function<void(PlanContents&)>& change) {
    PlanContents contents = MakeContents();
    change(contents);
    const Result<Plan> plan = Plan::Create(contents);
    EXPECT_TRUE(plan.ok()) << plan.status().ToString();
    return plan.ok() ? plan->plan_id() : std::string();
  };
  // Measuring again, other facts, another order.
  EXPECT_EQ(id_after([](PlanContents& c) { c.ladder[3].cost = MeasuredCost(31.57, 1, 0.1, 0.5); }), id);
  EXPECT_EQ(id_after([](PlanContents& c) { c.ppl_base = 30; }), id);
  EXPECT_EQ(id_after([](PlanContents& c) { c.calibration.texts.clear(); }), id);
  EXPECT_EQ(id_after([](PlanContents& c) { c.layers[0].s_qk[0] += 1; }), id);
  EXPECT_EQ(id_after([](PlanContents& c) { std::swap(c.ladder[0], c.ladder[5]); }), id);
  // One bit of one map, a window, a width, a name, another model.
  const auto next = [](float& x) { x = std::nextafter(x, 1e9F); };
  EXPECT_NE(id_after([&](PlanContents& c) { next(c.layers[1].a[3]); }), id);
  EXPECT_NE(id_after([&](PlanContents& c) { next(c.layers[0].b[511]); }), id);
  EXPECT_NE(id_after([&](PlanContents& c) { next(c.layers[0].m[0]); }), id);
  EXPECT_NE(id_after([&](PlanContents& c) { next(c.layers[1].n[9]); }), id);
  EXPECT_NE(id_after([](PlanContents& c) { c.ladder[5].recent_tokens = 65; }), id);
  EXPECT_NE(id_after([](PlanContents& c) { c.ladder[5].sink_tokens = 0; }), id);
  EXPECT_NE(id_after([](PlanContents& c) { c.ladder[5].layers[0].k.runs[0].bits = 3; }), id);
  EXPECT_NE(id_after([](PlanContents& c) { c.ladder[5].layers[0].k.runs[0].scale = KvScaleKind::kShared; }), id);
  EXPECT_NE(id_after([&](PlanContents& c) { next(c.ladder[5].layers[1].mass[2]); }), id);
  EXPECT_NE(id_after([](PlanContents& c) { c.ladder[5].layers[1].mass.clear(); }), id);
  EXPECT_NE(id_after([](PlanContents& c) { c.ladder[3].layers[0].mass = {1, 2, 3, 4}; }), id);
  EXPECT_NE(id_after([](PlanContents& c) { c.ladder[5].young = {{1, c.ladder[5].layers}}; }), id);
  EXPECT_NE(id_after([](PlanContents& c) { c.ladder[5].name = "z2.6"; }), id);
  EXPECT_NE(id_after([](PlanContents& c) { c.ladder.pop_back(); }), id);
  EXPECT_NE(id_after([](PlanContents& c) { c.model_fingerprint = "beef"; }), id);
  EXPECT_NE(id_after([](PlanContents& c) { c.geometry.hidden = 65; }), id);
}

TEST(Plan, CreateRefusesWhatIsInconsistent) {
  const auto expect_refused = [](const std::function<void(PlanContents&)>& damage, const std::string& cause) {
    PlanContents contents = MakeContents();
    damage(contents);
    const Status status = Plan::Create(contents).status();
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument) << cause;
    EXPECT_NE(status.message().find(cause), std::string::npos) << status.ToString();
  };
  expect_refused([](PlanContents& c) { c.layers.pop_back(); }, "maps for 1 layers");
  expect_refused([](PlanContents& c) { c.layers[1].a.pop_back(); }, "layer 1: key maps: 511");
  expect_refused([](PlanContents& c) { c.layers[1].s_vo.clear(); }, "layer 1: value maps");
  expect_refused([](PlanContents& c) { c.layers[0].m[7] = std::nanf(""); }, "layer 0: value maps: NaN");
  expect_refused([](PlanContents& c) { c.layers[0].s_qk[7] = INFINITY; }, "layer 0: key maps: NaN");
  expect_refused([](PlanContents& c) { std::swap(c.layers[0].a, c.layers[1].a); },
                 "KV head 0: the two maps are not dual");
  expect_refused([](PlanContents& c) { c.layers[0].n[300] += 0.5F; }, "KV head 1: the two maps are not dual");
  expect_refused([](PlanContents& c) { c.ladder.erase(c.ladder.begin()); }, "standard profile bf16");
  expect_refused([](PlanContents& c) { c.ladder[3].layers[0].k.runs[0].bits = 4; }, "q3 is not of the uniform width");
  expect_refused([](PlanContents& c) { c.ladder[3].layers[0].k.runs[0].scale = KvScaleKind::kShared; }, "q3 is not of");
  expect_refused([](PlanContents& c) { c.ladder[5].layers[1].mass[3] = std::nanf(""); }, "profile z2.5: layer 1: mass");
  expect_refused([](PlanContents& c) { c.ladder.push_back(c.ladder[5]); }, "two profiles are named z2.5");
  expect_refused([](PlanContents& c) { c.ladder[5].layers[1].k.runs[0].width = 32; }, "profile z2.5: layer 1 K");
  expect_refused([](PlanContents& c) { c.ladder[5].cost.kl = std::nan(""); }, "profile z2.5: cost: kl");
  expect_refused([](PlanContents& c) { c.ladder[5].cost.recall = 1.5; }, "recall");
  expect_refused([](PlanContents& c) { c.ladder[5].cost.ppl_increase_direct = INFINITY; }, "ppl_increase_direct");
  expect_refused([](PlanContents& c) { c.ppl_base = 0; }, "no ppl_base");
  expect_refused([](PlanContents& c) { c.ppl_base = -1; }, "ppl_base");
  expect_refused([](PlanContents& c) { c.calibration.damping = std::nan(""); }, "damping");
  expect_refused([](PlanContents& c) { c.calibration.seed = 1, c.calibration.n_windows = -1; }, "negative count");
  expect_refused([](PlanContents& c) { c.model_fingerprint = "a\nb"; }, "fingerprint");
  expect_refused([](PlanContents& c) { c.geometry.head_dim = 24; }, "head_dim 24");
}

TEST(Plan, EveryDamagedByteIsDetected) {
  const std::string path = TempPath("damaged.plan");
  ASSERT_TRUE(Plan::Create(MakeContents())->Save(path).ok());
  const std::vector<char> good = ReadAll(path);
  std::filesystem::remove(path);
  ASSERT_TRUE(ParseStatus(good).ok());
  std::size_t header_end = 8;
  for (int i = 0; i < 8; ++i) header_end += static_cast<std::size_t>(static_cast<unsigned char>(good[i])) << (8 * i);

  for (std::size_t i = 0; i < good.size(); ++i) {
    // Blanks that pad the header to 8 bytes carry nothing.
    if (i < header_end && i + 8 >= header_end && good[i] == ' ') continue;
    std::vector<char> bad = good;
    bad[i] = static_cast<char>(bad[i] ^ (1 << (i % 7)));
    const Status status = ParseStatus(bad);
    ASSERT_FALSE(status.ok()) << "byte " << i << " of " << good.size();
    if (i < header_end) continue;
    ASSERT_EQ(status.code(), StatusCode::kDataLoss) << "byte " << i;
  }
  for (std::size_t size = 0; size < good.size(); size += size < header_end ? 1 : 97) {
    ASSERT_FALSE(ParseStatus({good.begin(), good.begin() + static_cast<std::ptrdiff_t>(size)}).ok()) << size;
  }
}

// A file as a hostile writer would make it: any JSON text, any tensors, and the hash that fits them.
class ForgedPlan {
 public:
  ForgedPlan() {
    const std::string path = TempPath("forged_base.plan");
    EXPECT_TRUE(Plan::Create(MakeContents())->Save(path).ok());
    file_ = SafetensorsFile::Open(path).value();
    std::filesystem::remove(path);
    tensors = file_->tensors();
    text = json::parse(file_->metadata().at("zeroc_plan"));
  }

  Status Parse(std::string raw_text = "") const {
    if (raw_text.empty()) raw_text = text.dump();
    CanonicalHash hash;
    hash.Text(raw_text);
    for (const char* name : {"qk.a", "qk.b", "qk.s", "vo.m", "vo.n", "vo.s"}) {
      const auto it = tensors.find(name);
      if (it == tensors.end()) continue;
      std::vector<float> values(it->second.bytes / 4);
      std::memcpy(values.data(), it->second.data, values.size() * 4);
      hash.Floats(values);
    }
    std::map<std::string, std::string> metadata = {
        {"zeroc_plan_version", version}, {"zeroc_plan", raw_text}, {"zeroc_plan_xxh3", hash.Hex()}};
    if (extra_metadata) metadata["more"] = "x";
    const std::string path = TempPath("forged.plan");
    EXPECT_TRUE(WriteSafetensors(path, tensors, metadata).ok());
    const Status status = Plan::Open(path).status();
    std::filesystem::remove(path);
    return status;
  }

  TensorMap tensors;
  json text;
  std::string version = "2";
  bool extra_metadata = false;

 private:
  std::unique_ptr<SafetensorsFile> file_;
};

TEST(Plan, RefusesForgedFieldsByName) {
  ASSERT_TRUE(ForgedPlan().Parse().ok()) << ForgedPlan().Parse().ToString();
  const auto expect_refused = [](const std::function<void(ForgedPlan&)>& forge, const std::string& cause) {
    ForgedPlan plan;
    forge(plan);
    const Status status = plan.Parse();
    EXPECT_TRUE(status.code() == StatusCode::kInvalidArgument || status.code() == StatusCode::kDataLoss);
    EXPECT_NE(status.message().find(cause), std::string::npos) << status.ToString();
    EXPECT_NE(status.message().find("forged.plan"), std::string::npos) << status.ToString();
  };
  expect_refused([](ForgedPlan& p) { p.version = std::string("1"); }, "version 2");
  expect_refused([](ForgedPlan& p) { p.extra_metadata = true; }, "metadata must be");
  expect_refused([](ForgedPlan& p) { p.text = json::array(); }, "plan is not an object");
  expect_refused([](ForgedPlan& p) { p.text["plan_id"] = std::string(32, '0'); }, "plan_id");
  expect_refused([](ForgedPlan& p) { p.text["surprise"] = 1; }, "plan has a key");
  expect_refused([](ForgedPlan& p) { p.text.erase("ppl_base"); }, "plan.ppl_base is missing");
  expect_refused([](ForgedPlan& p) { p.text["ppl_base"] = "30"; }, "plan.ppl_base is not a number");
  expect_refused([](ForgedPlan& p) { p.text["model"]["n_layers"] = -2; }, "model.n_layers");
  expect_refused([](ForgedPlan& p) { p.text["model"]["n_layers"] = 2.0; }, "model.n_layers");
  expect_refused([](ForgedPlan& p) { p.text["model"]["n_layers"] = 1000000000; }, "n_layers 1000000000");
  expect_refused([](ForgedPlan& p) { p.text["model"]["n_layers"] = 1; }, "has shape [2, 2, 16, 16]");
  expect_refused([](ForgedPlan& p) { p.text["model"]["n_kv_heads"] = 4; }, "has shape");
  expect_refused([](ForgedPlan& p) { p.text["model"]["hidden"] = true; }, "model.hidden");
  expect_refused([](ForgedPlan& p) { p.text["ladder"] = json::object(); }, "plan.ladder is not an array");
  expect_refused([](ForgedPlan& p) { p.text["ladder"].clear(); }, "standard profile bf16");
  expect_refused([](ForgedPlan& p) { p.text["ladder"][1] = 7; }, "ladder[1] is not an object");
  expect_refused([](ForgedPlan& p) { p.text["ladder"][1]["name"] = "q4"; }, "two profiles");
  expect_refused([](ForgedPlan& p) { p.text["ladder"][5]["recent_tokens"] = 4294967296; }, "ladder[5].recent_tokens");
  expect_refused([](ForgedPlan& p) { p.text["ladder"][5]["layers"][1]["k"][0] = {2}; }, "ladder[5].layers[1].k");
  expect_refused([](ForgedPlan& p) { p.text["ladder"][5]["layers"][1]["k"][0][0] = -1; }, "ladder[5].layers[1].k");
  expect_refused([](ForgedPlan& p) { p.text["ladder"][5]["layers"][1]["k"][0][1] = 4294967312; }, "layers[1].k");
  const auto young = [](ForgedPlan& p) -> json& { return p.text["ladder"][5]["young"]; };
  expect_refused([](ForgedPlan& p) { p.text["ladder"][5].erase("young"); }, "ladder[5].young is missing");
  expect_refused([&](ForgedPlan& p) { young(p) = {1}; }, "ladder[5].young[0] is not an object");
  expect_refused([&](ForgedPlan& p) { young(p) = {{{"n_blocks", 1}}}; }, "ladder[5].young[0].layers is missing");
  expect_refused([&](ForgedPlan& p) { young(p) = {{{"n_blocks", 1}, {"layers", json::array()}}}; }, "0 layers");
  expect_refused(
      [&](ForgedPlan& p) {
        young(p) = {{{"n_blocks", 0}, {"layers", p.text["ladder"][5]["layers"]}}};
      },
      "n_blocks 0");
  expect_refused(
      [&](ForgedPlan& p) {
        p.text["ladder"][2]["young"] = {{{"n_blocks", 1}, {"layers", p.text["ladder"][2]["layers"]}}};
      },
      "not of the uniform width");
  const auto& mass = [](ForgedPlan& p) -> json& { return p.text["ladder"][5]["layers"][1]["mass"]; };
  expect_refused([](ForgedPlan& p) { p.text["ladder"][5]["layers"][1]["v"][0][2] = 0; }, "layers[1].v holds");
  expect_refused([](ForgedPlan& p) { p.text["ladder"][5]["layers"][1]["v"][0][2] = 2; }, "layers[1].v holds");
  expect_refused([](ForgedPlan& p) { p.text["ladder"][5]["layers"][1]["v"][0][2] = 1.0; }, "layers[1].v holds");
  expect_refused([](ForgedPlan& p) { p.text["ladder"][5]["layers"][0].erase("mass"); }, "layers[0].mass is missing");
  expect_refused([&](ForgedPlan& p) { mass(p) = 1; }, "layers[1].mass is neither");
  expect_refused([&](ForgedPlan& p) { mass(p) = json::array(); }, "layers[1].mass is neither");
  expect_refused([&](ForgedPlan& p) { mass(p)[0].push_back(1); }, "layers[1].mass is neither");
  expect_refused([&](ForgedPlan& p) { mass(p)[0][1] = "1"; }, "layers[1].mass is neither");
  expect_refused([&](ForgedPlan& p) { mass(p)[1][1] = 1e300; }, "layers[1].mass is neither");
  expect_refused([&](ForgedPlan& p) { mass(p).push_back({0, 0}); }, "mass has 6 numbers, not 4");
  expect_refused([](ForgedPlan& p) { p.text["ladder"][5]["layers"][1]["v"] = json::array(); }, "layer 1 V: 0 runs");
  expect_refused([](ForgedPlan& p) { p.text["ladder"][5]["measured"]["kl"] = -1; }, "kl");
  expect_refused([](ForgedPlan& p) { p.text["ladder"][5]["measured"]["recall"] = "1"; }, "measured.recall");
  expect_refused([](ForgedPlan& p) { p.text["ladder"][5]["measured"].erase("recall"); }, "recall is missing");
  expect_refused([](ForgedPlan& p) { p.text["calibration"]["texts"][0]["n_tokens"] = -1; }, "calibration.texts");
  expect_refused([](ForgedPlan& p) { p.text["calibration"]["seed"] = -1; }, "calibration.seed");
  expect_refused([](ForgedPlan& p) { p.tensors.erase("qk.b"); }, "6 tensors");
  expect_refused([](ForgedPlan& p) { p.tensors["more"] = p.tensors["qk.b"]; }, "6 tensors");
  expect_refused([](ForgedPlan& p) { p.tensors["qk.b"].dtype = DType::kI32; }, "qk.b is not F32");
  expect_refused([](ForgedPlan& p) { p.tensors["qk.s"] = p.tensors["qk.b"]; }, "qk.s has shape");
}

// Pins the file's bytes and the identity: a change here breaks every plan in the field and every cached block.
TEST(Plan, MatchesTheGoldenFile) {
  PlanContents contents;
  contents.model_fingerprint = "0123456789abcdef0123456789abcdef";
  contents.geometry = {.n_layers = 1, .n_heads = 2, .n_kv_heads = 1, .head_dim = 16, .hidden = 32};
  LayerMaps maps;
  for (int i = 0; i < 256; ++i) maps.a.push_back(i % 17 == 0 ? 1.0F : 0.0F);
  maps.b = maps.m = maps.n = maps.a;
  for (int i = 0; i < 16; ++i) maps.s_qk.push_back(1.0F / static_cast<float>(1 << i));
  maps.s_vo = maps.s_qk;
  contents.layers = {maps};
  contents.calibration = {.texts = {{"train.txt", HashText("train"), 1000}},
                          .heldout = {{"test.txt", HashText("test"), 77}},
                          .context_tokens = 4096,
                          .skip_tokens = 16,
                          .n_windows = 12,
                          .seed = 7,
                          .damping = 0.01};
  contents.ppl_base = 31.5;
  contents.ladder = StandardLadder(contents.geometry);
  contents.ladder[2].cost = MeasuredCost(31.5, -0.25, 0.0625, 0.5);
  Profile shared = UniformProfile("z2", 2, 1, 16);
  shared.layers[0] = {{{{2, 16, KvScaleKind::kShared}}}, {{{1, 16, KvScaleKind::kShared}}}, {0.125F, -3.0F}};
  shared.recent_tokens = 0;
  shared.young = {{2, UniformProfile("", 8, 1, 16).layers}};
  contents.ladder.push_back(shared);
  const Plan plan = Plan::Create(contents).value();
  const std::string path = TempPath("golden.plan");
  ASSERT_TRUE(plan.Save(path).ok());
  EXPECT_EQ(ReadAll(path), ReadAll("tests/fuzz/corpus/plan_fuzz/golden.plan"));
  std::filesystem::remove(path);
  EXPECT_EQ(plan.plan_id(), "385b18196f378f46042fee6b949bbb6a");
}

TEST(Plan, RefusesHostileText) {
  const ForgedPlan plan;
  EXPECT_EQ(plan.Parse("{").code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(plan.Parse("null").code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(plan.Parse("{\"ppl_base\": 1e999}").code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(plan.Parse(std::string(100000, '[')).code(), StatusCode::kInvalidArgument);
  const Status deep = plan.Parse(std::string(20, '[') + std::string(20, ']'));
  EXPECT_NE(deep.message().find("not JSON of the plan format"), std::string::npos) << deep.ToString();
  EXPECT_EQ(plan.Parse(std::string(5U << 20, ' ')).code(), StatusCode::kInvalidArgument);
}

TEST(Plan, BelongsToOneModel) {
  const Result<std::unique_ptr<Checkpoint>> checkpoint = Checkpoint::Open("models/zeroc-demo");
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status().ToString();
  const ModelGeometry geometry = GeometryOf((*checkpoint)->config());
  const std::string path = TempPath("model.plan");

  ASSERT_TRUE(Plan::Create(MakeContents(geometry, (*checkpoint)->fingerprint()))->Save(path).ok());
  EXPECT_TRUE(Plan::Open(path, **checkpoint).ok());
  ASSERT_TRUE(Plan::Create(MakeContents(geometry, "other-model"))->Save(path).ok());
  const Status status = Plan::Open(path, **checkpoint).status();
  EXPECT_EQ(status.code(), StatusCode::kFailedPrecondition);
  EXPECT_NE(status.message().find("other-model"), std::string::npos);
  EXPECT_NE(status.message().find((*checkpoint)->fingerprint()), std::string::npos);
  std::filesystem::remove(path);
  EXPECT_EQ(Plan::Open(path).status().code(), StatusCode::kNotFound);
  EXPECT_FALSE(Plan::Open("models/zeroc-demo/model.safetensors").ok());
}

TEST(Plan, PicksTheSmallestMeasuredProfileWithinTheBudget) {
  const Plan plan = Plan::Create(MakeContents()).value();
  // q4 promises its KL figure 0.0569, z2.5 its direct 0.3; the others are not measured.
  EXPECT_EQ(plan.SmallestWithin(0.1).name, "q4");
  EXPECT_EQ(plan.SmallestWithin(0.5).name, "z2.5");
  EXPECT_EQ(plan.SmallestWithin(0.01).name, "bf16");
  EXPECT_EQ(plan.SmallestWithin(-1).name, "bf16");
  ASSERT_NE(plan.FindProfile("q2"), nullptr);
  EXPECT_EQ(plan.FindProfile("q2")->layers[0].k.runs[0].bits, 2);
  EXPECT_EQ(plan.FindProfile("q5"), nullptr);
}

TEST(Plan, ProfileMapsStayDual) {
  const Plan plan = Plan::Create(MakeContents()).value();
  for (const Profile& profile : plan.ladder()) {
    const KeyMaps maps = plan.KeyMapsOf(profile, 1);
    EXPECT_EQ(maps.a.empty(), !profile.packs());
    if (!profile.packs()) continue;
    EXPECT_NE(maps.b, plan.layer(1).b) << profile.name << ": rotated inside its runs";
    for (int g = 0; g < 2; ++g) {
      const Eigen::MatrixXd product =
          testing::HeadMatrixOf(maps.a, g, 16) * testing::HeadMatrixOf(maps.b, g, 16).transpose();
      EXPECT_LT((product - Eigen::MatrixXd::Identity(16, 16)).cwiseAbs().maxCoeff(), 1e-4) << profile.name;
    }
  }
}

}  // namespace
}  // namespace zeroc
