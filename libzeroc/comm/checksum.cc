#include "libzeroc/comm/checksum.h"

#include <xxhash.h>

namespace zeroc {

std::uint64_t Checksum64(std::span<const std::byte> bytes) { return XXH3_64bits(bytes.data(), bytes.size()); }

}  // namespace zeroc
