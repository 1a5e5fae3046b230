// The KV cache of one sequence: which block holds which 64 tokens, exact or packed, in every layer.
//
// One rule decides what a query sees (docs/kv_format.md): a block's age. The youngest blocks are exact, older ones sit
// in the format's packed tiers, each coarser than the one before, and the first sink_tokens stay exact always. Results
// therefore depend neither on the chunk size nor on who computed which chunk. A block enters a tier once, from the
// bytes of the tier before it, and its younger copy is recycled as soon as no later query may see it, so the young
// bytes are bounded by the windows plus one chunk.
//
// Blocks are taken at Create and Resize (admission is decided there; a step never fails) and returned by the
// destructor, or by a Resize to shorter steps. The first blocks may be shared with others (KvBeginning): those that
// have their lasting form are never written again.
// Not thread-safe; the pool and this object belong to one step loop. Between BeginStep and EndStep, threads of the
// forward pass may read the tables and write the blocks of their own layer and head.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "kernels/kv_block.h"
#include "kernels/ops.h"
#include "libzeroc/base/status.h"
#include "libzeroc/kv/block_pool.h"
#include "libzeroc/kv/kv_format.h"
#include "libzeroc/kv/sp_split.h"

namespace zeroc {

// Blocks side by side in token order, all of one tier.
struct TierBlocks {
  std::uint32_t block_bytes = 0;
  std::vector<BlockRef> refs;
};

// Blocks of one layer, in token order: the tiers from the oldest to the youngest, then the exact blocks.
struct LayerBlocks {
  std::vector<TierBlocks> packed;  // [n_tiers]
  BlockRef sink;                   // held when something is packed and the profile has sinks
  std::vector<BlockRef> exact;

  std::size_t n_packed() const;
  // The packed block of the sequence's 64 tokens from 64 * block_idx on; block_idx < n_packed().
  BlockRef packed_ref(std::size_t block_idx) const;
};

// The beginning of a sequence that somebody has computed before: blocks to share, and perhaps the state behind them.
struct KvBeginning {
  int n_shared = 0;  // logical blocks [0, n_shared) in their lasting form (KvFormat::LastingBlocksAt)
  // 0: the shared blocks alone. Else a multiple of 64, n_shared == LastingBlocksAt(n_tokens), and layers hold all that
  // the query at n_tokens sees.
  int n_tokens = 0;
  std::vector<LayerBlocks> layers;  // [n_layers], as BlocksAt gives them
};

class SequenceKv {
 public:
  // Room for max_tokens tokens, written in steps of at most step_tokens_max. kResourceExhausted when the pool is full,
  // kInvalidArgument for sizes below 1. The pool must outlive the object.
  static Result<std::unique_ptr<SequenceKv>> Create(BlockPool& pool, std::shared_ptr<const KvFormat> format,
                                                    int max_tokens, int step_tokens_max);

  // The same, begun elsewhere: n_tokens() is beginning.n_tokens. The shared blocks get one user more, young and exact
  // ones are copied. The caller holds all of them meanwhile.
  static Result<std::unique_ptr<SequenceKv>> CreateFrom(BlockPool& pool, std::shared_ptr<const KvFormat> format,
                                                        int max_tokens, int step_tokens_max,
                                                        const KvBeginning& beginning);

  // One rank's part of a prompt that a group shares: room for the whole of it, written in one step, but only for the
  // blocks and forms that the rank holds (FormsHeldBy). It owns and writes some of them, the others are received
  // (FormData) before they are attended to. Such a sequence ends with its step: nothing may be decoded from it.
  static Result<std::unique_ptr<SequenceKv>> CreateShare(BlockPool& pool, std::shared_ptr<const KvFormat> format,
                                                         const SpSplit& split, int rank);

  // Bytes that Create would take, for admission messages and tests.
  static std::uint64_t BytesNeeded(const KvFormat& format, int max_tokens, int step_tokens_max);

  ~SequenceKv();
  SequenceKv(const SequenceKv&) = delete;
  SequenceKv& operator=(const SequenceKv&) = delete;

  const KvFormat& format() const { return *format_; }
  const std::shared_ptr<const KvFormat>& shared_format() const { return format_; }
  int n_tokens() const { return n_tokens_; }
  int max_tokens() const { return max_tokens_; }
  int step_tokens_max() const { return step_tokens_max_; }
  bool in_step() const { return step_tokens_ > 0; }
  int n_shared_blocks() const { return n_shared_; }  // of every layer, from the first; nobody may write them
  // Takes blocks of its own in place of the shared ones, for who will compute them anew. The sequence is empty.
  // kResourceExhausted changes nothing.
  Status Unshare();

  // --- one step of the forward pass over tokens [n_tokens, n_tokens + n_new) ---

  // n_new in [1, step_tokens_max] and within max_tokens; anything else is a bug.
  void BeginStep(int n_new);

  // Logical blocks that enter `tier` in this step, once their keys and values are written: [pack_begin, pack_end).
  // A block may enter several tiers in one step, in order.
  int pack_begin(int tier) const { return spans_[static_cast<std::size_t>(tier)].end; }
  int pack_end(int tier) const { return spans_[static_cast<std::size_t>(tier)].step_end; }

  // Exact blocks from the one that holds the step's first token, for KvWriteArgs::blocks.
  std::uint8_t* const* WriteBlocks(int layer) const;

  // A block that enters `tier` is packed from PackSource into PackedBlock.
  const std::uint8_t* PackSource(int layer, int tier, int block_idx) const;
  const kernels::KvBlockLayout& SourceLayout(int layer, int tier) const;
  std::uint8_t* PackedBlock(int layer, int tier, int block_idx) const;

  // Whether the sink tokens have to be taken out of exact block 0 in this step, for every layer: into SinkData.
  bool takes_sink() const { return format_->sink_tokens > 0 && n_tiers() > 0 && pack_begin(0) == 0 && pack_end(0) > 0; }
  // That, in host memory.
  void CopySink(int layer);

  std::uint8_t* SinkData(int layer) const { return layers_[static_cast<std::size_t>(layer)].sink_data; }

  // What the queries at first_pos .. last_pos see, last_pos included. The segments' ages say which query sees which
  // block in which tier. Returns the number of segments written.
  int Segments(int layer, int first_pos, int last_pos, kernels::KvSegment out[KvFormat::kMaxSegments]) const;

  // --- a rank's share ---

  bool is_share() const { return held_.has_value(); }
  // A block in a form that the rank holds, in a step. Owned ones are there when the layer has been written.
  std::uint8_t* FormData(int layer, const BlockForm& form) const;
  const kernels::KvBlockLayout& FormLayout(int layer, int tier) const;

  // Takes the step's tokens into the sequence and recycles the copies that left every later window.
  void EndStep();

  // --- hand-off ---

  // Blocks that hold the first n_tokens tokens, as a decode worker needs them for its first query at position n_tokens.
  // On the sender n_tokens() == n_tokens; on the receiver the sequence is empty and the blocks are where the wire
  // writes.
  LayerBlocks BlocksAt(int layer, int n_tokens) const;

  // Makes room for max_tokens tokens (not fewer than before) in steps of at most step_tokens_max. kResourceExhausted
  // leaves everything as it was. Between steps. Every block that holds tokens keeps its place, and with the same
  // step_tokens_max so does every block of BlocksAt where a wire may be writing.
  Status Resize(int max_tokens, int step_tokens_max);

  // The receiver's commit: the wire has filled BlocksAt(., n_tokens). The sequence was empty.
  void AdoptPrompt(int n_tokens);

  // Block block_idx in its lasting form; below LastingBlocksAt(n_tokens()), or n_shared_blocks().
  BlockRef LastingBlock(int layer, int block_idx) const;
  BlockRef SinkBlock(int layer) const { return layers_[static_cast<std::size_t>(layer)].sink; }  // perhaps none

  // Whether all that the query at n_tokens sees is still there: BlocksAt(., n_tokens) is the state at n_tokens. After a
  // step it is there for every position from the step's first one on, until something else happens to the sequence.
  bool HoldsStateAt(int n_tokens) const {
    return !in_step() && n_tokens > 0 && n_tokens >= last_step_begin_ && n_tokens <= n_tokens_;
  }

  // Bytes of the blocks that hold tokens now: packed, exact window (whole blocks) and sink. All layers.
  std::uint64_t HeldBytes() const;

  const BlockPool& pool() const { return pool_; }
  BlockPool& pool() { return pool_; }

 private:
  // A ring of blocks: logical block b lives in slot b % refs.size().
  struct Ring {
    std::vector<BlockRef> refs;         // not valid where a share does not hold the block
    std::vector<std::uint8_t*> window;  // logical blocks of this step's span, for the kernels
    int window_begin = 0;
    BlockRef At(int block_idx) const { return refs[static_cast<std::size_t>(block_idx) % refs.size()]; }
  };
  struct Layer {
    std::vector<Ring> tiers;  // [n_tiers]
    Ring exact;
    BlockRef sink;
    std::uint8_t* sink_data = nullptr;
  };
  // Which logical blocks are live in one tier: [begin, end), and up to step_end once the step has packed.
  struct Span {
    int begin = 0, end = 0, step_end = 0;
  };

  SequenceKv(BlockPool& pool, std::shared_ptr<const KvFormat> format, int max_tokens, int step_tokens_max);
  static Result<std::unique_ptr<SequenceKv>> Make(BlockPool& pool, std::shared_ptr<const KvFormat> format,
                                                  int max_tokens, int step_tokens_max, const KvBeginning* beginning);
  Status TakeBlocks(const KvBeginning* beginning);
  Status TakeRing(const kernels::KvBlockLayout& layout, int n, std::span<const BlockRef> shared,
                  const std::vector<bool>* held, Ring& ring);
  std::uint64_t BytesToTake() const;
  Status CopyState(const KvBeginning& beginning);
  void Reshape(Ring& ring, std::size_t n_slots, int live_begin, int live_end, std::vector<BlockRef> spare);
  void FillWindow(int begin, int end, Ring& ring) const;
  void SetSpans(int n_tokens);
  int n_tiers() const { return static_cast<int>(format_->tiers.size()); }
  std::uint8_t* Data(BlockRef ref) const { return reinterpret_cast<std::uint8_t*>(pool_.Data(ref)); }

  BlockPool& pool_;
  std::shared_ptr<const KvFormat> format_;
  int max_tokens_;
  int step_tokens_max_;
  int n_shared_ = 0;
  std::optional<HeldForms> held_;  // of a rank's share; else all
  std::vector<Layer> layers_;
  int n_tokens_ = 0;
  std::vector<Span> spans_;  // [n_tiers]
  int exact_begin_ = 0;      // first logical block whose exact copy is live
  int step_tokens_ = 0;      // 0: between steps
  int last_step_begin_ = 0;
};

}  // namespace zeroc
