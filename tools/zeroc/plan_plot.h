// A plan's ladder as a picture: bytes per token against the promised perplexity increase. Pure function.
#pragma once

#include <string>

#include "libzeroc/compression/plan.h"

namespace zeroc {

// An SVG document: measured profiles that pack something, both axes logarithmic. Profiles that no other one beats in
// both figures are joined by a line; `budget` (absolute increase, > 0) is a dashed one. Increases below 0.01 % of the
// base perplexity, noise included, are drawn on the lower edge. Without a measured profile the axes stay empty.
std::string PlanPlot(const Plan& plan, double budget);

}  // namespace zeroc
