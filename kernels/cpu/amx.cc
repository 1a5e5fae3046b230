#include "kernels/cpu/amx.h"

#include <atomic>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace zeroc::kernels::cpu {
namespace {

std::atomic<bool> g_allowed{true};

#if defined(__x86_64__) && defined(__linux__)
bool HasAvx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

bool Detect() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kAmx = 1u << 22 | 1u << 24 | 1u << 25;  // BF16, TILE, INT8
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & kAmx) != kAmx) return false;
  if (!HasAvx512() || !__builtin_cpu_supports("avx512bf16")) return false;
  constexpr int kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr int kTileData = 18;               // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
bool DetectVnni() { return HasAvx512() && __builtin_cpu_supports("avx512vnni"); }
#else
bool Detect() { return false; }
bool DetectVnni() { return false; }
#endif

}  // namespace

bool AmxReady() {
  static const bool ready = Detect();
  return ready && g_allowed.load(std::memory_order_relaxed);
}

bool VnniReady() {
  static const bool ready = DetectVnni();
  return ready && g_allowed.load(std::memory_order_relaxed);
}

void AllowAmx(bool allowed) { g_allowed.store(allowed, std::memory_order_relaxed); }

}  // namespace zeroc::kernels::cpu
