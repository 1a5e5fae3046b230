// How the ranks of a group share one prompt (sequence parallelism, docs/sequence_parallel.md): which rank computes
// which tokens, and which blocks it must hold of the others'.
//
// Zigzag: the prompt is cut at block borders into 2 P chunks of about equal length, and rank r owns the chunks r and
// 2 P - 1 - r, so that all ranks have the same causal work. Rank 0 owns the prompt's end, always; with fewer blocks
// than chunks the prompt's beginning may be another rank's, and ranks may have nothing. Plain values, the same on every
// rank; any thread.
#pragma once

#include <vector>

#include "libzeroc/kv/kv_format.h"

namespace zeroc {

// Logical blocks [begin, end).
struct BlockRange {
  int begin = 0, end = 0;
  friend bool operator==(const BlockRange&, const BlockRange&) = default;
};

// Token positions [begin, end).
struct TokenRange {
  int begin = 0, end = 0;
  int size() const { return end - begin; }
};

class SpSplit {
 public:
  SpSplit(int n_tokens, int n_ranks);  // both at least 1

  int n_tokens() const { return n_tokens_; }
  int n_ranks() const { return n_ranks_; }
  int n_blocks() const { return n_blocks_; }

  int OwnerOf(int block_idx) const;
  // A rank's blocks: at most two ranges, in order, not empty, with others' blocks between them.
  std::vector<BlockRange> Blocks(int rank) const;
  // The same as positions.
  std::vector<TokenRange> Tokens(int rank) const;
  int CountTokens(int rank) const;

 private:
  BlockRange Chunk(int chunk_idx) const;

  int n_tokens_, n_ranks_, n_blocks_;
};

// A block in one of its forms.
struct BlockForm {
  static constexpr int kExact = -1;
  int tier = kExact;
  int block_idx = 0;
};

// Blocks that are seen in the form which they keep for good, from the start of a prompt on. Where nothing is packed
// these are all of them, a last one that is not full included.
int CountLastingBlocks(const KvFormat& format, int n_tokens);

// Blocks of rank `owner` that queries of rank `viewer` see in another form than the lasting one: what lies in the exact
// window and in young tiers of the chunks that follow. In order; empty when both are the same.
std::vector<BlockForm> WindowBlocks(const KvFormat& format, const SpSplit& split, int owner, int viewer);

// Every form in which rank `rank` holds a block: its own, in all of them, and of the others what it sees.
struct HeldForms {
  std::vector<bool> exact;               // [n_blocks]
  std::vector<std::vector<bool>> tiers;  // [n_tiers][blocks in that tier or an older one, at the prompt's end]
};
HeldForms FormsHeldBy(const KvFormat& format, const SpSplit& split, int rank);

}  // namespace zeroc
