// One lease of a LeaseTable, and what both of its source files use. Private to handoff.
#pragma once

#include <string>
#include <vector>

#include "libzeroc/handoff/lease_table.h"

namespace zeroc {

struct LeaseTable::Lease {
  LeaseKey key;
  LeaseState state = LeaseState::kReserved;
  int n_prompt_tokens = 0;
  std::uint64_t layout_hash = 0;
  std::vector<BlockExtent> blocks;       // by block index
  std::vector<BlockExtent> regions;      // the same bytes, sorted and merged: where a write may go
  std::vector<std::uint64_t> checksums;  // by block index, once named
  std::vector<bool> named;
  std::uint32_t n_named = 0;

  std::uint16_t n_ranks = 0;  // 0 until the first Attach
  std::vector<Writer> writers;
  int pieces_in_flight = 0;
  bool has_first_token = false;
  FirstToken first_token;
  TransferFacts facts;

  std::int64_t created_ns = 0;
  std::int64_t last_sign_ns = 0;    // of life from a writer
  std::int64_t last_resend_ns = 0;  // of LeaseEnded
  bool owner_released = false;      // while verifying
  Status end_status;                // OK while it may still end well
};

inline std::string LeaseName(const LeaseKey& key) { return "lease " + std::to_string(key.lease_id); }

inline void SendToWriter(PeerId peer, const Message& message, LeaseActions* out) {
  out->push_back(SendMessage{peer, EncodeMessage(message)});
}

}  // namespace zeroc
