#include "libzeroc/engine/scoring.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>

#include "libzeroc/base/check.h"
#include "libzeroc/compression/canonical.h"
#include "libzeroc/engine/base_logits.h"
#include "libzeroc/engine/sequence_cache.h"
#include "libzeroc/kv/owned_pool.h"

namespace zeroc {
namespace {

constexpr int kPrefillChunk = 512;  // tokens per prefill step
constexpr int kScoreChunk = 256;    // scored tokens per step when they do not go through decode

// log softmax of one row in float64: out[i] = logits[i] - logsumexp.
double LogSumExp(const float* logits, std::size_t n) {
  const double max = *std::max_element(logits, logits + n);
  double sum = 0;
  for (std::size_t i = 0; i < n; ++i) sum += std::exp(logits[i] - max);
  return max + std::log(sum);
}

// Room for the caches of one method. A method that attends for itself needs no blocks.
Result<std::unique_ptr<OwnedPool>> OpenPool(const ScoredMethod& method, int n_sequences, int max_tokens, int step) {
  if (method.attention != nullptr) return std::unique_ptr<OwnedPool>();
  return OwnedPool::Create(*method.format, n_sequences, max_tokens, step, method.model->kv_memory());
}

Result<SequenceCache> NewCache(const ScoredMethod& method, OwnedPool* pool, int max_tokens, int step) {
  if (method.attention != nullptr) return SequenceCache::Of(*method.attention, max_tokens);
  return SequenceCache::InBlocks(pool->pool(), method.format, max_tokens, step);
}

std::uint64_t CacheBytes(const ScoredMethod& method, int max_tokens) {
  if (method.attention != nullptr) return method.attention->BytesNeeded(max_tokens);
  return SequenceKv::BytesNeeded(*method.format, max_tokens, kPrefillChunk);
}

// What a lane computes: everything, the layers that others share, or those behind them.
enum class Part { kAll, kTrunk, kBehindTrunk };

// The caches of one method for the windows that run side by side, and the logits of its last step.
struct Lane {
  ScoredMethod method;
  Part part = Part::kAll;
  std::unique_ptr<OwnedPool> pool;
  std::vector<SequenceCache> caches;  // [windows of the batch]
  std::vector<float> logits;          // [windows, rows, vocab]
};

// Of one token under one method.
struct Divergence {
  double nll = 0;
  double kl = 0;
};

class TextScorer {
 public:
  TextScorer(std::span<const std::int32_t> tokens, std::span<const std::int32_t> token_bytes, std::int32_t bos_id,
             const ScoreOptions& options)
      : tokens_(tokens), token_bytes_(token_bytes), bos_id_(bos_id), options_(options) {}

  Result<std::vector<TextScore>> Run(const ScoredMethod& base, std::span<const ScoredMethod> methods,
                                     const ProgressFn& progress);

 private:
  std::int32_t TokenAt(int window, int index) const {  // index 0 is BOS
    return index == 0 ? bos_id_ : tokens_[TextIndex(window, index)];
  }
  std::size_t TextIndex(int window, int index) const {
    return static_cast<std::size_t>(begins_[static_cast<std::size_t>(window)] + index - 1);
  }

  Status Check(const ScoredMethod& base) const;
  Status OpenBaseLogits(const ScoredMethod& base, bool compared);
  bool base_is_kept() const { return base_logits_ != nullptr && base_logits_->complete(); }
  void KeepOrTakeBase(int first_window, int n_windows, int n_rows, int first_target, Lane& base) const;
  Status ChooseWindows();
  void ScoreRow(std::size_t row, std::size_t target, std::vector<Lane>& lanes, std::span<Divergence> out) const;
  Status OpenLane(const ScoredMethod& method, int n_windows, Part part, Lane* lane) const;
  Status Prefill(int first_window, int n_windows, Lane& lane);
  Status Feed(int first_window, int n_windows, int begin, int n_new, Lane& lane);
  Status Forward(std::span<const ForwardSequence> sequences, int n_new, int batch_window, int begin, float* logits,
                 Lane& lane);
  Status RunTrunk(int first_window, int n_windows, Lane& trunk);
  void Score(int first_window, int n_windows, int n_rows, int first_target, std::vector<Lane>& lanes,
             std::vector<TextScore>& scores) const;
  Status RunBatch(int first_window, int n_windows, std::vector<Lane>& lanes, std::vector<TextScore>& scores,
                  const std::function<bool(int)>& on_scored);
  float* TrunkRows(int window_of_batch, int index) {
    return trunk_rows_.data() + (std::ptrdiff_t{window_of_batch} * options_.context + index) * hidden_;
  }

  std::span<const std::int32_t> tokens_;
  std::span<const std::int32_t> token_bytes_;
  std::int32_t bos_id_;
  ScoreOptions options_;
  std::vector<std::int64_t> begins_;  // [windows] first text token
  std::size_t vocab_ = 0;
  std::unique_ptr<BaseLogits> base_logits_;  // null without a file
  std::ptrdiff_t hidden_ = 0;
  std::vector<float> trunk_rows_;  // [windows of the batch, context, hidden]; empty without a trunk
  std::vector<float> step_rows_;   // of one step
};

Status TextScorer::Check(const ScoredMethod& base) const {
  const std::string context = std::to_string(options_.context);
  if (options_.stride < 1 || options_.stride >= options_.context) {
    return InvalidArgument("stride " + std::to_string(options_.stride) + " is not in [1, context " + context + ")");
  }
  if (options_.context > base.model->config().max_positions) {
    return InvalidArgument("context " + context + " is beyond the model's " +
                           std::to_string(base.model->config().max_positions) + " positions");
  }
  if (tokens_.size() != token_bytes_.size()) return InvalidArgument("token_bytes does not match tokens");
  if (static_cast<int>(tokens_.size()) < options_.context - 1) {
    return InvalidArgument("the text has " + std::to_string(tokens_.size()) + " tokens, one window of context " +
                           context + " needs " + std::to_string(options_.context - 1));
  }
  return OkStatus();
}

Status TextScorer::ChooseWindows() {
  begins_ = options_.window_begins;
  const auto n_tokens = static_cast<std::int64_t>(tokens_.size());
  for (const std::int64_t begin : begins_) {
    if (begin >= 0 && begin + options_.context - 1 <= n_tokens) continue;
    return InvalidArgument("a scored window begins at token " + std::to_string(begin) + " of " +
                           std::to_string(n_tokens));
  }
  if (!begins_.empty()) return OkStatus();
  std::int64_t n_windows = (n_tokens - (options_.context - 1)) / options_.stride + 1;
  if (options_.max_windows > 0) n_windows = std::min<std::int64_t>(n_windows, options_.max_windows);
  for (std::int64_t w = 0; w < n_windows; ++w) begins_.push_back(w * options_.stride);
  return OkStatus();
}

Status TextScorer::OpenLane(const ScoredMethod& method, int n_windows, Part part, Lane* lane) const {
  lane->method = method;
  lane->part = part;
  const int step = std::min(kPrefillChunk, options_.context);
  ZEROC_ASSIGN_OR_RETURN(lane->pool, OpenPool(method, n_windows, options_.context, step));
  const auto rows = static_cast<std::size_t>(options_.through_decode ? 1 : kScoreChunk);
  lane->logits.resize(static_cast<std::size_t>(n_windows) * rows * vocab_);
  return OkStatus();
}

// One step of the lane: n_new tokens of each sequence, which are windows batch_window .. of the batch, from `begin` on.
Status TextScorer::Forward(std::span<const ForwardSequence> sequences, int n_new, int batch_window, int begin,
                           float* logits, Lane& lane) {
  Transformer& model = *lane.method.model;
  if (lane.part == Part::kAll) return model.Forward(sequences, logits);
  const std::ptrdiff_t n_values = n_new * hidden_;
  step_rows_.resize(sequences.size() * static_cast<std::size_t>(n_values));
  LayerRange layers;
  (lane.part == Part::kTrunk ? layers.end : layers.begin) = options_.trunk_layers;
  layers.input = layers.output = step_rows_.data();
  float* rows = step_rows_.data();
  if (lane.part == Part::kTrunk) ZEROC_RETURN_IF_ERROR(model.Forward(sequences, logits, nullptr, layers));
  for (std::size_t i = 0; i < sequences.size(); ++i, rows += n_values) {
    float* kept = TrunkRows(batch_window + static_cast<int>(i), begin);
    lane.part == Part::kTrunk ? std::copy_n(rows, n_values, kept) : std::copy_n(kept, n_values, rows);
  }
  return lane.part == Part::kTrunk ? OkStatus() : model.Forward(sequences, logits, nullptr, layers);
}

// Leaves one row of logits per window: the prediction of the first scored target.
Status TextScorer::Prefill(int first_window, int n_windows, Lane& lane) {
  const int n_prefill = options_.context - options_.stride;
  lane.caches.clear();
  std::vector<std::int32_t> input;
  for (int w = 0; w < n_windows; ++w) {
    ZEROC_ASSIGN_OR_RETURN(SequenceCache cache, NewCache(lane.method, lane.pool.get(), options_.context,
                                                         std::min(kPrefillChunk, options_.context)));
    for (int begin = 0; begin < n_prefill; begin += kPrefillChunk) {
      const int end = std::min(n_prefill, begin + kPrefillChunk);
      input.clear();
      for (int i = begin; i < end; ++i) input.push_back(TokenAt(first_window + w, i));
      const ForwardSequence sequence = cache.Step(input, end == n_prefill ? 1 : 0);
      float* logits = lane.logits.data() + static_cast<std::size_t>(w) * vocab_;
      ZEROC_RETURN_IF_ERROR(Forward({&sequence, 1}, end - begin, w, begin, logits, lane));
    }
    cache.EndPrompt();
    lane.caches.push_back(std::move(cache));
  }
  return OkStatus();
}

// Feeds tokens [begin, begin + n_new) of every window; logits [windows, n_new, vocab], none for a window's last token.
Status TextScorer::Feed(int first_window, int n_windows, int begin, int n_new, Lane& lane) {
  std::vector<std::vector<std::int32_t>> inputs(static_cast<std::size_t>(n_windows));
  std::vector<ForwardSequence> sequences;
  const bool nothing_left = begin + 1 == options_.context;
  for (int w = 0; w < n_windows; ++w) {
    auto& input = inputs[static_cast<std::size_t>(w)];
    for (int i = begin; i < begin + n_new; ++i) input.push_back(TokenAt(first_window + w, i));
    sequences.push_back(lane.caches[static_cast<std::size_t>(w)].Step(input, nothing_left ? 0 : n_new));
  }
  return Forward(sequences, n_new, 0, begin, lane.logits.data(), lane);
}

// In the very steps that the methods take, so that the rows are theirs to the bit.
Status TextScorer::RunTrunk(int first_window, int n_windows, Lane& trunk) {
  ZEROC_RETURN_IF_ERROR(Prefill(first_window, n_windows, trunk));
  for (int next = options_.context - options_.stride; next < options_.context;) {
    const int n_new = std::min(kScoreChunk, options_.context - next);
    ZEROC_RETURN_IF_ERROR(Feed(first_window, n_windows, next, n_new, trunk));
    next += n_new;
  }
  trunk.caches.clear();
  return OkStatus();
}

// Row `row` of every lane's logits; lane 0 is the base.
void TextScorer::ScoreRow(std::size_t row, std::size_t target, std::vector<Lane>& lanes,
                          std::span<Divergence> out) const {
  std::vector<double> base_log_p(vocab_), base_p(vocab_);
  for (std::size_t l = 0; l < lanes.size(); ++l) {
    const float* logits = lanes[l].logits.data() + row * vocab_;
    const double lse = LogSumExp(logits, vocab_);
    out[l] = {lse - logits[target], 0};
    for (std::size_t i = 0; i < vocab_; ++i) {
      if (l == 0) {
        base_log_p[i] = logits[i] - lse;
        base_p[i] = std::exp(base_log_p[i]);
      } else {
        out[l].kl += base_p[i] * (base_log_p[i] - (logits[i] - lse));
      }
    }
  }
}

// Alone (not compared with anything) the base is computed in any case: its bytes are asked for.
Status TextScorer::OpenBaseLogits(const ScoredMethod& base, bool compared) {
  if (options_.base_logits_file.empty()) return OkStatus();
  CanonicalHash key;
  key.Text(base.model->checkpoint().fingerprint());
  key.Text(base.model->ops().name);
  key.Text(base.model->ops().isa());
  key.Int(base.attention != nullptr);
  key.Int(options_.through_decode);
  key.Int(options_.context);
  key.Int(options_.stride);
  for (std::size_t w = 0; w < begins_.size(); ++w) {
    for (int i = 0; i < options_.context; ++i) key.Int(TokenAt(static_cast<int>(w), i));
  }
  ZEROC_ASSIGN_OR_RETURN(base_logits_, BaseLogits::Open(options_.base_logits_file, key.Hex(),
                                                        static_cast<std::int64_t>(begins_.size()) * options_.stride,
                                                        static_cast<std::int64_t>(vocab_)));
  if (base_logits_->complete() && !compared) base_logits_ = nullptr;
  return OkStatus();
}

// The base's rows for targets first_target ..: into the file, or from it.
void TextScorer::KeepOrTakeBase(int first_window, int n_windows, int n_rows, int first_target, Lane& base) const {
  if (base_logits_ == nullptr) return;
  const int n_used = std::min(n_rows, options_.context - first_target);
  for (int w = 0; w < n_windows; ++w) {
    for (int r = 0; r < n_used; ++r) {
      const std::int64_t row =
          std::int64_t{first_window + w} * options_.stride + first_target + r - (options_.context - options_.stride);
      float* logits = base.logits.data() + static_cast<std::size_t>(w * n_rows + r) * vocab_;
      if (base_logits_->complete()) {
        std::copy_n(base_logits_->Row(row).data(), vocab_, logits);
      } else {
        base_logits_->Write(row, logits);
      }
    }
  }
}

// Scores targets first_target .. of every window from the rows that each lane holds.
void TextScorer::Score(int first_window, int n_windows, int n_rows, int first_target, std::vector<Lane>& lanes,
                       std::vector<TextScore>& scores) const {
  const int n_used = std::min(n_rows, options_.context - first_target);
  if (n_used <= 0) return;
  KeepOrTakeBase(first_window, n_windows, n_rows, first_target, lanes.front());
  const std::size_t n_items = static_cast<std::size_t>(n_windows) * static_cast<std::size_t>(n_used);
  std::vector<Divergence> rows(n_items * lanes.size());
  const auto score = [&](std::size_t item, int) {
    const int window = static_cast<int>(item) / n_used;
    const int r = static_cast<int>(item) % n_used;
    const auto row = static_cast<std::size_t>(window) * static_cast<std::size_t>(n_rows) + static_cast<std::size_t>(r);
    ScoreRow(row, static_cast<std::size_t>(TokenAt(first_window + window, first_target + r)), lanes,
             std::span(rows).subspan(item * lanes.size(), lanes.size()));
  };
  if (options_.threads != nullptr) {
    options_.threads->ParallelFor(n_items, score);
  } else {
    for (std::size_t item = 0; item < n_items; ++item) score(item, 0);
  }
  for (std::size_t item = 0; item < n_items; ++item) {
    for (std::size_t l = 0; l < lanes.size(); ++l) {
      scores[l].token_nll.push_back(rows[item * lanes.size() + l].nll);
      scores[l].token_kl.push_back(rows[item * lanes.size() + l].kl);
    }
  }
}

Status TextScorer::RunBatch(int first_window, int n_windows, std::vector<Lane>& lanes, std::vector<TextScore>& scores,
                            const std::function<bool(int)>& on_scored) {
  const std::span<Lane> computed = std::span(lanes).subspan(base_is_kept() ? 1 : 0);
  for (Lane& lane : computed) ZEROC_RETURN_IF_ERROR(Prefill(first_window, n_windows, lane));
  int next = options_.context - options_.stride;  // the target that the held logits predict, and the token to feed next
  Score(first_window, n_windows, 1, next, lanes, scores);
  while (next < options_.context) {
    const int n_new = std::min(options_.through_decode ? 1 : kScoreChunk, options_.context - next);
    for (Lane& lane : computed) ZEROC_RETURN_IF_ERROR(Feed(first_window, n_windows, next, n_new, lane));
    Score(first_window, n_windows, n_new, next + 1, lanes, scores);
    next += n_new;
    if (!on_scored(n_new * n_windows)) return Cancelled("scoring was stopped");
  }
  for (std::size_t l = 0; l < lanes.size(); ++l) {
    for (const SequenceCache& cache : lanes[l].caches) {
      scores[l].kv_bytes_per_token += static_cast<double>(cache.HeldBytes()) / options_.context;
    }
    lanes[l].caches.clear();
  }
  return OkStatus();
}

Result<std::vector<TextScore>> TextScorer::Run(const ScoredMethod& base, std::span<const ScoredMethod> methods,
                                               const ProgressFn& progress) {
  ZEROC_RETURN_IF_ERROR(Check(base));
  vocab_ = static_cast<std::size_t>(base.model->config().vocab_size);
  ZEROC_RETURN_IF_ERROR(ChooseWindows());
  ZEROC_RETURN_IF_ERROR(OpenBaseLogits(base, !methods.empty()));
  const int n_windows = static_cast<int>(begins_.size());

  std::uint64_t window_bytes = CacheBytes(base, options_.context);
  for (const ScoredMethod& m : methods) window_bytes += CacheBytes(m, options_.context);
  if (options_.trunk_layers > 0) window_bytes += CacheBytes(options_.trunk, options_.context);
  const auto fit = static_cast<int>(std::max<std::uint64_t>(1, options_.kv_bytes_max / window_bytes));
  const int batch = std::min({n_windows, std::max(1, options_.batch_windows), fit});

  std::vector<Lane> lanes(1 + methods.size());
  ZEROC_RETURN_IF_ERROR(OpenLane(base, batch, Part::kAll, &lanes[0]));
  const bool has_trunk = options_.trunk_layers > 0 && !methods.empty();
  const Part part = has_trunk ? Part::kBehindTrunk : Part::kAll;
  for (std::size_t m = 0; m < methods.size(); ++m) {
    ZEROC_CHECK(!has_trunk || methods[m].model == options_.trunk.model, m);
    ZEROC_RETURN_IF_ERROR(OpenLane(methods[m], batch, part, &lanes[m + 1]));
  }
  Lane trunk;
  if (has_trunk) {
    ZEROC_CHECK(!options_.through_decode, options_.trunk_layers);
    hidden_ = options_.trunk.model->config().hidden_size;
    trunk_rows_.resize(static_cast<std::size_t>(std::ptrdiff_t{batch} * options_.context * hidden_));
    ZEROC_RETURN_IF_ERROR(OpenLane(options_.trunk, batch, Part::kTrunk, &trunk));
  }

  std::vector<TextScore> scores(lanes.size());
  const double n_total = static_cast<double>(n_windows) * options_.stride;
  double n_scored = 0;
  const auto on_scored = [&](int n) {
    n_scored += n;
    return progress == nullptr || progress(n_scored / n_total);
  };
  for (int first = 0; first < n_windows; first += batch) {
    const int n = std::min(batch, n_windows - first);
    if (has_trunk) ZEROC_RETURN_IF_ERROR(RunTrunk(first, n, trunk));
    ZEROC_RETURN_IF_ERROR(RunBatch(first, n, lanes, scores, on_scored));
  }
  if (base_logits_ != nullptr && !base_logits_->complete()) ZEROC_RETURN_IF_ERROR(base_logits_->Finish());

  double bytes = 0;
  for (int w = 0; w < n_windows; ++w) {
    for (int i = options_.context - options_.stride; i < options_.context; ++i) bytes += token_bytes_[TextIndex(w, i)];
  }
  for (TextScore& score : scores) {
    score.tokens = static_cast<std::int64_t>(score.token_nll.size());
    const double sum = std::accumulate(score.token_nll.begin(), score.token_nll.end(), 0.0);
    score.nll = sum / static_cast<double>(score.tokens);
    score.ppl = std::exp(score.nll);
    score.bits_per_byte = sum / std::log(2.0) / bytes;
    score.kl = std::accumulate(score.token_kl.begin(), score.token_kl.end(), 0.0) / static_cast<double>(score.tokens);
    score.kv_bytes_per_token /= n_windows;
  }
  return scores;
}

// Whether greedy decoding after the prompt gives the answer, and the cache's size when the prompt is in.
Result<bool> RecallOne(const RecallCase& item, const ScoredMethod& method, OwnedPool* pool, std::vector<float>& logits,
                       double* kv_bytes_per_token) {
  const auto n_prompt = static_cast<int>(item.prompt.size());
  const int n_total = n_prompt + static_cast<int>(item.answer.size());
  ZEROC_ASSIGN_OR_RETURN(SequenceCache cache, NewCache(method, pool, n_total, kPrefillChunk));
  const std::span<const std::int32_t> prompt(item.prompt);
  for (int begin = 0; begin < n_prompt; begin += kPrefillChunk) {
    const int n = std::min(kPrefillChunk, n_prompt - begin);
    const ForwardSequence sequence = cache.Step(
        prompt.subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(n)), begin + n == n_prompt ? 1 : 0);
    ZEROC_RETURN_IF_ERROR(method.model->Forward({&sequence, 1}, logits.data()));
  }
  cache.EndPrompt();
  *kv_bytes_per_token = static_cast<double>(cache.HeldBytes()) / n_prompt;
  for (std::size_t i = 0; i < item.answer.size(); ++i) {
    const auto best = static_cast<std::int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
    if (best != item.answer[i]) return false;
    if (i + 1 == item.answer.size()) break;
    const ForwardSequence sequence = cache.Step({&item.answer[i], 1}, 1);
    ZEROC_RETURN_IF_ERROR(method.model->Forward({&sequence, 1}, logits.data()));
  }
  return true;
}

}  // namespace

std::vector<std::int64_t> SpreadWindows(std::int64_t n_tokens, const ScoreOptions& options) {
  const std::int64_t all = n_tokens < options.context - 1 ? 0 : (n_tokens - (options.context - 1)) / options.stride + 1;
  const std::int64_t n = options.max_windows > 0 ? std::min<std::int64_t>(all, options.max_windows) : all;
  std::vector<std::int64_t> begins;
  for (std::int64_t w = 0; w < n; ++w) begins.push_back(w * all / n * options.stride);
  return begins;
}

Result<std::vector<TextScore>> ScoreText(std::span<const std::int32_t> tokens,
                                         std::span<const std::int32_t> token_bytes, std::int32_t bos_id,
                                         const ScoredMethod& base, std::span<const ScoredMethod> methods,
                                         const ScoreOptions& options, const ProgressFn& progress) {
  return TextScorer(tokens, token_bytes, bos_id, options).Run(base, methods, progress);
}

Result<RecallScore> ScoreRecall(std::span<const RecallCase> cases, const ScoredMethod& method,
                                const ProgressFn& progress) {
  if (cases.empty()) return InvalidArgument("the recall set is empty");
  std::size_t longest = 0;
  for (std::size_t i = 0; i < cases.size(); ++i) {
    const std::size_t n = cases[i].prompt.size() + cases[i].answer.size();
    if (cases[i].prompt.empty() || cases[i].answer.empty() ||
        n > static_cast<std::size_t>(method.model->config().max_positions)) {
      return InvalidArgument("recall case " + std::to_string(i) + ": a prompt of " +
                             std::to_string(cases[i].prompt.size()) + " and an answer of " +
                             std::to_string(cases[i].answer.size()) + " tokens");
    }
    longest = std::max(longest, n);
  }
  ZEROC_ASSIGN_OR_RETURN(const auto pool, OpenPool(method, 1, static_cast<int>(longest), kPrefillChunk));
  std::vector<float> logits(static_cast<std::size_t>(method.model->config().vocab_size));
  RecallScore score;
  std::map<std::string, std::pair<int, int>> groups;  // right, all
  int n_right = 0;
  for (std::size_t i = 0; i < cases.size(); ++i) {
    double bytes = 0;
    ZEROC_ASSIGN_OR_RETURN(const bool right, RecallOne(cases[i], method, pool.get(), logits, &bytes));
    score.kv_bytes_per_token += bytes / static_cast<double>(cases.size());
    n_right += right ? 1 : 0;
    auto& [group_right, group_all] = groups[cases[i].group];
    group_right += right ? 1 : 0;
    ++group_all;
    if (progress != nullptr && !progress(static_cast<double>(i + 1) / static_cast<double>(cases.size()))) {
      return Cancelled("recall was stopped");
    }
  }
  score.accuracy = static_cast<double>(n_right) / static_cast<double>(cases.size());
  for (const auto& [name, counts] : groups) score.by_group[name] = static_cast<double>(counts.first) / counts.second;
  return score;
}

}  // namespace zeroc
