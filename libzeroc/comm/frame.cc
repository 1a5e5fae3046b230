#include "libzeroc/comm/frame.h"

#include <algorithm>
#include <cstring>

#include "libzeroc/base/check.h"

namespace zeroc {
namespace {

constexpr std::uint32_t kMagic = 0x3154435a;  // "ZCT1"
constexpr std::size_t kAckEntryBytes = 9;

template <typename T>
void Store(T value, std::byte* to) {
  for (std::size_t i = 0; i < sizeof(T); ++i) to[i] = static_cast<std::byte>(value >> (8 * i));
}

template <typename T>
T Load(const std::byte* from) {
  T value = 0;
  for (std::size_t i = 0; i < sizeof(T); ++i) value |= static_cast<T>(static_cast<T>(from[i]) << (8 * i));
  return value;
}

void AppendSized(const std::string& text, std::vector<std::byte>& out) {
  const std::size_t at = out.size();
  out.resize(at + 4 + text.size());
  Store(static_cast<std::uint32_t>(text.size()), out.data() + at);
  if (!text.empty()) std::memcpy(out.data() + at + 4, text.data(), text.size());
}

Result<std::string> TakeSized(std::span<const std::byte>& bytes, std::size_t max_bytes, const char* field) {
  const std::string where = std::string("transport hello: ") + field;
  if (bytes.size() < 4) return InvalidArgument(where + ": truncated length");
  const std::size_t size = Load<std::uint32_t>(bytes.data());
  bytes = bytes.subspan(4);
  if (size > max_bytes)
    return InvalidArgument(where + ": " + std::to_string(size) + " bytes, at most " + std::to_string(max_bytes));
  if (size > bytes.size()) return InvalidArgument(where + ": truncated");
  std::string text(reinterpret_cast<const char*>(bytes.data()), size);
  bytes = bytes.subspan(size);
  return text;
}

}  // namespace

FrameHeaderBytes EncodeFrameHeader(const FrameHeader& header) {
  FrameHeaderBytes out{};
  Store(kMagic, out.data());
  out[4] = static_cast<std::byte>(header.kind);
  out[5] = static_cast<std::byte>(header.from_connector);
  Store(header.type, out.data() + 6);
  Store(header.connection, out.data() + 8);
  Store(header.sequence, out.data() + 16);
  Store(header.tag.lease_id, out.data() + 24);
  Store(header.tag.generation, out.data() + 32);
  Store(header.offset, out.data() + 40);
  Store(header.bytes, out.data() + 48);
  return out;
}

Result<FrameHeader> DecodeFrameHeader(std::span<const std::byte> bytes) {
  if (bytes.size() != kFrameHeaderBytes) {
    return InvalidArgument("transport frame: header of " + std::to_string(bytes.size()) + " bytes, expected " +
                           std::to_string(kFrameHeaderBytes));
  }
  if (Load<std::uint32_t>(bytes.data()) != kMagic) return InvalidArgument("transport frame: wrong magic or version");
  const auto kind = static_cast<std::uint8_t>(bytes[4]);
  if (kind < static_cast<std::uint8_t>(FrameKind::kHello) || kind > static_cast<std::uint8_t>(FrameKind::kBye)) {
    return InvalidArgument("transport frame: unknown kind " + std::to_string(kind));
  }
  const auto from_connector = static_cast<std::uint8_t>(bytes[5]);
  if (from_connector > 1) return InvalidArgument("transport frame: direction " + std::to_string(from_connector));
  FrameHeader header;
  header.kind = static_cast<FrameKind>(kind);
  header.from_connector = from_connector == 1;
  header.type = Load<std::uint16_t>(bytes.data() + 6);
  header.connection = Load<std::uint64_t>(bytes.data() + 8);
  header.sequence = Load<std::uint64_t>(bytes.data() + 16);
  header.tag.lease_id = Load<std::uint64_t>(bytes.data() + 24);
  header.tag.generation = Load<std::uint64_t>(bytes.data() + 32);
  header.offset = Load<std::uint64_t>(bytes.data() + 40);
  header.bytes = Load<std::uint64_t>(bytes.data() + 48);
  return header;
}

std::vector<std::byte> EncodeHello(const HelloBody& hello) {
  std::vector<std::byte> out;
  AppendSized(hello.name, out);
  AppendSized(hello.address.bytes, out);
  return out;
}

Result<HelloBody> DecodeHello(std::span<const std::byte> bytes) {
  HelloBody hello;
  ZEROC_ASSIGN_OR_RETURN(hello.name, TakeSized(bytes, kPeerNameBytesMax, "name"));
  ZEROC_ASSIGN_OR_RETURN(hello.address.bytes, TakeSized(bytes, kPeerAddressBytesMax, "address"));
  if (hello.address.bytes.empty()) return InvalidArgument("transport hello: address: empty");
  if (!bytes.empty()) return InvalidArgument("transport hello: " + std::to_string(bytes.size()) + " bytes too many");
  // The name goes into logs and error messages, so control characters of a foreign name are made harmless.
  for (char& c : hello.name) {
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) c = '?';
  }
  return hello;
}

std::vector<std::byte> EncodeAcks(std::span<const AckEntry> acks) {
  ZEROC_CHECK(acks.size() <= kAckEntriesMax, acks.size());
  std::vector<std::byte> out(acks.size() * kAckEntryBytes);
  std::byte* at = out.data();
  for (const AckEntry& ack : acks) {
    Store(ack.sequence, at);
    at[8] = static_cast<std::byte>(ack.verdict);
    at += kAckEntryBytes;
  }
  return out;
}

Result<std::vector<AckEntry>> DecodeAcks(std::span<const std::byte> bytes) {
  if (bytes.empty() || bytes.size() % kAckEntryBytes != 0 || bytes.size() > kAckEntriesMax * kAckEntryBytes) {
    return InvalidArgument("transport ack: " + std::to_string(bytes.size()) + " bytes are no list of entries");
  }
  std::vector<AckEntry> acks;
  acks.reserve(bytes.size() / kAckEntryBytes);
  for (std::size_t at = 0; at < bytes.size(); at += kAckEntryBytes) {
    const auto verdict = static_cast<std::uint8_t>(bytes[at + 8]);
    if (verdict > static_cast<std::uint8_t>(PieceVerdict::kFailed)) {
      return InvalidArgument("transport ack: unknown verdict " + std::to_string(verdict));
    }
    acks.push_back({Load<std::uint64_t>(bytes.data() + at), static_cast<PieceVerdict>(verdict)});
  }
  return acks;
}

}  // namespace zeroc
