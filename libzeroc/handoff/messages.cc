#include "libzeroc/handoff/messages.h"

#include <string_view>

#include "libzeroc/handoff/byte_codec.h"

namespace zeroc {
namespace {

constexpr std::uint8_t kVersion = 1;
constexpr std::uint16_t kPartsMax = 1024;

void PutStatus(ByteWriter& out, const Status& status) {
  out.Int(static_cast<std::uint8_t>(status.code()));
  out.Text(status.message().substr(0, kStatusTextMax));
}

// A code outside gRPC's range fails the reader's caller through *bad.
Status GetStatus(ByteReader& in, bool* bad) {
  const auto code = in.Int<std::uint8_t>();
  std::string text = in.Text(kStatusTextMax);
  *bad = code > static_cast<std::uint8_t>(StatusCode::kUnauthenticated);
  if (*bad || code == 0) return OkStatus();
  return Status(static_cast<StatusCode>(code), std::move(text));
}

void Put(ByteWriter& out, const AttachMessage& m) {
  out.Int(m.n_ranks);
  out.Int(static_cast<std::uint8_t>(m.delivery));
  out.Int(m.n_prompt_tokens);
  out.Int(m.layout_hash);
}
void Put(ByteWriter& out, const AttachAckMessage& m) { PutStatus(out, m.status); }
void Put(ByteWriter& out, const CommitMessage& m) {
  out.Int(m.part);
  out.Int(m.n_parts);
  out.Int(static_cast<std::uint8_t>(m.has_first_token ? 1 : 0));
  if (m.has_first_token) {
    out.Int(m.first_token.id);
    out.Float(m.first_token.logprob);
    out.Int(m.first_token.seed);
    out.Int(m.first_token.position);
    out.Int(static_cast<std::uint8_t>(m.first_token.top.size()));
    for (const auto& [id, logprob] : m.first_token.top) {
      out.Int(id);
      out.Float(logprob);
    }
  }
  out.Int(static_cast<std::uint32_t>(m.blocks.size()));
  for (const BlockChecksum& block : m.blocks) {
    out.Int(block.block_idx);
    out.Int(block.checksum);
  }
}
void Put(ByteWriter& out, const CommitAckMessage& m) { PutStatus(out, m.status); }
void Put(ByteWriter& out, const AbortMessage& m) { PutStatus(out, m.status); }
void Put(ByteWriter&, const ReleasedMessage&) {}
void Put(ByteWriter& out, const LeaseEndedMessage& m) {
  PutStatus(out, m.status);
  out.Int(static_cast<std::uint8_t>(m.wants_release ? 1 : 0));
}

// Each Get returns "" or the name of the field that is out of range.
const char* Get(ByteReader& in, AttachMessage* m) {
  m->n_ranks = in.Int<std::uint16_t>();
  const auto delivery = in.Int<std::uint8_t>();
  m->n_prompt_tokens = in.Int<std::uint32_t>();
  m->layout_hash = in.Int<std::uint64_t>();
  if (m->n_ranks == 0 || m->n_ranks > kRanksMax) return "n_ranks";
  if (m->rank >= m->n_ranks) return "rank";
  if (delivery > static_cast<std::uint8_t>(Delivery::kPut)) return "delivery";
  m->delivery = static_cast<Delivery>(delivery);
  return "";
}

const char* GetStatusField(ByteReader& in, Status* status, bool may_be_ok) {
  bool bad = false;
  *status = GetStatus(in, &bad);
  return bad || (status->ok() && !may_be_ok) ? "status" : "";
}
const char* Get(ByteReader& in, AttachAckMessage* m) { return GetStatusField(in, &m->status, true); }
const char* Get(ByteReader& in, CommitAckMessage* m) { return GetStatusField(in, &m->status, true); }
const char* Get(ByteReader& in, AbortMessage* m) { return GetStatusField(in, &m->status, false); }
const char* Get(ByteReader& in, LeaseEndedMessage* m) {
  if (const char* bad = GetStatusField(in, &m->status, false); *bad != '\0') return bad;
  const auto wants_release = in.Int<std::uint8_t>();
  m->wants_release = wants_release == 1;
  return wants_release > 1 ? "release flag" : "";
}
const char* Get(ByteReader&, ReleasedMessage*) { return ""; }

const char* GetFirstToken(ByteReader& in, FirstToken* token) {
  token->id = in.Int<std::int32_t>();
  token->logprob = in.Float();
  token->seed = in.Int<std::uint64_t>();
  token->position = in.Int<std::uint32_t>();
  const auto n_top = in.Int<std::uint8_t>();
  if (token->id < 0) return "first token";
  if (n_top > kTopMax || !in.Holds(n_top, 8)) return "top tokens";
  for (int i = 0; i < n_top; ++i) {
    const auto id = in.Int<std::int32_t>();
    token->top.emplace_back(id, in.Float());
  }
  return "";
}

const char* Get(ByteReader& in, CommitMessage* m) {
  m->part = in.Int<std::uint16_t>();
  m->n_parts = in.Int<std::uint16_t>();
  const auto has_first_token = in.Int<std::uint8_t>();
  if (m->n_parts == 0 || m->n_parts > kPartsMax || m->part >= m->n_parts) return "part";
  if (has_first_token > 1) return "first token flag";
  m->has_first_token = has_first_token == 1;
  if (m->has_first_token) {
    if (const char* bad = GetFirstToken(in, &m->first_token); *bad != '\0') return bad;
  }
  const auto n_blocks = in.Int<std::uint32_t>();
  if (n_blocks > kCommitBlocksMax || !in.Holds(n_blocks, 12)) return "number of blocks";
  m->blocks.reserve(n_blocks);
  for (std::uint32_t i = 0; i < n_blocks; ++i) {
    const auto block_idx = in.Int<std::uint32_t>();
    m->blocks.push_back({block_idx, in.Int<std::uint64_t>()});
  }
  return "";
}

template <typename T>
Result<Message> Parse(const char* name, std::span<const std::byte> payload) {
  const std::string what = std::string("hand-off message ") + name + ": ";
  ByteReader in(payload);
  if (const auto version = in.Int<std::uint8_t>(); version != kVersion) {
    return InvalidArgument(what + "version " + std::to_string(version) + ", this worker reads " +
                           std::to_string(kVersion));
  }
  T message;
  message.lease.lease_id = in.Int<std::uint64_t>();
  message.lease.generation = in.Int<std::uint64_t>();
  message.rank = in.Int<std::uint16_t>();
  if (message.rank >= kRanksMax) return InvalidArgument(what + "rank out of range");
  const char* bad = Get(in, &message);
  if (in.failed()) return InvalidArgument(what + "truncated");
  if (*bad != '\0') return InvalidArgument(what + bad + " out of range");
  if (!in.AtEnd()) return InvalidArgument(what + "trailing bytes");
  return Message(std::move(message));
}

}  // namespace

EncodedMessage EncodeMessage(const Message& message) {
  EncodedMessage encoded;
  encoded.type = static_cast<std::uint16_t>(kFirstMessageType + message.index());
  std::visit(
      [&encoded](const auto& m) {
        ByteWriter out;
        out.Int(kVersion);
        out.Int(m.lease.lease_id);
        out.Int(m.lease.generation);
        out.Int(m.rank);
        Put(out, m);
        encoded.payload = out.Take();
      },
      message);
  return encoded;
}

Result<Message> ParseMessage(std::uint16_t type, std::span<const std::byte> payload) {
  switch (static_cast<int>(type) - static_cast<int>(kFirstMessageType)) {
    case 0:
      return Parse<AttachMessage>("Attach", payload);
    case 1:
      return Parse<AttachAckMessage>("AttachAck", payload);
    case 2:
      return Parse<CommitMessage>("Commit", payload);
    case 3:
      return Parse<CommitAckMessage>("CommitAck", payload);
    case 4:
      return Parse<AbortMessage>("Abort", payload);
    case 5:
      return Parse<ReleasedMessage>("Released", payload);
    case 6:
      return Parse<LeaseEndedMessage>("LeaseEnded", payload);
    default:
      return InvalidArgument("hand-off message: unknown type " + std::to_string(type));
  }
}

LeaseKey LeaseOf(const Message& message) {
  return std::visit([](const auto& m) { return m.lease; }, message);
}

}  // namespace zeroc
