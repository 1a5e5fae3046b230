// zeroc plan: the ladder of a plan, and the table that zeroc calibrate ends with.
#include <CLI/CLI.hpp>
#include <iostream>
#include <nlohmann/json.hpp>

#include "tools/zeroc/command.h"
#include "tools/zeroc/output.h"
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

class PlanCommand : public Command {
 public:
  explicit PlanCommand(CLI::App& app) {
    app.add_option("plan", path_, "plan file, as zeroc calibrate writes it")->required()->option_text("PLAN");
    app.add_flag("--json", json_, "print {\"plan_id\":..,\"ppl_base\":..,\"profiles\":[..]}");
  }

  Status Run() override {
    ZEROC_ASSIGN_OR_RETURN(const Plan plan, Plan::Open(path_));
    if (json_) {
      PrintJson(PlanJson(plan));
    } else {
      std::cout << PlanTable(plan);
    }
    return OkStatus();
  }

 private:
  std::string path_;
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

CommandEntry AddPlanCommand(CLI::App& parent) {
  CLI::App* app = parent.add_subcommand("plan", "Profiles of a plan with their bytes, perplexity increase and recall");
  return {app, std::make_unique<PlanCommand>(*app)};
}

}  // namespace zeroc
