// Checksum of KV bytes on the wire and at rest: XXH3-64, seed 0 (xxhash's stable format since 0.8). Detects corruption
// and misplaced bytes, not malice. Any thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace zeroc {

std::uint64_t Checksum64(std::span<const std::byte> bytes);

}  // namespace zeroc
