// Top-k, min-p and top-p sampling without sorting: every border in the order of candidates is found by four passes
// over the row, one for each byte of the logit as an ordered integer, which count the candidates or add up their
// weights.
#include "kernels/cuda/launch.h"
#include "kernels/cuda/numbers.h"
#include "kernels/cuda/sampling.h"

namespace zeroc::kernels::cuda {
namespace {

constexpr int kThreads = 256;                   // also the values of a byte
constexpr float kWeightOne = 1099511627776.0f;  // 2^40

struct SampleShared {
  std::uint64_t sums[kThreads];
  std::uint64_t keys[kThreads / 32];  // of the warps' best
  std::int32_t id;
};

struct SampleState {
  const float* logits;
  float temperature;
  int vocab;
  float best;
  SampleShared* shared;
};

// The scaled logit; both zeros are one.
ZEROC_DEVICE float LogitAt(const SampleState& s, int id) { return s.logits[id] / s.temperature + 0.0f; }

// Ascending with x.
ZEROC_DEVICE std::uint32_t KeyOf(float x) {
  const std::uint32_t bits = FloatToBits(x);
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}

ZEROC_DEVICE std::uint64_t WeightOf(const SampleState& s, float x) {
  return static_cast<std::uint64_t>(Exp(x - s.best) * kWeightOne);
}

// Sum of x over the threads, for all of them.
ZEROC_DEVICE std::uint64_t SumOf(std::uint64_t x, SampleShared* shared) {
  shared->sums[ThreadIdx()] = x;
  Sync();
  std::uint64_t sum = 0;
  for (int i = 0; i < kThreads; ++i) sum += shared->sums[i];
  Sync();
  return sum;
}

// Id of the largest logit, the least of equals.
ZEROC_DEVICE int BestId(const SampleState& s) {
  std::uint64_t best = 0;
  for (int i = ThreadIdx(); i < s.vocab; i += kThreads) {
    const std::uint64_t key = static_cast<std::uint64_t>(KeyOf(LogitAt(s, i))) << 32 | ~static_cast<std::uint32_t>(i);
    if (key > best) best = key;
  }
  for (int mask = 16; mask > 0; mask /= 2) {
    const std::uint64_t other = ShuffleXor(best, mask);
    if (other > best) best = other;
  }
  if (ThreadIdx() % 32 == 0) s.shared->keys[ThreadIdx() / 32] = best;
  Sync();
  for (int warp = 0; warp < kThreads / 32; ++warp) {
    if (s.shared->keys[warp] > best) best = s.shared->keys[warp];
  }
  return static_cast<int>(~static_cast<std::uint32_t>(best));
}

// A beginning of the order of candidates: all keys above `key`, and the first n_equal of those that equal it.
struct Prefix {
  std::uint32_t key;
  std::uint64_t n_equal;
  std::uint64_t sum;  // of counts or weights
};

// The shortest beginning whose sum of counts (or weights) reaches `target`, which the whole row reaches.
template <bool kWeights>
ZEROC_DEVICE Prefix Reach(const SampleState& s, std::uint64_t target) {
  std::uint32_t key = 0, known = 0;  // bits of the key, and which of them are known
  std::uint64_t above = 0;           // sum of the keys above those that agree with what is known
  for (int shift = 24; shift >= 0; shift -= 8) {
    s.shared->sums[ThreadIdx()] = 0;
    Sync();
    for (int i = ThreadIdx(); i < s.vocab; i += kThreads) {
      const float x = LogitAt(s, i);
      const std::uint32_t other = KeyOf(x);
      if ((other & known) != key) continue;
      AtomicAdd(&s.shared->sums[other >> shift & 255u], kWeights ? WeightOf(s, x) : std::uint64_t{1});
    }
    Sync();
    int byte = 255;
    for (; byte > 0; --byte) {
      if (above + s.shared->sums[byte] >= target) break;
      above += s.shared->sums[byte];
    }
    key |= static_cast<std::uint32_t>(byte) << shift;
    known |= 255u << shift;
    Sync();
  }
  // The float of a key, for the weight of each of the equal ones.
  const std::uint32_t bits = (key & 0x80000000u) != 0 ? key & 0x7fffffffu : ~key;
  const std::uint64_t each = kWeights ? WeightOf(s, BitsToFloat(bits)) : 1;
  const std::uint64_t left = target - above;
  const std::uint64_t n_equal = each == 0 ? 1 : (left + each - 1) / each;
  return {key, n_equal, above + n_equal * each};
}

// Sum of the weights of all keys above `key` and of n_equal that equal it (at most those that do).
ZEROC_DEVICE std::uint64_t WeightOfPrefix(const SampleState& s, std::uint32_t key, std::uint64_t n_equal) {
  std::uint64_t sum = 0, equal = 0, each = 0;
  for (int i = ThreadIdx(); i < s.vocab; i += kThreads) {
    const float x = LogitAt(s, i);
    const std::uint32_t other = KeyOf(x);
    if (other > key) sum += WeightOf(s, x);
    if (other == key) {
      ++equal;
      each = WeightOf(s, x);
    }
  }
  sum = SumOf(sum, s.shared);
  const std::uint64_t n = SumOf(equal, s.shared);
  if (n == 0) return sum;
  const std::uint64_t of_all = SumOf(equal * each, s.shared);
  return sum + of_all / n * (n_equal < n ? n_equal : n);
}

// Walks the row in order of ids, in 256 pieces, and notes the one at which the running sum of value(id) reaches target.
template <typename Value>
ZEROC_DEVICE int WalkTo(const SampleState& s, std::uint64_t target, const Value& value) {
  const int piece = (s.vocab + kThreads - 1) / kThreads;
  const int begin = Min(ThreadIdx() * piece, s.vocab), end = Min(begin + piece, s.vocab);
  std::uint64_t own = 0;
  for (int i = begin; i < end; ++i) own += value(i);
  s.shared->sums[ThreadIdx()] = own;
  Sync();
  std::uint64_t before = 0;
  for (int i = 0; i < ThreadIdx(); ++i) before += s.shared->sums[i];
  if (before < target && before + own >= target) {
    int at = begin;
    for (std::uint64_t sum = before + value(at); sum < target; sum += value(at)) ++at;
    s.shared->id = at;
  }
  Sync();
  return s.shared->id;
}

ZEROC_DEVICE std::uint64_t TargetOf(double uniform, std::uint64_t total) {
  const std::uint64_t passed = static_cast<std::uint64_t>(uniform * static_cast<double>(total));
  return passed < total ? passed + 1 : total;
}

// No filter: the best first, then by id with id 0 in the best one's place.
ZEROC_DEVICE int DrawFromAll(const SampleState& s, int best_id, double uniform) {
  std::uint64_t own = 0;
  for (int i = ThreadIdx(); i < s.vocab; i += kThreads) own += WeightOf(s, LogitAt(s, i));
  const std::uint64_t target = TargetOf(uniform, SumOf(own, s.shared));
  const std::uint64_t of_best = WeightOf(s, s.best);
  if (target <= of_best) return best_id;
  const int at = WalkTo(s, target - of_best, [&](int place) {
    return place == 0 ? 0 : WeightOf(s, LogitAt(s, place == best_id ? 0 : place));
  });
  return at == best_id ? 0 : at;
}

ZEROC_DEVICE int DrawFiltered(const SampleState& s, const SampleRow& row) {
  Prefix kept = {0, static_cast<std::uint64_t>(s.vocab), 0};
  if (row.top_k > 0 && row.top_k < s.vocab) kept = Reach<false>(s, static_cast<std::uint64_t>(row.top_k));
  if (row.min_p > 0.0f) {
    const std::uint32_t floor = KeyOf(s.best + logf(row.min_p));
    if (floor > kept.key) kept = {floor, static_cast<std::uint64_t>(s.vocab), 0};
  }
  std::uint64_t total = WeightOfPrefix(s, kept.key, kept.n_equal);
  if (row.top_p < 1.0f) {
    const double share = static_cast<double>(row.top_p) * static_cast<double>(total);
    std::uint64_t target = static_cast<std::uint64_t>(share);
    if (static_cast<double>(target) < share) ++target;
    total = Reach<true>(s, target < 1 ? 1 : target < total ? target : total).sum;
  }
  const Prefix drawn = Reach<true>(s, TargetOf(row.uniform, total));
  return WalkTo(s, drawn.n_equal, [&](int id) { return KeyOf(LogitAt(s, id)) == drawn.key ? std::uint64_t{1} : 0; });
}

ZEROC_KERNEL(kThreads) SampleKernel(SampleArgs args) {
  auto* shared = reinterpret_cast<SampleShared*>(SharedMemory());
  const SampleRow row = args.rows[BlockIdx()];
  SampleState state = {args.logits + BlockIdx() * args.stride, row.temperature == 0.0f ? 1.0f : row.temperature,
                       args.vocab, 0.0f, shared};
  int id = BestId(state);
  state.best = LogitAt(state, id);
  if (row.temperature != 0.0f) {
    const bool filters = (row.top_k > 0 && row.top_k < args.vocab) || row.min_p > 0.0f || row.top_p < 1.0f;
    id = filters ? DrawFiltered(state, row) : DrawFromAll(state, id, row.uniform);
  }
  if (ThreadIdx() == 0) args.ids[BlockIdx()] = id;
}

}  // namespace

KernelStatus Sample(const SampleArgs& args, Stream stream) {
  if (args.n_rows < 0 || args.vocab < 1 || args.stride < args.vocab) return KernelStatus::kBadShape;
  if (args.n_rows == 0) return KernelStatus::kOk;
  if (args.logits == nullptr || args.rows == nullptr || args.ids == nullptr) return KernelStatus::kBadShape;
  return Launch(SampleKernel, {args.n_rows, kThreads, static_cast<int>(sizeof(SampleShared))}, stream, args);
}

}  // namespace zeroc::kernels::cuda
