// Measures what compression costs: decode-scored perplexity and KL divergence of text, and recall of planted facts, all
// through the real packed path. Single-threaded callers; the models spread their work over their own pool.
//
// Windows (design section 6): window i is BOS + tokens [i S, i S + C - 1). Its first C - S tokens are prefilled and
// packed, then the last S targets are scored while the rest is fed one token per step through decode, packing as it
// goes. Incomplete windows are left out. Methods never change the windows.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "libzeroc/base/status.h"
#include "libzeroc/base/thread_pool.h"
#include "libzeroc/kv/kv_format.h"
#include "libzeroc/model/sequence_attention.h"
#include "libzeroc/model/transformer.h"

namespace zeroc {

// One way to serve the model: a folded model with a profile's format, or the plain one with its own format or with a
// method that attends for itself.
struct ScoredMethod {
  Transformer* model = nullptr;
  std::shared_ptr<const KvFormat> format;
  std::shared_ptr<const AttentionMethod> attention = nullptr;  // instead of format
};

struct ScoreOptions {
  int context = 2048;          // C, tokens of a window, BOS included
  int stride = 1024;           // S, scored targets per window; 1 <= S < C
  int max_windows = 0;         // 0: all
  bool through_decode = true;  // false: the scored part runs as prefill chunks too (same visibility rule, faster)
  int batch_windows = 8;       // windows side by side
  std::uint64_t kv_bytes_max = std::uint64_t{4} << 30;  // memory for the windows' caches
  // First text token of every window, each with C - 1 tokens behind it; empty: the windows above.
  std::vector<std::int64_t> window_begins = {};
  // A file with the base's logits (BaseLogits): read where it exists, else written. Empty: the base is computed.
  std::string base_logits_file = {};
  ThreadPool* threads = nullptr;  // spreads the comparison of logits; may be the models' own pool. Not owned
  // The first `trunk_layers` layers of every method (not of the base) compute bit for bit what they do in `trunk`, a
  // method of the same model: they run once. Only with through_decode = false.
  ScoredMethod trunk = {};
  int trunk_layers = 0;
};

struct TextScore {
  double nll = 0;  // mean, nats per scored token
  double ppl = 0;  // exp(nll)
  std::int64_t tokens = 0;
  double bits_per_byte = 0;       // over the bytes of the scored tokens
  double kl = 0;                  // mean KL(p_base || p_method), nats per token
  double kv_bytes_per_token = 0;  // all KV bytes held at window end / C
  std::vector<double> token_nll;  // per scored token, for paired tests
  std::vector<double> token_kl;
};

// window_begins of at most max_windows of the windows that a text of n_tokens holds, spread evenly over it.
std::vector<std::int64_t> SpreadWindows(std::int64_t n_tokens, const ScoreOptions& options);

// done in [0, 1]; returning false cancels (kCancelled).
using ProgressFn = std::function<bool(double done)>;

// Scores `base` and every method on the same windows in lockstep; the result's first entry is the base (kl = 0).
// token_bytes[i]: bytes of text that token i stands for. kInvalidArgument when the text holds no full window, or the
// context is beyond the model; as BaseLogits::Open says for its file. The base's kv_bytes_per_token is 0 when its
// logits come from a file.
Result<std::vector<TextScore>> ScoreText(std::span<const std::int32_t> tokens,
                                         std::span<const std::int32_t> token_bytes, std::int32_t bos_id,
                                         const ScoredMethod& base, std::span<const ScoredMethod> methods,
                                         const ScoreOptions& options, const ProgressFn& progress = nullptr);

struct RecallCase {
  std::vector<std::int32_t> prompt;  // BOS included
  std::vector<std::int32_t> answer;  // at least one token
  std::string group;
};

struct RecallScore {
  double accuracy = 0;  // share of cases whose greedy continuation is the answer, token by token
  std::map<std::string, double> by_group;
  double kv_bytes_per_token = 0;  // mean over cases, at the end of the prompt
};

Result<RecallScore> ScoreRecall(std::span<const RecallCase> cases, const ScoredMethod& method,
                                const ProgressFn& progress = nullptr);

}  // namespace zeroc
