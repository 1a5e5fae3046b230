// Where the KV of one prompt lies in an arena: the serialised layout of a lease, which decode makes and prefill writes
// to.
//
// Both sides derive the same list of blocks from the same SequenceKv rule, so a block is named by its index in the list
// alone: layer by layer, packed blocks in token order (the oldest tier first), then the sink block where there is one,
// then the exact tail. Blocks that decode holds already (the beginning of the prompt, in its prefix cache) are not in
// the list at all: they have no index, no place that a writer could learn, and no checksum.
// Plain values. Byte format: docs/handoff.md; the bytes are foreign and bounded by what they hold.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "libzeroc/base/status.h"
#include "libzeroc/kv/sequence_kv.h"

namespace zeroc {

// Two workers may exchange KV blocks exactly when these agree.
struct KvIdentity {
  std::string model_fingerprint;
  std::string plan_id;  // empty: no plan
  std::string profile;
  std::uint64_t layout_hash = 0;
  friend bool operator==(const KvIdentity&, const KvIdentity&) = default;
};

// One block: bytes [offset, offset + bytes) of an arena.
struct BlockExtent {
  std::uint64_t offset = 0;
  std::uint64_t bytes = 0;
  friend bool operator==(const BlockExtent&, const BlockExtent&) = default;
};

class BlockTable {
 public:
  struct Layer {
    std::uint32_t sink_bytes = 0;  // bytes of the block; packed ones state theirs by tier
    std::uint32_t exact_bytes = 0;
    LayerBlocks blocks;
    std::uint32_t first_block = 0;  // index of the layer's first block in the whole list
  };

  static constexpr std::uint32_t kBlocksMax =
      1u << 20;  // 4 MiB of units; 128k tokens of an 80-layer model are 160k blocks

  // The blocks of the first n_prompt_tokens tokens of kv, without the first n_present lasting blocks of every layer;
  // if there are any, without the sink too. n_present is below the number of the prompt's blocks.
  static BlockTable Of(const SequenceKv& kv, int n_prompt_tokens, std::string model_fingerprint, std::string plan_id,
                       int n_present = 0);

  // kInvalidArgument naming the field: unknown version, sizes that do not fit together, trailing bytes.
  static Result<BlockTable> Parse(std::span<const std::byte> bytes);
  std::string Serialise() const;

  const KvIdentity& identity() const { return identity_; }
  int n_prompt_tokens() const { return n_prompt_tokens_; }
  int n_layers() const { return static_cast<int>(layers_.size()); }
  const Layer& layer(int layer_idx) const { return layers_[static_cast<std::size_t>(layer_idx)]; }

  int n_present() const { return n_present_; }  // blocks of every layer
  int n_present_tokens() const { return n_present_ * kernels::kBlockTokens; }

  std::uint64_t n_present_bytes() const { return n_present_bytes_; }  // of all layers, their sinks included

  // PromptHash of the tokens that decode keeps the blocks under; 0: it keeps none. Prefill compares its own.
  std::uint64_t prompt_hash() const { return prompt_hash_; }
  void set_prompt_hash(std::uint64_t hash) { prompt_hash_ = hash; }

  // Of what is listed, and so written.
  std::uint32_t n_blocks() const { return n_blocks_; }
  std::uint64_t n_bytes() const { return n_bytes_; }

  // Every block, by index. O(n_blocks).
  std::vector<BlockExtent> Extents() const;

  // kFailedPrecondition naming the first difference: another model, plan, profile or layout, or another number or size
  // of blocks. The places may differ.
  Status CheckSameShape(const BlockTable& other) const;

  // kOutOfRange if a block does not lie within [0, arena_bytes), kInvalidArgument if two blocks overlap.
  Status CheckPlaces(std::uint64_t arena_bytes) const;

 private:
  void Count();

  KvIdentity identity_;
  int n_prompt_tokens_ = 0;
  int n_present_ = 0;
  std::vector<Layer> layers_;
  std::uint32_t n_blocks_ = 0;
  std::uint64_t n_bytes_ = 0;
  std::uint64_t n_present_bytes_ = 0;
  std::uint64_t prompt_hash_ = 0;
};

}  // namespace zeroc
