// zeroc plan: the ladder of a plan, and the table that zeroc calibrate ends with.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>

#include "tools/zeroc/command.h"
#include "tools/zeroc/output.h"
#include "tools/zeroc/plan_plot.h"
#include "tools/zeroc/plan_table.h"

namespace zeroc {
namespace {

using Json = nlohmann::ordered_json;

Json ProfileJson(const Profile& profile) {
  const ProfileCost& cost = profile.cost;
  const auto measured = [&cost](double value) { return cost.measured ? Json(value) : Json(nullptr); };
  return {{"name", profile.name},
          {"bits_per_element", cost.bits_per_element},
          {"kv_bytes_per_token", cost.kv_bytes_per_token},
          {"ppl_increase", measured(cost.ppl_increase)},
          {"recall", cost.recall.has_value() ? Json(*cost.recall) : Json(nullptr)},
          {"ppl_increase_rel", measured(cost.ppl_increase_rel)},
          {"kl", measured(cost.kl)}};
}

// "4x16 2x32s 0x16": runs in order, bits x width, s for shared scales.
std::string ShapeText(const TierShape& shape) {
  std::string text;
  for (const kernels::KvRun& run : shape.runs) {
    text += (text.empty() ? "" : " ") + std::to_string(run.bits) + "x" + std::to_string(run.width);
    if (kernels::IsQuantised(run.bits) && run.scale == kernels::KvScaleKind::kShared) text += "s";
  }
  return text;
}

// "2 at 8+, 4 at 4+": 64-token blocks of every young tier, and the fewest bits in it.
std::string YoungText(const Profile& profile) {
  std::string text;
  for (const YoungTier& tier : profile.young) {
    int bits = 16;
    for (const KvShape& shape : tier.layers) {
      for (const TierShape* side : {&shape.k, &shape.v}) {
        for (const kernels::KvRun& run : side->runs) bits = std::min(bits, run.bits);
      }
    }
    text += (text.empty() ? "" : ", ") + std::to_string(tier.n_blocks) + " at " + std::to_string(bits) + "+";
  }
  return text.empty() ? "-" : text;
}

class PlanCommand : public Command {
 public:
  explicit PlanCommand(CLI::App& app) {
    app.add_option("plan", path_, "plan file, as zeroc calibrate writes it")->required()->option_text("PLAN");
    app.add_option("--plot", plot_path_, "also write a picture (SVG) of bytes against perplexity increase")
        ->option_text("FILE.svg");
    app.add_option("--budget", budget_, "perplexity increase (absolute) drawn as a line in the picture [0.1]")
        ->check(CLI::Range(1e-6, 1e6))
        ->option_text("X");
    app.add_flag("--shapes", shapes_,
                 "also list the tier shapes of every layer (bits x coordinates, s: shared scales) and windows");
    app.add_flag("--json", json_, "print {\"plan_id\":..,\"ppl_base\":..,\"profiles\":[..]}");
  }

  Status Run() override {
    ZEROC_ASSIGN_OR_RETURN(const Plan plan, Plan::Open(path_));
    if (!plot_path_.empty()) ZEROC_RETURN_IF_ERROR(WritePlot(plan));
    if (json_) {
      PrintJson(PlanJson(plan));
    } else {
      std::cout << PlanTable(plan);
      if (shapes_) std::cout << '\n' << ShapeTable(plan);
    }
    return OkStatus();
  }

 private:
  Status WritePlot(const Plan& plan) const {
    std::ofstream file(plot_path_, std::ios::binary | std::ios::trunc);
    file << PlanPlot(plan, budget_);
    file.close();
    if (!file) return NotFound("--plot " + plot_path_ + ": cannot be written");
    return OkStatus();
  }

  std::string path_, plot_path_;
  double budget_ = 0.1;
  bool shapes_ = false;
  bool json_ = false;
};

}  // namespace

Json PlanJson(const Plan& plan) {
  Json profiles = Json::array();
  for (const Profile& profile : plan.ladder()) profiles.push_back(ProfileJson(profile));
  return {{"plan_id", plan.plan_id()},
          {"ppl_base", plan.ppl_base() > 0 ? Json(plan.ppl_base()) : Json(nullptr)},
          {"profiles", std::move(profiles)}};
}

std::string PlanTable(const Plan& plan) {
  const ModelGeometry& geometry = plan.geometry();
  // Of one token without compression: 16-bit K and V of every layer and head.
  const double raw_bytes = 4.0 * geometry.n_layers * geometry.n_kv_heads * geometry.head_dim;
  Table table({"profile", "bits/element", "KV bytes/token", "ratio", "ppl increase", "relative", "direct", "from KL",
               "KL nats/token", "recall"});
  for (const Profile& profile : plan.ladder()) {
    const ProfileCost& cost = profile.cost;
    const auto measured = [&cost](double value, int n_decimals) {
      return cost.measured ? Fixed(value, n_decimals) : std::string("-");
    };
    table.Add({profile.name, Fixed(cost.bits_per_element, 3), Fixed(cost.kv_bytes_per_token, 1),
               Fixed(raw_bytes / cost.kv_bytes_per_token, 2) + "x", measured(cost.ppl_increase, 4),
               cost.measured ? Fixed(100 * cost.ppl_increase_rel, 2) + " %" : "-",
               measured(cost.ppl_increase_direct, 4), measured(cost.ppl_increase_kl, 4), measured(cost.kl, 5),
               cost.recall.has_value() ? Fixed(*cost.recall, 3) : "-"});
  }
  std::string text = "plan " + plan.plan_id() + " of model " + plan.model_fingerprint() + "\n";
  text +=
      "perplexity without compression: " + (plan.ppl_base() > 0 ? Fixed(plan.ppl_base(), 4) : "not measured") + "\n";
  text += "bytes count everything held after " + std::to_string(kCostContext) +
          " tokens; the ppl increase promised is the larger of direct and from KL\n\n";
  return text + table.ToString();
}

std::string ShapeTable(const Plan& plan) {
  Table table({"profile", "layers", "keys (bits x coordinates)", "values", "sink", "recent", "young blocks"});
  for (const Profile& profile : plan.ladder()) {
    const std::size_t n_layers = profile.layers.size();
    for (std::size_t begin = 0, end = 0; begin < n_layers; begin = end) {
      while (end < n_layers && profile.layers[end].k == profile.layers[begin].k &&
             profile.layers[end].v == profile.layers[begin].v) {
        ++end;
      }
      const std::string layers = std::to_string(begin) + (end - begin > 1 ? "-" + std::to_string(end - 1) : "");
      table.Add({begin == 0 ? profile.name : "", layers, ShapeText(profile.layers[begin].k),
                 ShapeText(profile.layers[begin].v), std::to_string(profile.sink_tokens),
                 std::to_string(profile.recent_tokens), YoungText(profile)});
    }
  }
  return table.ToString();
}

CommandEntry AddPlanCommand(CLI::App& parent) {
  CLI::App* app = parent.add_subcommand("plan", "Profiles of a plan with their bytes, perplexity increase and recall");
  return {app, std::make_unique<PlanCommand>(*app)};
}

}  // namespace zeroc
