#include "libzeroc/baselines/methods.h"

#include <algorithm>
#include <cmath>
#include <new>
#include <random>

#include "libzeroc/baselines/evicting_caches.h"
#include "libzeroc/baselines/low_rank_caches.h"
#include "libzeroc/baselines/quantized_caches.h"

namespace zeroc {
namespace {

constexpr const char* kNames[] = {"fp8", "int8", "kivi4", "kivi2", "h2o", "snapkv", "palu", "hack", "zeroc-paper"};

using MakeCache = std::function<std::unique_ptr<SequenceAttention>(int max_tokens)>;

class Baseline final : public AttentionMethod {
 public:
  Baseline(const CacheShape& shape, std::string name, MakeCache make)
      : shape_(shape), name_(std::move(name)), make_(std::move(make)) {}

  std::uint64_t BytesNeeded(int max_tokens) const override { return CacheAttention::HostBytes(shape_, max_tokens); }

  Result<std::unique_ptr<SequenceAttention>> NewSequence(int max_tokens) const override {
    if (max_tokens < 1) return InvalidArgument(name_ + ": a sequence of " + std::to_string(max_tokens) + " tokens");
    try {
      return make_(max_tokens);
    } catch (const std::bad_alloc&) {
      return ResourceExhausted(name_ + ": no memory for a sequence of " + std::to_string(max_tokens) + " tokens (" +
                               std::to_string(BytesNeeded(max_tokens) >> 20) + " MiB)");
    }
  }

 private:
  CacheShape shape_;
  std::string name_;
  MakeCache make_;
};

Result<MakeCache> MakeLowRank(Transformer& model, const CacheShape& shape, const BaselineOptions& options,
                              double bits) {
  ZEROC_ASSIGN_OR_RETURN(const std::vector<LayerStatistics> statistics,
                         GatherStatistics(model, options.calibration, options.progress));
  if (options.name == "palu") {
    ZEROC_ASSIGN_OR_RETURN(PaluBases solved, SolvePalu(shape, statistics, bits));
    const auto bases = std::make_shared<const PaluBases>(std::move(solved));
    return MakeCache([shape, bases](int n) { return NewPaluCache(shape, n, bases); });
  }
  ZEROC_ASSIGN_OR_RETURN(PaperBases solved, SolvePaper(model, shape, statistics, bits));
  const auto bases = std::make_shared<const PaperBases>(std::move(solved));
  return MakeCache([shape, bases](int n) { return NewPaperCache(shape, n, bases); });
}

Result<MakeCache> MakeByName(Transformer& model, const CacheShape& shape, const BaselineOptions& options, double bits) {
  const std::string& name = options.name;
  const double share = bits / (8 * shape.exact_bytes);
  if (name == "exact") return MakeCache([shape](int n) { return NewExactCache(shape, n); });
  if (name == "fp8") return MakeCache([shape](int n) { return NewFp8Cache(shape, n); });
  if (name == "int8") return MakeCache([shape](int n) { return NewInt8Cache(shape, n); });
  if (name == "kivi4") return MakeCache([shape](int n) { return NewKiviCache(shape, n, 4); });
  if (name == "kivi2") return MakeCache([shape](int n) { return NewKiviCache(shape, n, 2); });
  if (name == "hack") return MakeCache([shape](int n) { return NewHackCache(shape, n); });
  if (name == "h2o") {
    return MakeCache(
        [shape, share](int n) { return NewH2oCache(shape, n, std::max(2, static_cast<int>(std::lround(share * n)))); });
  }
  if (name == "snapkv")
    return MakeCache([shape, share](int n) { return NewSnapKvCache(shape, n, std::min(1.0, share)); });
  return MakeLowRank(model, shape, options, bits);
}

std::int32_t Draw(const float* logits, std::size_t n, std::mt19937_64& random) {
  const float max = *std::max_element(logits, logits + n);
  double sum = 0;
  for (std::size_t i = 0; i < n; ++i) sum += std::exp(logits[i] - max);
  double left = static_cast<double>(random() >> 11) * 0x1p-53 * sum;
  for (std::size_t i = 0; i < n; ++i) {
    left -= std::exp(logits[i] - max);
    if (left < 0) return static_cast<std::int32_t>(i);
  }
  return static_cast<std::int32_t>(n - 1);
}

}  // namespace

std::span<const char* const> BaselineNames() { return kNames; }

bool IsBaseline(const std::string& name) {
  return std::find(std::begin(kNames), std::end(kNames), name) != std::end(kNames);
}

bool HasFreeSize(const std::string& name) { return DefaultBits(name) > 0; }

double DefaultBits(const std::string& name) {
  if (name == "h2o") return 3.2;   // 20 % of the tokens
  if (name == "snapkv") return 4;  // a quarter of the prompt: 1,024 of 4,096 tokens
  if (name == "palu") return 8;    // half the rank
  if (name == "zeroc-paper") return 8;
  return 0;
}

bool NeedsCalibration(const std::string& name) { return name == "palu" || name == "zeroc-paper"; }

Result<std::shared_ptr<const AttentionMethod>> MakeBaseline(Transformer& model, const BaselineOptions& options) {
  if (!IsBaseline(options.name) && options.name != "exact") {
    return InvalidArgument("there is no baseline '" + options.name + "'");
  }
  if (options.kv_bits != 0 && !HasFreeSize(options.name)) {
    return InvalidArgument("method " + options.name + " has one size and takes no bits");
  }
  const CacheShape shape = CacheShape::Of(model);
  const double bits = options.kv_bits == 0 ? DefaultBits(options.name) : options.kv_bits;
  if (!(bits >= 0 && bits <= 8 * shape.exact_bytes)) {
    return InvalidArgument("method " + options.name + ": " + std::to_string(bits) + " bits are not in (0, " +
                           std::to_string(8 * shape.exact_bytes) + "]");
  }
  ZEROC_ASSIGN_OR_RETURN(MakeCache make, MakeByName(model, shape, options, bits));
  return std::shared_ptr<const AttentionMethod>(std::make_shared<Baseline>(shape, options.name, std::move(make)));
}

Result<std::vector<std::vector<std::int32_t>>> SampleWindows(Transformer& model, std::int32_t bos_id, int n_windows,
                                                             int context, std::uint64_t seed,
                                                             const std::function<bool(double)>& progress) {
  const CacheShape shape = CacheShape::Of(model);
  const auto vocab = static_cast<std::size_t>(model.config().vocab_size);
  const auto n = static_cast<std::size_t>(n_windows);
  std::vector<std::unique_ptr<SequenceAttention>> caches;
  for (std::size_t w = 0; w < n; ++w) caches.push_back(NewExactCache(shape, context));
  std::vector<std::vector<std::int32_t>> windows(n, {bos_id});
  std::vector<float> logits(n * vocab);
  std::mt19937_64 random(seed);
  for (int t = 1; t < context; ++t) {
    std::vector<ForwardSequence> steps;
    for (std::size_t w = 0; w < n; ++w) {
      steps.push_back({.tokens = std::span(windows[w]).last(1), .n_logits = 1, .attention = caches[w].get()});
    }
    ZEROC_RETURN_IF_ERROR(model.Forward(steps, logits.data()));
    for (std::size_t w = 0; w < n; ++w) windows[w].push_back(Draw(logits.data() + w * vocab, vocab, random));
    if (progress != nullptr && !progress(static_cast<double>(t + 1) / context))
      return Cancelled("sampling was stopped");
  }
  return windows;
}

}  // namespace zeroc
