#include "libzeroc/kv/sequence_kv.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "libzeroc/base/check.h"

namespace zeroc {
namespace {

using kernels::kBlockTokens;
using kernels::kTileLanes;

int BlocksFor(int n_tokens) { return (n_tokens + kBlockTokens - 1) / kBlockTokens; }

// Exact blocks that may be live at once: everything from the first block that a step's first query sees exact to the
// block of the step's last token.
int ExactSlots(const KvFormat& format, int max_tokens, int step_tokens_max) {
  const int all = BlocksFor(max_tokens);
  if (!format.packs) return all;
  // Live exact tokens start at a block border, at most recent + 63 tokens before the step's first token.
  return std::min(all, BlocksFor(format.recent_tokens + kBlockTokens - 1 + step_tokens_max));
}

}  // namespace

std::uint64_t SequenceKv::BytesNeeded(const KvFormat& format, int max_tokens, int step_tokens_max) {
  const std::uint64_t n_packed = static_cast<std::uint64_t>(format.PackedBlocksAt(max_tokens));
  const std::uint64_t n_exact = static_cast<std::uint64_t>(ExactSlots(format, max_tokens, step_tokens_max));
  std::uint64_t bytes = 0;
  for (int layer = 0; layer < format.n_layers; ++layer) {
    bytes += n_exact * static_cast<std::uint64_t>(format.exact.block_bytes);
    if (n_packed == 0) continue;
    bytes += n_packed * static_cast<std::uint64_t>(format.packed[layer].block_bytes);
    if (format.sink_tokens > 0) bytes += static_cast<std::uint64_t>(format.sink.block_bytes);
  }
  return bytes;
}

Result<std::unique_ptr<SequenceKv>> SequenceKv::Create(BlockPool& pool, std::shared_ptr<const KvFormat> format,
                                                       int max_tokens, int step_tokens_max) {
  if (max_tokens < 1 || step_tokens_max < 1) {
    return InvalidArgument("sequence: max_tokens " + std::to_string(max_tokens) + " and step_tokens_max " +
                           std::to_string(step_tokens_max) + " must be at least 1");
  }
  std::unique_ptr<SequenceKv> kv(new SequenceKv(pool, std::move(format), max_tokens, step_tokens_max));
  ZEROC_RETURN_IF_ERROR(kv->TakeBlocks().WithContext("KV for " + std::to_string(max_tokens) + " tokens"));
  return kv;
}

SequenceKv::SequenceKv(BlockPool& pool, std::shared_ptr<const KvFormat> format, int max_tokens, int step_tokens_max)
    : pool_(pool),
      format_(std::move(format)),
      max_tokens_(max_tokens),
      step_tokens_max_(step_tokens_max),
      layers_(static_cast<std::size_t>(format_->n_layers)) {}

SequenceKv::~SequenceKv() {
  for (const Layer& layer : layers_) {
    for (const BlockRef ref : layer.packed) pool_.Release(ref);
    for (const BlockRef ref : layer.exact) pool_.Release(ref);
    if (layer.sink.valid()) pool_.Release(layer.sink);
  }
}

Status SequenceKv::TakeBlocks() {
  const auto n_packed = static_cast<std::size_t>(format_->PackedBlocksAt(max_tokens_));
  const auto n_exact = static_cast<std::size_t>(ExactSlots(*format_, max_tokens_, step_tokens_max_));
  for (std::size_t l = 0; l < layers_.size(); ++l) {
    Layer& layer = layers_[l];
    ZEROC_RETURN_IF_ERROR(pool_.Allocate(static_cast<std::size_t>(format_->exact.block_bytes), n_exact, &layer.exact));
    layer.exact_window.reserve(n_exact);
    if (n_packed == 0) continue;
    ZEROC_RETURN_IF_ERROR(
        pool_.Allocate(static_cast<std::size_t>(format_->packed[l].block_bytes), n_packed, &layer.packed));
    for (const BlockRef ref : layer.packed) layer.packed_data.push_back(Data(ref));
    if (format_->sink_tokens == 0) continue;
    std::vector<BlockRef> sink;
    ZEROC_RETURN_IF_ERROR(pool_.Allocate(static_cast<std::size_t>(format_->sink.block_bytes), 1, &sink));
    layer.sink = sink[0];
    layer.sink_data = Data(layer.sink);
  }
  return OkStatus();
}

void SequenceKv::BeginStep(int n_new) {
  ZEROC_CHECK(!in_step() && n_new >= 1 && n_new <= step_tokens_max_ && n_tokens_ + n_new <= max_tokens_, n_new,
              n_tokens_, max_tokens_, step_tokens_max_);
  step_tokens_ = n_new;
  pack_end_ = format_->PackedBlocksAt(n_tokens_ + n_new);
  const int exact_end = BlocksFor(n_tokens_ + n_new);
  for (Layer& layer : layers_) {
    const auto n_slots = static_cast<int>(layer.exact.size());
    ZEROC_CHECK(exact_end - exact_begin_ <= n_slots, exact_begin_, exact_end, n_slots);
    layer.exact_window.clear();
    for (int b = exact_begin_; b < exact_end; ++b) {
      layer.exact_window.push_back(Data(layer.exact[static_cast<std::size_t>(b % n_slots)]));
    }
  }
}

std::uint8_t* const* SequenceKv::WriteBlocks(int layer) const {
  return layers_[static_cast<std::size_t>(layer)].exact_window.data() + (n_tokens_ / kBlockTokens - exact_begin_);
}

const std::uint8_t* SequenceKv::ExactBlock(int layer, int block_idx) const {
  return layers_[static_cast<std::size_t>(layer)].exact_window[static_cast<std::size_t>(block_idx - exact_begin_)];
}

std::uint8_t* SequenceKv::PackedBlock(int layer, int block_idx) const {
  return layers_[static_cast<std::size_t>(layer)].packed_data[static_cast<std::size_t>(block_idx)];
}

void SequenceKv::CopySink(int layer) {
  if (format_->sink_tokens == 0) return;
  const kernels::KvBlockLayout& exact = format_->exact;
  const kernels::KvBlockLayout& sink = format_->sink;
  const std::uint8_t* from = ExactBlock(layer, 0);
  std::uint8_t* to = layers_[static_cast<std::size_t>(layer)].sink_data;
  const auto tile_bytes = static_cast<std::size_t>(kernels::TileBytes(exact.k.runs[0].bits));
  const auto coord_tiles = static_cast<std::size_t>(exact.head_dim / kTileLanes);
  const std::size_t token_groups = kBlockTokens / kTileLanes;
  for (int g = 0; g < exact.n_kv_heads; ++g) {
    const std::uint8_t* head_from = from + static_cast<std::size_t>(g) * static_cast<std::size_t>(exact.head_bytes);
    std::uint8_t* head_to = to + static_cast<std::size_t>(g) * static_cast<std::size_t>(sink.head_bytes);
    // K tiles of the first token group come first; of V, every coordinate tile's first token group.
    std::memcpy(head_to + sink.k.codes_offset[0], head_from + exact.k.codes_offset[0], coord_tiles * tile_bytes);
    for (std::size_t c = 0; c < coord_tiles; ++c) {
      std::memcpy(head_to + sink.v.codes_offset[0] + c * tile_bytes,
                  head_from + exact.v.codes_offset[0] + c * token_groups * tile_bytes, tile_bytes);
    }
  }
}

int SequenceKv::Segments(int layer, int first_pos, int last_pos, kernels::KvSegment out[3]) const {
  const Layer& l = layers_[static_cast<std::size_t>(layer)];
  const int n_packed = format_->PackedBlocksAt(first_pos);
  ZEROC_CHECK(n_packed == format_->PackedBlocksAt(last_pos) && n_packed <= pack_end_ && n_packed >= exact_begin_,
              first_pos, last_pos, n_packed, pack_end_, exact_begin_);
  int n = 0;
  const int exact_first_pos = n_packed * kBlockTokens;
  if (n_packed > 0) {
    if (format_->sink_tokens > 0) {
      out[n++] = {&l.sink_data, 1, &format_->sink, 0, 0, format_->sink_tokens};
    }
    out[n++] = {l.packed_data.data(), n_packed,       &format_->packed[static_cast<std::size_t>(layer)], 0,
                format_->sink_tokens, exact_first_pos};
  }
  out[n++] = {l.exact_window.data() + (n_packed - exact_begin_),
              BlocksFor(last_pos + 1) - n_packed,
              &format_->exact,
              exact_first_pos,
              exact_first_pos,
              last_pos + 1};
  return n;
}

void SequenceKv::EndStep() {
  ZEROC_CHECK(in_step());
  n_tokens_ += step_tokens_;
  step_tokens_ = 0;
  n_packed_ = pack_end_;
  exact_begin_ = n_packed_;
}

LayerBlocks SequenceKv::BlocksAt(int layer, int n_tokens) const {
  const Layer& l = layers_[static_cast<std::size_t>(layer)];
  const int n_packed = format_->PackedBlocksAt(n_tokens);
  const auto n_slots = static_cast<int>(l.exact.size());
  LayerBlocks blocks;
  blocks.packed.assign(l.packed.begin(), l.packed.begin() + n_packed);
  if (n_packed > 0) blocks.sink = l.sink;
  for (int b = n_packed; b < BlocksFor(n_tokens); ++b) {
    blocks.exact.push_back(l.exact[static_cast<std::size_t>(b % n_slots)]);
  }
  return blocks;
}

void SequenceKv::AdoptPrompt(int n_tokens) {
  ZEROC_CHECK(n_tokens_ == 0 && !in_step() && n_tokens >= 1 && n_tokens <= max_tokens_, n_tokens, n_tokens_,
              max_tokens_);
  n_tokens_ = n_tokens;
  n_packed_ = exact_begin_ = pack_end_ = format_->PackedBlocksAt(n_tokens);
}

std::uint64_t SequenceKv::HeldBytes() const {
  const auto n_packed = static_cast<std::uint64_t>(n_packed_);
  const auto n_exact = static_cast<std::uint64_t>(BlocksFor(n_tokens_) - exact_begin_);
  std::uint64_t bytes = 0;
  for (std::size_t l = 0; l < layers_.size(); ++l) {
    bytes += n_exact * static_cast<std::uint64_t>(format_->exact.block_bytes);
    if (n_packed == 0) continue;
    bytes += n_packed * static_cast<std::uint64_t>(format_->packed[l].block_bytes);
    if (format_->sink_tokens > 0) bytes += static_cast<std::uint64_t>(format_->sink.block_bytes);
  }
  return bytes;
}

}  // namespace zeroc
