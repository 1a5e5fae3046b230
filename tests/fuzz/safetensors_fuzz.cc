// Safetensors containers from strangers: parsing never crashes, and every accepted tensor lies inside the bytes.
#include <cstddef>
#include <cstdint>
#include <span>

#include "libzeroc/base/check.h"
#include "libzeroc/checkpoint/safetensors.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::span<const std::byte> bytes(reinterpret_cast<const std::byte*>(data), size);
  const auto file = zeroc::SafetensorsFile::Parse(bytes, "fuzz");
  if (!file.ok()) {
    ZEROC_CHECK(!file.status().message().empty());
    return 0;
  }
  std::size_t total = 0;
  for (const auto& [name, tensor] : (*file)->tensors()) {
    std::size_t expected = 0;
    ZEROC_CHECK(zeroc::internal::TensorBytes(tensor.dtype, tensor.shape, &expected));
    ZEROC_CHECK(expected == tensor.bytes, expected, tensor.bytes);
    ZEROC_CHECK(tensor.bytes <= size, tensor.bytes, size);
    if (tensor.bytes > 0) {
      const std::ptrdiff_t offset = tensor.data - bytes.data();
      ZEROC_CHECK(offset >= 8 && static_cast<std::size_t>(offset) <= size - tensor.bytes, offset, size);
    }
    total += tensor.bytes;
  }
  ZEROC_CHECK(total <= size, total, size);  // no overlap
  return 0;
}
