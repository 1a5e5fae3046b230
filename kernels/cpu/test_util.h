// Shared by the tests of the CPU ops: instruction sets, random data, guarded buffers, and tolerances with a ledger.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "hwy/targets.h"
#include "kernels/bf16.h"
#include "kernels/cpu/amx.h"
#include "kernels/kv_block.h"
#include "kernels/ops.h"

namespace zeroc::kernels {

inline constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
inline constexpr double kEps32 = 0x1p-24;   // unit roundoff of float32
inline constexpr double kEpsBf16 = 0x1p-8;  // of bf16

// Runs `body` once for each compiled instruction set that this processor has, without AMX.
template <typename Body>
void ForEachTarget(const Body& body) {
  cpu::AllowAmx(false);
  for (std::int64_t target : {HWY_AVX3, HWY_AVX2, HWY_SCALAR}) {
    hwy::SetSupportedTargetsForTest(0);
    if ((hwy::SupportedTargets() & target) == 0 && target != HWY_SCALAR) continue;
    hwy::SetSupportedTargetsForTest(target);
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
    SCOPED_TRACE(CpuOps().isa());
    EXPECT_STREQ(CpuOps().isa(), hwy::TargetName(target));
    body();
  }
  hwy::SetSupportedTargetsForTest(0);
  hwy::GetChosenTarget().Update(hwy::SupportedTargets());
  cpu::AllowAmx(true);
}

// The same, and once more with what AllowAmx allows, where there is AMX or VNNI.
template <typename Body>
void ForEachTargetAndAmx(const Body& body) {
  ForEachTarget(body);
  if (!cpu::AmxReady() && !cpu::VnniReady()) return;
  SCOPED_TRACE(cpu::AmxReady() ? "AMX" : "VNNI");
  body();
}

class Random {
 public:
  explicit Random(unsigned seed) : engine_(seed) {}
  float Normal() { return normal_(engine_); }
  int Below(int n) { return static_cast<int>(engine_() % static_cast<unsigned>(n)); }
  std::vector<float> Normals(std::size_t n, float scale = 1.0f) {
    std::vector<float> out(n);
    for (float& value : out) value = scale * Normal();
    return out;
  }
  std::vector<Bf16> Bf16Normals(std::size_t n, float scale = 1.0f) {
    std::vector<Bf16> out(n);
    for (Bf16& value : out) value = FloatToBf16(scale * Normal());
    return out;
  }

 private:
  std::mt19937 engine_;
  std::normal_distribution<float> normal_;
};

inline std::vector<float> ToFloats(const std::vector<Bf16>& from) {
  std::vector<float> out(from.size());
  for (std::size_t i = 0; i < from.size(); ++i) out[i] = Bf16ToFloat(from[i]);
  return out;
}

// Memory at an address that is a multiple of the element only, between canaries that must survive.
template <typename T>
class Guarded {
 public:
  explicit Guarded(std::size_t n) : size_(n), bytes_((n + 1) * sizeof(T) + 2 * kGuard, kCanary) {}
  explicit Guarded(const std::vector<T>& from) : Guarded(from.size()) {
    if (!from.empty()) std::memcpy(data(), from.data(), from.size() * sizeof(T));
  }
  ~Guarded() {
    for (std::size_t i = 0; i < kGuard; ++i) {
      const std::size_t back = Start() + size_ * sizeof(T) + i;
      if (bytes_[i] != kCanary || (back < bytes_.size() && bytes_[back] != kCanary)) {
        ADD_FAILURE() << "write outside a buffer of " << size_ << " elements";
        return;
      }
    }
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  T* data() { return reinterpret_cast<T*>(bytes_.data() + Start()); }
  T& operator[](std::size_t i) { return data()[i]; }
  std::size_t size() const { return size_; }

 private:
  static constexpr std::size_t kGuard = 64;
  static constexpr std::uint8_t kCanary = 0xcd;
  std::size_t Start() const { return kGuard + sizeof(T); }
  std::size_t size_;
  std::vector<std::uint8_t> bytes_;
};

// Compares against bounds and keeps the largest fraction of a bound that was used; prints it at the end.
class Ledger {
 public:
  explicit Ledger(std::string name) : name_(std::move(name)) {}
  ~Ledger() { std::printf("[ tolerance ] %s: %.3f of the bound used in %zu values\n", name_.c_str(), used_, count_); }
  Ledger(const Ledger&) = delete;
  Ledger& operator=(const Ledger&) = delete;

  // A non-finite `expected` must be matched as such.
  void Check(double actual, double expected, double bound) {
    ++count_;
    if (std::isnan(expected) || std::isinf(expected)) {
      if (!(std::isnan(expected) ? std::isnan(actual) : actual == expected)) Fail(actual, expected, bound);
      return;
    }
    const double error = std::abs(actual - expected);
    if (!(error <= bound)) return Fail(actual, expected, bound);
    if (bound > 0) used_ = std::max(used_, error / bound);
  }

 private:
  void Fail(double actual, double expected, double bound) {
    if (++failures_ <= 5) ADD_FAILURE() << name_ << ": " << actual << ", expected " << expected << " +- " << bound;
  }
  std::string name_;
  double used_ = 0;
  std::size_t count_ = 0;
  int failures_ = 0;
};

inline KvBlockLayout MustLayout(int heads, int dim, int tokens, const std::vector<KvRun>& k,
                                const std::vector<KvRun>& v, bool rotate_v) {
  KvBlockLayout layout;
  EXPECT_TRUE(MakeKvBlockLayout(heads, dim, tokens, k.data(), static_cast<int>(k.size()), v.data(),
                                static_cast<int>(v.size()), rotate_v, &layout));
  return layout;
}

}  // namespace zeroc::kernels
