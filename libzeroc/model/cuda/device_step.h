// What changes from step to step: token ids, the tables by which kernels find KV blocks, and how attention is cut into
// work. Made on the host from the sequences' block tables, taken to the device in two copies at the start of a step, so
// that afterwards nothing but launches is left to do.
//
// One stream, one thread. Nothing of the last step may be under way when the next one is made.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/cuda/attention_tiles.h"
#include "kernels/cuda/cuda_ops.h"
#include "kernels/kv_block.h"
#include "libzeroc/checkpoint/model_config.h"
#include "libzeroc/kv/sequence_kv.h"
#include "libzeroc/model/cuda/device_memory.h"
#include "libzeroc/model/cuda/device_weights.h"

namespace zeroc {

// One sequence's new tokens. A rank of a group has up to two of these for one sequence, its ranges of the prompt, with
// others' tokens between them.
struct StepSequence {
  SequenceKv* kv;  // in a step
  const DeviceFormat* format;
  std::span<const std::int32_t> tokens;
  int first_pos;  // of the first of them
  int n_logits;   // of the last of them
  bool of_group = false;

  int n_tokens() const { return static_cast<int>(tokens.size()); }
  int end_pos() const { return first_pos + n_tokens(); }
};

// Rows of activations: sequence i owns rows [begin[i], begin[i + 1]), for the last of its new tokens.
struct StepRows {
  std::vector<std::int64_t> begin = {0};
  std::int64_t count() const { return begin.back(); }
  std::int64_t count(std::size_t i) const { return begin[i + 1] - begin[i]; }
  bool operator==(const StepRows&) const = default;
};

class DeviceStep {
 public:
  // Blocks that new tokens are written to, of all sequences of one format.
  struct Write {
    const DeviceFormat* format;
    const kernels::cuda::KvWriteBlock* blocks;
    int n_blocks;
    bool packs;  // some of them in the same pass
    bool operator==(const Write&) const = default;
  };
  // Queries of all sequences of one format; the same for all layers with these rows.
  struct Prepare {
    const DeviceFormat* format;
    const kernels::cuda::QueryPrepTile* tiles;
    int n_tiles;
    bool operator==(const Prepare&) const = default;
  };
  // Blocks that enter a tier, of all sequences that agree in the layouts. In the order in which they must run.
  struct Pack {
    const std::uint8_t* const* sources;
    std::uint8_t* const* packed;
    int n_blocks;
    const kernels::KvBlockLayout* source_layout;
    const kernels::KvBlockLayout* packed_layout;
    bool operator==(const Pack&) const = default;
  };
  // One launch: sequences of few rows, or of many.
  struct Attention {
    bool decode;
    std::vector<kernels::KvBlockLayout> layouts;
    const kernels::cuda::DeviceQueryTile* tiles;
    int n_tiles;
    const kernels::cuda::DeviceSegment* segments;
    const kernels::cuda::DeviceItem* items;  // decode, as the next two
    const std::int32_t* first_item;
    bool operator==(const Attention&) const = default;
  };
  struct Layer {
    std::vector<Write> writes;
    std::vector<Pack> packs;
    std::vector<Attention> attention;
    bool operator==(const Layer&) const = default;
  };
  // All that launches are told: equal steps are the same launches, on what the tables then hold.
  struct Launches {
    StepRows rows, logit_rows;                // of all new tokens, of those with logits
    const std::int32_t* ids = nullptr;        // [rows]
    const std::int32_t* positions = nullptr;  // [rows], into the table of learned positions
    std::vector<Prepare> prepares[2];         // with queries of all rows, of those with logits
    std::vector<Layer> layers;
    bool operator==(const Launches&) const = default;
  };

  // Of layers [layer_begin, layer_end); with short_last, the last of them has queries of the logits' rows alone.
  // Enqueues the copies. kResourceExhausted when the device has no memory for the tables.
  Status Make(const ModelConfig& config, std::span<const StepSequence> sequences, int layer_begin, int layer_end,
              bool short_last, kernels::cuda::Stream stream);

  const Launches& launches() const { return launches_; }
  // One token of each sequence, all with logits, and no block that comes of age.
  bool IsPlainDecode() const;
  const StepRows& rows() const { return launches_.rows; }
  const StepRows& logit_rows() const { return launches_.logit_rows; }
  const Layer& layer(int layer) const { return launches_.layers[static_cast<std::size_t>(layer - layer_begin_)]; }
  int n_thread_blocks() const { return n_thread_blocks_; }  // of decode attention
  int n_parts_max() const { return n_parts_max_; }          // of any launch of it

 private:
  // As offsets into the tables, before these have their places.
  struct PackOffsets {
    std::size_t sources = 0, packed = 0;
  };
  struct Seen {  // one sequence's segments in one layer
    std::vector<kernels::KvSegment> segments;
    std::vector<std::size_t> blocks;  // offsets of theirs
  };
  struct LayerOffsets {
    std::vector<std::size_t> writes;
    std::vector<PackOffsets> packs;
    std::vector<Seen> seen;  // [sequences], empty without queries
  };
  struct AttentionOffsets {
    std::size_t tiles = 0, segments = 0, items = 0, first_item = 0;
  };

  void AddWrites(int layer, std::span<const StepSequence> sequences, LayerOffsets* offsets, Layer* out);
  std::vector<std::size_t> AddPrepares(const ModelConfig& config, std::span<const StepSequence> sequences,
                                       const StepRows& queries, std::vector<Prepare>* out);
  void AddPacks(int layer, std::span<const StepSequence> sequences, LayerOffsets* offsets, Layer* out);
  void AddSegments(int layer, std::span<const StepSequence> sequences, const StepRows& queries, LayerOffsets* offsets);
  void PlaceBlocks(const LayerOffsets& offsets, Layer* out);
  void AddAttention(const ModelConfig& config, std::span<const StepSequence> sequences, const StepRows& queries,
                    const LayerOffsets& offsets, Layer* out, std::vector<AttentionOffsets>* places);

  int layer_begin_ = 0;
  Launches launches_;
  int n_thread_blocks_ = 0;
  int n_parts_max_ = 0;
  DeviceTables blocks_;     // ids and block tables
  DeviceTables attention_;  // refers to blocks_
};

}  // namespace zeroc
