#include "libzeroc/engine/calibration.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <iterator>
#include <optional>
#include <string>
#include <utility>

#include "libzeroc/base/check.h"
#include "libzeroc/checkpoint/tensor_names.h"
#include "libzeroc/compression/canonical.h"
#include "libzeroc/engine/calibration_log.h"
#include "libzeroc/kv/owned_pool.h"

namespace zeroc {
namespace {

constexpr int kChunk = 512;  // tokens per forward step
constexpr std::int64_t kBaseFileBytesMax = std::int64_t{4} << 30;
// Where the uncompressed model's logits are kept while a calibration runs, behind partial_path.
constexpr const char* kProbeBase = ".probe";
constexpr const char* kDecodeBase = ".decode";

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

Status GatherMoments(Transformer& model, std::span<const Window> windows, std::int32_t bos_id, int context,
                     MomentAccumulator& moments, const CalibrationProgress& progress) {
  ZEROC_ASSIGN_OR_RETURN(const auto format, model.Format("none"));
  ZEROC_ASSIGN_OR_RETURN(const auto pool, OwnedPool::Create(*format, 1, context, kChunk, model.kv_memory()));
  MomentObserver observer(moments);
  for (std::size_t w = 0; w < windows.size(); ++w) {
    std::vector<std::int32_t> input{bos_id};
    const auto& tokens = windows[w].source->tokens;
    const auto begin = tokens.begin() + static_cast<std::ptrdiff_t>(windows[w].begin);
    input.insert(input.end(), begin, begin + context - 1);
    ZEROC_ASSIGN_OR_RETURN(const auto cache, SequenceKv::Create(pool->pool(), format, context, kChunk));
    for (int first = 0; first < context; first += kChunk) {
      const int n = std::min(kChunk, context - first);
      ForwardSequence sequence;
      sequence.kv = cache.get();
      sequence.tokens = std::span(input).subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(n));
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
    ZEROC_ASSIGN_OR_RETURN(const TensorView w_o, OutputWeight(checkpoint, layer));
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

// Part of a stage's progress bar.
ProgressFn Stage(const CalibrationProgress& progress, const char* name, double begin, double end) {
  if (progress == nullptr) return nullptr;
  return [&progress, name, begin, end](double done) { return progress(name, begin + (end - begin) * done); };
}

// Everything that the figures depend on.
std::string InputKey(const Checkpoint& checkpoint, const kernels::Ops& ops, std::span<const CalibrationSource> texts,
                     const CalibrationSource& heldout, std::span<const RecallCase> recall_cases,
                     const CalibrationOptions& options) {
  CanonicalHash hash;
  hash.Text("zeroc-calibration-inputs");
  hash.Text(checkpoint.fingerprint());
  hash.Text(ops.name);
  hash.Text(ops.isa());
  for (const CalibrationSource& text : texts) hash.Text(text.hash);
  hash.Text(heldout.hash);
  for (const RecallCase& item : recall_cases) {
    for (const std::vector<std::int32_t>* ids : {&item.prompt, &item.answer}) {
      hash.Int(static_cast<std::int64_t>(ids->size()));
      for (const std::int32_t id : *ids) hash.Int(id);
    }
  }
  const LadderOptions& ladder = options.ladder;
  for (const int value :
       {options.context, options.max_windows, options.probe_windows, options.score.context, options.score.stride,
        options.score.max_windows, options.basis.min_samples_per_dim, static_cast<int>(options.basis.kind),
        static_cast<int>(options.basis.undo_rotation), ladder.first_probes, ladder.second_probes,
        ladder.shapes.runs_max, static_cast<int>(ladder.shapes.affine), static_cast<int>(ladder.shapes.shared),
        static_cast<int>(ladder.layer_axis), static_cast<int>(ladder.mass), static_cast<int>(ladder.standard)}) {
    hash.Int(value);
  }
  hash.Int(static_cast<std::int64_t>(ladder.windows.size()));
  for (const WindowChoice& window : ladder.windows) {
    for (const int value : {window.recent_tokens, window.sink_tokens, static_cast<int>(window.young.size())}) {
      hash.Int(value);
    }
    for (const YoungChoice& tier : window.young) {
      for (const int value : {tier.blocks, tier.bits}) hash.Int(value);
    }
  }
  for (const int sink_tokens : ladder.sinks) hash.Int(sink_tokens);
  for (const double bits : ladder.rungs) hash.Text(std::to_string(bits));
  for (const double value : {options.basis.damping, options.budget, options.budget_rel}) {
    hash.Text(std::to_string(value));
  }
  return hash.Hex();
}

// Windows for probes, taken evenly over all texts, as one stream.
WindowedText ProbeText(std::span<const CalibrationSource> texts, int context, int max_windows) {
  WindowedText out;
  const auto n = static_cast<std::size_t>(context - 1);
  for (const Window& window : ChooseWindows(texts, n, max_windows)) {
    const auto begin = window.source->tokens.begin() + static_cast<std::ptrdiff_t>(window.begin);
    out.begins.push_back(static_cast<std::int64_t>(out.tokens.size()));
    out.tokens.insert(out.tokens.end(), begin, begin + static_cast<std::ptrdiff_t>(n));
  }
  return out;
}

class Calibrator {
 public:
  Calibrator(std::shared_ptr<const Checkpoint> checkpoint, const kernels::Ops& ops, ThreadPool& threads,
             std::span<const CalibrationSource> texts, const CalibrationSource& heldout,
             std::span<const RecallCase> recall_cases, std::int32_t bos_id, const CalibrationOptions& options,
             const CalibrationProgress& progress)
      : checkpoint_(std::move(checkpoint)),
        ops_(ops),
        threads_(threads),
        texts_(texts),
        heldout_(heldout),
        recall_cases_(recall_cases),
        bos_id_(bos_id),
        options_(options),
        progress_(progress) {
    options_.score.threads = &threads;
  }

  Result<Plan> Run();

 private:
  Status CheckInputs() const;
  Status MakeMaps();
  Status MakeLadder();
  Status MeetBudgets();
  Result<Profile> MeetBudget(const char* name, double budget, const std::function<Status(double)>& show);
  Status Measure(std::span<Profile> profiles, const ProgressFn& progress);
  ScoreOptions ScoreOf(ScoreOptions score, std::vector<std::int64_t> begins, const char* base_file) const;
  Status MeasureRecall();
  Status Show(const char* stage, double done) const {
    if (progress_ == nullptr || progress_(stage, done)) return OkStatus();
    return Cancelled("calibration was stopped");
  }
  std::string MapsPath() const { return options_.partial_path.empty() ? "" : options_.partial_path + ".maps"; }

  std::shared_ptr<const Checkpoint> checkpoint_;
  const kernels::Ops& ops_;
  ThreadPool& threads_;
  std::span<const CalibrationSource> texts_;
  const CalibrationSource& heldout_;
  std::span<const RecallCase> recall_cases_;
  std::int32_t bos_id_;
  CalibrationOptions options_;
  const CalibrationProgress& progress_;

  std::unique_ptr<CalibrationLog> log_;
  std::unique_ptr<Transformer> plain_, folded_;
  std::shared_ptr<const Plan> maps_;  // the plan without its ladder
  std::unique_ptr<LadderProbe> probe_;
  std::unique_ptr<MassTable> masses_;
  std::unique_ptr<LadderBuilder> builder_;
  std::vector<Profile> ladder_;
  std::size_t n_standard_ = 0;  // the ladder's first
};

Status Calibrator::CheckInputs() const {
  for (const int context : {options_.context, options_.score.context}) {
    if (context >= 2 && context <= checkpoint_->config().max_positions) continue;
    return InvalidArgument("a calibration context of " + std::to_string(context) + " is not in [2, " +
                           std::to_string(checkpoint_->config().max_positions) + "]");
  }
  for (const int context : {options_.context, options_.score.context}) {
    if (!ChooseWindows(texts_, static_cast<std::size_t>(context - 1), 1).empty()) continue;
    return InvalidArgument("calibration text too short: no text holds a window of " + std::to_string(context) +
                           " tokens");
  }
  if (static_cast<std::int64_t>(heldout_.tokens.size()) < options_.score.context - 1) {
    return InvalidArgument("held-out text too short: it has " + std::to_string(heldout_.tokens.size()) +
                           " tokens, one window of context " + std::to_string(options_.score.context) + " needs " +
                           std::to_string(options_.score.context - 1));
  }
  return OkStatus();
}

// Moments and bases, or those of the calibration that was stopped.
Status Calibrator::MakeMaps() {
  if (const std::vector<double>* done = log_->Find("maps"); done != nullptr) {
    Result<Plan> kept = Plan::Open(MapsPath(), *checkpoint_);
    if (kept.ok()) {
      maps_ = std::make_shared<const Plan>(std::move(kept).value());
      return OkStatus();
    }
  }
  PlanContents contents;
  contents.model_fingerprint = checkpoint_->fingerprint();
  contents.geometry = GeometryOf(checkpoint_->config());
  const std::vector<Window> windows =
      ChooseWindows(texts_, static_cast<std::size_t>(options_.context - 1), options_.max_windows);
  MomentAccumulator moments(contents.geometry);
  ZEROC_RETURN_IF_ERROR(GatherMoments(*plain_, windows, bos_id_, options_.context, moments, progress_));
  ZEROC_RETURN_IF_ERROR(SolveMaps(*checkpoint_, moments, options_.basis, &contents, progress_));
  for (const CalibrationSource& text : texts_) contents.calibration.texts.push_back(Record(text));
  contents.calibration.heldout.push_back(Record(heldout_));
  contents.calibration.context_tokens = options_.context;
  contents.calibration.skip_tokens = moments.skip_tokens();
  contents.calibration.n_windows = static_cast<std::int64_t>(windows.size());
  contents.calibration.seed = options_.seed;
  contents.calibration.damping = options_.basis.damping;
  contents.ladder = StandardLadder(contents.geometry);
  ZEROC_ASSIGN_OR_RETURN(Plan plan, Plan::Create(std::move(contents)));
  maps_ = std::make_shared<const Plan>(std::move(plan));
  if (options_.partial_path.empty()) return OkStatus();
  ZEROC_RETURN_IF_ERROR(maps_->Save(MapsPath()));
  return log_->Add("maps", {1});
}

// The smallest profile whose promise on the held-out text is within the budget (absolute): of the measured rungs, then
// by bisection over the bytes below the smallest of them that is within. The largest profile when none is.
Result<Profile> Calibrator::MeetBudget(const char* name, double budget, const std::function<Status(double)>& show) {
  constexpr int kSteps = 3;  // rungs are some 15 % apart: to two bytes in a hundred
  std::vector<const Profile*> by_bytes;
  for (const Profile& profile : ladder_) {
    if (profile.cost.measured) by_bytes.push_back(&profile);
  }
  std::sort(by_bytes.begin(), by_bytes.end(),
            [](const Profile* x, const Profile* y) { return x->cost.kv_bytes_per_token < y->cost.kv_bytes_per_token; });
  const auto within =
      std::find_if(by_bytes.begin(), by_bytes.end(), [&](const Profile* p) { return p->cost.ppl_increase <= budget; });
  Profile best = within == by_bytes.end() ? *by_bytes.back() : **within;
  double high = std::log(best.cost.kv_bytes_per_token);
  double low = within == by_bytes.begin() ? high - std::log(2.0) : std::log((*(within - 1))->cost.kv_bytes_per_token);
  for (int step = 0; step < kSteps && within != by_bytes.end(); ++step) {
    const double middle = (low + high) / 2;
    ZEROC_ASSIGN_OR_RETURN(Profile profile, builder_->Rung(std::exp(middle)));
    ZEROC_RETURN_IF_ERROR(Measure({&profile, 1}, nullptr));
    const bool fits = profile.cost.ppl_increase <= budget;
    if (fits) best = profile;
    (fits ? high : low) = middle;
    ZEROC_RETURN_IF_ERROR(show(static_cast<double>(step + 1) / kSteps));
  }
  best.name = name;
  return best;
}

// A rung more for each of the two budgets.
Status Calibrator::MeetBudgets() {
  const double ppl_base = (*log_->Find("decode:" + ProfileHash(ladder_[0])))[0];
  const std::pair<const char*, double> budgets[] = {{"abs", options_.budget}, {"rel", options_.budget_rel * ppl_base}};
  double done = 0;
  std::vector<Profile> found;
  for (const auto& [name, budget] : budgets) {
    if (budget <= 0) continue;
    const auto show = [this, done](double share) { return Show("budget", done + 0.5 * share); };
    ZEROC_ASSIGN_OR_RETURN(Profile profile, MeetBudget(name, budget, show));
    found.push_back(std::move(profile));
    done += 0.5;
  }
  std::move(found.begin(), found.end(), std::back_inserter(ladder_));
  return OkStatus();
}

// Keeps the base's logits on these windows in a file while that is of a reasonable size.
ScoreOptions Calibrator::ScoreOf(ScoreOptions score, std::vector<std::int64_t> begins, const char* base_file) const {
  const std::int64_t bytes =
      4 * std::ssize(begins) * score.stride * static_cast<std::int64_t>(checkpoint_->config().vocab_size);
  score.window_begins = std::move(begins);
  if (!options_.partial_path.empty() && bytes <= kBaseFileBytesMax) {
    score.base_logits_file = options_.partial_path + base_file;
  }
  return score;
}

Status Calibrator::MakeLadder() {
  const LadderProbe::Models models{plain_.get(), folded_.get(), maps_};
  WindowedText text = ProbeText(texts_, options_.score.context, options_.probe_windows);
  ScoreOptions score = options_.score;
  score = ScoreOf(std::move(score), text.begins, kProbeBase);
  probe_ = std::make_unique<LadderProbe>(models, std::move(text), bos_id_, std::move(score), "probe", *log_);
  if (options_.ladder.mass) {
    ZEROC_ASSIGN_OR_RETURN(masses_, MassTable::Gather(*plain_, probe_->text(), bos_id_, options_.score.context, {}));
  }
  builder_ = std::make_unique<LadderBuilder>(*maps_, *probe_, masses_.get(), options_.ladder, progress_);
  ZEROC_RETURN_IF_ERROR(builder_->ProbeSides());
  ladder_ = StandardLadder(maps_->geometry());
  n_standard_ = ladder_.size();
  ZEROC_ASSIGN_OR_RETURN(std::vector<Profile> rungs, builder_->Rungs());
  std::move(rungs.begin(), rungs.end(), std::back_inserter(ladder_));
  return OkStatus();
}

Status Calibrator::MeasureRecall() {
  if (recall_cases_.empty()) return OkStatus();
  ZEROC_ASSIGN_OR_RETURN(const auto formats, FormatsOf(*folded_, *maps_, ladder_));
  const double n = static_cast<double>(ladder_.size());
  for (std::size_t i = 0; i < ladder_.size(); ++i) {
    if (!ladder_[i].cost.measured) continue;
    const std::string name = "recall:" + ProfileHash(ladder_[i]);
    if (log_->Find(name) == nullptr) {
      const double at = static_cast<double>(i) / n;
      ZEROC_ASSIGN_OR_RETURN(const RecallScore score,
                             ScoreRecall(recall_cases_, ScoredMethod{folded_.get(), formats[i]},
                                         Stage(progress_, "recall", at, at + 1 / n)));
      ZEROC_RETURN_IF_ERROR(log_->Add(name, {score.accuracy}));
    }
    ladder_[i].cost.recall = (*log_->Find(name))[0];
  }
  return OkStatus();
}

// Fills in what each profile costs, decode-scored on the held-out text.
Status Calibrator::Measure(std::span<Profile> profiles, const ProgressFn& progress) {
  const auto n_heldout = static_cast<std::int64_t>(heldout_.tokens.size());
  const ScoreOptions score_options = ScoreOf(options_.score, SpreadWindows(n_heldout, options_.score), kDecodeBase);
  ZEROC_ASSIGN_OR_RETURN(const auto formats, FormatsOf(*folded_, *maps_, profiles));
  std::vector<ScoredMethod> methods;
  std::vector<std::size_t> missing;
  const auto log_name = [&](std::size_t i) { return "decode:" + ProfileHash(profiles[i]); };
  for (std::size_t i = 0; i < profiles.size(); ++i) {
    ScoredMethod& method = methods.emplace_back();
    method.model = folded_.get();
    method.format = formats[i];
    const bool listed =
        std::any_of(missing.begin(), missing.end(), [&](std::size_t other) { return log_name(other) == log_name(i); });
    if (log_->Find(log_name(i)) == nullptr && !listed) missing.push_back(i);
  }
  ScoredMethod base;
  base.model = plain_.get();
  ZEROC_ASSIGN_OR_RETURN(base.format, plain_->Format("none"));
  constexpr std::size_t kBatch = 5;  // a stop loses at most this many
  for (std::size_t begin = 0; begin < missing.size(); begin += kBatch) {
    const std::size_t end = std::min(missing.size(), begin + kBatch);
    std::vector<ScoredMethod> batch;
    for (std::size_t i = begin; i < end; ++i) batch.push_back(methods[missing[i]]);
    const double n = static_cast<double>(missing.size());
    ZEROC_ASSIGN_OR_RETURN(
        const std::vector<TextScore> scores,
        ScoreText(heldout_.tokens, heldout_.token_bytes, bos_id_, base, batch, score_options, [&](double done) {
          const double share = (static_cast<double>(begin) + done * static_cast<double>(end - begin)) / n;
          return progress == nullptr || progress(share);
        }));
    for (std::size_t i = begin; i < end; ++i) {
      const TextScore& score = scores[i - begin + 1];
      ZEROC_RETURN_IF_ERROR(log_->Add(log_name(missing[i]), {scores[0].ppl, score.ppl - scores[0].ppl, score.kl}));
    }
  }
  for (std::size_t i = 0; i < profiles.size(); ++i) {
    const std::vector<double>& figures = *log_->Find(log_name(i));
    profiles[i].cost = MeasuredCost(figures[0], figures[1], figures[2], std::nullopt);
    profiles[i].cost.kv_bytes_per_token = KvBytesPerToken(profiles[i], maps_->geometry(), kCostContext);
  }
  return OkStatus();
}

Result<Plan> Calibrator::Run() {
  ZEROC_RETURN_IF_ERROR(CheckInputs());
  ZEROC_RETURN_IF_ERROR(checkpoint_->CheckFinite());
  ZEROC_ASSIGN_OR_RETURN(log_,
                         CalibrationLog::Open(options_.partial_path,
                                              InputKey(*checkpoint_, ops_, texts_, heldout_, recall_cases_, options_)));
  ZEROC_ASSIGN_OR_RETURN(plain_, Transformer::Open(checkpoint_, nullptr, ops_, threads_));
  ZEROC_RETURN_IF_ERROR(MakeMaps());
  ZEROC_ASSIGN_OR_RETURN(folded_, Transformer::Open(checkpoint_, maps_, ops_, threads_));
  ZEROC_RETURN_IF_ERROR(MakeLadder());
  const std::size_t n_measured_first = options_.ladder.standard ? n_standard_ : 1;
  ZEROC_RETURN_IF_ERROR(Measure(std::span(ladder_).first(n_measured_first), Stage(progress_, "measure", 0, 0.3)));
  ZEROC_RETURN_IF_ERROR(Measure(std::span(ladder_).subspan(n_standard_), Stage(progress_, "measure", 0.3, 1)));
  ZEROC_RETURN_IF_ERROR(MeetBudgets());
  ZEROC_RETURN_IF_ERROR(MeasureRecall());
  PlanContents contents = maps_->contents();
  contents.ppl_base = (*log_->Find("decode:" + ProfileHash(ladder_[0])))[0];
  contents.ladder = std::move(ladder_);
  return Plan::Create(std::move(contents));
}

}  // namespace

Result<Plan> Calibrate(std::shared_ptr<const Checkpoint> checkpoint, const kernels::Ops& ops, ThreadPool& threads,
                       std::span<const CalibrationSource> texts, const CalibrationSource& heldout,
                       std::span<const RecallCase> recall_cases, std::int32_t bos_id, const CalibrationOptions& options,
                       const CalibrationProgress& progress) {
  return Calibrator(std::move(checkpoint), ops, threads, texts, heldout, recall_cases, bos_id, options, progress).Run();
}

void RemovePartial(const std::string& partial_path) {
  std::error_code ignored;
  // What a killed calibration was writing has that process's number in its name.
  const std::filesystem::path log = std::filesystem::absolute(partial_path, ignored);
  ZEROC_CHECK(log.has_filename(), partial_path);
  const std::string beside = log.filename().string() + ".";
  std::vector<std::filesystem::path> paths{log};
  for (const auto& entry : std::filesystem::directory_iterator(log.parent_path(), ignored)) {
    if (entry.path().filename().string().starts_with(beside)) paths.push_back(entry.path());
  }
  for (const std::filesystem::path& path : paths) std::filesystem::remove(path, ignored);
}

}  // namespace zeroc
