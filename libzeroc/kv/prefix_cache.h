// Beginnings of prompts whose keys and values stay after their sequence: later prompts that begin with the same tokens
// share the blocks. What is kept, its bytes and its eviction: docs/prefix_cache.md.
//
// Two kinds of entries. A *lasting block* is 64 tokens in the form that they keep for good, shared by reference; it
// depends on the tokens up to its end alone, so any longer prompt may use it. A *state* at n tokens is what else the
// query at n sees (young tiers, exact window), as copies, because a running sequence overwrites those blocks: with the
// lasting blocks below it a sequence can go on from n. Where nothing but lasting blocks is seen at n (a format that
// packs nothing), they are the state.
//
// A hit compares all tokens, the model, the plan and the profile: hashes only find entries. Entries whose blocks no
// sequence uses are given up, the least recently used first, when the pool runs short (it is the pool's reclaimer).
//
// Not thread-safe: belongs to the step loop, like its pool, which outlives it. Sequences may outlive the cache.
#pragma once

#include <cstddef>
#include <cstdint>
#include <list>
#include <memory>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "libzeroc/base/status.h"
#include "libzeroc/kv/sequence_kv.h"

namespace zeroc {

class PrefixCache final : public BlockReclaimer {
 public:
  struct Options {
    double share_max = 1.0;  // of the pool's bytes that entries may hold, used by sequences at the same time or not
  };
  struct Stats {
    std::uint64_t n_queried_tokens = 0;  // of prompts looked up
    std::uint64_t n_hit_tokens = 0;      // of them, found
    std::uint64_t n_evicted = 0;         // entries
    std::uint64_t n_entries = 0;
    std::uint64_t bytes = 0;  // of the entries' blocks
  };
  // What CreateFrom found for a prompt.
  struct Found {
    int n_shared_tokens = 0;  // some earlier prompt began with these tokens; a multiple of 64
  };

  // model_fingerprint and plan_id name what all sequences of the pool are computed with.
  PrefixCache(BlockPool& pool, std::string model_fingerprint, std::string plan_id, const Options& options);
  ~PrefixCache() override;
  PrefixCache(const PrefixCache&) = delete;
  PrefixCache& operator=(const PrefixCache&) = delete;

  // As SequenceKv::Create for the prompt's tokens, begun at the longest state that is kept at a multiple of
  // grain_tokens (itself one of 64): n_tokens() says where, at most tokens.size() - 1. Fails only where Create would.
  Result<std::unique_ptr<SequenceKv>> CreateResumed(const std::shared_ptr<const KvFormat>& format,
                                                    std::span<const std::int32_t> tokens, int max_tokens,
                                                    int step_tokens_max, int grain_tokens, Found* found = nullptr);

  // The same, empty, but sharing the lasting blocks of the prompt that are kept (n_shared_blocks()): for a prompt whose
  // other blocks will be written by the wire. The last token's block is never shared.
  Result<std::unique_ptr<SequenceKv>> CreateSharing(const std::shared_ptr<const KvFormat>& format,
                                                    std::span<const std::int32_t> tokens, int max_tokens,
                                                    int step_tokens_max);

  // Keeps kv's lasting blocks of the first n_blocks; n_blocks <= LastingBlocksAt(kv.n_tokens()), and tokens, which kv
  // was computed from, reach as far. Between steps.
  void KeepLasting(const SequenceKv& kv, std::span<const std::int32_t> tokens, int n_blocks);

  // Keeps the state at n_tokens, a multiple of 64 where kv holds it (SequenceKv::HoldsStateAt), and the lasting blocks
  // below. False when there is no room for the copies.
  bool KeepState(const SequenceKv& kv, std::span<const std::int32_t> tokens, int n_tokens);

  // What the copies of one state take, far from the sequence's start, and what the lasting blocks of 64 tokens take.
  static std::uint64_t StateBytes(const KvFormat& format);
  static std::uint64_t LastingBytes(const KvFormat& format);

  // Tokens that should lie between the states of one prompt, so that their copies take at most a quarter of what the
  // lasting blocks take: 64 for a format that needs no copies.
  static int StateSpacing(const KvFormat& format);

  std::uint64_t Reclaim(std::uint64_t bytes) override;

  Stats stats() const;
  // Changes whenever an entry comes, goes or is used.
  std::uint64_t version() const { return version_; }

  // Prefix hashes (libzeroc/compression/prefix_hash.h) of beginnings that CreateResumed or CreateSharing can use, the
  // most recently used first; only of beginnings of a multiple of grain_tokens.
  enum class Use : std::uint8_t { kResume, kShare };
  std::vector<std::uint64_t> RecentHashes(Use use, int grain_tokens, std::size_t n_max) const;

 private:
  struct Entry {
    bool is_state = false;
    bool resumes = false;  // a sequence can go on behind it
    std::uint64_t hash = 0;
    std::uint64_t id = 0;
    std::uint64_t parent_id = 0;  // of the lasting block before it, or of the root: with `tokens`, the whole beginning
    int n_tokens = 0;             // of the beginning
    std::vector<std::int32_t> tokens;  // from the parent's end to n_tokens
    std::uint64_t bytes = 0;
    BlockRef probe;  // one of its blocks, with users exactly when all are in use: sequences take every layer's or none
    std::vector<BlockRef> lasting;    // [n_layers]; the first block's entry has [n_layers] sinks behind them
    std::vector<LayerBlocks> layers;  // of a state, [n_layers]; without the oldest tier's blocks
  };
  struct Root {
    std::uint64_t id = 0;
    std::uint64_t hash = 0;
  };
  using Lru = std::list<Entry>;  // the most recently used first; of one prompt, the beginning before what follows
  using Entries = std::vector<Lru::iterator>;
  using Index = std::unordered_map<std::uint64_t, Lru::iterator>;

  const Root& RootOf(const KvFormat& format);
  // Of the blocks that hashes and tokens name, the first ones that are kept.
  Entries FindLasting(const Root& root, std::span<const std::uint64_t> hashes,
                      std::span<const std::int32_t> tokens) const;
  bool Matches(const Entry& entry, std::uint64_t parent_id, std::span<const std::int32_t> tokens) const;
  // The entry, or null. lasting: at least LastingBlocksAt(n_tokens) blocks.
  const Entry* FindState(const Root& root, const KvFormat& format, const Entries& lasting,
                         std::span<const std::uint64_t> hashes, std::span<const std::int32_t> tokens,
                         int n_tokens) const;
  KvBeginning Beginning(const KvFormat& format, const Entries& lasting, const Entry* state, int n_tokens) const;
  Entries EnsureLasting(const SequenceKv& kv, std::span<const std::uint64_t> hashes,
                        std::span<const std::int32_t> tokens, int n_blocks);
  bool CopyState(const SequenceKv& kv, int n_tokens, Entry* entry);
  void Touch(const Entry* state, const Entries& lasting);
  Lru::iterator Insert(Entry entry, Index& index);
  Lru::iterator Evict(Lru::iterator entry);  // returns the one behind it
  void EnforceShare();

  BlockPool& pool_;
  const std::string model_fingerprint_, plan_id_;
  const Options options_;
  std::unordered_map<std::string, Root> roots_;  // by profile
  std::uint64_t next_id_ = 1;
  Lru lru_;
  Index lasting_, states_;  // by prefix hash
  Stats stats_;
  std::uint64_t version_ = 0;
};

}  // namespace zeroc
