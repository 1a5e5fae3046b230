// Frames of the transport: decoding never crashes, and what it accepts encodes to the same bytes again.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>

#include "libzeroc/base/check.h"
#include "libzeroc/comm/frame.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::span<const std::byte> bytes(reinterpret_cast<const std::byte*>(data), size);
  const auto header = zeroc::DecodeFrameHeader(bytes);
  if (header.ok()) {
    const zeroc::FrameHeaderBytes again = zeroc::EncodeFrameHeader(*header);
    ZEROC_CHECK(std::ranges::equal(again, bytes));
  }
  const auto acks = zeroc::DecodeAcks(bytes);
  if (acks.ok()) ZEROC_CHECK(std::ranges::equal(zeroc::EncodeAcks(*acks), bytes));
  const auto hello = zeroc::DecodeHello(bytes);
  // The name is made printable on the way in, so the bytes may differ there, but not in number.
  if (hello.ok()) ZEROC_CHECK(zeroc::EncodeHello(*hello).size() == size, size);
  return 0;
}
