#include "libzeroc/model/sp_wire.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels/bf16.h"

namespace zeroc {
namespace {

constexpr float kLargestCode = 127.0f;

}  // namespace

void EncodeSpRow(SpScheme scheme, int act_bytes, const float* row, int d, std::byte* to) {
  if (scheme != SpScheme::kUlysses8) {
    if (act_bytes == 4) {
      std::memcpy(to, row, static_cast<std::size_t>(d) * 4);
      return;
    }
    for (int i = 0; i < d; ++i) {
      const std::uint16_t half = kernels::FloatToBf16(row[i]);
      std::memcpy(to + 2 * i, &half, 2);
    }
    return;
  }
  float largest = 0;
  for (int i = 0; i < d && std::isfinite(largest); ++i) {
    largest = std::isfinite(row[i]) ? std::max(largest, std::fabs(row[i])) : row[i];
  }
  // NaN and infinities make the whole row NaN: they are not hidden.
  const float scale = std::isfinite(largest) ? largest / kLargestCode : std::numeric_limits<float>::quiet_NaN();
  std::memcpy(to, &scale, 4);
  for (int i = 0; i < d; ++i) {
    to[4 + i] = static_cast<std::byte>(static_cast<std::int8_t>(scale > 0 ? std::lround(row[i] / scale) : 0));
  }
}

void DecodeSpRow(SpScheme scheme, int act_bytes, const std::byte* from, int d, float* row) {
  if (scheme != SpScheme::kUlysses8) {
    if (act_bytes == 4) {
      std::memcpy(row, from, static_cast<std::size_t>(d) * 4);
      return;
    }
    for (int i = 0; i < d; ++i) {
      std::uint16_t half;
      std::memcpy(&half, from + 2 * i, 2);
      row[i] = kernels::Bf16ToFloat(half);
    }
    return;
  }
  float scale;
  std::memcpy(&scale, from, 4);
  for (int i = 0; i < d; ++i) row[i] = scale * static_cast<float>(static_cast<std::int8_t>(from[4 + i]));
}

}  // namespace zeroc
