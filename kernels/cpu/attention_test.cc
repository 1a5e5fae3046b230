#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <tuple>
#include <vector>

#include "kernels/cpu/amx.h"
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/test_util.h"

namespace zeroc::kernels {
namespace {

// A sequence in blocks of one layout, written or packed by the reference; block addresses are odd multiples of a byte.
class Sequence {
 public:
  // Tokens [0, n_valid) of random K and V; rows from n_valid on are poisoned where the layout is exact.
  Sequence(const KvBlockLayout& layout, int n_blocks, int n_valid, unsigned seed, float k_scale) : layout_(layout) {
    Random random(seed);
    const int dim = layout.head_dim, heads = layout.n_kv_heads;
    const bool exact =
        layout.k.n_runs == 1 && layout.k.runs[0].bits >= 16 && layout.v.n_runs == 1 && layout.v.runs[0].bits >= 16;
    const int bits = exact ? layout.k.runs[0].bits : 32;
    const auto source = MustLayout(heads, dim, 64, {{bits, dim}}, {{exact ? layout.v.runs[0].bits : 32, dim}}, false);
    bytes_.assign(static_cast<std::size_t>(n_blocks * (layout.block_bytes + 1) + 1), 0xff);
    for (int b = 0; b < n_blocks; ++b) {
      std::uint8_t* to = bytes_.data() + b * (layout.block_bytes + 1) + 1;
      auto k = random.Normals(static_cast<std::size_t>(64 * heads * dim), k_scale);
      auto v = random.Normals(static_cast<std::size_t>(64 * heads * dim));
      for (float& x : v) x += 0.5f;
      for (int t = 0; t < 64; ++t) {
        if (b * layout.n_tokens + t < n_valid) continue;
        std::fill_n(k.begin() + t * heads * dim, heads * dim, exact ? kNan : 100.0f);
        std::fill_n(v.begin() + t * heads * dim, heads * dim, exact ? kNan : 100.0f);
      }
      std::vector<std::uint8_t> block(static_cast<std::size_t>(source.block_bytes));
      std::uint8_t* blocks[] = {block.data()};
      EXPECT_EQ(
          ReferenceOps().kv_write({k.data(), v.data(), heads * dim, 0, 64, 0, heads, {}, nullptr, &source, blocks}),
          KernelStatus::kOk);
      EXPECT_EQ(ReferenceOps().kv_pack({block.data(), &source, to, &layout_, 0, heads}), KernelStatus::kOk);
      pointers_.push_back(to);
    }
  }
  Sequence(const Sequence&) = delete;
  Sequence& operator=(const Sequence&) = delete;

  KvSegment Segment(int first_pos, int begin, int end) const {
    return {pointers_.data(), static_cast<std::int32_t>(pointers_.size()), &layout_, first_pos, begin, end};
  }

 private:
  KvBlockLayout layout_;
  std::vector<std::uint8_t> bytes_;
  std::vector<const std::uint8_t*> pointers_;
};

struct Result {
  std::vector<float> out, row_max, row_sum;
};

Result Attend(const Ops& ops, const std::vector<float>& q, int n_rows, int group, int dim, int first_query_pos,
              int kv_head, const std::vector<KvSegment>& segments) {
  Guarded<float> out(static_cast<std::size_t>(n_rows * dim)), top(static_cast<std::size_t>(n_rows)),
      sum(static_cast<std::size_t>(n_rows));
  Guarded<float> queries(q);
  const std::size_t scratch_bytes = AttentionScratchBytes(n_rows, dim);
  const std::unique_ptr<void, decltype(&std::free)> scratch(std::aligned_alloc(64, scratch_bytes + 64), &std::free);
  auto* end = static_cast<std::uint8_t*>(scratch.get()) + scratch_bytes;
  std::memset(scratch.get(), 0xff, scratch_bytes + 64);
  const AttentionArgs args = {queries.data(),  n_rows,     group,           dim,
                              first_query_pos, kv_head,    segments.data(), static_cast<std::int32_t>(segments.size()),
                              out.data(),      top.data(), sum.data(),      scratch.get()};
  EXPECT_EQ(ops.attention(args), KernelStatus::kOk);
  for (int i = 0; i < 64; ++i) EXPECT_EQ(end[i], 0xff) << "scratch overrun";
  return {{out.data(), out.data() + out.size()},
          {top.data(), top.data() + top.size()},
          {sum.data(), sum.data() + sum.size()}};
}

// The roundings that a variant states in AttentionArgs. q has norm about 1 and a key about sqrt(d), so the terms of a
// score have root-sum-square 1; the roundings of operands are independent, those of float32 sums a random walk over d.
// Largest of many: 6 standard deviations and more.
struct Errors {
  double score;  // of one score
  double value;  // of a weighted mean of values, in units of the values
};
Errors ErrorsOf(int dim, int n_rows, int n_tokens) {
  const double sums = 64 * std::sqrt(dim) * kEps32;
  if (!cpu::VnniReady()) return {6 * kEps32 + sums, kEps32 + 1e-6};
  // Two factors of every product are bf16: q and the key, the probability and the value.
  if (cpu::AmxReady() && n_rows > kDecodeRowsMax) return {6 * 1.5 * kEpsBf16 + sums, 1.5 * kEpsBf16};
  // Units of 1 / 32512 of the largest: of q, about three times its root mean square, and of the probabilities, which
  // are at most the sum that divides them. Small probabilities may all round down, and the rotation of V gathers what
  // all coordinates lost (up to 3 each, of values up to 6) in one.
  return {6 * 3 * 0.3 / 32512 + sums, 0.5 / 32512 * n_tokens * std::sqrt(64) * 3 / 6};
}

// Scores carry an error; each probability then errs by that factor, and so do sums and outputs.
void Compare(const Result& got, const Result& expected, int n_rows, int dim, const Errors& errors, Ledger* ledger) {
  for (int r = 0; r < n_rows; ++r) {
    const auto at = static_cast<std::size_t>(r);
    if (expected.row_max[at] == -INFINITY) {
      EXPECT_EQ(got.row_max[at], -INFINITY);
      EXPECT_EQ(got.row_sum[at], 0.0f);
    } else {
      ledger->Check(got.row_max[at], expected.row_max[at], errors.score);
      // The maxima may differ: compare log-sum-exp.
      ledger->Check(got.row_max[at] + std::log(got.row_sum[at]), expected.row_max[at] + std::log(expected.row_sum[at]),
                    errors.score + 1e-5);
    }
    double largest = 0;
    for (int i = 0; i < dim; ++i) {
      if (expected.row_sum[at] == 0) break;
      largest = std::max(largest,
                         std::abs(double{expected.out[at * static_cast<std::size_t>(dim) + i]}) / expected.row_sum[at]);
    }
    for (int i = 0; i < dim; ++i) {
      const std::size_t j = at * static_cast<std::size_t>(dim) + static_cast<std::size_t>(i);
      if (expected.row_sum[at] == 0) {
        EXPECT_EQ(got.out[j], 0.0f);
        continue;
      }
      // |V| is at most about 6 here; the weights err by twice a score's error, relative.
      ledger->Check(got.out[j] / got.row_sum[at], expected.out[j] / expected.row_sum[at],
                    6.0 * (2 * errors.score + errors.value) + 1e-5 * (1 + largest));
    }
  }
}

struct Shape {
  std::vector<KvRun> k, v;
};

std::vector<Shape> ShapesOf(int d) {
  std::vector<Shape> shapes;
  for (int bits : {32, 16, 8, 4, 3, 2, 1}) shapes.push_back({{{bits, d}}, {{bits, d}}});
  shapes.push_back({{{8, 16}, {4, d - 32}, {0, 16}}, {{3, d - 16}, {2, 16}}});
  shapes.push_back({{{4, 16}, {3, 16}, {2, d - 32}}, {{16, 16}, {4, d - 48}, {0, 16}, {1, 16}}});
  shapes.push_back({{{0, d}}, {{4, d}}});
  return shapes;
}

TEST(CpuAttention, MatchesTheReferenceForEveryWidthAndDim) {
  Ledger ledger("attention");
  ForEachTargetAndAmx([&] {
    for (int dim : {64, 80, 96, 128}) {
      unsigned seed = 100;
      for (const Shape& shape : ShapesOf(dim)) {
        for (bool rotate : {false, true}) {
          const auto layout = MustLayout(2, dim, 64, shape.k, shape.v, rotate);
          const Sequence history(layout, 3, 192, ++seed, 1.0f);
          SCOPED_TRACE("dim " + std::to_string(dim) + ", seed " + std::to_string(seed) + (rotate ? ", rotated" : ""));
          for (int group : {1, 3, 4, 8}) {
            SCOPED_TRACE("group " + std::to_string(group));
            const int n_rows = group * (group == 3 ? 5 : 1);
            Random random(seed);
            const auto q = random.Normals(static_cast<std::size_t>(n_rows * dim), 1.0f / std::sqrt(float(dim)));
            const std::vector<KvSegment> segments = {history.Segment(0, 0, 192)};
            const Result expected = Attend(ReferenceOps(), q, n_rows, group, dim, 190, 1, segments);
            const Result got = Attend(CpuOps(), q, n_rows, group, dim, 190, 1, segments);
            Compare(got, expected, n_rows, dim, ErrorsOf(dim, n_rows, 192), &ledger);
          }
        }
      }
    }
  });
}

TEST(CpuAttention, SegmentsMasksAndPoisonedPadding) {
  Ledger ledger("attention, segments and masks");
  ForEachTargetAndAmx([&] {
    const int dim = 64;
    const auto sink_layout = MustLayout(2, dim, 16, {{16, dim}}, {{16, dim}}, false);
    const auto q4 = MustLayout(2, dim, 64, {{4, 32}, {2, 32}}, {{3, dim}}, true);
    const auto q1 = MustLayout(2, dim, 64, {{4, 32}, {0, 32}}, {{1, dim}}, true);
    const auto exact = MustLayout(2, dim, 64, {{16, dim}}, {{16, dim}}, false);
    const Sequence sink(sink_layout, 1, 16, 1, 1.0f), middle(q4, 2, 128, 2, 1.0f), cold(q1, 1, 64, 3, 1.0f);
    for (int last : {256, 257, 271, 272, 300, 319, 320, 383}) {  // position of the last query
      const Sequence recent(exact, 2, last - 256 + 1, 4, 1.0f);
      const std::vector<KvSegment> segments = {sink.Segment(0, 0, 16), middle.Segment(0, 16, 128),
                                               cold.Segment(128, 128, 192), recent.Segment(256, 256, last + 1)};
      for (int n_tokens : {1, 2, 9, 40}) {
        for (int group : {1, 3}) {
          const int n_rows = n_tokens * group;
          Random random(static_cast<unsigned>(last));
          const auto q = random.Normals(static_cast<std::size_t>(n_rows * dim), 0.125f);
          const int first = last + 1 - n_tokens;
          const Result expected = Attend(ReferenceOps(), q, n_rows, group, dim, first, 0, segments);
          const Result got = Attend(CpuOps(), q, n_rows, group, dim, first, 0, segments);
          for (float x : expected.out) ASSERT_FALSE(std::isnan(x));
          Compare(got, expected, n_rows, dim, ErrorsOf(dim, n_rows, 192), &ledger);
        }
      }
    }
  });
}

TEST(CpuAttention, WindowsAtEveryEdge) {
  Ledger ledger("attention, windows");
  ForEachTargetAndAmx([&] {
    const int dim = 64, group = 2, n_rows = 2 * 70;
    for (int bits : {16, 4}) {
      const auto layout = MustLayout(1, dim, 64, {{bits, dim}}, {{bits, dim}}, bits == 4);
      const Sequence history(layout, 2, 128, 9, 1.0f);
      Random random(5);
      const auto q = random.Normals(n_rows * dim, 0.125f);
      for (int begin : {0, 1, 15, 16, 17, 63, 64, 65, 127, 128}) {
        for (int end : {0, 1, 16, 31, 64, 66, 127, 128, 500}) {
          const std::vector<KvSegment> segments = {history.Segment(1000, 1000 + begin, 1000 + end)};
          for (int first : {900, 999, 1000, 1062, 5000}) {  // some rows, or all, see nothing
            const Result expected = Attend(ReferenceOps(), q, n_rows, group, dim, first, 0, segments);
            const Result got = Attend(CpuOps(), q, n_rows, group, dim, first, 0, segments);
            Compare(got, expected, n_rows, dim, ErrorsOf(dim, n_rows, 192), &ledger);
          }
        }
      }
    }
  });
}

TEST(CpuAttention, LargeScoresAndNan) {
  ForEachTargetAndAmx([&] {
    const int dim = 64;
    const auto layout = MustLayout(1, dim, 64, {{16, dim}}, {{16, dim}}, false);
    const Sequence history(layout, 4, 256, 21, 30.0f);  // scores of several hundred: one token takes all
    Random random(6);
    auto q = random.Normals(20 * dim);
    const std::vector<float> few(q.begin(), q.begin() + 8 * dim);
    const Result expected = Attend(ReferenceOps(), few, 8, 1, dim, 255, 0, {history.Segment(0, 0, 256)});
    Result got = Attend(CpuOps(), few, 8, 1, dim, 255, 0, {history.Segment(0, 0, 256)});
    Ledger ledger("attention, large scores");
    Compare(got, expected, 8, dim, {1e-2, 1e-3}, &ledger);  // |q| |k| is about 8 * 240
    q[3 * dim + 1] = kNan;
    const auto packed_layout = MustLayout(1, dim, 64, {{4, dim}}, {{3, dim}}, true);
    const Sequence packed(packed_layout, 4, 256, 22, 30.0f);
    for (const KvSegment& segment : {history.Segment(0, 0, 256), packed.Segment(0, 0, 256)}) {
      got = Attend(CpuOps(), q, 20, 1, dim, 255, 0, {segment});
      for (int r = 0; r < 20; ++r) {
        EXPECT_EQ(std::isnan(got.row_sum[static_cast<std::size_t>(r)]), r == 3);
        for (int i = 0; i < dim; ++i) EXPECT_EQ(std::isnan(got.out[static_cast<std::size_t>(r * dim + i)]), r == 3);
      }
    }
  });
}

TEST(CpuAttention, PartsMergeToTheWhole) {
  ForEachTargetAndAmx([&] {
    const int dim = 64, group = 4, n_rows = 4;
    const auto layout = MustLayout(1, dim, 64, {{4, dim}}, {{4, dim}}, true);
    const Sequence history(layout, 8, 512, 31, 1.0f);
    Random random(7);
    const auto q = random.Normals(n_rows * dim, 0.3f);
    const Result whole = Attend(CpuOps(), q, n_rows, group, dim, 511, 0, {history.Segment(0, 0, 512)});
    std::vector<Result> parts;
    for (int begin : {0, 100, 300}) {
      const int end = begin == 0 ? 100 : begin == 100 ? 300 : 512;
      parts.push_back(Attend(CpuOps(), q, n_rows, group, dim, 511, 0, {history.Segment(0, begin, end)}));
    }
    const float* out[] = {parts[0].out.data(), parts[1].out.data(), parts[2].out.data()};
    const float* top[] = {parts[0].row_max.data(), parts[1].row_max.data(), parts[2].row_max.data()};
    const float* sum[] = {parts[0].row_sum.data(), parts[1].row_sum.data(), parts[2].row_sum.data()};
    // Parts have their own units of probabilities.
    const Errors errors = ErrorsOf(dim, n_rows, 512);
    const double merge_error = 1e-5 + (cpu::VnniReady() ? 6 * (2 * errors.score + errors.value) / 6 : 0);
    std::vector<Bf16> merged(n_rows * dim);
    ASSERT_EQ(CpuOps().attention_merge({out, top, sum, 3, n_rows, group, dim, 0, merged.data(), n_rows * dim}),
              KernelStatus::kOk);
    for (int i = 0; i < n_rows * dim; ++i) {
      const float expected = whole.out[static_cast<std::size_t>(i)] / whole.row_sum[static_cast<std::size_t>(i / dim)];
      const float value = Bf16ToFloat(merged[static_cast<std::size_t>(i)]);
      EXPECT_NEAR(value, expected, kEpsBf16 * std::abs(expected) + merge_error);
    }
  });
}

// Prompts come in steps that are cut in many ways, with more or fewer of their rows beside each other.
TEST(CpuAttention, WhatManyRowsGetDoesNotDependOnTheirCompany) {
  ForEachTargetAndAmx([&] {
    if (cpu::AmxReady()) return;  // its spans begin with the rows that are there
    const int dim = 64, group = 3, n_tokens = 70;
    for (int bits : {16, 8, 3}) {
      const auto layout = MustLayout(1, dim, 64, {{bits, dim}}, {{bits, dim}}, bits < 16);
      const Sequence history(layout, 6, 384, 17, 2.0f);
      Random random(8);
      const auto q = random.Normals(n_tokens * group * dim, 0.3f);
      // Of some age only, as in young tiers: rows see other blocks, and a segment begins at any block.
      const auto segment_from = [&](int block) {
        KvSegment segment = history.Segment(64 * block, 64 * block, 384);
        segment.blocks += block;
        segment.n_blocks -= block;
        segment.min_age = 10;
        segment.max_age = 200;
        return segment;
      };
      const auto rows = [&](int begin, int end, const KvSegment& segment) {
        const std::vector<float> some(q.begin() + begin * group * dim, q.begin() + end * group * dim);
        return Attend(CpuOps(), some, (end - begin) * group, group, dim, 300 + begin, 0, {segment});
      };
      const Result all = rows(0, n_tokens, segment_from(0));
      for (const auto& [begin, end, block] : {std::tuple{0, 4, 0}, {4, 37, 0}, {37, 70, 0}, {37, 70, 1}}) {
        const Result some = rows(begin, end, segment_from(block));
        for (std::size_t i = 0; i < some.row_sum.size(); ++i) {
          const std::size_t at = i + static_cast<std::size_t>(begin * group);
          ASSERT_EQ(some.row_max[i], all.row_max[at]);
          ASSERT_EQ(some.row_sum[i], all.row_sum[at]);
          for (std::size_t d = 0; d < dim; ++d) ASSERT_EQ(some.out[i * dim + d], all.out[at * dim + d]) << bits;
        }
      }
    }
  });
}

TEST(CpuAttention, RefusesBadShapes) {
  const auto layout = MustLayout(1, 64, 64, {{4, 64}}, {{4, 64}}, true);
  const Sequence history(layout, 1, 64, 31, 1.0f);
  const KvSegment segment = history.Segment(0, 0, 64);
  alignas(64) static std::uint8_t scratch[1 << 20];
  float x[64] = {}, top, sum;
  const AttentionArgs good = {x, 1, 1, 64, 63, 0, &segment, 1, x, &top, &sum, scratch};
  for (const Ops* ops : {&ReferenceOps(), &CpuOps()}) {
    AttentionArgs bad = good;
    bad.kv_head = 1;
    EXPECT_EQ(ops->attention(bad), KernelStatus::kBadShape);
    bad = good;
    bad.head_dim = 80;
    EXPECT_EQ(ops->attention(bad), KernelStatus::kBadShape);
    bad = good;
    bad.n_rows = kAttentionRowsMax + 1;
    EXPECT_EQ(ops->attention(bad), KernelStatus::kBadShape);
  }
}

}  // namespace
}  // namespace zeroc::kernels
