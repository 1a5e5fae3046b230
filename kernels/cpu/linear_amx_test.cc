// The AMX product against the reference, at every kind of edge: tiles, steps, chunks, and the end of mapped memory.
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>

#include "kernels/cpu/amx.h"
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/test_util.h"

namespace zeroc::kernels {
namespace {

// Read-only elements that end where an inaccessible page begins, and begin after one, as near as their size allows.
class Fenced {
 public:
  explicit Fenced(const std::vector<Bf16>& from) {
    const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    const std::size_t bytes = from.size() * sizeof(Bf16), inside = (bytes + page - 1) / page * page;
    mapped_ = inside + 2 * page;
    void* base = mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) return;
    base_ = static_cast<char*>(base);
    if (mprotect(base_ + page, inside, PROT_READ | PROT_WRITE) != 0) return;
    char* begin = base_ + page + inside - bytes;
    std::memcpy(begin, from.data(), bytes);
    if (mprotect(base_ + page, inside, PROT_READ) != 0) return;
    data_ = reinterpret_cast<const Bf16*>(begin);
  }
  ~Fenced() {
    if (base_ != nullptr) munmap(base_, mapped_);
  }
  Fenced(const Fenced&) = delete;
  Fenced& operator=(const Fenced&) = delete;
  const Bf16* data() const { return data_; }  // null if the system refused

 private:
  char* base_ = nullptr;
  const Bf16* data_ = nullptr;
  std::size_t mapped_ = 0;
};

struct Case {
  std::int64_t rows, k, outs;
  std::int64_t begin = 0, cut = 0;  // outputs [begin, outs - cut)
  bool bias = false, accumulate = false;
};

double Norm(const float* row, std::int64_t n) {
  double sum = 0;
  for (std::int64_t i = 0; i < n; ++i) sum += double{row[i]} * row[i];
  return std::sqrt(sum);
}

// The inputs of a case, its reference result and the bounds' norms.
struct Problem {
  std::vector<Bf16> x, w;
  std::vector<float> x_floats, bias, before, expected;
  std::vector<double> x_norms, w_norms;
  std::int64_t y_stride;

  explicit Problem(const Case& c) : y_stride(c.outs + 5) {
    Random random(static_cast<unsigned>(c.rows * 131 + c.k * 7 + c.outs));
    x = random.Bf16Normals(static_cast<std::size_t>(c.rows * c.k));
    w = random.Bf16Normals(static_cast<std::size_t>(c.outs * c.k), 0.1f);
    bias = random.Normals(static_cast<std::size_t>(c.outs));
    before = random.Normals(static_cast<std::size_t>(c.rows * y_stride));
    x_floats = ToFloats(x);
    const std::vector<float> w_floats = ToFloats(w);
    for (std::int64_t r = 0; r < c.rows; ++r) x_norms.push_back(Norm(x_floats.data() + r * c.k, c.k));
    for (std::int64_t o = 0; o < c.outs; ++o) w_norms.push_back(Norm(w_floats.data() + o * c.k, c.k));
    expected = before;
    EXPECT_EQ(ReferenceOps().linear(Args(c, x_floats.data(), w.data(), &expected)), KernelStatus::kOk);
  }

  LinearArgs Args(const Case& c, const void* x_data, const Bf16* w_data, std::vector<float>* y) const {
    return {x_data,         c.rows,    c.k,      w_data,      c.bias ? bias.data() : nullptr, c.outs, c.begin,
            c.outs - c.cut, y->data(), y_stride, c.accumulate};
  }
};

void CheckCase(const Case& c, Ledger* ledger) {
  SCOPED_TRACE(testing::Message() << c.rows << " rows, k " << c.k << ", " << c.outs << " outputs");
  const Problem p(c);
  const Fenced x(p.x), w(p.w);
  ASSERT_TRUE(x.data() != nullptr && w.data() != nullptr);
  std::vector<float> y = p.before;
  ASSERT_TRUE(cpu::LinearAmx(p.Args(c, x.data(), w.data(), &y)));
  for (std::int64_t r = 0; r < c.rows; ++r) {
    for (std::int64_t o = 0; o < p.y_stride; ++o) {
      const auto at = static_cast<std::size_t>(r * p.y_stride + o);
      if (o < c.begin || o >= c.outs - c.cut) {
        ASSERT_EQ(y[at], p.before[at]) << "row " << r << ": wrote output " << o;
        continue;
      }
      // bf16 products are exact in float32; the roundings of k sums grow like a random walk of steps below |x| |w|, and
      // bias and y add two more. The reference errs as much.
      const double product = p.x_norms[static_cast<std::size_t>(r)] * p.w_norms[static_cast<std::size_t>(o)];
      const double ends = std::abs(p.before[at]) + std::abs(p.bias[static_cast<std::size_t>(o)]);
      const double bound = 2 * kEps32 * ((8 + std::sqrt(static_cast<double>(c.k))) * product + 2 * ends);
      ledger->Check(y[at], p.expected[at], bound);
    }
  }
}

class LinearAmx : public testing::Test {
 protected:
  void SetUp() override {
    if (!cpu::AmxReady()) GTEST_SKIP() << "no AMX here";
  }
};

TEST_F(LinearAmx, EveryTailOfRowsStepsAndOutputs) {
  Ledger ledger("AMX linear, tails");
  int n = 0;
  for (std::int64_t rows : {1, 9, 15, 16, 17, 33, 64}) {
    for (std::int64_t k : {1, 2, 31, 32, 33, 48, 63, 64, 80, 384}) {
      for (std::int64_t outs : {1, 15, 16, 17, 31, 32, 33, 64, 97}) {
        ++n;  // all four mixes of bias and accumulate go round
        CheckCase({rows, k, outs, 0, 0, n % 2 == 0, n / 2 % 2 == 0}, &ledger);
      }
    }
  }
}

TEST_F(LinearAmx, BlocksAndChunks) {
  Ledger ledger("AMX linear, blocks");
  // 128 and 129 rows: weights where they lie, and copied. 512 and 513: one and two chunks of rows. 2048 columns and
  // more: chunks of columns, with bias added once. 384 columns by 1400 outputs: two blocks of weights.
  for (const Case& c : std::vector<Case>{{100, 1000, 97, 0, 0, true, true},
                                         {128, 384, 70, 0, 0, true, false},
                                         {129, 384, 70, 0, 0, true, false},
                                         {512, 80, 384, 0, 0, false, true},
                                         {513, 96, 33, 0, 0, true, true},
                                         {33, 2048, 64, 0, 0, true, false},
                                         {17, 2056, 40, 0, 0, true, true},
                                         {9, 8192, 33, 0, 0, true, false},
                                         {130, 8192, 17, 0, 0, true, true},
                                         {160, 384, 1400, 0, 0, false, false}}) {
    CheckCase(c, &ledger);
  }
}

TEST_F(LinearAmx, PartsOfTheOutputsOnly) {
  Ledger ledger("AMX linear, parts");
  for (std::int64_t rows : {16, 150}) {
    CheckCase({rows, 64, 97, 3, 5, true, false}, &ledger);
    CheckCase({rows, 48, 97, 96, 0, false, true}, &ledger);
    CheckCase({rows, 64, 97, 31, 33, true, true}, &ledger);
    CheckCase({rows, 64, 384, 64, 192, false, false}, &ledger);
  }
}

// The padding of tiles is multiplied too: a non-finite value there, or met by it, would spread.
TEST_F(LinearAmx, NonFiniteValuesStayInTheirRowAndOutput) {
  const Case c = {18, 40, 35};
  Problem p(c);
  p.x[3 * 40 + 39] = FloatToBf16(kNan);
  p.w[34 * 40 + 39] = FloatToBf16(std::numeric_limits<float>::infinity());
  std::vector<float> y = p.before;
  ASSERT_TRUE(cpu::LinearAmx(p.Args(c, p.x.data(), p.w.data(), &y)));
  for (std::int64_t r = 0; r < c.rows; ++r) {
    for (std::int64_t o = 0; o < c.outs; ++o) {
      const float value = y[static_cast<std::size_t>(r * p.y_stride + o)];
      EXPECT_EQ(std::isnan(value), r == 3) << r << ", " << o;
      EXPECT_EQ(std::isinf(value), r != 3 && o == 34) << r << ", " << o;
    }
  }
}

// One element has the same bits however outputs and rows are split over calls and threads: a prompt's logits must not
// depend on the number of threads, nor on what is batched with it (within one side of the copy threshold or across).
TEST_F(LinearAmx, SplitsAndThreadsGiveTheSameBits) {
  const Case c = {200, 2080, 130};
  const Problem p(c);
  std::vector<float> whole = p.before, parts = p.before;
  ASSERT_TRUE(cpu::LinearAmx(p.Args(c, p.x.data(), p.w.data(), &whole)));
  const auto run = [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row : {0, 50}) {
      LinearArgs args = p.Args(c, p.x.data() + row * c.k, p.w.data(), &parts);
      args.n_rows = row == 0 ? 50 : 150;
      args.y += row * p.y_stride;
      args.out_begin = begin;
      args.out_end = end;
      EXPECT_TRUE(cpu::LinearAmx(args));
    }
  };
  std::thread other(run, 0, 47);
  run(47, 130);
  other.join();
  EXPECT_EQ(whole, parts);
}

TEST_F(LinearAmx, SwitchedOffItDeclines) {
  const Case c = {16, 32, 16};
  const Problem p(c);
  std::vector<float> y = p.before;
  cpu::AllowAmx(false);
  EXPECT_FALSE(cpu::LinearAmx(p.Args(c, p.x.data(), p.w.data(), &y)));
  EXPECT_EQ(y, p.before);
  // The table's op still answers, through sgemm.
  EXPECT_EQ(CpuOps().linear(p.Args(c, p.x.data(), p.w.data(), &y)), KernelStatus::kOk);
  EXPECT_NE(y, p.before);
  cpu::AllowAmx(true);
}

}  // namespace
}  // namespace zeroc::kernels
