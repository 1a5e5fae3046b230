#include "libzeroc/model/cuda/device_step.h"

#include <algorithm>
#include <numeric>

#include "libzeroc/base/check.h"
#include "libzeroc/model/transformer_weights.h"

namespace zeroc {

namespace cuda = kernels::cuda;
using kernels::kBlockTokens;
using kernels::KvBlockLayout;
using kernels::KvSegment;

namespace {

// Thread blocks of decode attention that a processor holds at once (its shared memory decides; a guess until measured).
constexpr int kThreadBlocksPerProcessor = 3;

int CountTiers(const StepSequence& sequence) { return static_cast<int>(sequence.kv->format().tiers.size()); }

// Each once, in the order of their first use.
std::vector<const DeviceFormat*> FormatsOf(std::span<const StepSequence> sequences) {
  std::vector<const DeviceFormat*> formats;
  for (const StepSequence& sequence : sequences) {
    if (std::find(formats.begin(), formats.end(), sequence.format) == formats.end()) formats.push_back(sequence.format);
  }
  return formats;
}

// Blocks waiting to be packed, by layouts in the order of their first use.
class PackLists {
 public:
  struct List {
    const KvBlockLayout* source_layout;
    const KvBlockLayout* packed_layout;
    std::vector<const std::uint8_t*> sources;
    std::vector<std::uint8_t*> packed;
  };

  void Add(const KvBlockLayout* source_layout, const std::uint8_t* source, const KvBlockLayout* packed_layout,
           std::uint8_t* packed) {
    auto found = std::find_if(lists_.begin(), lists_.end(), [&](const List& list) {
      return list.source_layout == source_layout && list.packed_layout == packed_layout;
    });
    if (found == lists_.end()) found = lists_.insert(found, List{source_layout, packed_layout, {}, {}});
    found->sources.push_back(source);
    found->packed.push_back(packed);
  }
  const std::vector<List>& lists() const { return lists_; }

 private:
  std::vector<List> lists_;
};

// Whether the layouts of the segments fit into one launch beside those that are there; they are then there too.
bool TakeLayouts(std::span<const KvSegment> segments, std::vector<const KvBlockLayout*>* layouts) {
  std::vector<const KvBlockLayout*> all = *layouts;
  for (const KvSegment& segment : segments) {
    const bool known =
        std::any_of(all.begin(), all.end(), [&](const KvBlockLayout* l) { return *l == *segment.layout; });
    if (!known) all.push_back(segment.layout);
  }
  if (std::ssize(all) > cuda::kAttentionLayoutsMax && !layouts->empty()) return false;
  *layouts = std::move(all);
  return true;
}

}  // namespace

void DeviceStep::AddWrites(int layer, std::span<const StepSequence> sequences, LayerOffsets* offsets, Layer* out) {
  for (const DeviceFormat* format : FormatsOf(sequences)) {
    std::vector<cuda::KvWriteBlock> blocks;
    Write write = {format, nullptr, 0, false};
    for (std::size_t i = 0; i < sequences.size(); ++i) {
      const StepSequence& sequence = sequences[i];
      if (sequence.format != format) continue;
      const SequenceKv& kv = *sequence.kv;
      std::uint8_t* const* exact =
          kv.WriteBlocks(layer) + (sequence.first_pos / kBlockTokens - kv.n_tokens() / kBlockTokens);
      for (int pos = sequence.first_pos; pos < sequence.end_pos();) {
        const int block = pos / kBlockTokens, end = std::min(sequence.end_pos(), (block + 1) * kBlockTokens);
        // Complete with this step, and out of the exact window in it: packed from what is in shared memory.
        const bool packs = CountTiers(sequence) > 0 && block >= kv.pack_begin(0) && block < kv.pack_end(0);
        blocks.push_back({*exact++, packs ? kv.PackedBlock(layer, 0, block) : nullptr,
                          rows().begin[i] + (pos - sequence.first_pos), pos, end - pos});
        write.packs = write.packs || packs;
        pos = end;
      }
    }
    write.n_blocks = static_cast<int>(blocks.size());
    offsets->writes.push_back(blocks_.Add(blocks));
    out->writes.push_back(write);
  }
}

std::vector<std::size_t> DeviceStep::AddPrepares(const ModelConfig& config, std::span<const StepSequence> sequences,
                                                 const StepRows& queries, std::vector<Prepare>* out) {
  std::vector<std::size_t> offsets;
  const auto group = static_cast<int>(config.n_heads / config.n_kv_heads);
  for (const DeviceFormat* format : FormatsOf(sequences)) {
    std::vector<cuda::QueryPrepTile> tiles;
    for (std::size_t i = 0; i < sequences.size(); ++i) {
      if (sequences[i].format != format) continue;
      const auto n = static_cast<int>(queries.count(i));
      const std::int64_t offset = queries.begin[i] * config.n_heads * config.head_dim;
      for (int row = 0; row < n * group; row += cuda::kQueryTileRows) {
        tiles.push_back({queries.begin[i], offset, sequences[i].end_pos() - n, n, row});
      }
    }
    offsets.push_back(blocks_.Add(tiles));
    out->push_back({format, nullptr, static_cast<int>(tiles.size())});
  }
  return offsets;
}

// Blocks of earlier steps into the youngest tier, then from tier to tier, and the sink.
void DeviceStep::AddPacks(int layer, std::span<const StepSequence> sequences, LayerOffsets* offsets, Layer* out) {
  const auto add = [&](const PackLists& from) {
    for (const PackLists::List& list : from.lists()) {
      offsets->packs.push_back({blocks_.Add(list.sources), blocks_.Add(list.packed)});
      out->packs.push_back(
          {nullptr, nullptr, static_cast<int>(list.sources.size()), list.source_layout, list.packed_layout});
    }
  };
  for (int tier = 0; tier <= kMaxYoungTiers; ++tier) {
    PackLists lists;
    for (const StepSequence& sequence : sequences) {
      const SequenceKv& kv = *sequence.kv;
      if (tier >= CountTiers(sequence)) continue;
      const int first = sequence.first_pos / kBlockTokens, last = (sequence.end_pos() - 1) / kBlockTokens;
      const int end = std::min(kv.pack_end(tier), tier > 0 ? last + 1 : first);
      // Of a prompt that a group shares, its own blocks; all of them are new.
      for (int block = std::max(kv.pack_begin(tier), sequence.of_group ? first : 0); block < end; ++block) {
        lists.Add(&kv.SourceLayout(layer, tier), kv.PackSource(layer, tier, block), &kv.FormLayout(layer, tier),
                  kv.PackedBlock(layer, tier, block));
      }
    }
    add(lists);
  }
  PackLists sinks;
  for (const StepSequence& sequence : sequences) {
    const SequenceKv& kv = *sequence.kv;
    if (!kv.takes_sink() || (sequence.of_group && sequence.first_pos > 0)) continue;
    sinks.Add(&kv.format().exact, kv.PackSource(layer, 0, 0), &kv.format().sink, kv.SinkData(layer));
  }
  add(sinks);
}

void DeviceStep::AddSegments(int layer, std::span<const StepSequence> sequences, const StepRows& queries,
                             LayerOffsets* offsets) {
  for (std::size_t i = 0; i < sequences.size(); ++i) {
    Seen& seen = offsets->seen.emplace_back();
    const auto n = static_cast<int>(queries.count(i));
    if (n == 0) continue;
    const StepSequence& sequence = sequences[i];
    seen.segments.resize(KvFormat::kMaxSegments);
    const int n_segments =
        sequence.kv->Segments(layer, sequence.end_pos() - n, sequence.end_pos() - 1, seen.segments.data());
    seen.segments.resize(static_cast<std::size_t>(n_segments));
    for (KvSegment& segment : seen.segments) {
      seen.blocks.push_back(blocks_.Add(std::span(segment.blocks, static_cast<std::size_t>(segment.n_blocks))));
      if (segment.mass == nullptr) continue;
      const std::vector<KvTier>& tiers = sequence.kv->format().tiers;
      const auto tier = std::find_if(tiers.begin(), tiers.end(), [&](const KvTier& one) {
        return one.mass[static_cast<std::size_t>(layer)].data() == segment.mass;
      });
      ZEROC_CHECK(tier != tiers.end(), layer);
      segment.mass =
          sequence.format->mass[static_cast<std::size_t>(tier - tiers.begin())][static_cast<std::size_t>(layer)];
    }
  }
}

void DeviceStep::PlaceBlocks(const LayerOffsets& offsets, Layer* out) {
  for (std::size_t i = 0; i < out->writes.size(); ++i) {
    out->writes[i].blocks = blocks_.At<const cuda::KvWriteBlock>(offsets.writes[i]);
  }
  for (std::size_t i = 0; i < out->packs.size(); ++i) {
    out->packs[i].sources = blocks_.At<const std::uint8_t* const>(offsets.packs[i].sources);
    out->packs[i].packed = blocks_.At<std::uint8_t* const>(offsets.packs[i].packed);
  }
}

void DeviceStep::AddAttention(const ModelConfig& config, std::span<const StepSequence> sequences,
                              const StepRows& queries, const LayerOffsets& offsets, Layer* out,
                              std::vector<AttentionOffsets>* places) {
  const auto n_heads = static_cast<int>(config.n_heads), n_kv_heads = static_cast<int>(config.n_kv_heads);
  const auto head_dim = static_cast<int>(config.head_dim);
  // A group's queries go to the kernel to which one rank gives the whole prompt's: the same sums for the same rows.
  const auto is_decode = [&](std::size_t i) {
    const StepSequence& sequence = sequences[i];
    const bool all = sequence.of_group && queries.count(i) == sequence.n_tokens();
    const std::int64_t n = all ? sequence.kv->max_tokens() : queries.count(i);
    return n == 1 || n * (n_heads / n_kv_heads) <= cuda::kDecodeTileRows;
  };
  // Formats side by side, so that few launches have to be begun for want of room for layouts.
  std::vector<std::size_t> order;
  for (std::size_t i = 0; i < sequences.size(); ++i) {
    if (queries.count(i) > 0) order.push_back(i);
  }
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
    if (is_decode(a) != is_decode(b)) return is_decode(a);
    return std::less<>()(sequences[a].format, sequences[b].format);
  });
  std::vector<std::vector<KvSegment>> segments(sequences.size());  // with addresses of the device
  for (std::size_t next = 0; next < order.size();) {
    const bool decode = is_decode(order[next]);
    std::vector<const KvBlockLayout*> layouts;
    std::vector<cuda::AttentionSequence> asked;
    for (; next < order.size() && is_decode(order[next]) == decode; ++next) {
      const std::size_t i = order[next];
      const Seen& seen = offsets.seen[i];
      if (!TakeLayouts(seen.segments, &layouts)) break;
      segments[i] = seen.segments;
      for (std::size_t s = 0; s < seen.segments.size(); ++s) {
        segments[i][s].blocks = blocks_.At<const std::uint8_t* const>(seen.blocks[s]);
      }
      const auto n = static_cast<int>(queries.count(i));
      asked.push_back({segments[i], sequences[i].end_pos() - n, n, queries.begin[i] * config.n_heads * config.head_dim,
                       queries.begin[i]});
    }
    cuda::AttentionTiles tiles;
    const kernels::KernelStatus made =
        decode ? cuda::MakeDecodeTiles(asked, n_heads, n_kv_heads, head_dim, n_thread_blocks_, &tiles)
               : cuda::MakePrefillTiles(asked, n_heads, n_kv_heads, head_dim, &tiles);
    ZEROC_CHECK(made == kernels::KernelStatus::kOk, n_heads, n_kv_heads, layouts.size());
    places->push_back({attention_.Add(tiles.tiles), attention_.Add(tiles.segments), attention_.Add(tiles.items),
                       attention_.Add(tiles.first_item)});
    n_parts_max_ = std::max(n_parts_max_, tiles.n_parts);
    out->attention.push_back(
        {decode, std::move(tiles.layouts), nullptr, static_cast<int>(tiles.tiles.size()), nullptr, nullptr, nullptr});
  }
}

Status DeviceStep::Make(const ModelConfig& config, std::span<const StepSequence> sequences, int layer_begin,
                        int layer_end, bool short_last, cuda::Stream stream) {
  const auto n_layers = static_cast<std::size_t>(layer_end - layer_begin);
  layer_begin_ = layer_begin;
  launches_ = {};
  launches_.layers.resize(n_layers);
  n_thread_blocks_ = kThreadBlocksPerProcessor * cuda::MultiprocessorCount();
  n_parts_max_ = 0;
  blocks_.Clear();
  attention_.Clear();

  std::vector<std::int32_t> ids, positions;
  for (const StepSequence& sequence : sequences) {
    launches_.rows.begin.push_back(rows().count() + sequence.n_tokens());
    launches_.logit_rows.begin.push_back(logit_rows().count() + sequence.n_logits);
    ids.insert(ids.end(), sequence.tokens.begin(), sequence.tokens.end());
    if (config.has_rope()) continue;
    positions.resize(ids.size());
    std::iota(positions.end() - sequence.n_tokens(), positions.end(),
              TransformerWeights::kFirstPositionRow + sequence.first_pos);
  }
  const auto queries = [&](std::size_t layer) -> const StepRows& {
    return short_last && layer + 1 == n_layers ? logit_rows() : rows();
  };
  const std::size_t ids_at = blocks_.Add(ids), positions_at = blocks_.Add(positions);
  std::vector<std::size_t> tiles_at[2];
  for (const int shortened : {0, 1}) {
    tiles_at[shortened] =
        AddPrepares(config, sequences, shortened != 0 ? logit_rows() : rows(), &launches_.prepares[shortened]);
  }
  std::vector<LayerOffsets> offsets(n_layers);
  for (std::size_t l = 0; l < n_layers; ++l) {
    const int layer = layer_begin + static_cast<int>(l);
    AddWrites(layer, sequences, &offsets[l], &launches_.layers[l]);
    AddPacks(layer, sequences, &offsets[l], &launches_.layers[l]);
    AddSegments(layer, sequences, queries(l), &offsets[l]);
  }
  ZEROC_RETURN_IF_ERROR(blocks_.Place("block tables"));
  blocks_.Upload(stream);
  launches_.ids = blocks_.At<const std::int32_t>(ids_at);
  launches_.positions = blocks_.At<const std::int32_t>(positions_at);
  for (const int shortened : {0, 1}) {
    for (std::size_t i = 0; i < tiles_at[shortened].size(); ++i) {
      launches_.prepares[shortened][i].tiles = blocks_.At<const cuda::QueryPrepTile>(tiles_at[shortened][i]);
    }
  }

  std::vector<std::vector<AttentionOffsets>> places(n_layers);
  for (std::size_t l = 0; l < n_layers; ++l) {
    PlaceBlocks(offsets[l], &launches_.layers[l]);
    AddAttention(config, sequences, queries(l), offsets[l], &launches_.layers[l], &places[l]);
  }
  ZEROC_RETURN_IF_ERROR(attention_.Place("attention plans"));
  attention_.Upload(stream);
  for (std::size_t l = 0; l < n_layers; ++l) {
    for (std::size_t a = 0; a < places[l].size(); ++a) {
      Attention& launch = launches_.layers[l].attention[a];
      launch.tiles = attention_.At<const cuda::DeviceQueryTile>(places[l][a].tiles);
      launch.segments = attention_.At<const cuda::DeviceSegment>(places[l][a].segments);
      launch.items = attention_.At<const cuda::DeviceItem>(places[l][a].items);
      launch.first_item = attention_.At<const std::int32_t>(places[l][a].first_item);
    }
  }
  return OkStatus();
}

bool DeviceStep::IsPlainDecode() const {
  const auto n_sequences = static_cast<std::int64_t>(rows().begin.size()) - 1;
  return rows() == logit_rows() && rows().count() == n_sequences &&
         std::all_of(launches_.layers.begin(), launches_.layers.end(), [](const Layer& layer) {
           return layer.packs.empty() && std::none_of(layer.writes.begin(), layer.writes.end(),
                                                      [](const Write& write) { return write.packs; });
         });
}

}  // namespace zeroc
