// Runs kernels on the CPU as a GPU would: the blocks of a grid one after the other, the threads of a block as fibers
// that stop at barriers and warp-wide operations. Finds what a GPU punishes at random:
//   - a missing barrier: a thread runs as far as it can before the next one starts, in the order of Options::order, so
//     that with one of the two orders it reads what is not yet written or overwrites what is still needed;
//   - divergence: threads of a block (lanes of a warp) that wait at different places, or after others have returned;
//   - memory that nobody wrote: shared memory starts as NaN bytes in every block, asynchronous copies arrive only when
//     they are waited for, and not before.
// A launch that went wrong leaves a message (TakeFault) and its remaining threads are ended.
//
// Faults can be planted, to prove that a test would notice them: Options::broken names a call site (one of those that a
// run visited), which then does the wrong thing - see Site::Kind. One launch at a time on each host thread; the state
// is thread-local. Nothing here is fast: a launch of 128 threads with a thousand collectives takes some milliseconds.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

namespace zeroc::kernels::cuda::simt {

// A place in a kernel's source that calls a collective.
struct Site {
  enum class Kind : std::uint8_t {  // and what it does when it is broken
    kBarrier,                       // does not wait
    kWarpBarrier,                   // does not wait
    kShuffle,                       // gives the value of the neighbour of the lane that was asked for
    kMma,                           // adds the product's columns in the wrong order
    kCopy,                          // copies nothing
    kCopyWait,                      // does not wait
    kAtomic,                        // adds nothing
    kBlock,                         // not a call: the grid's last block does not run
  };
  std::string_view file;
  int line = 0;
  Kind kind = Kind::kBarrier;

  static constexpr Site Here(const char* at_file = __builtin_FILE(), int at_line = __builtin_LINE()) {
    return {at_file, at_line, Kind::kBarrier};
  }
  bool operator==(const Site&) const = default;
  bool operator<(const Site& other) const {
    return std::tie(file, line, kind) < std::tie(other.file, other.line, other.kind);
  }
};

struct Thread {
  int thread = 0, block = 0, block_y = 0;
  int n_threads = 0, n_blocks = 0;
  std::uint8_t* shared = nullptr;
};
// Of the fiber that runs now; zeros outside of a launch.
const Thread& Current();

enum class Order : std::uint8_t { kForward, kBackward };  // which thread that can run does

struct Options {
  Order order = Order::kForward;
  const Site* broken = nullptr;
};
// Of the launches from now on, on this host thread.
void SetOptions(const Options& options);
// Visited since the last call, on this host thread, each once.
std::vector<Site> TakeSites();
// The first fault since the last call, or an empty string.
std::string TakeFault();

struct Shape {
  int n_blocks = 1, n_blocks_y = 1;
  int n_threads = 32;    // a multiple of 32, at most 1,024
  int shared_bytes = 0;  // at most 227 KiB
};
// `thread` is called once for each thread of the grid.
void Run(const Shape& shape, const std::function<void()>& thread);

// What device_simt.h is made of; from inside a launch only.
void BlockBarrier(Site site);
void WarpBarrier(Site site);
std::uint64_t Shuffle(std::uint64_t value, int mask, Site site);
void MmaBf16(float* c, const std::uint32_t* a, std::uint32_t b0, std::uint32_t b1, Site site);
void MmaS8U8(std::int32_t* c, const std::uint32_t* a, std::uint32_t b0, std::uint32_t b1, Site site);
bool LosesAtomic(Site site);  // whether the site is broken
void CopyLater(void* shared, const void* global, Site site);
void CloseCopyGroup();
void FinishCopies(int n_groups_left, Site site);

}  // namespace zeroc::kernels::cuda::simt
