#include "libzeroc/comm/ucx/ucx_envelope.h"

#include <cstdint>
#include <span>

#include "libzeroc/comm/checksum.h"

namespace zeroc {
namespace {

constexpr std::string_view kMagic = "ZUX1";  // then the checksum of the rest, 8 bytes little-endian, then the rest

std::string ChecksumBytes(std::string_view bytes) {
  std::uint64_t sum = Checksum64(std::as_bytes(std::span(bytes)));
  std::string out;
  for (int i = 0; i < 8; ++i, sum >>= 8) out.push_back(static_cast<char>(sum & 0xff));
  return out;
}

}  // namespace

std::string SealUcx(std::string_view bytes) {
  std::string sealed(kMagic);
  sealed += ChecksumBytes(bytes);
  sealed += bytes;
  return sealed;
}

Result<std::string> UnsealUcx(std::string_view sealed, std::string_view what) {
  const std::string where = "ucx: " + std::string(what) + " of " + std::to_string(sealed.size()) + " bytes: ";
  if (sealed.size() <= kMagic.size() + 8 || !sealed.starts_with(kMagic))
    return InvalidArgument(where + "not made by UCX");
  const std::string_view bytes = sealed.substr(kMagic.size() + 8);
  if (sealed.substr(kMagic.size(), 8) != ChecksumBytes(bytes)) return InvalidArgument(where + "damaged");
  return std::string(bytes);
}

}  // namespace zeroc
