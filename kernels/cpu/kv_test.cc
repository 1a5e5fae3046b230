// query_prep, kv_write and kv_pack against the reference.
#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "kernels/cpu/test_util.h"
#include "kernels/hadamard.h"
#include "kernels/reference/reference.h"
#include "kernels/tile_codec.h"

namespace zeroc::kernels {
namespace {

struct Rope {
  std::vector<float> cos, sin;
  Rope(int n_tokens, int dim, int first_pos) {
    for (int t = 0; t < n_tokens; ++t) {
      for (int i = 0; i < dim / 2; ++i) {
        const double angle = (first_pos + t) * std::pow(1e4, -2.0 * i / dim);
        cos.push_back(static_cast<float>(std::cos(angle)));
        sin.push_back(static_cast<float>(std::sin(angle)));
      }
    }
  }
};

double Norm(const float* x, int n) {
  double sum = 0;
  for (int i = 0; i < n; ++i) sum += double{x[i]} * x[i];
  return std::sqrt(sum);
}

// Bound of one mapped coordinate: d products of |rope(x)| <= |x| and a column of the map, doubled for the reference. On
// AMX each factor is off by half a unit of its second bf16 (2^-18 of itself, twice) and lo * lo is left out (2^-18).
double MapBound(const float* x, const float* map, int dim, int column, double scale) {
  double column_norm = 1.0;
  if (map != nullptr) {
    column_norm = 0.0;
    for (int i = 0; i < dim; ++i) column_norm += std::pow(map[i * dim + column], 2);
    column_norm = std::sqrt(column_norm);
  }
  const double split = cpu::AmxReady() && map != nullptr ? 3 * 0x1p-18 : 0;
  return (2 * (dim + 4) * kEps32 + split) * scale * Norm(x, dim) * column_norm;
}

TEST(CpuQueryPrep, MatchesTheReference) {
  Ledger ledger("query_prep");
  ForEachTargetAndAmx([&] {
    for (int dim : {16, 64, 80, 96, 128, 256}) {
      for (int group : {1, 3, 8}) {
        const int n_kv_heads = 2, n_tokens = 5, n_heads = group * n_kv_heads;
        Random random(static_cast<unsigned>(dim + group));
        const std::int64_t stride = n_heads * dim + 1;
        Guarded<float> q(random.Normals(static_cast<std::size_t>(n_tokens * stride)));
        const auto map = random.Normals(static_cast<std::size_t>(n_kv_heads * dim * dim));
        const Rope rope(n_tokens, dim, 1000);
        for (bool with_map : {false, true}) {
          for (bool with_rope : {false, true}) {
            const std::size_t n = static_cast<std::size_t>(n_tokens * n_heads * dim);
            std::vector<float> expected(n, -1.0f);
            Guarded<float> out(std::vector<float>(n, -1.0f));
            QueryPrepArgs args = {q.data(), stride, n_tokens, n_heads, n_kv_heads, dim,
                                  1,        2,      {},       nullptr, 0.125f,     expected.data()};
            if (with_rope) args.rope = {rope.cos.data(), rope.sin.data()};
            if (with_map) args.q_map = map.data();
            ASSERT_EQ(ReferenceOps().query_prep(args), KernelStatus::kOk);
            args.out = out.data();
            ASSERT_EQ(CpuOps().query_prep(args), KernelStatus::kOk);
            for (int row = 0; row < n_tokens * group; ++row) {
              const float* x = q.data() + row / group * stride + (group + row % group) * dim;
              for (int i = 0; i < dim; ++i) {
                const auto at = static_cast<std::size_t>((n_tokens * group + row) * dim + i);
                const float* head_map = with_map ? map.data() + dim * dim : nullptr;
                ledger.Check(out[at], expected[at], MapBound(x, head_map, dim, i, 0.125));
              }
            }
            for (std::size_t i = 0; i < n / 2; ++i) ASSERT_EQ(out[i], -1.0f) << "head 0 is not part of the call";
          }
        }
      }
    }
  });
}

TEST(CpuKvWrite, MatchesTheReferenceAndKeepsOtherRows) {
  Ledger ledger("kv_write");
  ForEachTargetAndAmx([&] {
    for (int dim : {64, 80, 128}) {
      for (int bits : {16, 32}) {
        const int heads = 3;
        const auto layout = MustLayout(heads, dim, 64, {{bits, dim}}, {{bits, dim}}, false);
        for (const auto& [first, n] :
             std::vector<std::pair<int, int>>{{0, 1}, {63, 2}, {5, 64}, {130, 17}, {64, 128}}) {
          Random random(static_cast<unsigned>(dim + first));
          const int n_blocks = (first + n - 1) / 64 - first / 64 + 1;
          const std::int64_t stride = heads * dim + 7;
          Guarded<float> k(random.Normals(static_cast<std::size_t>(n * stride)));
          Guarded<float> v(random.Normals(static_cast<std::size_t>(n * stride)));
          const auto map = random.Normals(static_cast<std::size_t>(heads * dim * dim), 0.2f);
          const Rope rope(n, dim, first);
          const std::size_t bytes = static_cast<std::size_t>(n_blocks * layout.block_bytes);
          std::vector<std::uint8_t> expected(bytes, 0xab);
          Guarded<std::uint8_t> got(expected);
          std::vector<std::uint8_t*> expected_blocks, got_blocks;
          for (int b = 0; b < n_blocks; ++b) {
            expected_blocks.push_back(expected.data() + b * layout.block_bytes);
            got_blocks.push_back(got.data() + b * layout.block_bytes);
          }
          KvWriteArgs args = {k.data(),
                              v.data(),
                              stride,
                              first,
                              n,
                              0,
                              heads,
                              {rope.cos.data(), rope.sin.data()},
                              map.data(),
                              &layout,
                              expected_blocks.data()};
          ASSERT_EQ(ReferenceOps().kv_write(args), KernelStatus::kOk);
          args.blocks = got_blocks.data();
          ASSERT_EQ(CpuOps().kv_write(args), KernelStatus::kOk);
          for (int t = -(first % 64); t < n_blocks * 64 - first % 64; ++t) {
            const int row = first % 64 + t;
            for (int g = 0; g < heads; ++g) {
              std::vector<float> a(static_cast<std::size_t>(dim)), b(a.size());
              const std::int64_t at = row / 64 * layout.block_bytes + g * layout.head_bytes;
              const bool written = t >= 0 && t < n;
              reference::DecodeKeyRow(layout, expected.data() + at, row % 64, a.data());
              reference::DecodeKeyRow(layout, got.data() + at, row % 64, b.data());
              for (int i = 0; i < dim; ++i) {
                double bound = 0;
                if (written) {
                  bound = MapBound(k.data() + t * stride + g * dim, map.data() + g * dim * dim, dim, i, 1.0);
                  if (bits == 16) bound += 2 * kEpsBf16 * std::abs(a[static_cast<std::size_t>(i)]);  // may round apart
                }
                ledger.Check(b[static_cast<std::size_t>(i)], a[static_cast<std::size_t>(i)], bound);
              }
              reference::DecodeValueRow(layout, expected.data() + at, row % 64, a.data());
              reference::DecodeValueRow(layout, got.data() + at, row % 64, b.data());
              ASSERT_EQ(a, b) << "values are only rounded";
            }
          }
        }
      }
    }
  });
}

// Models without RoPE fold their maps into the weights; what is left for the ops is the rotation inside the runs.
TEST(CpuKvWrite, RotationIsTheMapThatItStandsFor) {
  Ledger ledger("rotation");
  ForEachTarget([&] {
    for (const auto& runs : {std::vector<KvRun>{{8, 64}}, {{4, 48}, {0, 16}}, {{8, 16}, {2, 32}, {16, 16}}}) {
      const int heads = 2, dim = 64, n = 70, group = 2;
      const auto exact = MustLayout(heads, dim, 64, {{32, dim}}, {{32, dim}}, false);
      const auto packed = MustLayout(heads, dim, 64, runs, {{8, dim}}, true);
      std::vector<float> map(static_cast<std::size_t>(heads * dim * dim), 0.0f);  // Hd of every head
      for (int row = 0; row < heads * dim; ++row) {
        map[static_cast<std::size_t>(row * dim + row % dim)] = 1.0f;
        HadamardRuns(map.data() + row * dim, &packed.k);
      }
      Random random(9);
      Guarded<float> x(random.Normals(static_cast<std::size_t>(n * heads * group * dim)));
      const std::int64_t stride = heads * group * dim;
      const double bound = 2 * (dim + 4) * kEps32 * 12;  // MapBound, with the norm of the longest head
      for (const Ops* ops : {&ReferenceOps(), &CpuOps()}) {
        std::vector<float> mapped(x.size()), rotated(x.size());
        QueryPrepArgs prep = {x.data(), stride, n,  heads * group, heads,  dim,
                              0,        heads,  {}, map.data(),    0.125f, nullptr};
        prep.out = mapped.data();
        ASSERT_EQ(ReferenceOps().query_prep(prep), KernelStatus::kOk);
        prep.out = rotated.data();
        prep.q_map = nullptr;
        prep.rotation = &packed.k;
        ASSERT_EQ(ops->query_prep(prep), KernelStatus::kOk);
        for (std::size_t i = 0; i < mapped.size(); ++i) ledger.Check(rotated[i], mapped[i], 0.125 * bound);

        std::vector<std::uint8_t> want(static_cast<std::size_t>(2 * exact.block_bytes)), got(want.size());
        std::vector<std::uint8_t*> want_blocks = {want.data(), want.data() + exact.block_bytes};
        std::vector<std::uint8_t*> got_blocks = {got.data(), got.data() + exact.block_bytes};
        KvWriteArgs write = {x.data(), x.data(), stride, 0, n, 0, heads, {}, map.data(), &exact, want_blocks.data()};
        ASSERT_EQ(ReferenceOps().kv_write(write), KernelStatus::kOk);
        write.k_map = nullptr;
        write.rotation = &packed.k;
        write.blocks = got_blocks.data();
        ASSERT_EQ(ops->kv_write(write), KernelStatus::kOk);
        std::vector<float> a(static_cast<std::size_t>(dim)), b(a.size());
        for (int t = 0; t < n; ++t) {
          for (int g = 0; g < heads; ++g) {
            const std::int64_t at = t / 64 * exact.block_bytes + g * exact.head_bytes;
            reference::DecodeKeyRow(exact, want.data() + at, t % 64, a.data());
            reference::DecodeKeyRow(exact, got.data() + at, t % 64, b.data());
            for (std::size_t i = 0; i < a.size(); ++i) ledger.Check(b[i], a[i], bound);
          }
        }
        const KvSideLayout other = MustLayout(heads, 32, 64, {{8, 32}}, {{8, 32}}, true).k;
        prep.rotation = write.rotation = &other;
        EXPECT_EQ(ops->query_prep(prep), KernelStatus::kBadShape) << "runs of another width";
        EXPECT_EQ(ops->kv_write(write), KernelStatus::kBadShape);
      }
    }
  });
}

// An exact block of one head set from rows of floats.
std::vector<std::uint8_t> ExactBlock(const KvBlockLayout& layout, const std::vector<float>& k,
                                     const std::vector<float>& v) {
  std::vector<std::uint8_t> block(static_cast<std::size_t>(layout.block_bytes), 0);
  std::vector<std::uint8_t*> blocks = {block.data()};
  EXPECT_EQ(ReferenceOps().kv_write({k.data(),
                                     v.data(),
                                     layout.n_kv_heads * layout.head_dim,
                                     0,
                                     64,
                                     0,
                                     layout.n_kv_heads,
                                     {},
                                     nullptr,
                                     &layout,
                                     blocks.data()}),
            KernelStatus::kOk);
  return block;
}

double RunError(const float* x, const float* y, int n) {
  double sum = 0;
  for (int i = 0; i < n; ++i) sum += std::pow(double{x[i]} - y[i], 2);
  return sum;
}

// Error of plain min-max quantisation from `lo` to `hi`.
double GridError(const float* x, int n, int bits, double lo, double hi) {
  const double top = (1 << bits) - 1;
  const double step = (hi - lo) / top;
  double sum = 0;
  for (int i = 0; i < n; ++i) {
    const double code = step == 0 ? 0.0 : std::clamp(std::nearbyint((x[i] - lo) / step), 0.0, top);
    sum += std::pow(x[i] - (lo + step * code), 2);
  }
  return sum;
}

// The same between the ends that the format can state: the scale code that covers the range, around its middle.
double CoveringError(const float* x, const KvRun& run) {
  const double lo = *std::min_element(x, x + run.width), hi = *std::max_element(x, x + run.width);
  if (run.scale == KvScaleKind::kShared) {
    const double half = std::exp2(std::ceil(4 * std::log2(std::max(hi, -lo)) - 1e-5) / 4);
    return GridError(x, run.width, run.bits, -half, half);
  }
  const double reach = std::max((hi - lo) / 2 * 128 / 127, std::abs(hi + lo) / 2 * 64 / 127);
  const double half = std::exp2(std::ceil(8 * std::log2(reach) - 1e-5) / 8);
  const double center = half / 64 * std::nearbyint((hi + lo) / 2 / half * 64);
  return GridError(x, run.width, run.bits, center - half, center + half);
}

constexpr KvScaleKind kShared = KvScaleKind::kShared;

const std::vector<std::vector<KvRun>> kShapes64 = {{{8, 64}},
                                                   {{4, 64}},
                                                   {{3, 64}},
                                                   {{2, 64}},
                                                   {{1, 64}},
                                                   {{16, 64}},
                                                   {{32, 64}},
                                                   {{4, 16}, {3, 16}, {2, 32}},
                                                   {{8, 16}, {0, 16}, {1, 32}},
                                                   {{16, 32}, {4, 32}},
                                                   {{3, 48}, {0, 16}},
                                                   {{8, 64, kShared}},
                                                   {{4, 64, kShared}},
                                                   {{3, 64, kShared}},
                                                   {{2, 64, kShared}},
                                                   {{1, 64, kShared}},
                                                   {{4, 16, kShared}, {2, 16, kShared}, {1, 16, kShared}, {0, 16}},
                                                   {{3, 48, kShared}, {4, 16}}};

// Keys with a mean and values with outliers, some tokens all zero; token sizes span six octaves if `wild`.
void FillRows(Random& random, int heads, int dim, bool wild, std::vector<float>* k, std::vector<float>* v) {
  *k = random.Normals(static_cast<std::size_t>(64 * heads * dim));
  *v = random.Normals(static_cast<std::size_t>(64 * heads * dim), 0.01f);
  for (std::size_t i = 0; i < v->size(); ++i) {
    const std::size_t token = i / static_cast<std::size_t>(heads * dim);
    if (i % 37 == 0) (*v)[i] *= 20.0f;
    if (i % 5 == 0) (*k)[i] += 3.0f;
    if (wild) (*k)[i] *= std::exp2(static_cast<float>(token % 7) - 3.0f);
    if (wild && token == 9) (*k)[i] = (*v)[i] = 0.0f;
  }
}

// Every instruction set must give the reference's bytes: a block packed here and one packed there are the same block.
TEST(CpuKvPack, GivesTheReferencesBytes) {
  ForEachTarget([&] {
    const int heads = 3;
    for (int dim : {64, 80, 128}) {
      for (int exact_bits : {16, 32}) {
        const auto exact = MustLayout(heads, dim, 64, {{exact_bits, dim}}, {{exact_bits, dim}}, false);
        for (auto runs : kShapes64) {
          if (dim > 64) runs.push_back({runs[0].bits, dim - 64, runs[0].scale});
          for (bool rotate : {false, true}) {
            for (int n_tokens : {16, 64}) {
              const auto packed = MustLayout(heads, dim, n_tokens, runs, runs, rotate);
              Random random(11);
              std::vector<float> k, v;
              FillRows(random, heads, dim, true, &k, &v);
              const auto block = ExactBlock(exact, k, v);
              Guarded<std::uint8_t> source(block);
              std::vector<std::uint8_t> expected(static_cast<std::size_t>(packed.block_bytes), 0x5a);
              Guarded<std::uint8_t> got(expected);
              ASSERT_EQ(ReferenceOps().kv_pack({source.data(), &exact, expected.data(), &packed, 0, heads}),
                        KernelStatus::kOk);
              ASSERT_EQ(CpuOps().kv_pack({source.data(), &exact, got.data(), &packed, 0, heads}), KernelStatus::kOk);
              for (std::size_t i = 0; i < expected.size(); ++i) {
                ASSERT_EQ(got[i], expected[i]) << runs[0].bits << " bits, kind " << static_cast<int>(runs[0].scale)
                                               << ", dim " << dim << ", rotated " << rotate << ", byte " << i;
              }
            }
          }
        }
      }
    }
  });
}

// From one packed layout to the next, as blocks age: again the reference's bytes, dropped runs and rotations included.
TEST(CpuKvPack, RepacksPackedBlocksAsTheReferenceDoes) {
  ForEachTarget([&] {
    const int heads = 2, dim = 64;
    const auto exact = MustLayout(heads, dim, 64, {{16, dim}}, {{16, dim}}, false);
    Random random(12);
    std::vector<float> k, v;
    FillRows(random, heads, dim, true, &k, &v);
    const auto block = ExactBlock(exact, k, v);
    for (const auto& first : kShapes64) {
      for (const bool rotate : {false, true}) {
        const auto source_layout = MustLayout(heads, dim, 64, first, first, rotate);
        std::vector<std::uint8_t> source(static_cast<std::size_t>(source_layout.block_bytes));
        ASSERT_EQ(ReferenceOps().kv_pack({block.data(), &exact, source.data(), &source_layout, 0, heads}),
                  KernelStatus::kOk);
        Guarded<std::uint8_t> guarded(source);
        for (const auto& second : kShapes64) {
          const auto packed = MustLayout(heads, dim, 64, second, second, true);
          std::vector<std::uint8_t> expected(static_cast<std::size_t>(packed.block_bytes), 0x5a);
          Guarded<std::uint8_t> got(expected);
          ASSERT_EQ(ReferenceOps().kv_pack({source.data(), &source_layout, expected.data(), &packed, 0, heads}),
                    KernelStatus::kOk);
          ASSERT_EQ(CpuOps().kv_pack({guarded.data(), &source_layout, got.data(), &packed, 0, heads}),
                    KernelStatus::kOk);
          for (std::size_t i = 0; i < expected.size(); ++i) {
            ASSERT_EQ(got[i], expected[i])
                << first[0].bits << " to " << second[0].bits << " bits, rotated " << rotate << ", byte " << i;
          }
        }
      }
    }
  });
}

// Clipping must pay: over a block, the rule's error is below that of scales which cover each token's range.
TEST(CpuKvPack, IsBetterThanMinMax) {
  const int dim = 64, heads = 2;
  const auto exact = MustLayout(heads, dim, 64, {{32, dim}}, {{32, dim}}, false);
  for (const auto& runs : kShapes64) {
    for (bool rotate : {false, true}) {
      const auto packed = MustLayout(heads, dim, 64, runs, runs, rotate);
      Random random(11);
      std::vector<float> k, v;
      FillRows(random, heads, dim, false, &k, &v);
      const auto block = ExactBlock(exact, k, v);
      std::vector<std::uint8_t> got(static_cast<std::size_t>(packed.block_bytes));
      ASSERT_EQ(CpuOps().kv_pack({block.data(), &exact, got.data(), &packed, 0, heads}), KernelStatus::kOk);
      for (bool value : {false, true}) {
        const auto decode = value ? reference::DecodeValueRow : reference::DecodeKeyRow;
        std::vector<double> error(runs.size()), covering(runs.size());
        for (int i = 0; i < heads * 64; ++i) {
          float x[64], y[64];
          decode(exact, block.data() + i / 64 * exact.head_bytes, i % 64, x);
          decode(packed, got.data() + i / 64 * packed.head_bytes, i % 64, y);
          for (std::size_t r = 0, first = 0; r < runs.size(); first += static_cast<std::size_t>(runs[r++].width)) {
            error[r] += RunError(x + first, y + first, runs[r].width);
            if (!IsQuantised(runs[r].bits)) continue;
            if (value && rotate) HadamardRun(x + first, runs[r].width);  // the error's norm is the same there
            covering[r] += CoveringError(x + first, runs[r]);
          }
        }
        for (std::size_t r = 0; r < runs.size(); ++r) {
          if (!IsQuantised(runs[r].bits)) continue;
          EXPECT_LE(error[r], 1.001 * covering[r]) << runs[r].bits << " bits, kind " << static_cast<int>(runs[r].scale)
                                                   << ", value " << value << ", rotated " << rotate;
        }
      }
    }
  }
}

// Shares of a Gaussian's variance that a symmetric uniform quantiser leaves (Max 1960), 4, 3, 2 and 1 bits. The grid
// of the shared scales adds a little, the token's own rms (of 64 numbers) takes a little.
TEST(CpuKvPack, SharedScalesLeaveTheErrorOfMaxsQuantiser) {
  const int dim = 64, heads = 8;
  const auto exact = MustLayout(heads, dim, 64, {{32, dim}}, {{32, dim}}, false);
  Random random(6);
  const auto k = random.Normals(64 * heads * dim);
  const auto block = ExactBlock(exact, k, k);
  for (const auto& [bits, share] :
       std::vector<std::pair<int, double>>{{4, 0.01154}, {3, 0.03744}, {2, 0.1188}, {1, 0.3634}}) {
    const auto packed = MustLayout(heads, dim, 64, {{bits, dim, kShared}}, {{bits, dim, kShared}}, false);
    std::vector<std::uint8_t> got(static_cast<std::size_t>(packed.block_bytes));
    ASSERT_EQ(CpuOps().kv_pack({block.data(), &exact, got.data(), &packed, 0, heads}), KernelStatus::kOk);
    double error = 0, energy = 0;
    for (int g = 0; g < heads; ++g) {
      for (int t = 0; t < 64; ++t) {
        float x[64], y[64];
        reference::DecodeKeyRow(exact, block.data() + g * exact.head_bytes, t, x);
        reference::DecodeKeyRow(packed, got.data() + g * packed.head_bytes, t, y);
        error += RunError(x, y, dim);
        energy += std::pow(Norm(x, dim), 2);
      }
    }
    EXPECT_LT(error / energy, 1.04 * share) << bits;
    EXPECT_GT(error / energy, 0.8 * share) << bits;
  }
}

TEST(CpuKvPack, ValuesOnTheGridComeBackExactly) {
  ForEachTarget([&] {
    const int dim = 64;
    const auto exact = MustLayout(1, dim, 64, {{32, dim}}, {{32, dim}}, false);
    for (int bits : {8, 4, 3}) {  // the candidates of coarser runs are not the covering ones
      const auto packed = MustLayout(1, dim, 64, {{bits, dim}}, {{bits, dim}}, false);
      Random random(static_cast<unsigned>(bits));
      std::vector<float> k(64 * dim), v(64 * dim);
      for (int t = 0; t < 64; ++t) {
        const KvScale scale = DecodeScale(bits, static_cast<std::uint8_t>(100 + t), static_cast<std::int8_t>(t - 30));
        for (int i = 0; i < dim; ++i) {
          const int top = (1 << bits) - 1;  // both ends occur, so that the range is known
          const int code = i == 3 ? 0 : i == 40 ? top : random.Below(top + 1);
          k[static_cast<std::size_t>(t * dim + i)] = scale.base + scale.step * static_cast<float>(code);
          v[static_cast<std::size_t>(t * dim + i)] = scale.base + scale.step * static_cast<float>(top - code);
        }
      }
      const auto block = ExactBlock(exact, k, v);
      std::vector<std::uint8_t> got(static_cast<std::size_t>(packed.block_bytes));
      for (const Ops* ops : {&ReferenceOps(), &CpuOps()}) {
        ASSERT_EQ(ops->kv_pack({block.data(), &exact, got.data(), &packed, 0, 1}), KernelStatus::kOk);
        for (int t = 0; t < 64; ++t) {
          float row[64];
          reference::DecodeKeyRow(packed, got.data(), t, row);
          for (int i = 0; i < dim; ++i) ASSERT_EQ(row[i], k[static_cast<std::size_t>(t * dim + i)]) << bits << ' ' << t;
          reference::DecodeValueRow(packed, got.data(), t, row);
          for (int i = 0; i < dim; ++i) ASSERT_EQ(row[i], v[static_cast<std::size_t>(t * dim + i)]) << bits << ' ' << t;
        }
      }
    }
  });
}

TEST(CpuKvPack, ConstantZeroHugeAndNonFiniteRowsStayInBounds) {
  ForEachTarget([&] {
    const auto exact = MustLayout(1, 64, 64, {{32, 64}}, {{32, 64}}, false);
    for (int bits : {8, 4, 3, 2, 1}) {
      for (const KvScaleKind kind : {KvScaleKind::kAffine, kShared}) {
        const auto packed = MustLayout(1, 64, 64, {{bits, 64, kind}}, {{bits, 64, kind}}, true);
        std::vector<float> k(64 * 64, 0.0f);
        const float rows[] = {0.0f, 1.0f, -2.5f, 1e30f, -1e-30f, kNan, INFINITY};
        for (std::size_t t = 0; t < 7; ++t) std::fill_n(k.begin() + static_cast<std::ptrdiff_t>(64 * t), 64, rows[t]);
        k[64 * 8 + 5] = kNan;
        const auto block = ExactBlock(exact, k, k);
        for (const Ops* ops : {&ReferenceOps(), &CpuOps()}) {
          std::vector<std::uint8_t> source = block;
          Guarded<std::uint8_t> got(static_cast<std::size_t>(packed.block_bytes));
          ASSERT_EQ(ops->kv_pack({source.data(), &exact, got.data(), &packed, 0, 1}), KernelStatus::kOk);
          float row[64];
          for (int t = 0; t < 64; ++t) {
            reference::DecodeKeyRow(packed, got.data(), t, row);
            for (float value : row) ASSERT_TRUE(std::isfinite(value)) << ops->name << " row " << t;
          }
          reference::DecodeKeyRow(packed, got.data(), 0, row);
          if (kind == kShared) continue;  // one scale base for 1e30 and 1
          for (float value : row) EXPECT_EQ(value, 0.0f);
          reference::DecodeKeyRow(packed, got.data(), 1, row);
          // A row of ones has half range 64 / 127.
          const float step = 1.1f / static_cast<float>((1 << bits) - 1);
          for (float value : row) EXPECT_NEAR(value, 1.0f, 0.55f * step) << ops->name << ' ' << bits;
        }
      }
    }
  });
}

}  // namespace
}  // namespace zeroc::kernels
