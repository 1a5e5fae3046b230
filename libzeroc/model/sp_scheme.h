// The ways in which the ranks of a group exchange what attention needs, and what each costs in bytes
// (docs/sequence_parallel.md). Values and pure functions; any thread.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "libzeroc/base/status.h"
#include "libzeroc/kv/kv_format.h"

namespace zeroc {

enum class SpScheme : std::uint8_t {
  kAuto,       // of kAllGather and kUlysses the one that sends less
  kAllGather,  // every rank sends its packed blocks to every other
  kRing,       // the same bytes, handed on from rank to rank
  kUlysses,    // every rank attends to the lasting blocks for some of the heads: queries and outputs travel too
  kUlysses8,   // the same with queries and outputs in 8 bits: not exact
};

std::string_view SpSchemeName(SpScheme scheme);            // "allgather"
Result<SpScheme> SpSchemeFromName(std::string_view name);  // kInvalidArgument, naming those that there are

// Query heads [first, first + n) of a KV head's group.
struct HeadShare {
  int kv_head, first, n;
};
// The heads of one rank in kUlysses: whole groups, or, with more ranks than KV heads, a part of one (or nothing).
std::vector<HeadShare> HeadsOf(int rank, int n_ranks, int n_heads, int n_kv_heads);

// Bytes of one row of one query head on the wire: a query, or an output with the logarithm of its softmax sum.
std::int64_t QueryRowBytes(SpScheme scheme, int head_dim, int act_bytes);
std::int64_t OutputRowBytes(SpScheme scheme, int head_dim, int act_bytes);

// Bytes that a rank sends for a prompt, all layers.
struct SpBytes {
  double blocks = 0;   // lasting form
  double windows = 0;  // exact and young blocks before each chunk, and the sinks
  double queries = 0;
  double outputs = 0;
  double total() const { return blocks + windows + queries + outputs; }
};

// The mean over the ranks, by formula: with B the lasting bytes of a token (all layers), N tokens, P ranks, H query
// heads and G KV heads
//   allgather, ring  (P - 1) N / P B
//   ulysses          (P - 1) / P N / P [H (query + output), in all layers, + max(G, P) / G B]
// and, where something is packed, for each of the 2 P - 2 borders between two ranks' chunks the exact window and the
// young tiers, sent once, and the sinks from the owner of the prompt's first block to the others. act_bytes: of an
// activation on the wire, 2 or 4. all_logits: of every token; else, as for a prompt that is served, the last layer has
// no queries but the last token's, and next to the others moves none.
SpBytes PredictSpBytes(SpScheme scheme, const KvFormat& format, int n_heads, int n_tokens, int n_ranks, int act_bytes,
                       bool all_logits);

// For a prompt that is served. Anything but kAuto stays as it is.
SpScheme ResolveSpScheme(SpScheme scheme, const KvFormat& format, int n_heads, int n_tokens, int n_ranks,
                         int act_bytes);

}  // namespace zeroc
