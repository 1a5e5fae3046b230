#include "kernels/cuda/host_simt/simt.h"

#include <algorithm>
#include <bit>
#include <boost/context/fiber.hpp>
#include <boost/context/preallocated.hpp>
#include <cstring>
#include <memory>
#include <set>

#include "kernels/bf16.h"

#if defined(__SANITIZE_ADDRESS__)
#define ZEROC_SIMT_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define ZEROC_SIMT_ASAN 1
#endif
#endif
#ifdef ZEROC_SIMT_ASAN
#include <sanitizer/common_interface_defs.h>
#endif

namespace zeroc::kernels::cuda::simt {
namespace {

namespace context = boost::context;

constexpr int kWarp = 32;
constexpr int kSharedMax = 227 * 1024;
#ifdef ZEROC_SIMT_ASAN
constexpr std::size_t kStackBytes = 512 * 1024;
#else
constexpr std::size_t kStackBytes = 64 * 1024;
#endif

// Tells AddressSanitizer which stack runs next, and where this one is when it comes back.
struct StackSwitch {
#ifdef ZEROC_SIMT_ASAN
  void Leave(const void* bottom, std::size_t bytes, bool for_good = false) {
    __sanitizer_start_switch_fiber(for_good ? nullptr : &fake_, bottom, bytes);
  }
  void Arrive(const void** bottom = nullptr, std::size_t* bytes = nullptr) {
    __sanitizer_finish_switch_fiber(fake_, bottom, bytes);
  }
  void* fake_ = nullptr;
#else
  void Leave(const void*, std::size_t, bool = false) {}
  void Arrive(const void** = nullptr, std::size_t* = nullptr) {}
#endif
};

struct Aborted {};  // ends a fiber after a fault

// The stacks belong to the machine.
struct NoAllocator {
  context::stack_context allocate() { return {}; }
  void deallocate(context::stack_context&) {}
};

enum class State : std::uint8_t { kReady, kBarrier, kCollective, kDone };

struct Copy {
  void* to;
  const void* from;
  int group;
};

struct Fiber {
  context::fiber self;  // where to go on
  StackSwitch stack;
  State state = State::kReady;
  Site site;
  void* operand = nullptr;
  std::vector<Copy> copies;
  int n_groups = 0;
};

std::string Name(const Site& site) {
  return std::string(site.file.substr(site.file.find_last_of('/') + 1)) + ":" + std::to_string(site.line);
}

class Machine {
 public:
  static Machine& Get() {
    thread_local Machine machine;
    return machine;
  }

  void Run(const Shape& shape, const std::function<void()>& thread);

  // Whether the site is broken; notes the visit.
  bool Visit(Site& site, Site::Kind kind) {
    site.kind = kind;
    if (last_visit_ != site) sites_.insert(site);
    last_visit_ = site;
    return options_.broken != nullptr && *options_.broken == site;
  }

  void Wait(State state, const Site& site, void* operand);
  void Collective(const Site& site, void* operand, void (*op)(void* const* operands));
  [[noreturn]] void Fail(const std::string& message) {
    NoteFault(message);
    throw Aborted();
  }
  void NoteFault(const std::string& message) {
    if (fault_.empty()) fault_ = message;
    aborting_ = true;
  }
  Fiber& fiber() { return fibers_[static_cast<std::size_t>(current_.thread)]; }

  Options options_;
  Thread current_;
  std::set<Site> sites_;
  Site last_visit_{"", -1};
  std::string fault_;

 private:
  void RunBlock(const std::function<void()>& thread);
  void Start(int thread_idx, const std::function<void()>& thread);
  void Resume(int thread_idx);
  int NextReady() const;
  bool ReleaseBarrier();
  std::string Waiting() const;

  std::vector<Fiber> fibers_;
  std::vector<std::uint32_t> ready_;  // [warps] masks
  std::vector<int> arrived_;          // [warps] lanes in a collective
  std::vector<std::unique_ptr<std::uint8_t[]>> stacks_;
  std::vector<std::uint8_t> shared_;
  context::fiber scheduler_;
  StackSwitch scheduler_stack_;
  const void* scheduler_bottom_ = nullptr;
  std::size_t scheduler_bytes_ = 0;
  bool aborting_ = false;
  bool running_ = false;
};

void Machine::Start(int thread_idx, const std::function<void()>& thread) {
  const auto at = static_cast<std::size_t>(thread_idx);
  while (stacks_.size() <= at) stacks_.push_back(std::make_unique_for_overwrite<std::uint8_t[]>(kStackBytes));
  context::stack_context where;
  where.size = kStackBytes;
  where.sp = stacks_[at].get() + kStackBytes;
  fibers_[at] = {};
  fibers_[at].self = context::fiber(std::allocator_arg, context::preallocated(where.sp, where.size, where),
                                    NoAllocator(), [this, at, &thread](context::fiber&& scheduler) {
                                      scheduler_ = std::move(scheduler);
                                      StackSwitch().Arrive(&scheduler_bottom_, &scheduler_bytes_);
                                      try {
                                        thread();
                                      } catch (const Aborted&) {
                                      }
                                      fibers_[at].state = State::kDone;
                                      fibers_[at].stack.Leave(scheduler_bottom_, scheduler_bytes_, /*for_good=*/true);
                                      return std::move(scheduler_);
                                    });
}

void Machine::Resume(int thread_idx) {
  const auto at = static_cast<std::size_t>(thread_idx);
  current_.thread = thread_idx;
  scheduler_stack_.Leave(stacks_[at].get(), kStackBytes);
  context::fiber back = std::move(fibers_[at].self).resume();
  scheduler_stack_.Arrive();
  fibers_[at].self = std::move(back);
}

// On the fiber: gives way until the scheduler finds it ready again.
void Machine::Wait(State state, const Site& site, void* operand) {
  Fiber& me = fiber();
  me.state = state;
  me.site = site;
  me.operand = operand;
  const int thread_idx = current_.thread;
  ready_[static_cast<std::size_t>(thread_idx / kWarp)] &= ~(1u << thread_idx % kWarp);
  me.stack.Leave(scheduler_bottom_, scheduler_bytes_);
  scheduler_ = std::move(scheduler_).resume();
  me.stack.Arrive(&scheduler_bottom_, &scheduler_bytes_);
  if (aborting_) throw Aborted();
}

void Machine::Collective(const Site& site, void* operand, void (*op)(void* const* operands)) {
  const int warp = current_.thread / kWarp;
  int& arrived = arrived_[static_cast<std::size_t>(warp)];
  if (++arrived < kWarp) return Wait(State::kCollective, site, operand);
  arrived = 0;
  void* operands[kWarp];
  for (int lane = 0; lane < kWarp; ++lane) {
    const int thread_idx = warp * kWarp + lane;
    Fiber& other = fibers_[static_cast<std::size_t>(thread_idx)];
    const bool me = thread_idx == current_.thread;
    if (!me && other.site != site) {
      Fail("lanes of one warp wait at " + Name(other.site) + " and at " + Name(site));
    }
    operands[lane] = me ? operand : other.operand;
    other.state = State::kReady;
  }
  if (op != nullptr) op(operands);
  ready_[static_cast<std::size_t>(warp)] = ~0u;
}

int Machine::NextReady() const {
  const int n_warps = static_cast<int>(ready_.size());
  for (int i = 0; i < n_warps; ++i) {
    const int warp = options_.order == Order::kForward ? i : n_warps - 1 - i;
    const std::uint32_t mask = ready_[static_cast<std::size_t>(warp)];
    if (mask == 0) continue;
    return warp * kWarp + (options_.order == Order::kForward ? std::countr_zero(mask) : 31 - std::countl_zero(mask));
  }
  return -1;
}

std::string Machine::Waiting() const {
  std::set<std::string> places;
  int n_done = 0;
  for (const Fiber& fiber : fibers_) {
    if (fiber.state == State::kDone) ++n_done;
    if (fiber.state == State::kBarrier || fiber.state == State::kCollective) places.insert(Name(fiber.site));
  }
  std::string text = "threads wait at";
  for (const std::string& place : places) text += " " + place;
  return text + "; " + std::to_string(n_done) + " of " + std::to_string(fibers_.size()) + " have returned";
}

// Nothing can run. True if all wait at one barrier, which then opens.
bool Machine::ReleaseBarrier() {
  const Site& site = fibers_[0].site;
  for (const Fiber& fiber : fibers_) {
    if (fiber.state != State::kBarrier || fiber.site != site) return false;
  }
  for (Fiber& fiber : fibers_) fiber.state = State::kReady;
  std::fill(ready_.begin(), ready_.end(), ~0u);
  return true;
}

void Machine::RunBlock(const std::function<void()>& thread) {
  std::fill(shared_.begin(), shared_.end(), std::uint8_t{0xff});
  fibers_.resize(static_cast<std::size_t>(current_.n_threads));
  ready_.assign(static_cast<std::size_t>(current_.n_threads / kWarp), ~0u);
  arrived_.assign(ready_.size(), 0);
  for (int i = 0; i < current_.n_threads; ++i) Start(i, thread);
  int n_done = 0;
  while (n_done < current_.n_threads) {
    const int next = NextReady();
    if (next < 0) {
      if (ReleaseBarrier()) continue;
      NoteFault(Waiting());
      for (std::size_t i = 0; i < fibers_.size(); ++i) {  // let the rest run into its end
        if (fibers_[i].state != State::kDone) ready_[i / kWarp] |= 1u << i % kWarp;
      }
      continue;
    }
    Resume(next);
    if (fibers_[static_cast<std::size_t>(next)].state == State::kDone) {
      ++n_done;
      ready_[static_cast<std::size_t>(next / kWarp)] &= ~(1u << next % kWarp);
    } else if (aborting_) {
      ready_[static_cast<std::size_t>(next / kWarp)] |= 1u << next % kWarp;
    }
  }
}

void Machine::Run(const Shape& shape, const std::function<void()>& thread) {
  if (running_) return NoteFault("a launch from inside a kernel");
  if (shape.n_threads < kWarp || shape.n_threads > 1024 || shape.n_threads % kWarp != 0 || shape.n_blocks < 1 ||
      shape.n_blocks_y < 1 || shape.shared_bytes < 0 || shape.shared_bytes > kSharedMax) {
    return NoteFault("a launch of a shape that no GPU takes");
  }
  running_ = true;
  aborting_ = false;
  constexpr std::size_t kSharedAlignment = 128, kSharedGuard = 64;
  shared_.resize(static_cast<std::size_t>(shape.shared_bytes) + kSharedAlignment + kSharedGuard);
  const auto address = reinterpret_cast<std::uintptr_t>(shared_.data());
  Site grid{"grid", 0};
  int n_blocks = shape.n_blocks * shape.n_blocks_y;
  if (Visit(grid, Site::Kind::kBlock)) --n_blocks;
  for (int i = 0; i < n_blocks && !aborting_; ++i) {
    const int block = options_.order == Order::kForward ? i : n_blocks - 1 - i;
    current_ = {.thread = 0,
                .block = block % shape.n_blocks,
                .block_y = block / shape.n_blocks,
                .n_threads = shape.n_threads,
                .n_blocks = shape.n_blocks,
                .shared = shared_.data() + (kSharedAlignment - address % kSharedAlignment)};
    RunBlock(thread);
    const auto* behind = current_.shared + shape.shared_bytes;
    const auto* end = shared_.data() + shared_.size();
    if (std::any_of(behind, end, [](std::uint8_t byte) { return byte != 0xff; })) {
      NoteFault("a write behind the " + std::to_string(shape.shared_bytes) + " bytes of shared memory");
    }
  }
  current_ = {};
  running_ = false;
}

}  // namespace

const Thread& Current() { return Machine::Get().current_; }
void SetOptions(const Options& options) { Machine::Get().options_ = options; }

std::vector<Site> TakeSites() {
  Machine& machine = Machine::Get();
  std::vector<Site> sites(machine.sites_.begin(), machine.sites_.end());
  machine.sites_.clear();
  machine.last_visit_ = {"", -1};
  return sites;
}

std::string TakeFault() { return std::exchange(Machine::Get().fault_, {}); }

void Run(const Shape& shape, const std::function<void()>& thread) { Machine::Get().Run(shape, thread); }

void BlockBarrier(Site site) {
  Machine& machine = Machine::Get();
  if (machine.Visit(site, Site::Kind::kBarrier)) return;
  machine.Wait(State::kBarrier, site, nullptr);
}

void WarpBarrier(Site site) {
  Machine& machine = Machine::Get();
  if (machine.Visit(site, Site::Kind::kWarpBarrier)) return;
  machine.Collective(site, nullptr, nullptr);
}

std::uint64_t Shuffle(std::uint64_t value, int mask, Site site) {
  struct Operand {
    std::uint64_t in, out;
    int from;
  };
  Machine& machine = Machine::Get();
  int from = (machine.current_.thread ^ mask) % kWarp;
  if (machine.Visit(site, Site::Kind::kShuffle)) from ^= 1;
  Operand operand{value, 0, from};
  machine.Collective(site, &operand, [](void* const* operands) {
    for (int lane = 0; lane < kWarp; ++lane) {
      auto* mine = static_cast<Operand*>(operands[lane]);
      mine->out = static_cast<const Operand*>(operands[mine->from])->in;
    }
  });
  return operand.out;
}

namespace {

template <typename Sum>
struct MmaOperand {
  Sum* c;
  const std::uint32_t* a;
  std::uint32_t b[2];
  int swap;  // 1: columns 2q and 2q + 1 change places, what a broken site does
};

// The fragments of a warp, spread out: a [16][kDepth], b [kDepth][8], c += a b. kPack values in each register.
template <typename Sum, typename A, typename B, int kPack>
void Multiply(void* const* operands, A (*get_a)(std::uint32_t, int), B (*get_b)(std::uint32_t, int)) {
  constexpr int kDepth = 8 * kPack;
  A a[16][kDepth];
  B b[kDepth][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto* mine = static_cast<const MmaOperand<Sum>*>(operands[lane]);
    const int g = lane / 4, first = kPack * (lane % 4);
    for (int i = 0; i < kPack; ++i) {
      for (int r = 0; r < 4; ++r) a[g + 8 * (r % 2)][first + i + 4 * kPack * (r / 2)] = get_a(mine->a[r], i);
      for (int r = 0; r < 2; ++r) b[first + i + 4 * kPack * r][g] = get_b(mine->b[r], i);
    }
  }
  Sum product[16][8] = {};
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < kDepth; ++k) {
      for (int column = 0; column < 8; ++column) {
        product[row][column] += static_cast<Sum>(a[row][k]) * static_cast<Sum>(b[k][column]);
      }
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto* mine = static_cast<const MmaOperand<Sum>*>(operands[lane]);
    for (int r = 0; r < 4; ++r) {
      mine->c[r] += product[lane / 4 + 8 * (r / 2)][2 * (lane % 4) + (r % 2 ^ mine->swap)];
    }
  }
}

}  // namespace

void MmaBf16(float* c, const std::uint32_t* a, std::uint32_t b0, std::uint32_t b1, Site site) {
  Machine& machine = Machine::Get();
  const int swap = machine.Visit(site, Site::Kind::kMma) ? 1 : 0;
  MmaOperand<float> operand{c, a, {b0, b1}, swap};
  machine.Collective(site, &operand, [](void* const* operands) {
    const auto get = [](std::uint32_t word, int i) { return Bf16ToFloat(static_cast<std::uint16_t>(word >> 16 * i)); };
    Multiply<float, float, float, 2>(operands, get, get);
  });
}

void MmaS8U8(std::int32_t* c, const std::uint32_t* a, std::uint32_t b0, std::uint32_t b1, Site site) {
  Machine& machine = Machine::Get();
  const int swap = machine.Visit(site, Site::Kind::kMma) ? 1 : 0;
  MmaOperand<std::int32_t> operand{c, a, {b0, b1}, swap};
  machine.Collective(site, &operand, [](void* const* operands) {
    Multiply<std::int32_t, std::int8_t, std::uint8_t, 4>(
        operands, [](std::uint32_t word, int i) { return static_cast<std::int8_t>(word >> 8 * i); },
        [](std::uint32_t word, int i) { return static_cast<std::uint8_t>(word >> 8 * i); });
  });
}

bool LosesAtomic(Site site) { return Machine::Get().Visit(site, Site::Kind::kAtomic); }

void CopyLater(void* shared, const void* global, Site site) {
  Machine& machine = Machine::Get();
  if ((reinterpret_cast<std::uintptr_t>(shared) | reinterpret_cast<std::uintptr_t>(global)) % 16 != 0) {
    machine.Fail("an asynchronous copy that is not aligned to 16 bytes at " + Name(site));
  }
  if (machine.Visit(site, Site::Kind::kCopy)) return;
  Fiber& fiber = machine.fiber();
  fiber.copies.push_back({shared, global, fiber.n_groups});
}

void CloseCopyGroup() { ++Machine::Get().fiber().n_groups; }

void FinishCopies(int n_groups_left, Site site) {
  Machine& machine = Machine::Get();
  if (machine.Visit(site, Site::Kind::kCopyWait)) return;
  Fiber& fiber = machine.fiber();
  const int end = fiber.n_groups - n_groups_left;  // groups below this must be there
  const auto is_due = [end](const Copy& copy) { return copy.group < end; };
  for (const Copy& copy : fiber.copies) {
    if (is_due(copy)) std::memcpy(copy.to, copy.from, 16);
  }
  std::erase_if(fiber.copies, is_due);
}

}  // namespace zeroc::kernels::cuda::simt
