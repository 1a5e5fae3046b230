#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "kernels/cpu/test_util.h"

namespace zeroc::kernels {
namespace {

TEST(CpuRows, EmbedCopiesRowsExactly) {
  ForEachTarget([] {
    Random random(1);
    for (std::int64_t hidden : {1, 7, 16, 33, 384}) {
      const auto table = random.Bf16Normals(static_cast<std::size_t>(5 * hidden));
      const std::vector<std::int32_t> ids = {4, 0, 4, 2};
      Guarded<float> out(static_cast<std::size_t>(4 * hidden));
      ASSERT_EQ(CpuOps().embed({table.data(), ids.data(), 4, hidden, out.data()}), KernelStatus::kOk);
      for (std::int64_t r = 0; r < 4; ++r) {
        for (std::int64_t i = 0; i < hidden; ++i) {
          ASSERT_EQ(out[static_cast<std::size_t>(r * hidden + i)],
                    Bf16ToFloat(table[static_cast<std::size_t>(ids[static_cast<std::size_t>(r)] * hidden + i)]));
        }
      }
    }
  });
}

TEST(CpuRows, EmbedAddsToWhatIsThere) {
  ForEachTarget([] {
    Random random(5);
    for (std::int64_t hidden : {1, 17, 768}) {
      const auto table = random.Bf16Normals(static_cast<std::size_t>(4 * hidden));
      const std::vector<std::int32_t> ids = {3, 3, 0};
      std::vector<float> expected = random.Normals(static_cast<std::size_t>(3 * hidden));
      Guarded<float> out(expected);
      ASSERT_EQ(CpuOps().embed({table.data(), ids.data(), 3, hidden, out.data(), true}), KernelStatus::kOk);
      ASSERT_EQ(ReferenceOps().embed({table.data(), ids.data(), 3, hidden, expected.data(), true}), KernelStatus::kOk);
      for (std::size_t i = 0; i < expected.size(); ++i) ASSERT_EQ(out[i], expected[i]) << "one float32 addition";
    }
  });
}

TEST(CpuRows, RmsNormMatchesTheReference) {
  Ledger ledger("rms_norm");
  ForEachTarget([&] {
    Random random(2);
    for (std::int64_t hidden : {1, 3, 16, 63, 65, 384, 2049}) {
      const std::size_t n = static_cast<std::size_t>(3 * hidden);
      Guarded<float> x(random.Normals(n, 3.0f));
      Guarded<Bf16> gain(random.Bf16Normals(static_cast<std::size_t>(hidden)));
      if (hidden == 65) x[70] = kNan;  // row 1 becomes NaN as a whole, its neighbours do not
      std::vector<float> expected(n);
      Guarded<Bf16> out(n);
      const RmsNormArgs args = {x.data(), gain.data(), 3, hidden, 1e-5f, expected.data()};
      ASSERT_EQ(ReferenceOps().rms_norm(args), KernelStatus::kOk);
      RmsNormArgs cpu = args;
      cpu.out = out.data();
      ASSERT_EQ(CpuOps().rms_norm(cpu), KernelStatus::kOk);
      // One rounding to bf16, and a float32 sum of `hidden` positive terms (relative error halves under the root).
      const double relative = kEpsBf16 + (static_cast<double>(hidden) / 2 + 4) * kEps32;
      for (std::size_t i = 0; i < n; ++i) {
        ledger.Check(Bf16ToFloat(out[i]), expected[i], relative * std::abs(expected[i]));
      }
    }
  });
}

TEST(CpuRows, LayerNormMatchesTheReference) {
  Ledger ledger("layer_norm");
  ForEachTarget([&] {
    Random random(6);
    for (std::int64_t hidden : {1, 3, 16, 63, 65, 384, 2049}) {
      const std::size_t n = static_cast<std::size_t>(3 * hidden);
      Guarded<float> x(random.Normals(n, 3.0f));
      for (std::size_t i = 0; i < n; ++i) x[i] += 10.0f;  // a mean that is not small beside the spread
      Guarded<Bf16> gain(random.Bf16Normals(static_cast<std::size_t>(hidden)));
      Guarded<float> bias(random.Normals(static_cast<std::size_t>(hidden)));
      if (hidden == 65) x[70] = kNan;  // row 1 becomes NaN as a whole, its neighbours do not
      std::vector<float> expected(n);
      Guarded<Bf16> out(n);
      LayerNormArgs args = {x.data(), gain.data(), bias.data(), 3, hidden, 1e-5f, expected.data()};
      ASSERT_EQ(ReferenceOps().layer_norm(args), KernelStatus::kOk);
      args.out = out.data();
      ASSERT_EQ(CpuOps().layer_norm(args), KernelStatus::kOk);
      // The mean of values near 10 is off by hidden / kLanes roundings at most; the row's norm divides by its spread,
      // which is 3, or sqrt(eps) for a row of one value.
      const double spread = hidden == 1 ? std::sqrt(1e-5) : 1.0;
      const double relative = (static_cast<double>(hidden) + 8) * kEps32 * 16 / spread;
      for (std::size_t i = 0; i < n; ++i) {
        const std::size_t column = i % static_cast<std::size_t>(hidden);
        const double terms = std::abs(expected[i] - bias[column]) + std::abs(double{Bf16ToFloat(gain[column])});
        ledger.Check(Bf16ToFloat(out[i]), expected[i], kEpsBf16 * std::abs(expected[i]) + relative * terms);
      }
    }
  });
}

TEST(CpuRows, HeadNormMatchesTheReferenceAndKeepsToItsHeads) {
  Ledger ledger("head_norm");
  ForEachTarget([&] {
    Random random(7);
    for (std::int64_t head_dim : {1, 16, 48, 65, 128}) {
      const std::int64_t n_heads = 3, stride = n_heads * head_dim + 5;
      Guarded<float> x(random.Normals(static_cast<std::size_t>(2 * stride), 4.0f));
      Guarded<Bf16> gain(random.Bf16Normals(static_cast<std::size_t>(head_dim)));
      if (head_dim == 48) x[60] = kNan;  // head 1 of row 0
      std::vector<float> expected(x.data(), x.data() + x.size());
      const std::vector<float> before = expected;
      HeadNormArgs args = {expected.data(), 2, stride, n_heads, head_dim, gain.data(), 1e-6f};
      ASSERT_EQ(ReferenceOps().head_norm(args), KernelStatus::kOk);
      args.x = x.data();
      ASSERT_EQ(CpuOps().head_norm(args), KernelStatus::kOk);
      const double relative = (static_cast<double>(head_dim) / 2 + 6) * kEps32;
      for (std::size_t i = 0; i < x.size(); ++i) {
        ledger.Check(x[i], expected[i], relative * std::abs(expected[i]));
        const bool in_head = static_cast<std::int64_t>(i) % stride < n_heads * head_dim;
        if (!in_head) {
          ASSERT_EQ(x[i], before[i]) << "behind the heads";
        }
      }
    }
  });
}

TEST(CpuRows, ReluMatchesTheReference) {
  ForEachTarget([] {
    Random random(8);
    for (std::int64_t width : {1, 5, 16, 31, 1024}) {
      const std::int64_t stride = width + 3;
      Guarded<float> x(random.Normals(static_cast<std::size_t>(3 * stride), 4.0f));
      x[static_cast<std::size_t>(stride)] = kNan;
      x[static_cast<std::size_t>(2 * stride)] = -0.0f;
      std::vector<float> expected(static_cast<std::size_t>(3 * width));
      Guarded<Bf16> out(expected.size());
      ReluArgs args = {x.data(), 3, width, stride, expected.data()};
      ASSERT_EQ(ReferenceOps().relu(args), KernelStatus::kOk);
      args.out = out.data();
      ASSERT_EQ(CpuOps().relu(args), KernelStatus::kOk);
      for (std::size_t i = 0; i < expected.size(); ++i) {
        ASSERT_EQ(out[i], FloatToBf16(expected[i])) << "one rounding: " << expected[i];
      }
    }
  });
}

TEST(CpuRows, SwiGluMatchesTheReference) {
  Ledger ledger("swiglu");
  ForEachTarget([&] {
    Random random(3);
    for (std::int64_t width : {1, 5, 16, 31, 1024}) {
      const std::int64_t stride = 2 * width + 1;
      Guarded<float> both(random.Normals(static_cast<std::size_t>(3 * stride), 4.0f));
      // The exponential must neither overflow nor turn NaN into a number.
      both[0] = 200.0f;
      both[static_cast<std::size_t>(stride)] = -200.0f;
      both[static_cast<std::size_t>(2 * stride)] = width == 5 ? kNan : 0.0f;
      std::vector<float> expected(static_cast<std::size_t>(3 * width));
      Guarded<Bf16> out(expected.size());
      SwiGluArgs args = {both.data(), both.data() + width, 3, width, stride, expected.data()};
      ASSERT_EQ(ReferenceOps().swiglu(args), KernelStatus::kOk);
      args.out = out.data();
      ASSERT_EQ(CpuOps().swiglu(args), KernelStatus::kOk);
      for (std::size_t i = 0; i < expected.size(); ++i) {
        // e^x to 3e-7 and the reference's own cancellation of 1 + e^-g; e^-88 and below is zero here.
        ledger.Check(Bf16ToFloat(out[i]), expected[i], (kEpsBf16 + 1e-6) * std::abs(expected[i]) + 1e-34);
      }
    }
  });
}

TEST(CpuRows, MergeMatchesTheReferenceAndSkipsBlindParts) {
  Ledger ledger("attention_merge");
  ForEachTarget([&] {
    Random random(4);
    for (int parts : {1, 2, 5}) {
      const int group = 3, n_rows = 6, dim = 80;
      std::vector<std::vector<float>> out, top, sum;
      std::vector<const float*> out_p, top_p, sum_p;
      for (int p = 0; p < parts; ++p) {
        out.push_back(random.Normals(n_rows * dim, 5.0f));
        top.push_back(random.Normals(n_rows, 20.0f));
        sum.push_back(std::vector<float>(n_rows, 1.0f + static_cast<float>(p)));
      }
      // Row 0 sees nothing anywhere, row 1 only in the last part; row 2 carries a NaN.
      for (int p = 0; p < parts; ++p) {
        const auto at = static_cast<std::size_t>(p);
        for (int r = 0; r < (p + 1 < parts ? 2 : 1); ++r) {
          top[at][static_cast<std::size_t>(r)] = -INFINITY;
          sum[at][static_cast<std::size_t>(r)] = 0.0f;
          std::fill_n(out[at].begin() + r * dim, dim, 0.0f);
        }
        if (p == 0) out[0][2 * dim + 7] = kNan;
        out_p.push_back(out[at].data());
        top_p.push_back(top[at].data());
        sum_p.push_back(sum[at].data());
      }
      const std::int64_t stride = 2 * group * dim + 5;
      std::vector<float> expected(static_cast<std::size_t>(2 * stride), -7.0f);
      Guarded<Bf16> got(std::vector<Bf16>(expected.size(), FloatToBf16(-7.0f)));
      AttentionMergeArgs args = {out_p.data(),    top_p.data(), sum_p.data(), parts, n_rows, group, dim, 1,
                                 expected.data(), stride};
      ASSERT_EQ(ReferenceOps().attention_merge(args), KernelStatus::kOk);
      args.dst = got.data();
      ASSERT_EQ(CpuOps().attention_merge(args), KernelStatus::kOk);
      EXPECT_EQ(expected[static_cast<std::size_t>(group * dim)], 0.0f);  // the blind row
      for (std::size_t i = 0; i < expected.size(); ++i) {
        ledger.Check(Bf16ToFloat(got[i]), expected[i], kEpsBf16 * std::abs(expected[i]) + 5e-6);
      }
    }
  });
}

TEST(CpuRows, RefusesBadShapes) {
  for (const Ops* ops : {&ReferenceOps(), &CpuOps()}) {
    float x[4] = {};
    Bf16 gain[4] = {};
    EXPECT_EQ(ops->rms_norm({x, gain, 1, 0, 1e-5f, x}), KernelStatus::kBadShape);
    EXPECT_EQ(ops->rms_norm({nullptr, gain, 1, 4, 1e-5f, x}), KernelStatus::kBadShape);
    EXPECT_EQ(ops->layer_norm({x, gain, nullptr, 1, 4, 1e-5f, x}), KernelStatus::kBadShape);
    EXPECT_EQ(ops->layer_norm({x, gain, x, 1, 4, -1.0f, x}), KernelStatus::kBadShape);
    EXPECT_EQ(ops->head_norm({x, 1, 3, 2, 2, gain, 1e-5f}), KernelStatus::kBadShape);
    EXPECT_EQ(ops->head_norm({x, 1, 4, 2, 2, nullptr, 1e-5f}), KernelStatus::kBadShape);
    EXPECT_EQ(ops->swiglu({x, x, 1, 4, 3, x}), KernelStatus::kBadShape);
    EXPECT_EQ(ops->relu({x, 1, 4, 3, x}), KernelStatus::kBadShape);
    EXPECT_EQ(ops->relu({nullptr, 1, 4, 4, x}), KernelStatus::kBadShape);
    EXPECT_EQ(ops->embed({gain, nullptr, 1, 4, x}), KernelStatus::kBadShape);
    EXPECT_EQ(ops->linear({x, 1, 4, gain, nullptr, 1, 0, 2, x, 1, false}), KernelStatus::kBadShape);
    EXPECT_EQ(ops->linear({x, 1, 4, gain, nullptr, 2, 0, 2, x, 1, false}), KernelStatus::kBadShape);
  }
}

}  // namespace
}  // namespace zeroc::kernels
