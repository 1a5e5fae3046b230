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

// Blocks of a tier that may be live at once: those that a step's first query sees in it, and those that enter it in the
// step, which are at most BlocksFor(step) however the step lies to the borders.
int TierSlots(const KvFormat& format, int tier, int max_tokens, int step_tokens_max) {
  const int all = format.BlocksAt(tier, max_tokens);
  const int n_blocks = format.tiers[static_cast<std::size_t>(tier)].n_blocks;
  return n_blocks == 0 ? all : std::min(all, n_blocks + BlocksFor(step_tokens_max));
}

std::uint64_t BlockBytes(const kernels::KvBlockLayout& layout) {
  return static_cast<std::uint64_t>(layout.block_bytes);
}

std::size_t CountHeld(const std::vector<bool>& held) {
  return static_cast<std::size_t>(std::count(held.begin(), held.end(), true));
}

void ReleaseAll(BlockPool& pool, const std::vector<BlockRef>& refs) {
  for (const BlockRef ref : refs) {
    if (ref.valid()) pool.Release(ref);
  }
}

}  // namespace

std::size_t LayerBlocks::n_packed() const {
  std::size_t n = 0;
  for (const TierBlocks& tier : packed) n += tier.refs.size();
  return n;
}

BlockRef LayerBlocks::packed_ref(std::size_t block_idx) const {
  for (const TierBlocks& tier : packed) {
    if (block_idx < tier.refs.size()) return tier.refs[block_idx];
    block_idx -= tier.refs.size();
  }
  return {};
}

std::uint64_t SequenceKv::BytesNeeded(const KvFormat& format, int max_tokens, int step_tokens_max) {
  const auto n_exact = static_cast<std::uint64_t>(ExactSlots(format, max_tokens, step_tokens_max));
  std::uint64_t bytes = static_cast<std::uint64_t>(format.n_layers) * n_exact * BlockBytes(format.exact);
  if (format.PackedBlocksAt(max_tokens) == 0) return bytes;
  for (std::size_t tier = 0; tier < format.tiers.size(); ++tier) {
    const int n_slots = TierSlots(format, static_cast<int>(tier), max_tokens, step_tokens_max);
    for (const kernels::KvBlockLayout& layout : format.tiers[tier].layouts) {
      bytes += static_cast<std::uint64_t>(n_slots) * BlockBytes(layout);
    }
  }
  if (format.sink_tokens > 0) bytes += static_cast<std::uint64_t>(format.n_layers) * BlockBytes(format.sink);
  return bytes;
}

Result<std::unique_ptr<SequenceKv>> SequenceKv::Create(BlockPool& pool, std::shared_ptr<const KvFormat> format,
                                                       int max_tokens, int step_tokens_max) {
  return Make(pool, std::move(format), max_tokens, step_tokens_max, nullptr);
}

Result<std::unique_ptr<SequenceKv>> SequenceKv::CreateFrom(BlockPool& pool, std::shared_ptr<const KvFormat> format,
                                                           int max_tokens, int step_tokens_max,
                                                           const KvBeginning& beginning) {
  return Make(pool, std::move(format), max_tokens, step_tokens_max, &beginning);
}

Result<std::unique_ptr<SequenceKv>> SequenceKv::Make(BlockPool& pool, std::shared_ptr<const KvFormat> format,
                                                     int max_tokens, int step_tokens_max,
                                                     const KvBeginning* beginning) {
  if (max_tokens < 1 || step_tokens_max < 1) {
    return InvalidArgument("sequence: max_tokens " + std::to_string(max_tokens) + " and step_tokens_max " +
                           std::to_string(step_tokens_max) + " must be at least 1");
  }
  std::unique_ptr<SequenceKv> kv(new SequenceKv(pool, std::move(format), max_tokens, step_tokens_max));
  if (beginning != nullptr) {
    const int n_tokens = beginning->n_tokens;
    ZEROC_CHECK(beginning->layers.size() == kv->layers_.size() && n_tokens % kBlockTokens == 0 &&
                    n_tokens <= max_tokens && beginning->n_shared <= kv->format_->LastingBlocksAt(max_tokens) &&
                    (n_tokens == 0 || beginning->n_shared == kv->format_->LastingBlocksAt(n_tokens)),
                beginning->layers.size(), n_tokens, max_tokens, beginning->n_shared);
    kv->n_shared_ = beginning->n_shared;
  }
  ZEROC_RETURN_IF_ERROR(kv->TakeBlocks(beginning).WithContext("KV for " + std::to_string(max_tokens) + " tokens"));
  if (beginning != nullptr && beginning->n_tokens > 0) {
    ZEROC_RETURN_IF_ERROR(kv->CopyState(*beginning));
  }
  return kv;
}

Result<std::unique_ptr<SequenceKv>> SequenceKv::CreateShare(BlockPool& pool, std::shared_ptr<const KvFormat> format,
                                                            const SpSplit& split, int rank) {
  const int n_tokens = split.n_tokens();
  std::unique_ptr<SequenceKv> kv(new SequenceKv(pool, std::move(format), n_tokens, n_tokens));
  kv->held_ = FormsHeldBy(*kv->format_, split, rank);
  ZEROC_RETURN_IF_ERROR(kv->TakeBlocks(nullptr).WithContext("KV for rank " + std::to_string(rank) + " of " +
                                                            std::to_string(split.n_ranks()) + ", " +
                                                            std::to_string(n_tokens) + " tokens"));
  return kv;
}

SequenceKv::SequenceKv(BlockPool& pool, std::shared_ptr<const KvFormat> format, int max_tokens, int step_tokens_max)
    : pool_(pool),
      format_(std::move(format)),
      max_tokens_(max_tokens),
      step_tokens_max_(step_tokens_max),
      layers_(static_cast<std::size_t>(format_->n_layers)),
      spans_(format_->tiers.size()) {}

SequenceKv::~SequenceKv() {
  for (const Layer& layer : layers_) {
    for (const Ring& tier : layer.tiers) {
      ReleaseAll(pool_, tier.refs);
    }
    ReleaseAll(pool_, layer.exact.refs);
    if (layer.sink.valid()) pool_.Release(layer.sink);
  }
}

Status SequenceKv::TakeRing(const kernels::KvBlockLayout& layout, int n, std::span<const BlockRef> shared,
                            const std::vector<bool>* held, Ring& ring) {
  ring.window.reserve(static_cast<std::size_t>(n));
  if (held != nullptr) {
    std::vector<BlockRef> taken;
    ZEROC_RETURN_IF_ERROR(pool_.Allocate(BlockBytes(layout), CountHeld(*held), &taken));
    ring.refs.resize(static_cast<std::size_t>(n));
    for (std::size_t b = 0, next = 0; b < held->size(); ++b) {
      if ((*held)[b]) ring.refs[b] = taken[next++];
    }
    return OkStatus();
  }
  for (const BlockRef ref : shared) {
    pool_.AddUser(ref);
    ring.refs.push_back(ref);
  }
  return pool_.Allocate(static_cast<std::size_t>(layout.block_bytes), static_cast<std::size_t>(n) - shared.size(),
                        &ring.refs);
}

// Without what is shared, and without what a rank's share does not hold.
std::uint64_t SequenceKv::BytesToTake() const {
  std::uint64_t bytes = BytesNeeded(*format_, max_tokens_, step_tokens_max_);
  for (std::size_t l = 0; l < layers_.size(); ++l) {
    const auto& lasting = format_->packs ? format_->tiers.back().layouts[l] : format_->exact;
    bytes -= static_cast<std::uint64_t>(n_shared_) * BlockBytes(lasting);
    if (!held_) continue;
    bytes -= (held_->exact.size() - CountHeld(held_->exact)) * BlockBytes(format_->exact);
    for (std::size_t t = 0; t < held_->tiers.size(); ++t) {
      bytes -= (held_->tiers[t].size() - CountHeld(held_->tiers[t])) * BlockBytes(format_->tiers[t].layouts[l]);
    }
  }
  return bytes;
}

Status SequenceKv::TakeBlocks(const KvBeginning* beginning) {
  // What could not fit is refused before the pool gives up kept blocks for a part of it.
  const BlockPool::Usage usage = pool_.usage();
  const std::uint64_t needed = BytesToTake();
  if (needed > usage.bytes_total - usage.bytes_used) {
    return ResourceExhausted(std::to_string(needed) + " bytes asked, " +
                             std::to_string(usage.bytes_total - usage.bytes_used) + " free");
  }
  const bool will_pack = format_->PackedBlocksAt(max_tokens_) > 0;
  for (std::size_t l = 0; l < layers_.size(); ++l) {
    Layer& layer = layers_[l];
    const LayerBlocks* from = beginning == nullptr ? nullptr : &beginning->layers[l];
    const auto shared = [&](const std::vector<BlockRef>& refs) {
      return std::span(refs).first(static_cast<std::size_t>(n_shared_));
    };
    std::span<const BlockRef> lasting;
    if (n_shared_ > 0) lasting = shared(format_->packs ? from->packed[0].refs : from->exact);
    layer.tiers.resize(format_->tiers.size());
    ZEROC_RETURN_IF_ERROR(TakeRing(format_->exact, ExactSlots(*format_, max_tokens_, step_tokens_max_),
                                   format_->packs ? std::span<const BlockRef>() : lasting,
                                   held_ ? &held_->exact : nullptr, layer.exact));
    if (!will_pack) continue;
    for (int tier = 0; tier < n_tiers(); ++tier) {
      ZEROC_RETURN_IF_ERROR(TakeRing(format_->tiers[static_cast<std::size_t>(tier)].layouts[l],
                                     TierSlots(*format_, tier, max_tokens_, step_tokens_max_),
                                     tier + 1 == n_tiers() ? lasting : std::span<const BlockRef>(),
                                     held_ ? &held_->tiers[static_cast<std::size_t>(tier)] : nullptr,
                                     layer.tiers[static_cast<std::size_t>(tier)]));
    }
    if (format_->sink_tokens == 0) continue;
    if (from != nullptr && from->sink.valid()) {
      pool_.AddUser(from->sink);
      layer.sink = from->sink;
    } else {
      std::vector<BlockRef> sink;
      ZEROC_RETURN_IF_ERROR(pool_.Allocate(static_cast<std::size_t>(format_->sink.block_bytes), 1, &sink));
      layer.sink = sink[0];
    }
    layer.sink_data = Data(layer.sink);
  }
  return OkStatus();
}

// The blocks that steps to come will overwrite, as copies.
Status SequenceKv::CopyState(const KvBeginning& beginning) {
  const int n_tokens = beginning.n_tokens;
  std::vector<KvCopy> copies;
  const auto copy = [&](std::span<const BlockRef> sources, std::span<const BlockRef> targets, std::size_t bytes) {
    ZEROC_CHECK(sources.size() == targets.size(), sources.size(), targets.size());
    for (std::size_t i = 0; i < sources.size(); ++i) {
      copies.push_back({pool_.Data(targets[i]), pool_.Data(sources[i]), bytes});
    }
  };
  for (std::size_t l = 0; l < layers_.size(); ++l) {
    const LayerBlocks& from = beginning.layers[l];
    const LayerBlocks to = BlocksAt(static_cast<int>(l), n_tokens);
    for (std::size_t i = 1; i < to.packed.size(); ++i) {
      copy(from.packed[i].refs, to.packed[i].refs, to.packed[i].block_bytes);
    }
    if (format_->packs) copy(from.exact, to.exact, static_cast<std::size_t>(format_->exact.block_bytes));
  }
  ZEROC_RETURN_IF_ERROR(pool_.memory().Copy(copies));
  SetSpans(n_tokens);
  last_step_begin_ = n_tokens;
  return OkStatus();
}

Status SequenceKv::Unshare() {
  ZEROC_CHECK(n_tokens_ == 0 && !in_step(), n_tokens_);
  const auto n = static_cast<std::size_t>(n_shared_);
  const bool has_sinks = n_shared_ > 0 && layers_[0].sink.valid();
  std::vector<BlockRef> fresh;  // of every layer: the blocks, then the sink
  Status status;
  for (std::size_t l = 0; l < layers_.size() && status.ok(); ++l) {
    status = pool_.Allocate(BlockBytes(format_->packs ? format_->tiers.back().layouts[l] : format_->exact), n, &fresh);
    if (has_sinks && status.ok()) status = pool_.Allocate(BlockBytes(format_->sink), 1, &fresh);
  }
  if (!status.ok()) {
    for (const BlockRef ref : fresh) pool_.Release(ref);
    return status.WithContext("KV of its own for " + std::to_string(n_shared_ * kBlockTokens) + " shared tokens");
  }
  auto next = fresh.begin();
  for (Layer& layer : layers_) {
    Ring& lasting = format_->packs ? layer.tiers.back() : layer.exact;
    for (std::size_t i = 0; i < n; ++i) std::swap(lasting.refs[i], *next++);
    if (!has_sinks) continue;
    std::swap(layer.sink, *next++);
    layer.sink_data = Data(layer.sink);
  }
  for (const BlockRef ref : fresh) pool_.Release(ref);  // what was shared
  n_shared_ = 0;
  return OkStatus();
}

BlockRef SequenceKv::LastingBlock(int layer, int block_idx) const {
  ZEROC_CHECK(block_idx >= 0 && block_idx < std::max(n_shared_, format_->LastingBlocksAt(n_tokens_)), block_idx,
              n_shared_, n_tokens_);
  const Layer& l = layers_[static_cast<std::size_t>(layer)];
  return format_->packs ? l.tiers.back().At(block_idx) : l.exact.At(block_idx);
}

void SequenceKv::FillWindow(int begin, int end, Ring& ring) const {
  ZEROC_CHECK(end - begin <= static_cast<int>(ring.refs.size()), begin, end, ring.refs.size());
  // Only the oldest tier's window grows without end, and its blocks never move: append what is new.
  if (ring.window_begin != begin || static_cast<int>(ring.window.size()) > end - begin) ring.window.clear();
  ring.window_begin = begin;
  for (int b = begin + static_cast<int>(ring.window.size()); b < end; ++b) {
    const BlockRef ref = ring.At(b);
    ring.window.push_back(ref.valid() ? Data(ref) : nullptr);
  }
}

void SequenceKv::BeginStep(int n_new) {
  ZEROC_CHECK(!in_step() && n_new >= 1 && n_new <= step_tokens_max_ && n_tokens_ + n_new <= max_tokens_, n_new,
              n_tokens_, max_tokens_, step_tokens_max_);
  step_tokens_ = n_new;
  for (int tier = 0; tier < n_tiers(); ++tier) {
    spans_[static_cast<std::size_t>(tier)].step_end = format_->BlocksAt(tier, n_tokens_ + n_new);
  }
  // What this step writes lies behind what is shared.
  ZEROC_CHECK(n_shared_ <= (format_->packs ? spans_.back().end : n_tokens_ / kBlockTokens), n_shared_, n_tokens_);
  for (Layer& layer : layers_) {
    FillWindow(exact_begin_, BlocksFor(n_tokens_ + n_new), layer.exact);
    for (std::size_t tier = 0; tier < spans_.size(); ++tier) {
      FillWindow(spans_[tier].begin, spans_[tier].step_end, layer.tiers[tier]);
    }
  }
}

std::uint8_t* const* SequenceKv::WriteBlocks(int layer) const {
  return layers_[static_cast<std::size_t>(layer)].exact.window.data() + (n_tokens_ / kBlockTokens - exact_begin_);
}

const std::uint8_t* SequenceKv::PackSource(int layer, int tier, int block_idx) const {
  const Layer& l = layers_[static_cast<std::size_t>(layer)];
  const Ring& from = tier == 0 ? l.exact : l.tiers[static_cast<std::size_t>(tier) - 1];
  return from.window[static_cast<std::size_t>(block_idx - from.window_begin)];
}

const kernels::KvBlockLayout& SequenceKv::SourceLayout(int layer, int tier) const {
  return FormLayout(layer, tier - 1);
}

std::uint8_t* SequenceKv::PackedBlock(int layer, int tier, int block_idx) const {
  const Ring& to = layers_[static_cast<std::size_t>(layer)].tiers[static_cast<std::size_t>(tier)];
  return to.window[static_cast<std::size_t>(block_idx - to.window_begin)];
}

std::uint8_t* SequenceKv::FormData(int layer, const BlockForm& form) const {
  const Layer& l = layers_[static_cast<std::size_t>(layer)];
  const Ring& ring = form.tier == BlockForm::kExact ? l.exact : l.tiers[static_cast<std::size_t>(form.tier)];
  std::uint8_t* data = ring.window[static_cast<std::size_t>(form.block_idx - ring.window_begin)];
  ZEROC_CHECK(is_share() && data != nullptr, form.tier, form.block_idx);
  return data;
}

const kernels::KvBlockLayout& SequenceKv::FormLayout(int layer, int tier) const {
  if (tier == BlockForm::kExact) return format_->exact;
  return format_->tiers[static_cast<std::size_t>(tier)].layouts[static_cast<std::size_t>(layer)];
}

void SequenceKv::CopySink(int layer) {
  if (format_->sink_tokens == 0) return;
  const kernels::KvBlockLayout& exact = format_->exact;
  const kernels::KvBlockLayout& sink = format_->sink;
  const std::uint8_t* from = PackSource(layer, 0, 0);
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

int SequenceKv::Segments(int layer, int first_pos, int last_pos, kernels::KvSegment out[KvFormat::kMaxSegments]) const {
  const Layer& l = layers_[static_cast<std::size_t>(layer)];
  const int first_packed = format_->PackedBlocksAt(first_pos);
  const int last_packed = format_->PackedBlocksAt(last_pos);
  ZEROC_CHECK(first_packed >= exact_begin_ && first_packed <= last_packed, first_pos, last_pos, exact_begin_);
  int n = 0;
  if (last_packed > 0 && format_->sink_tokens > 0) {
    // The sink stands in for the first tokens of block 0 while that is seen packed.
    out[n] = {&l.sink_data, 1, &format_->sink, 0, 0, format_->sink_tokens};
    out[n++].min_age = format_->MinAge(0) + kBlockTokens - format_->sink_tokens;
  }
  for (int tier = n_tiers() - 1; tier >= 0; --tier) {
    const bool is_oldest = tier + 1 == n_tiers();
    const int begin = is_oldest ? 0 : format_->BlocksAt(tier + 1, first_pos);
    const int end = format_->BlocksAt(tier, last_pos);
    if (begin >= end) continue;
    const Ring& ring = l.tiers[static_cast<std::size_t>(tier)];
    ZEROC_CHECK(begin >= ring.window_begin && end <= ring.window_begin + static_cast<int>(ring.window.size()), begin,
                end, ring.window_begin, ring.window.size());
    const KvTier& format = format_->tiers[static_cast<std::size_t>(tier)];
    const std::vector<float>& mass = format.mass[static_cast<std::size_t>(layer)];
    const int first = begin * kBlockTokens;
    out[n] = {ring.window.data() + (begin - ring.window_begin),
              end - begin,
              &format.layouts[static_cast<std::size_t>(layer)],
              first,
              std::max(first, format_->sink_tokens),
              end * kBlockTokens};
    out[n].min_age = format_->MinAge(tier);
    if (!is_oldest) out[n].max_age = format_->MinAge(tier + 1) - 1;
    out[n++].mass = mass.empty() ? nullptr : mass.data();
  }
  const int exact_first_pos = first_packed * kBlockTokens;
  out[n] = {l.exact.window.data() + (first_packed - exact_begin_),
            BlocksFor(last_pos + 1) - first_packed,
            &format_->exact,
            exact_first_pos,
            exact_first_pos,
            last_pos + 1};
  if (format_->packs) out[n].max_age = format_->MinAge(0) - 1;
  return n + 1;
}

// What is live when the next query stands at n_tokens.
void SequenceKv::SetSpans(int n_tokens) {
  n_tokens_ = n_tokens;
  exact_begin_ = format_->PackedBlocksAt(n_tokens);
  for (int tier = 0; tier < n_tiers(); ++tier) {
    const int end = format_->BlocksAt(tier, n_tokens);
    spans_[static_cast<std::size_t>(tier)] = {tier + 1 < n_tiers() ? format_->BlocksAt(tier + 1, n_tokens) : 0, end,
                                              end};
  }
}

void SequenceKv::EndStep() {
  ZEROC_CHECK(in_step());
  last_step_begin_ = n_tokens_;
  SetSpans(n_tokens_ + step_tokens_);
  step_tokens_ = 0;
}

LayerBlocks SequenceKv::BlocksAt(int layer, int n_tokens) const {
  const Layer& l = layers_[static_cast<std::size_t>(layer)];
  LayerBlocks blocks;
  for (int tier = n_tiers() - 1; tier >= 0; --tier) {
    TierBlocks& group = blocks.packed.emplace_back();
    group.block_bytes = static_cast<std::uint32_t>(
        format_->tiers[static_cast<std::size_t>(tier)].layouts[static_cast<std::size_t>(layer)].block_bytes);
    const int begin = tier + 1 < n_tiers() ? format_->BlocksAt(tier + 1, n_tokens) : 0;
    for (int b = begin; b < format_->BlocksAt(tier, n_tokens); ++b) {
      group.refs.push_back(l.tiers[static_cast<std::size_t>(tier)].At(b));
    }
  }
  if (blocks.n_packed() > 0) blocks.sink = l.sink;
  for (int b = format_->PackedBlocksAt(n_tokens); b < BlocksFor(n_tokens); ++b) blocks.exact.push_back(l.exact.At(b));
  return blocks;
}

void SequenceKv::AdoptPrompt(int n_tokens) {
  ZEROC_CHECK(n_tokens_ == 0 && !in_step() && n_tokens >= 1 && n_tokens <= max_tokens_ &&
                  n_shared_ <= format_->LastingBlocksAt(n_tokens),
              n_tokens, n_tokens_, max_tokens_, n_shared_);
  SetSpans(n_tokens);
  last_step_begin_ = n_tokens;
}

Status SequenceKv::Resize(int max_tokens, int step_tokens_max) {
  ZEROC_CHECK(!in_step() && !is_share() && max_tokens >= max_tokens_ && step_tokens_max >= 1, max_tokens, max_tokens_,
              step_tokens_max);
  const bool needs_sink = format_->sink_tokens > 0 && format_->PackedBlocksAt(max_tokens) > 0;
  struct Change {
    Ring* ring;
    std::size_t n_slots;
    int live_begin, live_end;
    std::vector<BlockRef> fresh;
  };
  std::vector<Change> changes;
  std::vector<BlockRef> sinks;
  // Everything that is missing first, so that a refusal changes nothing.
  Status status;
  const auto take = [&](const kernels::KvBlockLayout& layout, int n_slots, int live_begin, int live_end, Ring& ring) {
    Change& change = changes.emplace_back(Change{&ring, static_cast<std::size_t>(n_slots), live_begin, live_end});
    const std::size_t n_have = ring.refs.size();
    if (!status.ok() || change.n_slots <= n_have) return;
    status = pool_.Allocate(static_cast<std::size_t>(layout.block_bytes), change.n_slots - n_have, &change.fresh);
  };
  for (std::size_t l = 0; l < layers_.size(); ++l) {
    take(format_->exact, ExactSlots(*format_, max_tokens, step_tokens_max), exact_begin_, BlocksFor(n_tokens_),
         layers_[l].exact);
    for (int tier = 0; tier < n_tiers(); ++tier) {
      const auto t = static_cast<std::size_t>(tier);
      take(format_->tiers[t].layouts[l], TierSlots(*format_, tier, max_tokens, step_tokens_max), spans_[t].begin,
           spans_[t].end, layers_[l].tiers[t]);
    }
    if (!needs_sink || layers_[l].sink.valid() || !status.ok()) continue;
    status = pool_.Allocate(static_cast<std::size_t>(format_->sink.block_bytes), 1, &sinks);
  }
  if (!status.ok()) {
    for (const Change& change : changes) {
      for (const BlockRef ref : change.fresh) pool_.Release(ref);
    }
    for (const BlockRef ref : sinks) pool_.Release(ref);
    return status.WithContext("KV for " + std::to_string(max_tokens) + " tokens");
  }
  last_step_begin_ = n_tokens_;  // blocks that no later query sees lose their places
  for (Change& change : changes) {
    Reshape(*change.ring, change.n_slots, change.live_begin, change.live_end, std::move(change.fresh));
  }
  std::size_t n_sinks = 0;
  for (Layer& layer : layers_) {
    if (!needs_sink || layer.sink.valid()) continue;
    layer.sink = sinks[n_sinks++];
    layer.sink_data = Data(layer.sink);
  }
  max_tokens_ = max_tokens;
  step_tokens_max_ = step_tokens_max;
  return OkStatus();
}

// Slots of live blocks move with their blocks; the others stay where they are, as far as they fit.
void SequenceKv::Reshape(Ring& ring, std::size_t n_slots, int live_begin, int live_end, std::vector<BlockRef> spare) {
  ZEROC_CHECK(live_end - live_begin <= static_cast<int>(n_slots), live_begin, live_end, n_slots);
  if (n_slots == ring.refs.size()) return;
  std::vector<BlockRef> refs(n_slots);
  std::vector<bool> moved(ring.refs.size());
  for (int b = live_begin; b < live_end; ++b) {
    refs[static_cast<std::size_t>(b) % n_slots] = ring.At(b);
    moved[static_cast<std::size_t>(b) % ring.refs.size()] = true;
  }
  std::vector<BlockRef> homeless;
  for (std::size_t slot = 0; slot < ring.refs.size(); ++slot) {
    if (moved[slot]) continue;
    if (slot < n_slots && !refs[slot].valid()) {
      refs[slot] = ring.refs[slot];
    } else {
      homeless.push_back(ring.refs[slot]);
    }
  }
  homeless.insert(homeless.end(), spare.begin(), spare.end());
  std::size_t next = 0;
  for (BlockRef& ref : refs) {
    if (!ref.valid()) ref = homeless[next++];
  }
  for (; next < homeless.size(); ++next) pool_.Release(homeless[next]);
  ring.refs = std::move(refs);
  ring.window.reserve(n_slots);
}

std::uint64_t SequenceKv::HeldBytes() const {
  std::uint64_t bytes = 0;
  for (std::size_t l = 0; l < layers_.size(); ++l) {
    bytes += static_cast<std::uint64_t>(BlocksFor(n_tokens_) - exact_begin_) * BlockBytes(format_->exact);
    for (std::size_t tier = 0; tier < spans_.size(); ++tier) {
      bytes += static_cast<std::uint64_t>(spans_[tier].end - spans_[tier].begin) *
               BlockBytes(format_->tiers[tier].layouts[l]);
    }
    if (exact_begin_ > 0 && format_->sink_tokens > 0) bytes += BlockBytes(format_->sink);
  }
  return bytes;
}

}  // namespace zeroc
