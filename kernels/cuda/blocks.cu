// Whole KV blocks: checksums, and copies between scattered blocks and a contiguous buffer. Memory-bound.
#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/numbers.h"

namespace zeroc::kernels::cuda {
namespace {

constexpr int kThreads = 128;

// ---- XXH3, 64 bits, seed 0, inputs longer than 240 bytes ----
//
// Eight 64-bit accumulators, one on each of eight neighbouring lanes. A stripe of 64 bytes adds to accumulator i the
// product of the halves of (word i ^ key i), and to accumulator i ^ 1 the word itself; the keys move on by 8 bytes of
// the secret with each stripe and begin anew after 16, with a scramble between.

constexpr int kLanes = 8;
constexpr int kStripeBytes = 64;
constexpr int kStripes = 16;  // of a round
// Scalars, not arrays: those of the host have no address on the device.
constexpr std::uint64_t kPrime32A = 0x9e3779b1u, kPrime32B = 0x85ebca77u, kPrime32C = 0xc2b2ae3du;
constexpr std::uint64_t kPrime64A = 0x9e3779b185ebca87u, kPrime64B = 0xc2b2ae3d27d4eb4fu;
constexpr std::uint64_t kPrime64C = 0x165667b19e3779f9u, kPrime64D = 0x85ebca77c2b2ae63u;
constexpr std::uint64_t kPrime64E = 0x27d4eb2f165667c5u;

// Word at byte 8 i of the default secret, little-endian.
ZEROC_DEVICE std::uint64_t SecretWord(int i) {
  constexpr std::uint64_t kSecret[24] = {
      0xbe4ba423396cfeb8u, 0x1cad21f72c81017cu, 0xdb979083e96dd4deu, 0x1f67b3b7a4a44072u, 0x78e5c0cc4ee679cbu,
      0x2172ffcc7dd05a82u, 0x8e2443f7744608b8u, 0x4c263a81e69035e0u, 0xcb00c391bb52283cu, 0xa32e531b8b65d088u,
      0x4ef90da297486471u, 0xd8acdea946ef1938u, 0x3f349ce33f76faa8u, 0x1d4f0bc7c7bbdcf9u, 0x3159b4cd4be0518au,
      0x647378d9c97e9fc8u, 0xc3ebd33483acc5eau, 0xeb6313faffa081c5u, 0x49daf0b751dd0d17u, 0x9e68d429265516d3u,
      0xfca1477d58be162bu, 0xce31d07ad1b8f88fu, 0x280416958f3acb45u, 0x7e404bbbcafbd7afu};
  return kSecret[i];
}
// At any byte.
ZEROC_DEVICE std::uint64_t SecretAt(int byte) {
  const int shift = 8 * (byte % 8);
  const std::uint64_t low = SecretWord(byte / 8);
  return shift == 0 ? low : low >> shift | SecretWord(byte / 8 + 1) << (64 - shift);
}

ZEROC_DEVICE std::uint64_t FirstSum(int lane) {
  constexpr std::uint64_t kSums[kLanes] = {kPrime32C, kPrime64A, kPrime64B, kPrime64C,
                                           kPrime64D, kPrime32B, kPrime64E, kPrime32A};
  return kSums[lane];
}

ZEROC_DEVICE std::uint64_t AddStripe(std::uint64_t sum, std::uint64_t word, std::uint64_t key_word) {
  const std::uint64_t key = word ^ key_word;
  return sum + ShuffleXor(word, 1) + (key & 0xffffffffu) * (key >> 32);
}

struct ChecksumParams {
  BlockChecksumArgs args;
};

ZEROC_KERNEL(kThreads) ChecksumKernel(ChecksumParams p) {
  const int lane = ThreadIdx() % kLanes;
  const int block = BlockIdx() * (kThreads / kLanes) + ThreadIdx() / kLanes;
  // Lanes without a block of their own go along with the last one: shuffles take all.
  const std::uint8_t* bytes = p.args.blocks[Min(block, p.args.n_blocks - 1)];
  const std::int64_t n = p.args.block_bytes;
  const auto word_at = [&](std::int64_t at) { return *reinterpret_cast<const std::uint64_t*>(bytes + at + 8 * lane); };
  std::uint64_t sum = FirstSum(lane);
  const std::int64_t n_rounds = (n - 1) / (kStripeBytes * kStripes);
  for (std::int64_t round = 0; round < n_rounds; ++round) {
    std::uint64_t words[kStripes];
    ZEROC_UNROLL
    for (int s = 0; s < kStripes; ++s) words[s] = word_at((round * kStripes + s) * kStripeBytes);
    ZEROC_UNROLL
    for (int s = 0; s < kStripes; ++s) sum = AddStripe(sum, words[s], SecretWord(s + lane));
    sum ^= sum >> 47;
    sum ^= SecretWord(16 + lane);
    sum *= kPrime32A;
  }
  const std::int64_t first = n_rounds * kStripes * kStripeBytes;
  const int n_stripes = static_cast<int>((n - 1 - first) / kStripeBytes);
  for (int s = 0; s < n_stripes; ++s) sum = AddStripe(sum, word_at(first + s * kStripeBytes), SecretWord(s + lane));
  sum = AddStripe(sum, word_at(n - kStripeBytes), SecretAt(121 + 8 * lane));
  // Pairs of accumulators, folded to 64 bits, and their sum mixed.
  sum ^= SecretAt(11 + 8 * lane);
  const std::uint64_t other = ShuffleXor(sum, 1);
  std::uint64_t hash = lane % 2 == 0 ? sum * other ^ MultiplyHigh(sum, other) : 0;
  for (int mask = kLanes / 2; mask > 1; mask /= 2) hash += ShuffleXor(hash, mask);
  hash += static_cast<std::uint64_t>(n) * kPrime64A;
  hash ^= hash >> 37;
  hash *= 0x165667919e3779f9u;
  hash ^= hash >> 32;
  if (lane == 0 && block < p.args.n_blocks) p.args.out[block] = hash;
}

// ---- Copies ----

struct CopyParams {
  BlockCopyArgs args;
  bool gathers;
};

struct alignas(16) Piece {
  std::uint32_t words[4];
};

ZEROC_KERNEL(kThreads) CopyKernel(CopyParams p) {
  const std::int64_t n_pieces = p.args.block_bytes / 16;
  auto* block = reinterpret_cast<Piece*>(p.args.blocks[BlockIdx()]);
  auto* line = reinterpret_cast<Piece*>(p.args.contiguous + BlockIdx() * p.args.block_bytes);
  Piece* to = p.gathers ? line : block;
  const Piece* from = p.gathers ? block : line;
  for (std::int64_t i = ThreadIdx(); i < n_pieces; i += kThreads) to[i] = from[i];
}

KernelStatus LaunchCopy(const BlockCopyArgs& args, bool gathers, Stream stream) {
  if (args.n_blocks < 0 || args.block_bytes < 16 || args.block_bytes % 16 != 0) return KernelStatus::kBadShape;
  if (args.n_blocks == 0) return KernelStatus::kOk;
  if (args.blocks == nullptr || args.contiguous == nullptr) return KernelStatus::kBadShape;
  return Launch(CopyKernel, {args.n_blocks, kThreads}, stream, {args, gathers});
}

}  // namespace

KernelStatus BlockChecksums(const BlockChecksumArgs& args, Stream stream) {
  if (args.n_blocks < 0 || args.block_bytes <= 240 || args.block_bytes % 8 != 0) return KernelStatus::kBadShape;
  if (args.n_blocks == 0) return KernelStatus::kOk;
  if (args.blocks == nullptr || args.out == nullptr) return KernelStatus::kBadShape;
  constexpr int kBlocks = kThreads / kLanes;
  return Launch(ChecksumKernel, {(args.n_blocks + kBlocks - 1) / kBlocks, kThreads}, stream, {args});
}

KernelStatus GatherBlocks(const BlockCopyArgs& args, Stream stream) { return LaunchCopy(args, true, stream); }
KernelStatus ScatterBlocks(const BlockCopyArgs& args, Stream stream) { return LaunchCopy(args, false, stream); }

}  // namespace zeroc::kernels::cuda
