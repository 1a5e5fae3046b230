// What the kernels use of a GPU, and nothing else: thread indexes, barriers, shuffles, shared memory, matrix fragments,
// asynchronous copies. Kernel sources (*.cu) see only this file, so that the same source runs on a GPU, through nvcc,
// and on any machine, through the emulation of host_simt (one fiber for each thread of a block; docs/cuda.md).
//
//   ZEROC_KERNEL(threads) void Name(Params p)   a kernel of at most `threads` threads per block; blocks are 1-d
//   ZEROC_DEVICE T Name(..)                     a function that kernels call
//   ZEROC_UNROLL                                before a loop whose counter indexes registers
//
//   ThreadIdx(), BlockIdx(), BlockIdxY(), BlockThreads(), GridBlocks(), SharedMemory()
//   Sync()                       barrier of the block; all of its threads, at the same place
//   SyncWarp()                   barrier of the warp: orders its memory accesses
//   ShuffleXor(x, mask)          x of lane ^ mask; all 32 lanes
//   CopyAsync16(to, from)        16 bytes from global to shared memory, both aligned; CopyAsyncCommit() closes a group,
//                                CopyAsyncWait<n>() returns when all but the last n groups of this thread are there
//   MmaBf16(c, a, b0, b1)        c[16 x 8] += a[16 x 16] b[16 x 8], bf16 in f32
//   MmaS8U8(c, a, b0, b1)        c[16 x 8] += a[16 x 32] b[32 x 8], signed times unsigned bytes in int32
//   FunnelShiftRight(lo, hi, n)  low word of (hi : lo) >> n, n < 32
//   AtomicAdd(at, value)         to 64 bits in shared memory
//   MultiplyHigh(a, b)           upper 64 bits of a 128-bit product
//
// Fragments are PTX's of mma.sync m16n8k16 and m16n8k32, with g = lane / 4 and q = lane % 4; all warps of a processor
// of compute capability 8.0 or later have them:
//   c[0..1]  row g, columns 2q, 2q + 1;  c[2..3]  row g + 8
//   bf16: a[0] row g, k 2q, 2q + 1;  a[1] row g + 8;  a[2], a[3] the same at k + 8;  b0 column g, k 2q, 2q + 1;  b1 k
//   + 8 int8: a[0] row g, k 4q .. 4q + 3;  a[1] row g + 8;  a[2], a[3] at k + 16;  b0 column g, k 4q .. 4q + 3;  b1 k
//   + 16
#pragma once

#ifdef __CUDACC__
#include "kernels/cuda/device_cuda.h"
#else
#include "kernels/cuda/host_simt/device_simt.h"
#endif
