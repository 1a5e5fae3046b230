#include "libzeroc/kv/prefix_cache.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include "libzeroc/base/check.h"
#include "libzeroc/compression/prefix_hash.h"

namespace zeroc {
namespace {

using kernels::kBlockTokens;
static_assert(kPrefixHashTokens == kBlockTokens);

int WholeBlocks(std::size_t n_tokens) { return static_cast<int>(n_tokens) / kBlockTokens; }

std::span<const std::int32_t> BlockTokensOf(std::span<const std::int32_t> tokens, std::size_t block_idx) {
  return tokens.subspan(block_idx * kBlockTokens, kBlockTokens);
}

// Whether the query at n_tokens sees lasting blocks only.
bool NeedsNoState(const KvFormat& format, int n_tokens) {
  return format.LastingBlocksAt(n_tokens) == n_tokens / kBlockTokens;
}

const kernels::KvBlockLayout& LastingLayout(const KvFormat& format, std::size_t layer) {
  return format.packs ? format.tiers.back().layouts[layer] : format.exact;
}

template <typename Fn>
void ForEachRef(const std::vector<BlockRef>& lasting, const std::vector<LayerBlocks>& layers, Fn fn) {
  for (const BlockRef ref : lasting) fn(ref);
  for (const LayerBlocks& layer : layers) {
    for (const TierBlocks& tier : layer.packed) {
      for (const BlockRef ref : tier.refs) fn(ref);
    }
    for (const BlockRef ref : layer.exact) fn(ref);
    if (layer.sink.valid()) fn(layer.sink);
  }
}

// Holds all blocks of a beginning while a sequence is made from it: nothing that this takes may reclaim them.
class Pin {
 public:
  Pin(BlockPool& pool, const KvBeginning& beginning) : pool_(pool), beginning_(beginning) {
    ForEachRef({}, beginning_.layers, [this](BlockRef ref) { pool_.AddUser(ref); });
  }
  ~Pin() {
    ForEachRef({}, beginning_.layers, [this](BlockRef ref) { pool_.Release(ref); });
  }
  Pin(const Pin&) = delete;
  Pin& operator=(const Pin&) = delete;

 private:
  BlockPool& pool_;
  const KvBeginning& beginning_;
};

}  // namespace

PrefixCache::PrefixCache(BlockPool& pool, std::string model_fingerprint, std::string plan_id, const Options& options)
    : pool_(pool), model_fingerprint_(std::move(model_fingerprint)), plan_id_(std::move(plan_id)), options_(options) {
  pool_.SetReclaimer(this);
}

PrefixCache::~PrefixCache() {
  pool_.SetReclaimer(nullptr);
  while (!lru_.empty()) Evict(std::prev(lru_.end()));
}

const PrefixCache::Root& PrefixCache::RootOf(const KvFormat& format) {
  Root& root = roots_[format.profile];
  if (root.id == 0) root = {next_id_++, PrefixHashRoot(model_fingerprint_, plan_id_, format.profile)};
  return root;
}

// --- look-ups ---

bool PrefixCache::Matches(const Entry& entry, std::uint64_t parent_id, std::span<const std::int32_t> tokens) const {
  return entry.parent_id == parent_id && std::ranges::equal(entry.tokens, tokens);
}

PrefixCache::Entries PrefixCache::FindLasting(const Root& root, std::span<const std::uint64_t> hashes,
                                              std::span<const std::int32_t> tokens) const {
  Entries found;
  std::uint64_t parent_id = root.id;
  for (std::size_t i = 0; i < hashes.size(); ++i) {
    const auto it = lasting_.find(hashes[i]);
    if (it == lasting_.end() || !Matches(*it->second, parent_id, BlockTokensOf(tokens, i))) break;
    parent_id = it->second->id;
    found.push_back(it->second);
  }
  return found;
}

const PrefixCache::Entry* PrefixCache::FindState(const Root& root, const KvFormat& format, const Entries& lasting,
                                                 std::span<const std::uint64_t> hashes,
                                                 std::span<const std::int32_t> tokens, int n_tokens) const {
  const auto it = states_.find(hashes[static_cast<std::size_t>(n_tokens / kBlockTokens - 1)]);
  if (it == states_.end()) return nullptr;
  const auto n_lasting = static_cast<std::size_t>(format.LastingBlocksAt(n_tokens));
  const std::uint64_t parent_id = n_lasting == 0 ? root.id : lasting[n_lasting - 1]->id;
  const auto behind = tokens.first(static_cast<std::size_t>(n_tokens)).subspan(n_lasting * kBlockTokens);
  return Matches(*it->second, parent_id, behind) ? &*it->second : nullptr;
}

KvBeginning PrefixCache::Beginning(const KvFormat& format, const Entries& lasting, const Entry* state,
                                   int n_tokens) const {
  KvBeginning beginning;
  beginning.n_shared = static_cast<int>(lasting.size());
  beginning.n_tokens = n_tokens;
  const auto n_layers = static_cast<std::size_t>(format.n_layers);
  for (std::size_t l = 0; l < n_layers; ++l) {
    LayerBlocks& layer = beginning.layers.emplace_back();
    if (state != nullptr) layer = state->layers[l];
    layer.packed.resize(format.tiers.size());
    std::vector<BlockRef>& refs = format.packs ? layer.packed[0].refs : layer.exact;
    for (const Lru::iterator block : lasting) refs.push_back(block->lasting[l]);
    if (!lasting.empty() && lasting[0]->lasting.size() > n_layers) layer.sink = lasting[0]->lasting[n_layers + l];
  }
  return beginning;
}

Result<std::unique_ptr<SequenceKv>> PrefixCache::CreateResumed(const std::shared_ptr<const KvFormat>& format,
                                                               std::span<const std::int32_t> tokens, int max_tokens,
                                                               int step_tokens_max, int grain_tokens, Found* found) {
  ZEROC_CHECK(!tokens.empty() && grain_tokens > 0 && grain_tokens % kBlockTokens == 0, tokens.size(), grain_tokens);
  const Root& root = RootOf(*format);
  const std::vector<std::uint64_t> hashes = PrefixHashes(root.hash, tokens.first(tokens.size() - 1));
  Entries lasting = FindLasting(root, hashes, tokens);
  const int n_shared_tokens = static_cast<int>(lasting.size()) * kBlockTokens;
  const Entry* state = nullptr;
  int n_tokens = static_cast<int>(tokens.size() - 1) / grain_tokens * grain_tokens;
  for (; n_tokens > 0; n_tokens -= grain_tokens) {
    if (format->LastingBlocksAt(n_tokens) > static_cast<int>(lasting.size())) continue;
    if (NeedsNoState(*format, n_tokens)) break;
    state = FindState(root, *format, lasting, hashes, tokens, n_tokens);
    if (state != nullptr) break;
  }
  lasting.resize(static_cast<std::size_t>(format->LastingBlocksAt(n_tokens)));
  Result<std::unique_ptr<SequenceKv>> kv = ResourceExhausted("");
  if (n_tokens > 0) {
    const KvBeginning beginning = Beginning(*format, lasting, state, n_tokens);
    const Pin pin(pool_, beginning);
    kv = SequenceKv::CreateFrom(pool_, format, max_tokens, step_tokens_max, beginning);
    if (kv.ok()) Touch(state, lasting);
  }
  // With the state in memory beside its copy there may be no room for what fits alone.
  if (!kv.ok()) kv = SequenceKv::Create(pool_, format, max_tokens, step_tokens_max);
  if (!kv.ok()) return kv;
  stats_.n_queried_tokens += tokens.size();
  stats_.n_hit_tokens += static_cast<std::uint64_t>((*kv)->n_tokens());
  if (found != nullptr) found->n_shared_tokens = std::max(n_shared_tokens, (*kv)->n_tokens());
  return kv;
}

Result<std::unique_ptr<SequenceKv>> PrefixCache::CreateSharing(const std::shared_ptr<const KvFormat>& format,
                                                               std::span<const std::int32_t> tokens, int max_tokens,
                                                               int step_tokens_max) {
  ZEROC_CHECK(!tokens.empty());
  const Root& root = RootOf(*format);
  const int n_useful =
      std::min(format->LastingBlocksAt(static_cast<int>(tokens.size())), WholeBlocks(tokens.size() - 1));
  const auto useful = tokens.first(static_cast<std::size_t>(n_useful) * kBlockTokens);
  const Entries lasting = FindLasting(root, PrefixHashes(root.hash, useful), useful);
  Result<std::unique_ptr<SequenceKv>> kv = ResourceExhausted("");
  if (!lasting.empty()) {
    const KvBeginning beginning = Beginning(*format, lasting, nullptr, 0);
    const Pin pin(pool_, beginning);
    kv = SequenceKv::CreateFrom(pool_, format, max_tokens, step_tokens_max, beginning);
    if (kv.ok()) Touch(nullptr, lasting);
  }
  if (!kv.ok()) kv = SequenceKv::Create(pool_, format, max_tokens, step_tokens_max);
  if (!kv.ok()) return kv;
  stats_.n_queried_tokens += tokens.size();
  stats_.n_hit_tokens += static_cast<std::uint64_t>((*kv)->n_shared_blocks()) * kBlockTokens;
  return kv;
}

// --- keeping ---

PrefixCache::Lru::iterator PrefixCache::Insert(Entry entry, Index& index) {
  entry.id = next_id_++;
  stats_.bytes += entry.bytes;
  const std::uint64_t hash = entry.hash;
  lru_.push_front(std::move(entry));
  index[hash] = lru_.begin();
  return lru_.begin();
}

PrefixCache::Entries PrefixCache::EnsureLasting(const SequenceKv& kv, std::span<const std::uint64_t> hashes,
                                                std::span<const std::int32_t> tokens, int n_blocks) {
  const KvFormat& format = kv.format();
  const Root& root = RootOf(format);
  const auto n = static_cast<std::size_t>(n_blocks);
  Entries entries = FindLasting(root, hashes.first(n), tokens);
  while (entries.size() < n) {
    const std::size_t i = entries.size();
    if (const auto other = lasting_.find(hashes[i]); other != lasting_.end()) {
      // A collision, or what remained of a beginning whose first blocks are gone: nobody can find it any more.
      if (std::ranges::find(entries, other->second) != entries.end()) break;
      Evict(other->second);
    }
    Entry entry;
    entry.resumes = NeedsNoState(format, (static_cast<int>(i) + 1) * kBlockTokens);
    entry.hash = hashes[i];
    entry.parent_id = i == 0 ? root.id : entries[i - 1]->id;
    entry.n_tokens = (static_cast<int>(i) + 1) * kBlockTokens;
    const auto ids = BlockTokensOf(tokens, i);
    entry.tokens.assign(ids.begin(), ids.end());
    for (int l = 0; l < format.n_layers; ++l) {
      entry.lasting.push_back(kv.LastingBlock(l, static_cast<int>(i)));
      entry.bytes += static_cast<std::uint64_t>(LastingLayout(format, static_cast<std::size_t>(l)).block_bytes);
    }
    for (int l = 0; l < format.n_layers && i == 0 && kv.SinkBlock(l).valid(); ++l) {
      entry.lasting.push_back(kv.SinkBlock(l));
      entry.bytes += static_cast<std::uint64_t>(format.sink.block_bytes);
    }
    entry.probe = entry.lasting[0];
    for (const BlockRef ref : entry.lasting) pool_.Keep(ref);
    entries.push_back(Insert(std::move(entry), lasting_));
  }
  return entries;
}

void PrefixCache::KeepLasting(const SequenceKv& kv, std::span<const std::int32_t> tokens, int n_blocks) {
  ZEROC_CHECK(
      !kv.in_step() && n_blocks <= kv.format().LastingBlocksAt(kv.n_tokens()) && n_blocks <= WholeBlocks(tokens.size()),
      n_blocks, kv.n_tokens(), tokens.size());
  if (n_blocks == 0) return;
  tokens = tokens.first(static_cast<std::size_t>(n_blocks) * kBlockTokens);
  Touch(nullptr, EnsureLasting(kv, PrefixHashes(RootOf(kv.format()).hash, tokens), tokens, n_blocks));
  EnforceShare();
}

bool PrefixCache::CopyState(const SequenceKv& kv, int n_tokens, Entry* entry) {
  const KvFormat& format = kv.format();
  std::vector<KvCopy> copies;
  // Blocks for copies of `from`, kept, appended to *to.
  const auto copy = [&](const std::vector<BlockRef>& from, std::size_t block_bytes, std::vector<BlockRef>* to) {
    std::vector<BlockRef> refs;
    if (!pool_.Allocate(block_bytes, from.size(), &refs).ok()) return false;
    for (std::size_t i = 0; i < from.size(); ++i) {
      copies.push_back({pool_.Data(refs[i]), pool_.Data(from[i]), block_bytes});
      pool_.Keep(refs[i]);
      pool_.Release(refs[i]);
      to->push_back(refs[i]);
      entry->probe = refs[i];
    }
    entry->bytes += from.size() * block_bytes;
    return true;
  };
  for (int l = 0; l < format.n_layers; ++l) {
    const LayerBlocks from = kv.BlocksAt(l, n_tokens);
    LayerBlocks& to = entry->layers.emplace_back();
    to.packed.resize(from.packed.size());
    for (std::size_t tier = 1; tier < from.packed.size(); ++tier) {
      to.packed[tier].block_bytes = from.packed[tier].block_bytes;
      if (!copy(from.packed[tier].refs, from.packed[tier].block_bytes, &to.packed[tier].refs)) return false;
    }
    if (!copy(from.exact, static_cast<std::size_t>(format.exact.block_bytes), &to.exact)) return false;
    if (!from.sink.valid()) continue;
    to.sink = from.sink;
    pool_.Keep(to.sink);
    entry->bytes += static_cast<std::uint64_t>(format.sink.block_bytes);
  }
  return pool_.memory().Copy(copies).ok();
}

bool PrefixCache::KeepState(const SequenceKv& kv, std::span<const std::int32_t> tokens, int n_tokens) {
  const KvFormat& format = kv.format();
  ZEROC_CHECK(
      kv.HoldsStateAt(n_tokens) && n_tokens % kBlockTokens == 0 && static_cast<std::size_t>(n_tokens) <= tokens.size(),
      n_tokens, kv.n_tokens(), tokens.size());
  const int n_lasting = format.LastingBlocksAt(n_tokens);
  if (NeedsNoState(format, n_tokens)) {
    KeepLasting(kv, tokens, n_lasting);
    return true;
  }
  tokens = tokens.first(static_cast<std::size_t>(n_tokens));
  const Root& root = RootOf(format);
  const std::vector<std::uint64_t> hashes = PrefixHashes(root.hash, tokens);
  Entries lasting = FindLasting(root, std::span(hashes).first(static_cast<std::size_t>(n_lasting)), tokens);
  if (static_cast<int>(lasting.size()) == n_lasting) {
    if (const Entry* state = FindState(root, format, lasting, hashes, tokens, n_tokens)) {
      Touch(state, lasting);
      return true;
    }
  }
  Entry entry;
  entry.is_state = entry.resumes = true;
  entry.hash = hashes.back();
  entry.n_tokens = n_tokens;
  const auto drop = [&] { ForEachRef({}, entry.layers, [this](BlockRef ref) { pool_.Drop(ref); }); };
  const bool copied = CopyState(kv, n_tokens, &entry);
  // Only now, because the copies may have cost entries.
  if (copied) lasting = EnsureLasting(kv, hashes, tokens, n_lasting);
  if (!copied || static_cast<int>(lasting.size()) < n_lasting) {
    drop();
    return false;
  }
  entry.parent_id = n_lasting == 0 ? root.id : lasting.back()->id;
  const auto behind = tokens.subspan(static_cast<std::size_t>(n_lasting) * kBlockTokens);
  entry.tokens.assign(behind.begin(), behind.end());
  if (const auto other = states_.find(entry.hash); other != states_.end()) Evict(other->second);
  Touch(&*Insert(std::move(entry), states_), lasting);
  EnforceShare();
  return true;
}

std::uint64_t PrefixCache::LastingBytes(const KvFormat& format) {
  std::uint64_t bytes = 0;
  for (std::size_t l = 0; l < static_cast<std::size_t>(format.n_layers); ++l) {
    bytes += static_cast<std::uint64_t>(LastingLayout(format, l).block_bytes);
  }
  return bytes;
}

std::uint64_t PrefixCache::StateBytes(const KvFormat& format) {
  if (!format.packs) return 0;
  // Far behind the youngest tiers every state has the same blocks.
  const int far = (format.MinAge(static_cast<int>(format.tiers.size()) - 1) / kBlockTokens + 2) * kBlockTokens;
  const auto n_exact = static_cast<std::uint64_t>(far / kBlockTokens - format.PackedBlocksAt(far));
  std::uint64_t bytes =
      static_cast<std::uint64_t>(format.n_layers) * n_exact * static_cast<std::uint64_t>(format.exact.block_bytes);
  for (std::size_t tier = 0; tier + 1 < format.tiers.size(); ++tier) {
    for (const kernels::KvBlockLayout& layout : format.tiers[tier].layouts) {
      bytes += static_cast<std::uint64_t>(format.tiers[tier].n_blocks) * static_cast<std::uint64_t>(layout.block_bytes);
    }
  }
  return bytes;
}

int PrefixCache::StateSpacing(const KvFormat& format) {
  const std::uint64_t lasting = LastingBytes(format);
  const std::uint64_t n_blocks = (4 * StateBytes(format) + lasting - 1) / lasting;
  return static_cast<int>(std::max<std::uint64_t>(n_blocks, 1)) * kBlockTokens;
}

// --- use and eviction ---

// What follows is never more recent than what it follows, so that eviction shortens a beginning from its end.
void PrefixCache::Touch(const Entry* state, const Entries& lasting) {
  ++version_;
  if (state != nullptr) {
    const auto it = states_.find(state->hash);
    lru_.splice(lru_.begin(), lru_, it->second);
  }
  for (auto it = lasting.rbegin(); it != lasting.rend(); ++it) lru_.splice(lru_.begin(), lru_, *it);
}

PrefixCache::Lru::iterator PrefixCache::Evict(Lru::iterator entry) {
  ++version_;
  ForEachRef(entry->lasting, entry->layers, [this](BlockRef ref) { pool_.Drop(ref); });
  stats_.bytes -= entry->bytes;
  (entry->is_state ? states_ : lasting_).erase(entry->hash);
  return lru_.erase(entry);
}

std::uint64_t PrefixCache::Reclaim(std::uint64_t bytes) {
  const std::uint64_t kept = pool_.usage().bytes_kept;
  std::uint64_t freed = 0;
  for (auto it = lru_.end(); it != lru_.begin() && freed < bytes;) {
    --it;
    if (pool_.n_users(it->probe) > 0) continue;
    it = Evict(it);
    ++stats_.n_evicted;
    freed = kept - pool_.usage().bytes_kept;
  }
  return freed;
}

void PrefixCache::EnforceShare() {
  const double max = options_.share_max * static_cast<double>(pool_.usage().bytes_total);
  while (!lru_.empty() && static_cast<double>(stats_.bytes) > max) {
    Evict(std::prev(lru_.end()));
    ++stats_.n_evicted;
  }
}

PrefixCache::Stats PrefixCache::stats() const {
  Stats stats = stats_;
  stats.n_entries = lru_.size();
  return stats;
}

std::vector<std::uint64_t> PrefixCache::RecentHashes(Use use, int grain_tokens, std::size_t n_max) const {
  std::vector<std::uint64_t> hashes;
  for (const Entry& entry : lru_) {
    if (hashes.size() >= n_max) break;
    const bool usable = use == Use::kResume ? entry.resumes : !entry.is_state;
    if (usable && entry.n_tokens % grain_tokens == 0) hashes.push_back(entry.hash);
  }
  return hashes;
}

}  // namespace zeroc
