// A plan's ladder for people and for programs. Pure functions.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>

#include "libzeroc/compression/plan.h"

namespace zeroc {

// {"plan_id":..,"ppl_base":..,"profiles":[..]}; what was not measured is null.
nlohmann::ordered_json PlanJson(const Plan& plan);

std::string PlanTable(const Plan& plan);

// The tier shapes of every profile that packs, layers of equal shape in one line.
std::string ShapeTable(const Plan& plan);

}  // namespace zeroc
