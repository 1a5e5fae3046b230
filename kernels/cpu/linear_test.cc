#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <vector>

#include "kernels/cpu/amx.h"
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/test_util.h"

namespace zeroc::kernels {
namespace {

struct Case {
  std::int64_t n_rows, k, n_out, begin, end;
  bool bias, accumulate;
};

using Linear = std::function<bool(const LinearArgs&)>;

// Runs `linear` on bf16 inputs against the reference on the same numbers in float32.
void CheckCase(const Case& c, const Linear& linear, Ledger* ledger) {
  Random random(static_cast<unsigned>(c.n_rows * 131 + c.k));
  const std::int64_t y_stride = c.n_out + 3;
  Guarded<Bf16> x(random.Bf16Normals(static_cast<std::size_t>(c.n_rows * c.k)));
  Guarded<Bf16> w(random.Bf16Normals(static_cast<std::size_t>(c.n_out * c.k), 0.1f));
  const auto bias = random.Normals(static_cast<std::size_t>(c.n_out));
  const auto before = random.Normals(static_cast<std::size_t>(c.n_rows * y_stride));
  std::vector<float> x_floats(x.size());
  for (std::size_t i = 0; i < x.size(); ++i) x_floats[i] = Bf16ToFloat(x[i]);
  std::vector<float> expected = before;
  Guarded<float> y(before);
  LinearArgs args = {x_floats.data(), c.n_rows, c.k,   w.data(),        c.bias ? bias.data() : nullptr,
                     c.n_out,         c.begin,  c.end, expected.data(), y_stride,
                     c.accumulate};
  ASSERT_EQ(ReferenceOps().linear(args), KernelStatus::kOk);
  args.x = x.data();
  args.y = y.data();
  ASSERT_TRUE(linear(args));
  for (std::int64_t r = 0; r < c.n_rows; ++r) {
    double x_norm = 0;
    for (std::int64_t i = 0; i < c.k; ++i) x_norm += std::pow(x_floats[static_cast<std::size_t>(r * c.k + i)], 2);
    for (std::int64_t o = 0; o < y_stride; ++o) {
      const auto at = static_cast<std::size_t>(r * y_stride + o);
      if (o < c.begin || o >= c.end) {
        ASSERT_EQ(y[at], before[at]) << "outside [begin, end)";
        continue;
      }
      double w_norm = 0;
      for (std::int64_t i = 0; i < c.k; ++i)
        w_norm += std::pow(Bf16ToFloat(w[static_cast<std::size_t>(o * c.k + i)]), 2);
      // Products of bf16 are exact in float32. The roundings of k sums of |x||w| <= |x| |w| add up like a random walk
      // (the worst case, k instead of its root, would hide a lost term); twice, for the reference errs too.
      const double bound = 2 * kEps32 *
                           ((8 + std::sqrt(static_cast<double>(c.k))) * std::sqrt(x_norm * w_norm) +
                            std::abs(before[at]) + std::abs(bias[static_cast<std::size_t>(std::min(o, c.n_out - 1))]));
      ledger->Check(y[at], expected[at], bound);
    }
  }
}

TEST(CpuLinear, MatchesTheReferenceOnEveryTarget) {
  Ledger ledger("linear");
  ForEachTarget([&] {
    for (std::int64_t rows : {1, 2, 3, 4, 5, 6, 7, 8}) {
      CheckCase(
          {rows, 384, 13, 0, 13, rows % 2 == 0, rows % 3 == 0},
          [](const LinearArgs& a) { return CpuOps().linear(a) == KernelStatus::kOk; }, &ledger);
      CheckCase(
          {rows, 33, 9, 2, 8, true, true}, [](const LinearArgs& a) { return CpuOps().linear(a) == KernelStatus::kOk; },
          &ledger);
      CheckCase(
          {rows, 1, 1, 0, 1, false, false}, [](const LinearArgs& a) { return CpuOps().linear(a) == KernelStatus::kOk; },
          &ledger);
    }
  });
}

const Case kManyRows[] = {{9, 384, 64, 0, 64, false, false},    {17, 31, 5, 1, 4, true, false},
                          {64, 1024, 384, 0, 384, true, true},  {33, 2048, 96, 16, 80, false, true},
                          {512, 384, 100, 3, 99, false, false}, {100, 65, 33, 0, 33, false, true},
                          {130, 4100, 40, 0, 40, true, false},  {16, 1, 1, 0, 1, false, false}};

TEST(CpuLinear, ManyRowsMatchTheReference) {
  Ledger ledger("linear, many rows");
  for (const Case& c : kManyRows) {
    CheckCase(
        c, [](const LinearArgs& a) { return CpuOps().linear(a) == KernelStatus::kOk; }, &ledger);
  }
}

TEST(CpuLinear, AmxTilesMatchTheReference) {
  if (!cpu::AmxReady()) GTEST_SKIP() << "no AMX here";
  Ledger ledger("linear, AMX");
  for (const Case& c : kManyRows) {
    if (c.k % 32 == 0) CheckCase(c, cpu::LinearAmx, &ledger);
  }
  for (std::int64_t rows : {1, 9, 15, 16, 17, 31, 32, 33, 40, 47, 257}) {
    for (std::int64_t outs : {1, 15, 16, 17, 31, 32, 33, 48, 63, 95}) {
      CheckCase({rows, 96, outs, 0, outs, outs % 2 == 0, rows % 2 == 0}, cpu::LinearAmx, &ledger);
    }
  }
  CheckCase({40, 4160, 50, 1, 50, true, true}, cpu::LinearAmx, &ledger);  // several chunks of k
}

TEST(CpuLinear, ConvertedPanelsMatchTheReference) {
  Ledger ledger("linear, float32 panels");
  for (const Case& c : kManyRows) CheckCase(c, cpu::LinearSgemm, &ledger);
}

TEST(CpuLinear, SplitsGiveTheSameBits) {
  Random random(7);
  const std::int64_t k = 384, n_out = 200;
  for (std::int64_t rows : {1, 5, 40}) {
    const auto x = random.Bf16Normals(static_cast<std::size_t>(rows * k));
    const auto w = random.Bf16Normals(static_cast<std::size_t>(n_out * k));
    std::vector<float> whole(static_cast<std::size_t>(rows * n_out)), parts(whole.size());
    LinearArgs args = {x.data(), rows, k, w.data(), nullptr, n_out, 0, n_out, whole.data(), n_out, false};
    ASSERT_EQ(CpuOps().linear(args), KernelStatus::kOk);
    args.y = parts.data();
    for (std::int64_t begin = 0; begin < n_out; begin += 96) {
      args.out_begin = begin;
      args.out_end = std::min(begin + 96, n_out);
      ASSERT_EQ(CpuOps().linear(args), KernelStatus::kOk);
    }
    EXPECT_EQ(whole, parts) << rows << " rows";
  }
}

// A row beside others gets the bits that it gets beside any number of others: what a request is answered with must not
// depend on who shares its batch. Within one kernel; the one for few rows adds in an order of its own.
TEST(CpuLinear, ARowDoesNotDependOnItsCompany) {
  constexpr std::int64_t kN = 300, kOut = 80;
  for (const std::int64_t k : {64, 384, 1024}) {
    Random random(static_cast<unsigned>(k));
    const auto x = random.Bf16Normals(static_cast<std::size_t>(kN * k));
    const auto w = random.Bf16Normals(static_cast<std::size_t>(kOut * k));
    const auto bias = random.Normals(kOut);
    const auto before = random.Normals(static_cast<std::size_t>(kN * kOut));
    const auto product = [&](std::int64_t begin, std::int64_t rows, bool accumulate) {
      std::vector<float> y(before.begin() + begin * kOut, before.begin() + (begin + rows) * kOut);
      EXPECT_EQ(CpuOps().linear(
                    {x.data() + begin * k, rows, k, w.data(), bias.data(), kOut, 0, kOut, y.data(), kOut, accumulate}),
                KernelStatus::kOk);
      return y;
    };
    for (const bool accumulate : {false, true}) {
      const std::vector<float> whole = product(0, kN, accumulate);
      for (const std::int64_t rows : {9, 12, 15, 16, 17, 24, 36, 48, 100, 257, 265}) {
        for (const std::int64_t begin : {0, 1, 7, 35}) {
          const std::vector<float> part = product(begin, rows, accumulate);
          EXPECT_TRUE(std::equal(part.begin(), part.end(), whole.begin() + begin * kOut))
              << rows << " rows from " << begin << ", k " << k;
        }
      }
    }
  }
}

TEST(CpuLinear, OneNanRowStaysInItsRow) {
  for (std::int64_t rows : {3, 20}) {
    Random random(8);
    auto x = random.Bf16Normals(static_cast<std::size_t>(rows * 64));
    const auto w = random.Bf16Normals(16 * 64);
    x[64 + 5] = FloatToBf16(kNan);
    std::vector<float> y(static_cast<std::size_t>(rows * 16));
    ASSERT_EQ(CpuOps().linear({x.data(), rows, 64, w.data(), nullptr, 16, 0, 16, y.data(), 16, false}),
              KernelStatus::kOk);
    for (std::size_t i = 0; i < y.size(); ++i) EXPECT_EQ(std::isnan(y[i]), i / 16 == 1) << i;
  }
}

}  // namespace
}  // namespace zeroc::kernels
