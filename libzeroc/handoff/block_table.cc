#include "libzeroc/handoff/block_table.h"

#include <algorithm>
#include <utility>

#include "libzeroc/base/check.h"
#include "libzeroc/handoff/byte_codec.h"

namespace zeroc {
namespace {

constexpr std::uint32_t kMagic = 0x54424b5a;  // "ZKBT"
constexpr std::uint16_t kVersion = 3;         // 2: offsets in units of 16 bytes, not 64; 3: blocks present at decode
constexpr std::size_t kNameBytesMax = 128;
constexpr std::uint32_t kPromptTokensMax = 1u << 26;
constexpr std::uint16_t kLayersMax = 1024;
constexpr std::uint32_t kBlockBytesMax = 1u << 26;
constexpr std::size_t kLayerHeaderBytes = 14;
constexpr std::uint8_t kTiersMax = 1 + kMaxYoungTiers;

std::uint32_t BlocksFor(std::uint32_t n_tokens) {
  return (n_tokens + kernels::kBlockTokens - 1) / static_cast<std::uint32_t>(kernels::kBlockTokens);
}

Status BadField(const std::string& what) { return InvalidArgument("block table: " + what); }

bool IsBlockSize(std::uint32_t bytes) {
  return bytes > 0 && bytes % BlockRef::kUnitBytes == 0 && bytes <= kBlockBytesMax;
}

Status CheckLayer(const BlockTable::Layer& layer, std::uint32_t n_blocks, std::uint32_t n_present,
                  const std::string& where) {
  const std::size_t n_packed = layer.blocks.n_packed();
  if (n_packed + layer.blocks.exact.size() + n_present != n_blocks) {
    return BadField(where + ": " + std::to_string(n_packed) + " packed, " + std::to_string(layer.blocks.exact.size()) +
                    " exact and " + std::to_string(n_present) + " present blocks, the prompt has " +
                    std::to_string(n_blocks));
  }
  if (layer.blocks.sink.valid() && n_present > 0) return BadField(where + ": a sink beside present blocks");
  if (layer.blocks.sink.valid() && n_packed == 0) return BadField(where + ": a sink without packed blocks");
  for (const TierBlocks& tier : layer.blocks.packed) {
    if (!IsBlockSize(tier.block_bytes)) return BadField(where + ": packed block size");
  }
  if (!layer.blocks.exact.empty() && !IsBlockSize(layer.exact_bytes)) return BadField(where + ": exact block size");
  if (layer.blocks.sink.valid() && !IsBlockSize(layer.sink_bytes)) return BadField(where + ": sink block size");
  return OkStatus();
}

bool ReadUnits(ByteReader& in, std::uint32_t n, std::vector<BlockRef>* out) {
  if (!in.Holds(n, sizeof(std::uint32_t))) return false;
  out->reserve(n);
  for (std::uint32_t i = 0; i < n; ++i) out->push_back({in.Int<std::uint32_t>()});
  return std::all_of(out->begin(), out->end(), [](BlockRef ref) { return ref.valid(); });
}

Status Differs(const std::string& what, const std::string& ours, const std::string& theirs) {
  return FailedPrecondition("lease: " + what + " is " + ours + " on one side and " + theirs + " on the other");
}

}  // namespace

BlockTable BlockTable::Of(const SequenceKv& kv, int n_prompt_tokens, std::string model_fingerprint, std::string plan_id,
                          int n_present) {
  const KvFormat& format = kv.format();
  ZEROC_CHECK(n_present >= 0 && n_present <= format.LastingBlocksAt(n_prompt_tokens) &&
                  n_present * kernels::kBlockTokens < n_prompt_tokens,
              n_present, n_prompt_tokens);
  BlockTable table;
  table.n_present_ = n_present;
  table.identity_ = {std::move(model_fingerprint), std::move(plan_id), format.profile, format.layout_hash};
  table.n_prompt_tokens_ = n_prompt_tokens;
  for (int l = 0; l < format.n_layers; ++l) {
    Layer layer;
    layer.blocks = kv.BlocksAt(l, n_prompt_tokens);
    const bool has_sink = format.sink_tokens > 0 && layer.blocks.sink.valid();
    if (has_sink) layer.sink_bytes = static_cast<std::uint32_t>(format.sink.block_bytes);
    if (!has_sink || n_present > 0) layer.blocks.sink = BlockRef{};
    std::vector<BlockRef>& lasting = format.packs ? layer.blocks.packed[0].refs : layer.blocks.exact;
    lasting.erase(lasting.begin(), lasting.begin() + n_present);
    layer.exact_bytes = static_cast<std::uint32_t>(format.exact.block_bytes);
    table.layers_.push_back(std::move(layer));
  }
  table.Count();
  return table;
}

void BlockTable::Count() {
  n_blocks_ = 0;
  n_bytes_ = 0;
  n_present_bytes_ = 0;
  const auto n_present = static_cast<std::uint64_t>(n_present_);
  for (Layer& layer : layers_) {
    layer.first_block = n_blocks_;
    n_blocks_ += static_cast<std::uint32_t>(layer.blocks.n_packed() + layer.blocks.exact.size());
    for (const TierBlocks& tier : layer.blocks.packed) n_bytes_ += tier.refs.size() * std::uint64_t{tier.block_bytes};
    n_bytes_ += layer.blocks.exact.size() * std::uint64_t{layer.exact_bytes};
    const std::uint64_t lasting_bytes =
        layer.blocks.packed.empty() ? layer.exact_bytes : layer.blocks.packed[0].block_bytes;
    if (n_present > 0) n_present_bytes_ += n_present * lasting_bytes + layer.sink_bytes;
    if (layer.blocks.sink.valid()) {
      ++n_blocks_;
      n_bytes_ += layer.sink_bytes;
    }
  }
}

std::string BlockTable::Serialise() const {
  ByteWriter out;
  out.Int(kMagic);
  out.Int(kVersion);
  out.Text(identity_.model_fingerprint);
  out.Text(identity_.plan_id);
  out.Text(identity_.profile);
  out.Int(identity_.layout_hash);
  out.Int(prompt_hash_);
  out.Int(static_cast<std::uint32_t>(n_prompt_tokens_));
  out.Int(static_cast<std::uint32_t>(n_present_));
  out.Int(static_cast<std::uint16_t>(layers_.size()));
  for (const Layer& layer : layers_) {
    out.Int(layer.sink_bytes);
    out.Int(layer.exact_bytes);
    out.Int(static_cast<std::uint32_t>(layer.blocks.exact.size()));
    out.Int(static_cast<std::uint8_t>(layer.blocks.sink.valid() ? 1 : 0));
    out.Int(static_cast<std::uint8_t>(layer.blocks.packed.size()));
    for (const TierBlocks& tier : layer.blocks.packed) {
      out.Int(tier.block_bytes);
      out.Int(static_cast<std::uint32_t>(tier.refs.size()));
      for (const BlockRef ref : tier.refs) out.Int(ref.unit);
    }
    if (layer.blocks.sink.valid()) out.Int(layer.blocks.sink.unit);
    for (const BlockRef ref : layer.blocks.exact) out.Int(ref.unit);
  }
  return out.Take();
}

Result<BlockTable> BlockTable::Parse(std::span<const std::byte> bytes) {
  ByteReader in(bytes);
  if (in.Int<std::uint32_t>() != kMagic) return BadField("not a block table");
  if (const auto version = in.Int<std::uint16_t>(); version != kVersion) {
    return BadField("version " + std::to_string(version) + ", this worker reads " + std::to_string(kVersion));
  }
  BlockTable table;
  table.identity_.model_fingerprint = in.Text(kNameBytesMax);
  table.identity_.plan_id = in.Text(kNameBytesMax);
  table.identity_.profile = in.Text(kNameBytesMax);
  table.identity_.layout_hash = in.Int<std::uint64_t>();
  table.prompt_hash_ = in.Int<std::uint64_t>();
  const auto n_prompt_tokens = in.Int<std::uint32_t>();
  const auto n_present = in.Int<std::uint32_t>();
  const auto n_layers = in.Int<std::uint16_t>();
  if (in.failed()) return BadField("truncated header");
  if (n_prompt_tokens == 0 || n_prompt_tokens > kPromptTokensMax) return BadField("n_prompt_tokens out of range");
  if (n_present >= BlocksFor(n_prompt_tokens)) return BadField("n_present out of range");
  if (n_layers == 0 || n_layers > kLayersMax) return BadField("n_layers out of range");
  if (!in.Holds(n_layers, kLayerHeaderBytes)) return BadField("truncated");
  table.n_prompt_tokens_ = static_cast<int>(n_prompt_tokens);
  table.n_present_ = static_cast<int>(n_present);
  table.layers_.resize(n_layers);
  std::uint64_t n_blocks = 0;
  for (std::uint16_t l = 0; l < n_layers; ++l) {
    const std::string where = "layer " + std::to_string(l);
    Layer& layer = table.layers_[l];
    layer.sink_bytes = in.Int<std::uint32_t>();
    layer.exact_bytes = in.Int<std::uint32_t>();
    const auto n_exact = in.Int<std::uint32_t>();
    const auto has_sink = in.Int<std::uint8_t>();
    const auto n_tiers = in.Int<std::uint8_t>();
    if (has_sink > 1) return BadField(where + ": sink flag");
    if (n_tiers > kTiersMax) return BadField(where + ": more than " + std::to_string(kTiersMax) + " tiers");
    n_blocks += std::uint64_t{n_exact} + has_sink;
    bool complete = true;
    for (std::uint8_t i = 0; i < n_tiers && complete; ++i) {
      TierBlocks& tier = layer.blocks.packed.emplace_back();
      tier.block_bytes = in.Int<std::uint32_t>();
      const auto n_refs = in.Int<std::uint32_t>();
      n_blocks += n_refs;
      complete = n_blocks <= kBlocksMax && ReadUnits(in, n_refs, &tier.refs);
    }
    if (n_blocks > kBlocksMax) return BadField(where + ": more than " + std::to_string(kBlocksMax) + " blocks");
    std::vector<BlockRef> sink;
    if (!complete || !ReadUnits(in, has_sink, &sink) || !ReadUnits(in, n_exact, &layer.blocks.exact)) {
      return BadField(where + ": truncated, or a block without a place");
    }
    if (has_sink == 1) layer.blocks.sink = sink[0];
    ZEROC_RETURN_IF_ERROR(CheckLayer(layer, BlocksFor(n_prompt_tokens), n_present, where));
  }
  if (!in.AtEnd()) return BadField("trailing bytes");
  table.Count();
  return table;
}

std::vector<BlockExtent> BlockTable::Extents() const {
  std::vector<BlockExtent> extents;
  extents.reserve(n_blocks_);
  for (const Layer& layer : layers_) {
    for (const TierBlocks& tier : layer.blocks.packed) {
      for (const BlockRef ref : tier.refs) extents.push_back({ref.offset(), tier.block_bytes});
    }
    if (layer.blocks.sink.valid()) extents.push_back({layer.blocks.sink.offset(), layer.sink_bytes});
    for (const BlockRef ref : layer.blocks.exact) extents.push_back({ref.offset(), layer.exact_bytes});
  }
  return extents;
}

Status BlockTable::CheckSameShape(const BlockTable& other) const {
  const KvIdentity& a = identity_;
  const KvIdentity& b = other.identity_;
  if (a.model_fingerprint != b.model_fingerprint) return Differs("the model", a.model_fingerprint, b.model_fingerprint);
  if (a.plan_id != b.plan_id) return Differs("the plan", '"' + a.plan_id + '"', '"' + b.plan_id + '"');
  if (a.profile != b.profile) return Differs("the profile", a.profile, b.profile);
  if (a.layout_hash != b.layout_hash) {
    return Differs("the layout hash", std::to_string(a.layout_hash), std::to_string(b.layout_hash));
  }
  if (n_prompt_tokens_ != other.n_prompt_tokens_) {
    return Differs("the prompt's length", std::to_string(n_prompt_tokens_), std::to_string(other.n_prompt_tokens_));
  }
  if (n_present_ != other.n_present_) {
    return Differs("the number of present blocks", std::to_string(n_present_), std::to_string(other.n_present_));
  }
  if (n_layers() != other.n_layers()) {
    return Differs("the number of layers", std::to_string(n_layers()), std::to_string(other.n_layers()));
  }
  for (std::size_t l = 0; l < layers_.size(); ++l) {
    const Layer& x = layers_[l];
    const Layer& y = other.layers_[l];
    const auto same_tier = [](const TierBlocks& a_tier, const TierBlocks& b_tier) {
      return a_tier.block_bytes == b_tier.block_bytes && a_tier.refs.size() == b_tier.refs.size();
    };
    const auto& ours = x.blocks.packed;
    const auto& theirs = y.blocks.packed;
    if (x.sink_bytes != y.sink_bytes || x.exact_bytes != y.exact_bytes ||
        !std::equal(ours.begin(), ours.end(), theirs.begin(), theirs.end(), same_tier) ||
        x.blocks.exact.size() != y.blocks.exact.size() || x.blocks.sink.valid() != y.blocks.sink.valid()) {
      return FailedPrecondition("lease: layer " + std::to_string(l) + " has other blocks on the two sides");
    }
  }
  return OkStatus();
}

Status BlockTable::CheckPlaces(std::uint64_t arena_bytes) const {
  std::vector<BlockExtent> extents = Extents();
  std::sort(extents.begin(), extents.end(),
            [](const BlockExtent& a, const BlockExtent& b) { return a.offset < b.offset; });
  std::uint64_t end = 0;
  for (const BlockExtent& extent : extents) {
    if (extent.offset + extent.bytes > arena_bytes) {
      return Status(StatusCode::kOutOfRange, "block table: a block ends at byte " +
                                                 std::to_string(extent.offset + extent.bytes) + " of an arena of " +
                                                 std::to_string(arena_bytes));
    }
    if (extent.offset < end) return BadField("two blocks overlap at byte " + std::to_string(extent.offset));
    end = extent.offset + extent.bytes;
  }
  return OkStatus();
}

}  // namespace zeroc
