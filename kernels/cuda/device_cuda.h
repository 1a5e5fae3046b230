// device.h for nvcc: each function is one instruction or intrinsic.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#define ZEROC_DEVICE __device__ __forceinline__
#define ZEROC_KERNEL(threads) __global__ void __launch_bounds__(threads)
#define ZEROC_UNROLL _Pragma("unroll")

namespace zeroc::kernels::cuda {

ZEROC_DEVICE int ThreadIdx() { return static_cast<int>(threadIdx.x); }
ZEROC_DEVICE int BlockIdx() { return static_cast<int>(blockIdx.x); }
ZEROC_DEVICE int BlockIdxY() { return static_cast<int>(blockIdx.y); }
ZEROC_DEVICE int BlockThreads() { return static_cast<int>(blockDim.x); }
ZEROC_DEVICE int GridBlocks() { return static_cast<int>(gridDim.x); }

// 16-byte aligned, as many bytes as the launch asked for.
ZEROC_DEVICE std::uint8_t* SharedMemory() {
  extern __shared__ __align__(16) std::uint8_t zeroc_shared_memory[];
  return zeroc_shared_memory;
}

ZEROC_DEVICE void Sync() { __syncthreads(); }
ZEROC_DEVICE void SyncWarp() { __syncwarp(); }

template <typename T>
ZEROC_DEVICE T ShuffleXor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

ZEROC_DEVICE void CopyAsync16(void* shared, const void* global) {
  const auto to = static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}
ZEROC_DEVICE void CopyAsyncCommit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kGroupsLeft>
ZEROC_DEVICE void CopyAsyncWait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroupsLeft) : "memory");
}

ZEROC_DEVICE void MmaBf16(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
ZEROC_DEVICE void MmaS8U8(std::int32_t (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

ZEROC_DEVICE std::uint32_t FunnelShiftRight(std::uint32_t low, std::uint32_t high, int bits) {
  return __funnelshift_r(low, high, static_cast<unsigned>(bits));
}
ZEROC_DEVICE std::uint64_t MultiplyHigh(std::uint64_t a, std::uint64_t b) { return __umul64hi(a, b); }
ZEROC_DEVICE float BitsToFloat(std::uint32_t bits) { return __uint_as_float(bits); }
ZEROC_DEVICE std::uint32_t FloatToBits(float value) { return __float_as_uint(value); }
// Nearest, ties to even.
ZEROC_DEVICE float Round(float x) { return rintf(x); }
ZEROC_DEVICE int RoundToInt(float x) { return __float2int_rn(x); }
// To 2 ulp and the rounding of x * log2(e).
ZEROC_DEVICE float Exp(float x) { return __expf(x); }
ZEROC_DEVICE float Sqrt(float x) { return __fsqrt_rn(x); }

// At shared memory; all that count are additions to integers, whose order does not matter.
ZEROC_DEVICE void AtomicAdd(std::uint64_t* at, std::uint64_t value) {
  static_assert(sizeof(unsigned long long) == sizeof(std::uint64_t));
  atomicAdd(reinterpret_cast<unsigned long long*>(at), static_cast<unsigned long long>(value));
}

}  // namespace zeroc::kernels::cuda
