#include "libzeroc/compression/canonical.h"

#include <xxhash.h>

#include <array>
#include <bit>

#include "libzeroc/base/check.h"

namespace zeroc {

static_assert(std::endian::native == std::endian::little, "integers and floats are hashed as they lie");

void CanonicalHash::Free::operator()(XXH3_state_s* state) const { XXH3_freeState(state); }

CanonicalHash::CanonicalHash() : state_(XXH3_createState()) {
  ZEROC_CHECK(state_ != nullptr && XXH3_128bits_reset(state_.get()) == XXH_OK);
}

void CanonicalHash::Int(std::int64_t value) { XXH3_128bits_update(state_.get(), &value, sizeof(value)); }

void CanonicalHash::Text(std::string_view value) {
  Int(static_cast<std::int64_t>(value.size()));
  Bytes(value);
}

void CanonicalHash::Floats(std::span<const float> values) {
  Int(static_cast<std::int64_t>(values.size()));
  XXH3_128bits_update(state_.get(), values.data(), values.size_bytes());
}

void CanonicalHash::Bytes(std::string_view value) { XXH3_128bits_update(state_.get(), value.data(), value.size()); }

std::string CanonicalHash::Hex() const {
  XXH128_canonical_t canonical;
  XXH128_canonicalFromHash(&canonical, XXH3_128bits_digest(state_.get()));
  static constexpr char kDigits[] = "0123456789abcdef";
  std::string hex;
  for (const unsigned char byte : canonical.digest) {
    hex.push_back(kDigits[byte >> 4]);
    hex.push_back(kDigits[byte & 15]);
  }
  return hex;
}

std::uint64_t CanonicalHash::Low64() const { return XXH3_128bits_digest(state_.get()).low64; }

}  // namespace zeroc
