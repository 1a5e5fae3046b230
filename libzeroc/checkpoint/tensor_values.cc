#include "libzeroc/checkpoint/tensor_values.h"

#include <bit>
#include <cstring>

#include "libzeroc/base/check.h"

namespace zeroc {

bool IsWeightType(DType dtype) { return dtype == DType::kBf16 || dtype == DType::kF16 || dtype == DType::kF32; }

float HalfToFloat(std::uint16_t bits) {
  const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x8000u) << 16;
  const std::uint32_t magnitude = bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return std::bit_cast<float>(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);  // inf, NaN
  if (magnitude >= 0x400u) return std::bit_cast<float>(sign | ((magnitude << 13) + (112u << 23)));
  const float subnormal = static_cast<float>(magnitude) * 0x1p-24F;
  return sign != 0 ? -subnormal : subnormal;
}

void ReadFloats(const TensorView& tensor, std::int64_t first, std::int64_t n, float* out) {
  const std::size_t element = DTypeBytes(tensor.dtype);
  const auto begin = static_cast<std::size_t>(first) * element;
  const auto length = static_cast<std::size_t>(n) * element;
  ZEROC_CHECK(first >= 0 && n >= 0 && IsWeightType(tensor.dtype) && begin + length <= tensor.bytes, first, n,
              tensor.bytes);
  const std::byte* from = tensor.data + begin;
  if (tensor.dtype == DType::kF32) {
    std::memcpy(out, from, length);
    return;
  }
  for (std::int64_t i = 0; i < n; ++i) {
    std::uint16_t bits;
    std::memcpy(&bits, from + 2 * i, sizeof(bits));
    out[i] =
        tensor.dtype == DType::kBf16 ? std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16) : HalfToFloat(bits);
  }
}

}  // namespace zeroc
