// Test cases of the CUDA ops, free of any test framework: they run against the emulation in ctest and against a GPU in
// tests/gpu/run. Every case compares an op with ReferenceOps on the host.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "kernels/bf16.h"
#include "kernels/cuda/runtime.h"
#include "kernels/kv_block.h"
#include "kernels/ops.h"

namespace zeroc::kernels::cuda {

inline constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
inline constexpr float kInf = std::numeric_limits<float>::infinity();
inline constexpr double kEps32 = 0x1p-24;   // unit roundoff of float32
inline constexpr double kEpsBf16 = 0x1p-8;  // of bf16

// What one case found. Not thread-safe. With `stops`, the first failure throws Stop: whoever only asks whether there
// is one need not wait for the rest.
class Outcome {
 public:
  struct Stop {};
  explicit Outcome(bool stops = false) : stops_(stops) {}

  // A non-finite `expected` must be matched as such.
  void Check(double actual, double expected, double bound) {
    ++n_checked_;
    if (!std::isfinite(expected)) {
      if (!(std::isnan(expected) ? std::isnan(actual) : actual == expected)) Off(actual, expected, bound);
      return;
    }
    const double error = std::abs(actual - expected);
    if (!(error <= bound)) return Off(actual, expected, bound);
    if (bound > 0 && error / bound > used_) used_ = error / bound;
  }
  void Expect(bool good, const std::string& what) {
    ++n_checked_;
    if (!good) Fail(what);
  }
  // The op was taken, and the device did it.
  void Done(KernelStatus status) {
    if (status != KernelStatus::kOk) Fail("status " + std::to_string(static_cast<int>(status)));
    if (const char* error = Synchronize(nullptr)) Fail(error);
  }

  int n_failures() const { return n_failures_; }
  std::size_t n_checked() const { return n_checked_; }
  double used() const { return used_; }  // largest fraction of a bound
  const std::string& first_failure() const { return first_failure_; }

 private:
  void Off(double actual, double expected, double bound) {
    Fail(std::to_string(actual) + ", expected " + std::to_string(expected) + " +- " + std::to_string(bound) +
         " (value " + std::to_string(n_checked_) + ")");
  }
  void Fail(const std::string& what) {
    if (n_failures_++ == 0) first_failure_ = what;
    if (stops_) throw Stop();
  }
  bool stops_;
  int n_failures_ = 0;
  std::size_t n_checked_ = 0;
  double used_ = 0;
  std::string first_failure_;
};

struct Case {
  const char* family;
  const char* name;
  void (*run)(Outcome&);
};
// Small shapes: seconds in the emulation for all of them.
std::span<const Case> RowCases();
std::span<const Case> KvCases();
std::span<const Case> DecodeCases();
std::span<const Case> PrefillCases();
std::span<const Case> BlockCases();
std::span<const Case> SamplingCases();
std::vector<Case> AllCases();

class Random {
 public:
  explicit Random(unsigned seed) : engine_(seed) {}
  float Normal() { return normal_(engine_); }
  int Below(int n) { return static_cast<int>(engine_() % static_cast<unsigned>(n)); }
  std::vector<float> Normals(std::int64_t n, float scale = 1.0f) {
    std::vector<float> out(static_cast<std::size_t>(n));
    for (float& value : out) value = scale * Normal();
    return out;
  }
  std::vector<Bf16> Bf16Normals(std::int64_t n, float scale = 1.0f) {
    std::vector<Bf16> out(static_cast<std::size_t>(n));
    for (Bf16& value : out) value = FloatToBf16(scale * Normal());
    return out;
  }

 private:
  std::mt19937 engine_;
  std::normal_distribution<float> normal_;
};

// Device memory with a copy of a vector, or n elements of its own.
template <typename T>
class Buffer {
 public:
  explicit Buffer(std::size_t n) : size_(n), data_(static_cast<T*>(Allocate(n * sizeof(T) + 1))) {}
  explicit Buffer(const std::vector<T>& from) : Buffer(from.size()) {
    CopyToDevice(data_, from.data(), from.size() * sizeof(T), nullptr);
    Synchronize(nullptr);
  }
  ~Buffer() { Free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* data() const { return data_; }
  std::size_t size() const { return size_; }
  std::vector<T> ToHost() const {
    std::vector<T> out(size_);
    CopyToHost(out.data(), data_, size_ * sizeof(T), nullptr);
    Synchronize(nullptr);
    return out;
  }

 private:
  std::size_t size_;
  T* data_;
};

inline KvBlockLayout LayoutOf(int heads, int dim, int tokens, const std::vector<KvRun>& k, const std::vector<KvRun>& v,
                              bool rotate_v) {
  KvBlockLayout layout;
  if (!MakeKvBlockLayout(heads, dim, tokens, k.data(), static_cast<int>(k.size()), v.data(), static_cast<int>(v.size()),
                         rotate_v, &layout)) {
    layout.n_kv_heads = 0;  // no op takes it
  }
  return layout;
}

// Tables of RoPE for consecutive positions.
struct RopeTables {
  std::vector<float> cos, sin;
  RopeTables(int n_tokens, int dim, int first_pos) {
    for (int t = 0; t < n_tokens; ++t) {
      for (int i = 0; i < dim / 2; ++i) {
        const double angle = (first_pos + t) * std::pow(1e4, -2.0 * i / dim);
        cos.push_back(static_cast<float>(std::cos(angle)));
        sin.push_back(static_cast<float>(std::sin(angle)));
      }
    }
  }
};

}  // namespace zeroc::kernels::cuda
