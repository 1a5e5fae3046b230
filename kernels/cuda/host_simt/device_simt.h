// device.h without a GPU: the thread's state and the collectives of the emulation (simt.h). Kernels are ordinary
// functions, compiled by the host's compiler, that run inside simt::Run.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels/cuda/host_simt/simt.h"

#define ZEROC_DEVICE inline
#define ZEROC_KERNEL(threads) void
#define ZEROC_UNROLL

namespace zeroc::kernels::cuda {

inline int ThreadIdx() { return simt::Current().thread; }
inline int BlockIdx() { return simt::Current().block; }
inline int BlockIdxY() { return simt::Current().block_y; }
inline int BlockThreads() { return simt::Current().n_threads; }
inline int GridBlocks() { return simt::Current().n_blocks; }
inline std::uint8_t* SharedMemory() { return simt::Current().shared; }

inline void Sync(simt::Site site = simt::Site::Here()) { simt::BlockBarrier(site); }
inline void SyncWarp(simt::Site site = simt::Site::Here()) { simt::WarpBarrier(site); }

template <typename T>
T ShuffleXor(T value, int mask, simt::Site site = simt::Site::Here()) {
  static_assert(sizeof(T) <= sizeof(std::uint64_t));
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = simt::Shuffle(bits, mask, site);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

inline void CopyAsync16(void* shared, const void* global, simt::Site site = simt::Site::Here()) {
  simt::CopyLater(shared, global, site);
}
inline void CopyAsyncCommit() { simt::CloseCopyGroup(); }
template <int kGroupsLeft>
void CopyAsyncWait(simt::Site site = simt::Site::Here()) {
  simt::FinishCopies(kGroupsLeft, site);
}

inline void MmaBf16(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1,
                    simt::Site site = simt::Site::Here()) {
  simt::MmaBf16(c, a, b0, b1, site);
}
inline void MmaS8U8(std::int32_t (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1,
                    simt::Site site = simt::Site::Here()) {
  simt::MmaS8U8(c, a, b0, b1, site);
}

inline std::uint32_t FunnelShiftRight(std::uint32_t low, std::uint32_t high, int bits) {
  return static_cast<std::uint32_t>((std::uint64_t{high} << 32 | low) >> bits);
}
inline std::uint64_t MultiplyHigh(std::uint64_t a, std::uint64_t b) {
  __extension__ using Wide = unsigned __int128;
  return static_cast<std::uint64_t>(Wide{a} * b >> 64);
}
inline float BitsToFloat(std::uint32_t bits) { return std::bit_cast<float>(bits); }
inline std::uint32_t FloatToBits(float value) { return std::bit_cast<std::uint32_t>(value); }
inline float Round(float x) { return std::nearbyint(x); }
inline int RoundToInt(float x) { return static_cast<int>(std::nearbyint(x)); }
inline float Exp(float x) { return std::exp(x); }
inline float Sqrt(float x) { return std::sqrt(x); }

inline void AtomicAdd(std::uint64_t* at, std::uint64_t value, simt::Site site = simt::Site::Here()) {
  if (!simt::LosesAtomic(site)) *at += value;
}

}  // namespace zeroc::kernels::cuda
