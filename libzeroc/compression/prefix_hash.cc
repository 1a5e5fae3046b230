#include "libzeroc/compression/prefix_hash.h"

#include <xxhash.h>

#include <bit>
#include <cstring>
#include <string>

#include "libzeroc/base/check.h"

namespace zeroc {

static_assert(std::endian::native == std::endian::little, "integers are hashed as they lie");

std::uint64_t PrefixHashRoot(std::string_view model_fingerprint, std::string_view plan_id, std::string_view profile) {
  std::string bytes;
  for (const std::string_view text : {model_fingerprint, plan_id, profile}) {
    const auto n = static_cast<std::uint32_t>(text.size());
    bytes.append(reinterpret_cast<const char*>(&n), sizeof n);
    bytes.append(text);
  }
  return XXH3_64bits(bytes.data(), bytes.size());
}

std::uint64_t PrefixHashNext(std::uint64_t parent, std::span<const std::int32_t> ids) {
  ZEROC_CHECK(ids.size() == kPrefixHashTokens, ids.size());
  unsigned char bytes[sizeof parent + kPrefixHashTokens * sizeof(std::int32_t)];
  std::memcpy(bytes, &parent, sizeof parent);
  std::memcpy(bytes + sizeof parent, ids.data(), ids.size_bytes());
  return XXH3_64bits(bytes, sizeof bytes);
}

std::uint64_t PromptHash(std::span<const std::int32_t> ids) { return XXH3_64bits(ids.data(), ids.size_bytes()); }

std::vector<std::uint64_t> PrefixHashes(std::uint64_t root, std::span<const std::int32_t> ids) {
  std::vector<std::uint64_t> hashes;
  hashes.reserve(ids.size() / kPrefixHashTokens);
  for (std::size_t begin = 0; begin + kPrefixHashTokens <= ids.size(); begin += kPrefixHashTokens) {
    root = PrefixHashNext(root, ids.subspan(begin, kPrefixHashTokens));
    hashes.push_back(root);
  }
  return hashes;
}

}  // namespace zeroc
