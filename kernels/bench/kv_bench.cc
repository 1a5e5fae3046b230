// What compression costs a prefill beside the attention: nanoseconds of one thread per token and layer, all KV heads
// together, for the key map, packing keys, packing values and the query map; and their share of the layer's linear
// products (q, k, v, o, gate, up, down with 512 rows), measured in the same process. Attention is left out of the
// denominator, so the true share is smaller. The write of exact blocks is not part of it: every profile does it.
#include <benchmark/benchmark.h>

#include <map>
#include <string>

#include "kernels/bench/bench_util.h"

namespace zeroc::kernels {
namespace {

constexpr int kTokens = 512;  // a prefill chunk
constexpr int kRepeats = 15;  // the fastest counts

struct Geometry {
  const char* name;
  int hidden, heads, kv_heads, dim, ffn;
};

constexpr Geometry kGeometries[] = {
    {"1b", 2048, 32, 8, 64, 8192}, {"1b_dim128", 2048, 16, 8, 128, 8192}, {"demo", 384, 6, 2, 64, 1024}};

using Runs = std::vector<KvRun>;

KvBlockLayout MakeLayout(const Geometry& shape, const Runs& k, const Runs& v, bool rotate_v) {
  KvBlockLayout layout;
  if (!MakeKvBlockLayout(shape.kv_heads, shape.dim, kBlockTokens, k.data(), static_cast<int>(k.size()), v.data(),
                         static_cast<int>(v.size()), rotate_v, &layout)) {
    std::abort();
  }
  return layout;
}

void Must(KernelStatus status) {
  if (status != KernelStatus::kOk) std::abort();
}

// Nanoseconds per token and layer of one call over the chunk, several calls measured in turn.
std::vector<double> PerToken(const std::vector<std::function<void()>>& bodies) {
  std::vector<double> best(bodies.size(), 1e30);
  for (int i = 0; i < kRepeats; ++i) {
    for (std::size_t b = 0; b < bodies.size(); ++b) best[b] = std::min(best[b], Seconds(bodies[b]) * 1e9 / kTokens);
  }
  return best;
}

// The linear products of one layer.
double LinearNanoseconds(const Geometry& shape) {
  const int q = shape.heads * shape.dim, kv = shape.kv_heads * shape.dim;
  const std::pair<int, int> products[] = {
      {shape.hidden, q},         {shape.hidden, kv},        {shape.hidden, kv},       {q, shape.hidden},
      {shape.hidden, shape.ffn}, {shape.hidden, shape.ffn}, {shape.ffn, shape.hidden}};
  const int widest = std::max(shape.ffn, std::max(shape.hidden, q));
  const auto x = RandomBf16(static_cast<std::size_t>(kTokens) * static_cast<std::size_t>(widest), 1.0f, 1);
  std::vector<float> y(x.size());
  std::vector<std::vector<Bf16>> weights;
  for (const auto& [k, n] : products) {
    weights.push_back(RandomBf16(static_cast<std::size_t>(k) * static_cast<std::size_t>(n), 0.05f, 2));
  }
  return BestSeconds(
             5,
             [&] {
               for (std::size_t i = 0; i < weights.size(); ++i) {
                 const auto [k, n] = products[i];
                 Must(CpuOps().linear({x.data(), kTokens, k, weights[i].data(), nullptr, n, 0, n, y.data(), n, false}));
               }
             }) *
         1e9 / kTokens;
}

// One layer's keys, values and queries of a chunk, and its exact blocks.
struct Layer {
  explicit Layer(const Geometry& g) : shape(g), exact(MakeLayout(g, {{16, g.dim}}, {{16, g.dim}}, false)) {
    const auto d = static_cast<std::size_t>(g.dim);
    k = RandomFloats(kTokens * static_cast<std::size_t>(g.kv_heads) * d, 1.0f, 1);
    v = RandomFloats(k.size(), 1.0f, 2);
    q = RandomFloats(kTokens * static_cast<std::size_t>(g.heads) * d, 1.0f, 3);
    map = RandomFloats(static_cast<std::size_t>(g.kv_heads) * d * d, 0.1f, 4);
    angles = RandomFloats(kTokens * d / 2, 0.5f, 5);
    out.resize(q.size());
    bytes.resize(static_cast<std::size_t>(exact.block_bytes) * kBlocks);
    packed_bytes.resize(bytes.size());
    for (std::size_t b = 0; b < kBlocks; ++b) {
      blocks.push_back(bytes.data() + b * static_cast<std::size_t>(exact.block_bytes));
    }
    Write(true);
  }

  void Write(bool with_map) {
    Must(CpuOps().kv_write({k.data(),
                            v.data(),
                            shape.kv_heads * shape.dim,
                            0,
                            kTokens,
                            0,
                            shape.kv_heads,
                            {angles.data(), angles.data()},
                            with_map ? map.data() : nullptr,
                            &exact,
                            blocks.data()}));
  }
  void PrepareQueries(bool with_map) {
    Must(CpuOps().query_prep({q.data(),
                              shape.heads * shape.dim,
                              kTokens,
                              shape.heads,
                              shape.kv_heads,
                              shape.dim,
                              0,
                              shape.kv_heads,
                              {angles.data(), angles.data()},
                              with_map ? map.data() : nullptr,
                              0.125f,
                              out.data()}));
  }
  void Pack(const KvBlockLayout& packed) {
    for (std::size_t b = 0; b < kBlocks; ++b) {
      std::uint8_t* to = packed_bytes.data() + b * static_cast<std::size_t>(packed.block_bytes);
      Must(CpuOps().kv_pack({blocks[b], &exact, to, &packed, 0, shape.kv_heads}));
    }
  }

  static constexpr std::size_t kBlocks = kTokens / kBlockTokens;
  Geometry shape;
  KvBlockLayout exact;
  std::vector<float> k, v, q, map, angles, out;
  std::vector<std::uint8_t> bytes, packed_bytes;
  std::vector<std::uint8_t*> blocks;
};

void PrefillCost(benchmark::State& state, Geometry shape, Runs runs) {
  for (KvRun& run : runs) run.width *= shape.dim / 64;
  Layer layer(shape);
  const Runs nothing = {{0, shape.dim}};
  const KvBlockLayout keys = MakeLayout(shape, runs, nothing, true), values = MakeLayout(shape, nothing, runs, true);
  for (auto _ : state) {
    const std::vector<double> ns = PerToken(
        {[&] { layer.Write(false); }, [&] { layer.Write(true); }, [&] { layer.Pack(keys); },
         [&] { layer.Pack(values); }, [&] { layer.PrepareQueries(false); }, [&] { layer.PrepareQueries(true); }});
    static std::map<std::string, double> linear;  // once per geometry
    if (!linear.contains(shape.name)) linear[shape.name] = LinearNanoseconds(shape);
    const double k_map = ns[1] - ns[0], q_map = ns[5] - ns[4];
    state.counters["write_ns"] = ns[0];
    state.counters["k_map_ns"] = k_map;
    state.counters["k_pack_ns"] = ns[2];
    state.counters["v_pack_ns"] = ns[3];
    state.counters["q_prep_ns"] = ns[4];
    state.counters["q_map_ns"] = q_map;
    state.counters["linear_ns"] = linear[shape.name];
    state.counters["kv_share_%"] = 100 * (k_map + ns[2] + ns[3]) / linear[shape.name];
    state.counters["q_share_%"] = 100 * q_map / linear[shape.name];
  }
}

void RegisterAll() {
  constexpr KvScaleKind kShared = KvScaleKind::kShared;
  const std::pair<const char*, Runs> shapes[] = {
      {"8", {{8, 64}}},
      {"4", {{4, 64}}},
      {"3", {{3, 64}}},
      {"2", {{2, 64}}},
      {"1", {{1, 64}}},
      {"4_shared", {{4, 64, kShared}}},
      {"3_shared", {{3, 64, kShared}}},
      {"2_shared", {{2, 64, kShared}}},
      {"1_shared", {{1, 64, kShared}}},
      {"4x16,2x16,1x16,0x16_shared", {{4, 16, kShared}, {2, 16, kShared}, {1, 16, kShared}, {0, 16}}}};
  for (const Geometry& geometry : kGeometries) {
    for (const auto& [name, runs] : shapes) {
      const std::string title = std::string("PrefillCost/") + geometry.name + "/" + name;
      benchmark::RegisterBenchmark(title.c_str(), PrefillCost, geometry, runs)->Iterations(1);
    }
  }
}

}  // namespace
}  // namespace zeroc::kernels

int main(int argc, char** argv) {
  zeroc::kernels::RegisterAll();
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}
