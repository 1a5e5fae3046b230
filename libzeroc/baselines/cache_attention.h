// The base of all baselines: exact causal attention over float32 head stores, with hooks where a method changes what
// is stored, evicts, or looks at queries and probabilities.
//
// Two phases. Prompt: chunks of tokens; all are stored, then attend. Decode, after EndPrompt: token by token, whatever
// the size of the step, so that a step of n tokens equals n steps. Hooks get one head at a time; heads of one layer run
// on different threads, so a hook touches only its own head's state. Exact values are rounded to what a real cache
// holds (bf16 beside the engine's bf16 table, float32 beside the reference).
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "libzeroc/baselines/head_store.h"
#include "libzeroc/model/sequence_attention.h"
#include "libzeroc/model/transformer.h"

namespace zeroc {

struct CacheShape {
  int n_layers = 0, n_heads = 0, n_kv_heads = 0, head_dim = 0;
  int exact_bytes = 2;  // of a number that is kept as it is: 2 (bf16) or 4

  int group() const { return n_heads / n_kv_heads; }
  int kv_width() const { return n_kv_heads * head_dim; }
  static CacheShape Of(const Transformer& model);
};

// Rounds to the precision of a number of exact_bytes bytes.
void RoundExact(int exact_bytes, std::span<float> values);

class CacheAttention : public SequenceAttention {
 public:
  CacheAttention(const CacheShape& shape, int max_tokens);

  int n_tokens() const override { return n_tokens_; }
  int max_tokens() const override { return max_tokens_; }
  void BeginStep(int n_new) override;
  void Attend(int layer, const AttentionRows& rows, ThreadPool& threads, float* out) override;
  void EndStep() override;
  void EndPrompt() override;
  std::uint64_t HeldBytes() const override;

  static std::uint64_t HostBytes(const CacheShape& shape, int max_tokens);

 protected:
  struct Head {
    std::size_t idx;  // layer * n_kv_heads + kv_head
    int layer, kv_head;
    HeadStore store;
  };

  const CacheShape& shape() const { return shape_; }
  bool in_prompt() const { return in_prompt_; }
  std::span<Head> heads() { return heads_; }
  std::size_t n_heads_total() const { return heads_.size(); }

  // Keys before RoPE and values of a step's tokens, all KV heads, [n_tokens, kv_width] each.
  virtual void MapRows(int /*layer*/, int /*n_tokens*/, float* /*k*/, float* /*v*/) {}
  // Slots first .. of the store are new: keys after RoPE, rounded.
  virtual void OnAppended(Head& /*head*/, int /*first_slot*/) {}
  // Scaled queries after RoPE, [n_tokens, group, head_dim].
  virtual void MapQueries(Head& /*head*/, int /*n_tokens*/, float* /*q*/) {}
  // Before values are weighted: p [n_rows, stride], zero from n_visible on.
  virtual void MapProbabilities(const Head& /*head*/, std::span<const int> /*n_visible*/, float* /*p*/,
                                std::int64_t /*stride*/) {}
  // A tile of rows has attended; in decode the group's rows of one token. p as above, the largest n_visible given.
  virtual void OnAttended(Head& /*head*/, int /*n_rows*/, const float* /*p*/, std::int64_t /*stride*/,
                          int /*n_slots*/) {}
  virtual void OnPromptEnd() {}
  // Bytes that the method's real cache spends on this head.
  virtual std::uint64_t HeadBytes(const Head& head) const = 0;

 private:
  struct Scratch {
    std::vector<float> q, k, p;
    std::vector<int> n_visible;
  };
  void AppendRows(Head& head, const AttentionRows& rows, int begin, int n, Scratch& scratch);
  void PrepareQueries(Head& head, const AttentionRows& rows, int begin, int n, Scratch& scratch);
  void AttendTokens(Head& head, int n, int first_visible, Scratch& scratch, float* out);

  CacheShape shape_;
  int max_tokens_;
  int n_tokens_ = 0, n_new_ = 0;
  bool in_prompt_ = true;
  std::vector<Head> heads_;
  std::vector<float> k_rows_, v_rows_;  // [n_tokens, kv_width] of one step and layer
  std::vector<Scratch> scratch_;        // [threads]
};

}  // namespace zeroc
