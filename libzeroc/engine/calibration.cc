#include "libzeroc/engine/calibration.h"

#include <algorithm>
#include <string>

#include "libzeroc/kv/owned_pool.h"

namespace zeroc {
namespace {

constexpr int kChunk = 512;  // tokens per forward step

class MomentObserver : public ForwardObserver {
 public:
  explicit MomentObserver(MomentAccumulator& moments) : moments_(moments) {}
  bool WantsProjections() const override { return true; }
  void OnProjections(int layer, int first_pos, int n_tokens, const HeadRows& q, const HeadRows& k,
                     const HeadRows& v) override {
    moments_.Add(layer, first_pos, n_tokens, q, k, v);
  }

 private:
  MomentAccumulator& moments_;
};

struct Window {
  const CalibrationSource* source;
  std::size_t begin;  // of the text's tokens; BOS stands before them
};

// Full windows of all texts, thinned evenly to the limit.
std::vector<Window> ChooseWindows(std::span<const CalibrationSource> texts, std::size_t n_text, int max_windows) {
  std::vector<Window> all;
  for (const CalibrationSource& text : texts) {
    for (std::size_t begin = 0; begin + n_text <= text.tokens.size(); begin += n_text) all.push_back({&text, begin});
  }
  const auto limit = static_cast<std::size_t>(max_windows);
  if (max_windows <= 0 || all.size() <= limit) return all;
  std::vector<Window> chosen;
  for (std::size_t i = 0; i < limit; ++i) chosen.push_back(all[i * all.size() / limit]);
  return chosen;
}

Status GatherMoments(LlamaModel& model, std::span<const Window> windows, std::int32_t bos_id, int context,
                     MomentAccumulator& moments, const CalibrationProgress& progress) {
  ZEROC_ASSIGN_OR_RETURN(const auto format, model.Format("none"));
  ZEROC_ASSIGN_OR_RETURN(const auto pool, OwnedPool::Create(*format, 1, context, kChunk));
  MomentObserver observer(moments);
  for (std::size_t w = 0; w < windows.size(); ++w) {
    std::vector<std::int32_t> input{bos_id};
    const auto& tokens = windows[w].source->tokens;
    const auto begin = tokens.begin() + static_cast<std::ptrdiff_t>(windows[w].begin);
    input.insert(input.end(), begin, begin + context - 1);
    ZEROC_ASSIGN_OR_RETURN(const auto cache, SequenceKv::Create(pool->pool(), format, context, kChunk));
    for (int first = 0; first < context; first += kChunk) {
      const int n = std::min(kChunk, context - first);
      const ForwardSequence sequence{
          cache.get(), std::span(input).subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(n)), 0};
      ZEROC_RETURN_IF_ERROR(model.Forward({&sequence, 1}, nullptr, &observer));
    }
    if (progress != nullptr && !progress("moments", static_cast<double>(w + 1) / static_cast<double>(windows.size()))) {
      return Cancelled("calibration was stopped");
    }
  }
  return OkStatus();
}

Status SolveMaps(const Checkpoint& checkpoint, const MomentAccumulator& moments, const BasisOptions& options,
                 PlanContents* contents, const CalibrationProgress& progress) {
  const ModelConfig& c = checkpoint.config();
  for (int layer = 0; layer < c.n_layers; ++layer) {
    ZEROC_ASSIGN_OR_RETURN(const TensorView w_o,
                           checkpoint.Tensor("model.layers." + std::to_string(layer) + ".self_attn.o_proj.weight",
                                             {c.hidden_size, c.n_heads * c.head_dim}));
    ZEROC_ASSIGN_OR_RETURN(LayerMaps maps, SolveLayer(moments, layer, w_o, options));
    contents->layers.push_back(std::move(maps));
    if (progress != nullptr && !progress("bases", static_cast<double>(layer + 1) / static_cast<double>(c.n_layers))) {
      return Cancelled("calibration was stopped");
    }
  }
  return OkStatus();
}

CalibrationText Record(const CalibrationSource& source) {
  return {source.name, source.hash, static_cast<std::int64_t>(source.tokens.size())};
}

ProgressFn Stage(const CalibrationProgress& progress, const char* name, double begin, double end) {
  if (progress == nullptr) return nullptr;
  return [&progress, name, begin, end](double done) { return progress(name, begin + (end - begin) * done); };
}

}  // namespace

Result<Plan> Calibrate(std::shared_ptr<const Checkpoint> checkpoint, const kernels::Ops& ops, ThreadPool& threads,
                       std::span<const CalibrationSource> texts, const CalibrationSource& heldout,
                       std::span<const RecallCase> recall_cases, std::int32_t bos_id, const CalibrationOptions& options,
                       const CalibrationProgress& progress) {
  if (options.context < 2 || options.context > checkpoint->config().max_positions) {
    return InvalidArgument("calibration context " + std::to_string(options.context) + " is not in [2, " +
                           std::to_string(checkpoint->config().max_positions) + "]");
  }
  const std::vector<Window> windows =
      ChooseWindows(texts, static_cast<std::size_t>(options.context - 1), options.max_windows);
  if (windows.empty()) {
    return InvalidArgument("calibration text too short: no text holds a window of " + std::to_string(options.context) +
                           " tokens");
  }
  ZEROC_ASSIGN_OR_RETURN(const auto plain, LlamaModel::Open(checkpoint, nullptr, ops, threads));
  PlanContents contents;
  contents.model_fingerprint = checkpoint->fingerprint();
  contents.geometry = GeometryOf(checkpoint->config());
  MomentAccumulator moments(contents.geometry);
  ZEROC_RETURN_IF_ERROR(GatherMoments(*plain, windows, bos_id, options.context, moments, progress));
  ZEROC_RETURN_IF_ERROR(SolveMaps(*checkpoint, moments, options.basis, &contents, progress));
  for (const CalibrationSource& text : texts) contents.calibration.texts.push_back(Record(text));
  contents.calibration.heldout.push_back(Record(heldout));
  contents.calibration.context_tokens = options.context;
  contents.calibration.skip_tokens = moments.skip_tokens();
  contents.calibration.n_windows = static_cast<std::int64_t>(windows.size());
  contents.calibration.seed = options.seed;
  contents.calibration.damping = options.basis.damping;
  contents.ladder = StandardLadder(contents.geometry);

  ZEROC_ASSIGN_OR_RETURN(Plan unmeasured, Plan::Create(contents));
  const auto plan = std::make_shared<const Plan>(std::move(unmeasured));
  ZEROC_ASSIGN_OR_RETURN(const auto folded, LlamaModel::Open(checkpoint, plan, ops, threads));
  ScoredMethod base{plain.get(), nullptr};
  ZEROC_ASSIGN_OR_RETURN(base.format, plain->Format("none"));
  std::vector<ScoredMethod> methods;
  for (const Profile& profile : contents.ladder) {
    ZEROC_ASSIGN_OR_RETURN(auto format, folded->Format(profile.name));
    methods.push_back({folded.get(), std::move(format)});
  }
  ZEROC_ASSIGN_OR_RETURN(const std::vector<TextScore> scores,
                         ScoreText(heldout.tokens, heldout.token_bytes, bos_id, base, methods, options.score,
                                   Stage(progress, "measure", 0, 1)));
  contents.ppl_base = scores[0].ppl;
  for (std::size_t i = 0; i < methods.size(); ++i) {
    std::optional<double> recall;
    if (!recall_cases.empty()) {
      const double n = static_cast<double>(methods.size());
      const double at = static_cast<double>(i) / n;
      ZEROC_ASSIGN_OR_RETURN(const RecallScore score,
                             ScoreRecall(recall_cases, methods[i], Stage(progress, "recall", at, at + 1 / n)));
      recall = score.accuracy;
    }
    Profile& profile = contents.ladder[i];
    profile.cost = MeasuredCost(contents.ppl_base, scores[i + 1].ppl - contents.ppl_base, scores[i + 1].kl, recall);
  }
  return Plan::Create(std::move(contents));
}

}  // namespace zeroc
