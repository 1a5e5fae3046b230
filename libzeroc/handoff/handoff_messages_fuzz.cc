// Hand-off messages and block tables: parsing never crashes, and what it accepts encodes to the same bytes again.
// The first byte chooses the message type (0: a block table).
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "libzeroc/base/check.h"
#include "libzeroc/handoff/block_table.h"
#include "libzeroc/handoff/byte_codec.h"
#include "libzeroc/handoff/messages.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size == 0) return 0;
  const std::span<const std::byte> bytes(reinterpret_cast<const std::byte*>(data) + 1, size - 1);
  if (data[0] == 0) {
    const auto table = zeroc::BlockTable::Parse(bytes);
    if (!table.ok()) return 0;
    ZEROC_CHECK(std::ranges::equal(zeroc::AsBytes(table->Serialise()), bytes));
    (void)table->CheckPlaces(1 << 30).ok();
    ZEROC_CHECK(table->Extents().size() == table->n_blocks());
    return 0;
  }
  const auto type = static_cast<std::uint16_t>(zeroc::kFirstMessageType + data[0] - 1);
  const auto message = zeroc::ParseMessage(type, bytes);
  if (!message.ok()) return 0;
  const zeroc::EncodedMessage again = zeroc::EncodeMessage(*message);
  ZEROC_CHECK(again.type == type, again.type, type);
  // A status of OK drops its text, so only the others are the same byte for byte.
  if (again.payload.size() == bytes.size()) ZEROC_CHECK(std::ranges::equal(zeroc::AsBytes(again.payload), bytes));
  return 0;
}
