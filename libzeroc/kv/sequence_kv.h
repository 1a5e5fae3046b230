// The KV cache of one sequence: which block holds which 64 tokens, exact or packed, in every layer.
//
// One rule decides what a query sees (docs/kv_format.md): at position t the blocks b < PackedBlocksAt(t) are attended
// packed, later ones exact, and the first sink_tokens always exact. Results therefore depend neither on the chunk size
// nor on who computed which chunk. A block is packed once, from the bf16 values that the exact block holds, and its
// exact copy is recycled as soon as no later query may see it, so exact bytes are bounded by the window plus one chunk.
//
// All blocks are taken at Create (admission is decided there, nothing fails later) and returned by the destructor.
// Not thread-safe; the pool and this object belong to one step loop. Between BeginStep and EndStep, threads of the
// forward pass may read the tables and write the blocks of their own layer and head.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "kernels/kv_block.h"
#include "kernels/ops.h"
#include "libzeroc/base/status.h"
#include "libzeroc/kv/block_pool.h"
#include "libzeroc/kv/kv_format.h"

namespace zeroc {

// Blocks of one layer, in token order; empty refs where a kind is absent.
struct LayerBlocks {
  std::vector<BlockRef> packed;  // logical blocks 0 .. n - 1
  BlockRef sink;                 // held when something is packed and the profile has sinks
  std::vector<BlockRef> exact;   // logical blocks PackedBlocksAt(n_tokens) ..
};

class SequenceKv {
 public:
  // Room for max_tokens tokens, written in steps of at most step_tokens_max. kResourceExhausted when the pool is full,
  // kInvalidArgument for sizes below 1. The pool must outlive the object.
  static Result<std::unique_ptr<SequenceKv>> Create(BlockPool& pool, std::shared_ptr<const KvFormat> format,
                                                    int max_tokens, int step_tokens_max);

  // Bytes that Create would take, for admission messages and tests.
  static std::uint64_t BytesNeeded(const KvFormat& format, int max_tokens, int step_tokens_max);

  ~SequenceKv();
  SequenceKv(const SequenceKv&) = delete;
  SequenceKv& operator=(const SequenceKv&) = delete;

  const KvFormat& format() const { return *format_; }
  int n_tokens() const { return n_tokens_; }
  int max_tokens() const { return max_tokens_; }
  bool in_step() const { return step_tokens_ > 0; }

  // --- one step of the forward pass over tokens [n_tokens, n_tokens + n_new) ---

  // n_new in [1, step_tokens_max] and within max_tokens; anything else is a bug.
  void BeginStep(int n_new);

  // Logical blocks that this step packs, after its keys and values are written: [pack_begin, pack_end).
  int pack_begin() const { return n_packed_; }
  int pack_end() const { return pack_end_; }

  // Exact blocks from the one that holds the step's first token, for KvWriteArgs::blocks.
  std::uint8_t* const* WriteBlocks(int layer) const;

  // The exact and packed copy of a logical block in [pack_begin, pack_end).
  const std::uint8_t* ExactBlock(int layer, int block_idx) const;
  std::uint8_t* PackedBlock(int layer, int block_idx) const;

  // Copies the sink tokens out of exact block 0; call for every layer when pack_begin() == 0 < pack_end().
  void CopySink(int layer);

  // What the queries at first_pos .. last_pos see, last_pos included: 1 to 3 segments. All of them must share one
  // value of PackedBlocksAt. Returns the number of segments written.
  int Segments(int layer, int first_pos, int last_pos, kernels::KvSegment out[3]) const;

  // Takes the step's tokens into the sequence and recycles exact blocks that left every later window.
  void EndStep();

  // --- hand-off ---

  // Blocks that hold the first n_tokens tokens, as a decode worker needs them for its first query at position n_tokens.
  // On the sender n_tokens() == n_tokens; on the receiver the sequence is empty and the blocks are where the wire
  // writes.
  LayerBlocks BlocksAt(int layer, int n_tokens) const;

  // The receiver's commit: the wire has filled BlocksAt(., n_tokens). The sequence was empty.
  void AdoptPrompt(int n_tokens);

  // Bytes of the blocks that hold tokens now: packed, exact window (whole blocks) and sink. All layers.
  std::uint64_t HeldBytes() const;

  const BlockPool& pool() const { return pool_; }

 private:
  struct Layer {
    std::vector<BlockRef> packed;  // by logical block
    std::vector<BlockRef> exact;   // ring: logical block b lives in slot b % exact.size()
    BlockRef sink;
    std::vector<std::uint8_t*> packed_data;
    std::vector<std::uint8_t*> exact_window;  // logical blocks exact_begin_ .., for this step
    std::uint8_t* sink_data = nullptr;
  };

  SequenceKv(BlockPool& pool, std::shared_ptr<const KvFormat> format, int max_tokens, int step_tokens_max);
  Status TakeBlocks();
  std::uint8_t* Data(BlockRef ref) const { return reinterpret_cast<std::uint8_t*>(pool_.Data(ref)); }

  BlockPool& pool_;
  std::shared_ptr<const KvFormat> format_;
  int max_tokens_;
  int step_tokens_max_;
  std::vector<Layer> layers_;
  int n_tokens_ = 0;
  int n_packed_ = 0;     // logical blocks packed so far
  int exact_begin_ = 0;  // first logical block whose exact copy is live
  int step_tokens_ = 0;  // 0: between steps
  int pack_end_ = 0;
};

}  // namespace zeroc
