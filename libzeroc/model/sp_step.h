// One rank's part of the forward pass over a prompt that a group shares (docs/sequence_parallel.md): it sends the
// blocks of each layer as they are written, and receives the others'. On the host it also attends: to others' blocks as
// they arrive, while its own are attended to (Attend). A device waits for all of them (Receive) and attends by itself.
//
// The blocks travel in cache format, packed, and lie afterwards where attention reads them. The same visibility rule as
// everywhere decides what a query sees, so the result is that of one rank up to the order of float32 sums: keys are
// attended to by the rank that owns them, own first, then those of rank - 1, rank - 2, ..., and merged by log-sum-exp.
// With kUlysses a rank attends to lasting blocks for its own heads and everybody's queries, and to windows for its own
// queries.
//
// All ranks make theirs with equal arguments (but the sequence), and call Transformer::Forward with it. Whatever fails
// on one rank aborts the communicator, and with it the step of all. Not thread-safe; used by the step loop.
#pragma once

#include <chrono>
#include <cstdint>
#include <span>
#include <vector>

#include "libzeroc/base/status.h"
#include "libzeroc/base/thread_pool.h"
#include "libzeroc/comm/communicator.h"
#include "libzeroc/kv/sequence_kv.h"
#include "libzeroc/kv/sp_split.h"
#include "libzeroc/model/attention_plan.h"
#include "libzeroc/model/sp_scheme.h"

namespace zeroc {

struct SpOptions {
  SpScheme scheme = SpScheme::kAllGather;  // not kAuto
  std::uint32_t job = 0;                   // one for each step of a communicator
  // The longest that the rank waits for another one, each time: more than the slowest rank needs for a layer.
  std::chrono::milliseconds patience{10'000};
  // Whose logits are computed: those of every token, each on its rank, or those of the prompt's last one, on rank 0.
  bool all_logits = false;
};

class SpStep {
 public:
  // kv: SequenceKv::CreateShare(.., split, comm.rank()), empty. All outlive the step.
  SpStep(Communicator& comm, const SpOptions& options, SequenceKv& kv, const SpSplit& split);
  ~SpStep();  // aborts a step that was begun and did not end: memory of the sequence may be in use
  SpStep(const SpStep&) = delete;
  SpStep& operator=(const SpStep&) = delete;

  // Positions that the rank computes, and of them those whose logits it computes (perhaps empty), range by range.
  std::vector<TokenRange> Tokens(int rank) const { return split_.Tokens(rank); }
  std::vector<TokenRange> LogitTokens(int rank) const;
  int rank() const { return comm_.rank(); }
  // Reaches the memory of the sequence's blocks: whoever runs the step sees to it.
  Communicator& comm() const { return comm_; }
  SpScheme scheme() const { return options_.scheme; }
  int CountLogits() const;
  const SequenceKv& kv() const { return kv_; }

  // What is sent, by us and all layers so far.
  const SpBytes& sent() const { return sent_; }

  // --- Transformer's calls: for every layer in order, then Finish ---

  // Own blocks of the layer are written and packed.
  void OnLayerWritten(int layer, const AttentionShape& shape);
  // Waits for every block that the rank sees in this layer, handing on what others are to get by us. Not for kUlysses.
  Status Receive(int layer);
  // Instead of Receive: attention of the rank's queries, in host memory. One entry for each of its ranges that has any.
  // `all_rows`: this layer computes every token, not only LogitTokens. act_bytes: of an activation, for kUlysses.
  Status Attend(int layer, bool all_rows, const AttentionShape& shape, int act_bytes,
                std::span<const AttentionQueries> queries, ThreadPool& threads, AttentionWorkspace& workspace);
  // Everything that was sent may be changed.
  Status Finish();

 private:
  enum class Kind : std::uint8_t { kBlocks, kWindows, kQueries, kOutputs };
  // Rows of one range of tokens for one share of heads; a message holds several of these.
  struct Rows {
    std::size_t range_idx;
    TokenRange tokens;
    HeadShare share;
    std::int64_t begin;  // first row of the message
    std::int64_t count() const { return std::int64_t{tokens.size()} * share.n; }
  };
  // What kUlysses moves in one layer.
  struct HeadExchange;

  Communicator::TimePoint Until() const { return std::chrono::steady_clock::now() + options_.patience; }
  std::uint64_t Tag(int layer, Kind kind, int source = 0) const;
  template <typename Byte>
  std::vector<std::span<Byte>> LastingSpans(int layer, int owner, const std::vector<HeadShare>* heads) const;
  template <typename Byte>
  std::vector<std::span<Byte>> WindowSpans(int layer, int owner, int viewer) const;
  void SendWindows(int layer);
  void SendBlocks(int layer);
  void ReceiveNext(int layer, int source);
  void Collect(const std::vector<CommOp>& ops, std::vector<CommOp>* in);
  int FromStep(int step) const { return (comm_.rank() + n_ranks_ - step) % n_ranks_; }
  Status WaitFor(int layer, int source);
  std::vector<TokenRange> QueryTokens(int rank, bool all_rows) const;
  std::vector<Rows> RowsOf(int rank, bool all_rows, int heads_of) const;
  Status AttendByOwner(int layer, const AttentionShape& shape, std::span<const AttentionQueries> queries,
                       AttentionWorkspace& workspace);
  Status AttendByHeads(HeadExchange& exchange, std::span<const AttentionQueries> queries, ThreadPool& threads,
                       AttentionWorkspace& workspace);
  void AttendLasting(const HeadExchange& exchange, std::span<const Rows> rows, const float* q, float* out,
                     float* log_sum, AttentionWorkspace& workspace) const;

  Communicator& comm_;
  const SpOptions options_;
  SequenceKv& kv_;
  const SpSplit split_;
  const int n_ranks_;

  std::vector<std::vector<int>> lasting_;                       // [rank] its blocks in lasting form
  std::vector<std::vector<BlockForm>> to_viewer_, from_owner_;  // [rank] windows
  std::vector<std::vector<HeadShare>> heads_;                   // [rank] of kUlysses, from the first layer on
  std::vector<CommOp> sends_;                                   // until Finish
  std::vector<CommOp> blocks_in_, windows_in_;                  // [rank], of this layer
  SpBytes sent_;
  bool in_step_ = false;
};

}  // namespace zeroc
