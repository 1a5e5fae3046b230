// Rows times a square float32 map on AMX: the profile's key and query maps in a prefill.
//
// AMX multiplies bf16, so both operands are split into two, x = hi + lo, and three of the four products are summed
// in float32. What is left out and rounded away is below 2^-16 |x| |map column|, 2^-8 of the rounding of the bf16 keys
// that follow.
//
// One object per map and thread, alive while its rows are multiplied: it holds the thread's tile configuration and a
// buffer of the thread. Not copyable; calls cannot fail.
#pragma once

#include <cstdint>

namespace zeroc::kernels::cpu {

class MapAmx {
 public:
  static constexpr int kMaxRows = 64;

  // scale * map, [head_dim, head_dim] row-major, is read here only; head_dim is a multiple of 16, at most kMaxHeadDim.
  // Not active without a map, where AMX may not be used, or where n_rows rows in all are too few to pay for splitting.
  MapAmx(const float* map, float scale, int head_dim, std::int64_t n_rows);
  ~MapAmx();
  MapAmx(const MapAmx&) = delete;
  MapAmx& operator=(const MapAmx&) = delete;

  bool active() const { return map_tiles_ != nullptr; }

  // out = scale * x * map for n_rows <= kMaxRows rows of head_dim floats each; only if active.
  void Multiply(const float* x, int n_rows, float* out) const;

 private:
  int head_dim_;
  std::uint16_t* map_tiles_ = nullptr;  // of the thread, the rows' tiles behind them
};

}  // namespace zeroc::kernels::cpu
