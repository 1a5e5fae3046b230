// The emulation itself: it computes what PTX says and catches what it promises to catch.
#include "kernels/cuda/host_simt/simt.h"

#include <gtest/gtest.h>

#include <numeric>
#include <vector>

#include "kernels/cuda/device.h"
#include "kernels/cuda/numbers.h"

namespace zeroc::kernels::cuda {
namespace {

std::string FaultOf(const simt::Shape& shape, const std::function<void()>& thread) {
  simt::TakeFault();
  simt::Run(shape, thread);
  return simt::TakeFault();
}

TEST(Simt, EveryThreadOfEveryBlockRunsOnce) {
  std::vector<int> seen(3 * 2 * 64, 0);
  const std::string fault = FaultOf({.n_blocks = 3, .n_blocks_y = 2, .n_threads = 64}, [&] {
    const int place = (BlockIdxY() * GridBlocks() + BlockIdx()) * BlockThreads() + ThreadIdx();
    ++seen[static_cast<std::size_t>(place)];
  });
  EXPECT_EQ(fault, "");
  for (const int times : seen) EXPECT_EQ(times, 1);
}

TEST(Simt, SharedMemoryIsSeenBehindABarrierOnly) {
  for (const simt::Order order : {simt::Order::kForward, simt::Order::kBackward}) {
    simt::SetOptions({order, nullptr});
    for (const bool waits : {true, false}) {
      int n_wrong = 0;
      const std::string fault = FaultOf({.n_threads = 96, .shared_bytes = 96 * 4}, [&] {
        auto* shared = reinterpret_cast<int*>(SharedMemory());
        shared[ThreadIdx()] = ThreadIdx();
        if (waits) Sync();
        n_wrong += shared[95 - ThreadIdx()] != 95 - ThreadIdx();
      });
      EXPECT_EQ(fault, "");
      EXPECT_EQ(n_wrong == 0, waits);
    }
  }
  simt::SetOptions({});
}

TEST(Simt, ShufflesCrossLanes) {
  std::vector<int> sums(64);
  const std::string fault = FaultOf({.n_threads = 64}, [&] {
    int sum = ThreadIdx();
    for (int mask = 16; mask > 0; mask /= 2) sum += ShuffleXor(sum, mask);
    sums[static_cast<std::size_t>(ThreadIdx())] = sum;
  });
  EXPECT_EQ(fault, "");
  for (int i = 0; i < 64; ++i) EXPECT_EQ(sums[static_cast<std::size_t>(i)], i < 32 ? 496 : 496 + 32 * 32);
}

TEST(Simt, DivergenceIsAFault) {
  const simt::Shape shape = {.n_threads = 64};
  // Apart from the macros, which would put all of it on one line.
  const auto returns_early = [] {
    if (ThreadIdx() < 63) Sync();
  };
  const auto warp_without_barrier = [] {
    if (ThreadIdx() >= 32) Sync();
  };
  const auto two_shuffles = [] {
    if (ThreadIdx() % 2 == 0) {
      ShuffleXor(1, 1);
    } else {
      ShuffleXor(2, 1);
    }
  };
  const auto two_barriers = [] {
    if (ThreadIdx() < 32) Sync();
    if (ThreadIdx() >= 32) Sync();
  };
  EXPECT_NE(FaultOf(shape, returns_early), "");
  EXPECT_NE(FaultOf(shape, warp_without_barrier), "");
  EXPECT_NE(FaultOf(shape, two_shuffles), "");
  EXPECT_NE(FaultOf(shape, two_barriers), "");
  EXPECT_EQ(FaultOf(shape, [] { Sync(); }), "") << "and a launch after a faulty one is clean";
}

TEST(Simt, SharedMemoryHasAnEndAndALimit) {
  EXPECT_NE(FaultOf({.n_threads = 32, .shared_bytes = 16}, [] { SharedMemory()[16] = 0; }), "");
  EXPECT_NE(FaultOf({.n_threads = 32, .shared_bytes = 1 << 20}, [] {}), "");
  EXPECT_NE(FaultOf({.n_threads = 31}, [] {}), "");
}

TEST(Simt, CopiesArriveWhenTheyAreWaitedFor) {
  alignas(16) static const std::uint8_t from[32] = {1, 2, 3};
  for (const bool waits : {true, false}) {
    std::uint8_t got = 0, later = 0;
    const std::string fault = FaultOf({.n_threads = 32, .shared_bytes = 32}, [&] {
      if (ThreadIdx() == 0) {
        CopyAsync16(SharedMemory(), from);
        CopyAsyncCommit();
        CopyAsync16(SharedMemory() + 16, from);
        CopyAsyncCommit();
        if (waits) CopyAsyncWait<1>();
        got = SharedMemory()[1];
        later = SharedMemory()[17];
      }
    });
    EXPECT_EQ(fault, "");
    EXPECT_EQ(got, waits ? 2 : 0xff);
    EXPECT_EQ(later, 0xff) << "the last group may still be on its way";
  }
  EXPECT_NE(FaultOf({.n_threads = 32, .shared_bytes = 32}, [] { CopyAsync16(SharedMemory() + 4, from); }), "");
}

// Fragments as PTX lays them out, against a product written down plainly.
TEST(Simt, MatrixFragmentsAreThoseOfPtx) {
  float a[16][16], b[16][8], c[16][8];
  for (int i = 0; i < 16; ++i) {
    for (int k = 0; k < 16; ++k) a[i][k] = static_cast<float>(3 * i - k);
    for (int j = 0; j < 8; ++j) b[i][j] = static_cast<float>(i + 5 * j - 9);
  }
  EXPECT_EQ(FaultOf({.n_threads = 32},
                    [&] {
                      const int g = ThreadIdx() / 4, q = ThreadIdx() % 4;
                      const std::uint32_t fragment[4] = {PackBf16(a[g][2 * q], a[g][2 * q + 1]),
                                                         PackBf16(a[g + 8][2 * q], a[g + 8][2 * q + 1]),
                                                         PackBf16(a[g][2 * q + 8], a[g][2 * q + 9]),
                                                         PackBf16(a[g + 8][2 * q + 8], a[g + 8][2 * q + 9])};
                      float sum[4] = {1, 1, 1, 1};
                      MmaBf16(sum, fragment, PackBf16(b[2 * q][g], b[2 * q + 1][g]),
                              PackBf16(b[2 * q + 8][g], b[2 * q + 9][g]));
                      for (int r = 0; r < 4; ++r) c[g + 8 * (r / 2)][2 * q + r % 2] = sum[r];
                    }),
            "");
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 8; ++j) {
      float sum = 1;
      for (int k = 0; k < 16; ++k) sum += a[i][k] * b[k][j];
      EXPECT_EQ(c[i][j], sum) << "row " << i << ", column " << j;
    }
  }
}

TEST(Simt, ByteFragmentsAreThoseOfPtx) {
  int a[16][32], b[32][8], c[16][8];
  for (int k = 0; k < 32; ++k) {
    for (int i = 0; i < 16; ++i) a[i][k] = (7 * i + 13 * k) % 256 - 128;
    for (int j = 0; j < 8; ++j) b[k][j] = (31 * k + 5 * j) % 256;
  }
  const auto word = [](int x0, int x1, int x2, int x3) {
    return static_cast<std::uint32_t>((x0 & 255) | (x1 & 255) << 8 | (x2 & 255) << 16) |
           static_cast<std::uint32_t>(x3 & 255) << 24;
  };
  EXPECT_EQ(FaultOf({.n_threads = 32},
                    [&] {
                      const int g = ThreadIdx() / 4, q = ThreadIdx() % 4;
                      std::uint32_t fragment[4];
                      for (int r = 0; r < 4; ++r) {
                        const int* row = a[g + 8 * (r % 2)] + 4 * q + 16 * (r / 2);
                        fragment[r] = word(row[0], row[1], row[2], row[3]);
                      }
                      const auto column = [&](int k) { return word(b[k][g], b[k + 1][g], b[k + 2][g], b[k + 3][g]); };
                      std::int32_t sum[4] = {};
                      MmaS8U8(sum, fragment, column(4 * q), column(4 * q + 16));
                      for (int r = 0; r < 4; ++r) c[g + 8 * (r / 2)][2 * q + r % 2] = sum[r];
                    }),
            "");
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 8; ++j) {
      int sum = 0;
      for (int k = 0; k < 32; ++k) sum += a[i][k] * b[k][j];
      EXPECT_EQ(c[i][j], sum) << "row " << i << ", column " << j;
    }
  }
}

}  // namespace
}  // namespace zeroc::kernels::cuda
