// zeroc calibrate: makes a plan for a model and measures its ladder.
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <filesystem>
#include <iostream>
#include <limits>
#include <nlohmann/json.hpp>

#include "libzeroc/engine/calibration.h"
#include "tools/zeroc/command.h"
#include "tools/zeroc/output.h"
#include "tools/zeroc/plan_table.h"
#include "tools/zeroc/recall_cases.h"
#include "tools/zeroc/session.h"
#include "tools/zeroc/text_input.h"

namespace zeroc {
namespace {

class CalibrateCommand : public Command {
 public:
  explicit CalibrateCommand(CLI::App& app) {
    model_.AddModel(app);
    app.add_option(
           "--text", texts_,
           "text that the key, query and value moments come from; FILE@A:B takes the part from A to B percent of "
           "its bytes (moments from FILE@0:50 and the ladder from FILE@50:100 of one text); may be repeated")
        ->required()
        ->option_text("FILE ..");
    app.add_option("--heldout", heldout_, "text that perplexity and KL are measured on; FILE@A:B as above")
        ->required()
        ->option_text("FILE");
    app.add_option("--recall-set", recall_set_, "recall cases (zeroc recall --help); without it recall is not measured")
        ->option_text("FILE");
    app.add_option("--recall-cases", n_recall_cases_, "cases taken, evenly over the groups; 0: all [16]")
        ->check(CLI::Range(0, std::numeric_limits<int>::max()))
        ->option_text("N");
    app.add_option(
           "--out", out_path_,
           "plan to write; an old one is replaced only by a complete one. Until then PLAN.partial keeps what is "
           "measured: the same command goes on where it was stopped")
        ->required()
        ->option_text("PLAN");
    AddSizes(app);
    AddLadder(app);
    AddAblations(app);
    model_.AddThreads(app);
    model_.AddJson(app);
  }

  Status CheckUsage() override {
    if (options_.score.stride >= options_.score.context) {
      return InvalidArgument("--score-stride must be below --score-context");
    }
    if (no_affine_ && no_shared_) return InvalidArgument("--no-affine and --no-shared leave no scale");
    ZEROC_RETURN_IF_ERROR(ApplyAblations());
    for (const std::string& text : texts_) {
      ZEROC_ASSIGN_OR_RETURN(TextSlice slice, ParseTextSlice(text));
      slices_.push_back(std::move(slice));
    }
    ZEROC_ASSIGN_OR_RETURN(heldout_slice_, ParseTextSlice(heldout_));
    return OkStatus();
  }

  Status Run() override {
    ZEROC_RETURN_IF_ERROR(CheckOutFolder());
    ZEROC_ASSIGN_OR_RETURN(const std::unique_ptr<Session> session, Session::Open(model_));
    ZEROC_ASSIGN_OR_RETURN(const std::unique_ptr<Tokenizer> tokenizer, session->OpenTokenizer());
    ZEROC_ASSIGN_OR_RETURN(const std::int32_t bos_id, session->BosId(*tokenizer));
    std::vector<CalibrationSource> sources;
    for (std::size_t i = 0; i < slices_.size(); ++i) {
      ZEROC_ASSIGN_OR_RETURN(CalibrationSource source, Load(*session, *tokenizer, slices_[i], texts_[i]));
      sources.push_back(std::move(source));
    }
    ZEROC_ASSIGN_OR_RETURN(CalibrationSource heldout, Load(*session, *tokenizer, heldout_slice_, heldout_));
    heldout.token_bytes = TokenBytes(*tokenizer, heldout.tokens);
    std::vector<RecallCase> cases;
    if (!recall_set_.empty()) {
      ZEROC_ASSIGN_OR_RETURN(cases, LoadRecallCases(*session, *tokenizer, recall_set_, n_recall_cases_));
    }
    const Result<Plan> plan = RunStages(*session, sources, heldout, cases, bos_id);
    if (!plan.ok()) return plan.status();
    ZEROC_RETURN_IF_ERROR(plan->Save(out_path_));
    RemovePartial(options_.partial_path);
    Print(*plan);
    return OkStatus();
  }

 private:
  void AddSizes(CLI::App& app) {
    constexpr int kMost = 1 << 24;
    app.add_option("--context", options_.context,
                   "tokens of a window for moments, BOS included; calibrate at the length you serve [4096]")
        ->check(CLI::Range(2, kMost))
        ->option_text("N");
    app.add_option("--max-windows", options_.max_windows, "calibration windows, evenly over the texts [32]")
        ->check(CLI::Range(1, kMost))
        ->option_text("N");
    app.add_option("--score-context", options_.score.context, "tokens of a scored window, BOS included [4096]")
        ->check(CLI::Range(2, kMost))
        ->option_text("N");
    app.add_option("--score-stride", options_.score.stride, "tokens scored at the end of each window [2048]")
        ->check(CLI::Range(1, kMost))
        ->option_text("N");
    app.add_option("--score-windows", options_.score.max_windows, "windows scored; 0: all of the held-out text [4]")
        ->check(CLI::Range(0, kMost))
        ->option_text("N");
  }

  void AddLadder(CLI::App& app) {
    app.add_option("--probe-windows", options_.probe_windows,
                   "windows of --score-context tokens from --text that the ladder is searched on [2]")
        ->check(CLI::Range(1, 1 << 20))
        ->option_text("N");
    app.add_option("--rungs", options_.ladder.rungs,
                   "one profile zX for each X: at most X bits per element, everything counted at 4,096 tokens "
                   "[6 5 4 3.5 3 2.5 2.25 2 1.75 1.5 1.25]")
        ->check(CLI::Range(0.1, 16.0))
        ->option_text("X ..");
    app.add_option("--budget", options_.budget,
                   "perplexity increase (absolute) that profile 'abs' just meets on the held-out text [0.1]")
        ->check(CLI::Range(0.0, 1e6))
        ->option_text("X");
    app.add_option("--budget-rel", options_.budget_rel,
                   "perplexity increase (a share of the perplexity) that profile 'rel' just meets [0.018]")
        ->check(CLI::Range(0.0, 10.0))
        ->option_text("X");
  }

  // For comparisons; every one of them makes a plan that the engine can serve.
  void AddAblations(CLI::App& app) {
    constexpr const char* kGroup = "Comparisons";
    app.add_option("--basis", basis_,
                   "coordinates: balanced, svd-qk (orthogonal, of stacked Q and K), hadamard (none, "
                   "rotation only) or none [balanced]")
        ->check(CLI::IsMember({"balanced", "svd-qk", "hadamard", "none"}))
        ->option_text("NAME")
        ->group(kGroup);
    app.add_flag("--no-hadamard", no_hadamard_,
                 "undo the rotation inside runs; shapes then have a single run (implied by --basis none)")
        ->group(kGroup);
    app.add_flag("--no-layer-axis", no_layer_axis_, "the same two shapes in every layer")->group(kGroup);
    app.add_flag("--no-mass", no_mass_, "no correction of the softmax mass of packed keys")->group(kGroup);
    app.add_flag("--no-standard", no_standard_, "do not measure the profiles of one width")->group(kGroup);
    app.add_flag("--no-young", no_young_, "no young tiers: a block is exact, then packed once")->group(kGroup);
    app.add_flag("--no-affine", no_affine_, "shared scales only")->group(kGroup);
    app.add_flag("--no-shared", no_shared_, "affine scales only")->group(kGroup);
    app.add_option("--recent", recent_, "exact recent tokens, instead of a choice per profile")
        ->check(CLI::Range(0, 1 << 20))
        ->option_text("N")
        ->group(kGroup);
    app.add_option("--sink", sink_, "exact first tokens, 0 or 16, instead of a choice per profile")
        ->check(CLI::IsMember({0, 16}))
        ->option_text("N")
        ->group(kGroup);
    app.add_option("--damping", options_.basis.damping, "share of the mean diagonal added to the moments [0.01]")
        ->check(CLI::Range(0.0, 1.0))
        ->option_text("X")
        ->group(kGroup);
  }

  Status ApplyAblations() {
    LadderOptions& ladder = options_.ladder;
    if (basis_ == "svd-qk") options_.basis.kind = BasisKind::kStackedSvd;
    if (basis_ == "hadamard" || basis_ == "none") options_.basis.kind = BasisKind::kIdentity;
    if (no_hadamard_ || basis_ == "none") {
      options_.basis.undo_rotation = true;
      ladder.shapes.runs_max = 1;  // only the rotation over all coordinates can be undone by the maps
    }
    ladder.layer_axis = !no_layer_axis_;
    ladder.mass = !no_mass_;
    ladder.standard = !no_standard_;
    ladder.shapes.affine = !no_affine_;
    ladder.shapes.shared = !no_shared_;
    if (recent_ >= 0) ladder.windows = {WindowChoice{recent_, {}}};
    if (no_young_) std::erase_if(ladder.windows, [](const WindowChoice& w) { return !w.young.empty(); });
    if (sink_ >= 0) {
      for (WindowChoice& window : ladder.windows) window.sink_tokens = sink_;
      ladder.sinks.clear();
    }
    options_.partial_path = out_path_ + ".partial";
    return OkStatus();
  }

  // Now, not behind the hours of work that a large model takes.
  Status CheckOutFolder() const {
    const std::filesystem::path folder = std::filesystem::absolute(out_path_).parent_path();
    std::error_code error;
    if (!std::filesystem::is_directory(folder, error))
      return NotFound("--out " + out_path_ + ": its folder does not exist");
    if (access(folder.c_str(), W_OK) != 0) return NotFound("--out " + out_path_ + ": its folder cannot be written to");
    return OkStatus();
  }

  // The name in the plan is the argument without its folders: a plan tells nothing of the machine that made it.
  static Result<CalibrationSource> Load(const Session& session, const Tokenizer& tokenizer, const TextSlice& slice,
                                        const std::string& argument) {
    ZEROC_ASSIGN_OR_RETURN(const std::string text, ReadTextSlice(slice));
    CalibrationSource source;
    source.name = argument.substr(argument.find_last_of('/', slice.path.size()) + 1);
    source.hash = HashText(text);
    ZEROC_ASSIGN_OR_RETURN(source.tokens, tokenizer.Encode(text));
    ZEROC_RETURN_IF_ERROR(session.CheckIds(source.tokens, "tokens of " + argument));
    return source;
  }

  Result<Plan> RunStages(Session& session, const std::vector<CalibrationSource>& sources,
                         const CalibrationSource& heldout, const std::vector<RecallCase>& cases, std::int32_t bos_id) {
    Progress progress;
    const CalibrationProgress show = [&progress](const char* stage, double done) {
      progress.Show(stage, done);
      return true;
    };
    return Calibrate(session.shared_checkpoint(), session.ops(), session.threads(), sources, heldout, cases, bos_id,
                     options_, show);
  }

  void Print(const Plan& plan) const {
    if (model_.json) {
      PrintJson(PlanJson(plan));
      return;
    }
    const Profile& best = plan.SmallestWithin(options_.budget);
    std::cout << PlanTable(plan) << "\nsmallest profile within +" << options_.budget << ": " << best.name << " ("
              << Fixed(best.cost.kv_bytes_per_token, 1) << " bytes/token)\nwritten to " << out_path_ << '\n';
  }

  ModelOptions model_;
  CalibrationOptions options_;
  std::vector<std::string> texts_;
  std::vector<TextSlice> slices_;
  std::string heldout_, recall_set_, out_path_;
  TextSlice heldout_slice_;
  int n_recall_cases_ = 16;
  std::string basis_ = "balanced";
  bool no_hadamard_ = false, no_layer_axis_ = false, no_mass_ = false, no_young_ = false;
  bool no_standard_ = false;
  bool no_affine_ = false, no_shared_ = false;
  int recent_ = -1, sink_ = -1;
};

}  // namespace

CommandEntry AddCalibrateCommand(CLI::App& parent) {
  CLI::App* app = parent.add_subcommand("calibrate", "Make a plan: bases from text, and a measured ladder of profiles");
  return {app, std::make_unique<CalibrateCommand>(*app)};
}

}  // namespace zeroc
