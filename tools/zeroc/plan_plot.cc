#include "tools/zeroc/plan_plot.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "tools/zeroc/output.h"

namespace zeroc {
namespace {

constexpr double kWidth = 760, kHeight = 460;  // pixels
constexpr double kLeft = 70, kRight = 30, kTop = 50, kBottom = 55;
constexpr double kFloor = 1e-4;  // relative increases from 0.01 % up are drawn

struct Point {
  std::string name;
  double bytes;  // KV bytes per token
  double rel;    // promised increase over the base perplexity
};

// Maps a positive value to pixels, logarithmically; from(a) = a's pixel.
struct LogAxis {
  double lo, hi;        // values
  double at_lo, at_hi;  // pixels
  double operator()(double value) const {
    const double clamped = std::clamp(value, lo, hi);
    return at_lo + (at_hi - at_lo) * std::log(clamped / lo) / std::log(hi / lo);
  }
};

std::vector<Point> MeasuredPoints(const Plan& plan) {
  std::vector<Point> points;
  for (const Profile& profile : plan.ladder()) {
    if (!profile.packs() || !profile.cost.measured) continue;
    points.push_back({profile.name, profile.cost.kv_bytes_per_token, profile.cost.ppl_increase_rel});
  }
  std::sort(points.begin(), points.end(),
            [](const Point& a, const Point& b) { return a.bytes != b.bytes ? a.bytes < b.bytes : a.rel < b.rel; });
  return points;
}

// Points, in order of bytes, that no other beats in bytes and increase.
std::vector<Point> Frontier(const std::vector<Point>& points) {
  std::vector<Point> frontier;
  double least = HUGE_VAL;
  for (auto point = points.begin(); point != points.end(); ++point) {
    if (point->rel >= least) continue;
    least = point->rel;
    frontier.push_back(*point);
  }
  return frontier;
}

std::string Text(double x, double y, const std::string& anchor, const std::string& text, const std::string& more = "") {
  return "<text x=\"" + Fixed(x, 1) + "\" y=\"" + Fixed(y, 1) + "\" text-anchor=\"" + anchor + "\"" + more + ">" +
         text + "</text>\n";
}

std::string Line(double x1, double y1, double x2, double y2, const std::string& style) {
  return "<line x1=\"" + Fixed(x1, 1) + "\" y1=\"" + Fixed(y1, 1) + "\" x2=\"" + Fixed(x2, 1) + "\" y2=\"" +
         Fixed(y2, 1) + "\" " + style + "/>\n";
}

// 1, 2 and 5 times powers of ten inside the axis.
std::vector<double> Ticks(const LogAxis& axis) {
  std::vector<double> ticks;
  for (double decade = std::pow(10, std::floor(std::log10(axis.lo))); decade <= axis.hi; decade *= 10) {
    for (const double step : {1.0, 2.0, 5.0}) {
      const double value = decade * step;
      if (value >= axis.lo * 0.999 && value <= axis.hi * 1.001) ticks.push_back(value);
    }
  }
  return ticks;
}

std::string Percent(double rel) {
  const double percent = 100 * rel;
  return Fixed(percent, percent < 0.095 ? 2 : percent < 0.95 ? 1 : 0) + " %";
}

std::string Grid(const LogAxis& x, const LogAxis& y) {
  std::string svg;
  for (const double tick : Ticks(x)) {
    svg += Line(x(tick), y.at_lo, x(tick), y.at_hi, "stroke=\"#e3e3e3\"");
    svg += Text(x(tick), y.at_lo + 18, "middle", Fixed(tick, 0));
  }
  for (const double tick : Ticks(y)) {
    svg += Line(x.at_lo, y(tick), x.at_hi, y(tick), "stroke=\"#e3e3e3\"");
    svg += Text(x.at_lo - 8, y(tick) + 4, "end", Percent(tick));
  }
  svg += Line(x.at_lo, y.at_lo, x.at_hi, y.at_lo, "stroke=\"#444\"");
  svg += Line(x.at_lo, y.at_lo, x.at_lo, y.at_hi, "stroke=\"#444\"");
  return svg;
}

}  // namespace

std::string PlanPlot(const Plan& plan, double budget) {
  const std::vector<Point> points = MeasuredPoints(plan);
  double lo_bytes = 100, hi_bytes = 1000, hi_rel = 0.1;
  if (!points.empty()) {
    lo_bytes = points.front().bytes / 1.15;
    hi_bytes = points.back().bytes * 1.15;
    for (const Point& point : points) hi_rel = std::max(hi_rel, 1.3 * point.rel);
  }
  const LogAxis x{lo_bytes, hi_bytes, kLeft, kWidth - kRight};
  const LogAxis y{kFloor, hi_rel, kHeight - kBottom, kTop};

  std::string svg = "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"" + Fixed(kWidth, 0) + "\" height=\"" +
                    Fixed(kHeight, 0) + "\" font-family=\"sans-serif\" font-size=\"12\" fill=\"#222\">\n" +
                    "<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n";
  svg += Text(kLeft, 22, "start", "KV cache per token against perplexity increase", " font-size=\"15\"");
  svg += Text(kLeft, 39, "start", "plan " + plan.plan_id() + ", bytes of everything held at 4,096 tokens",
              " fill=\"#666\"");
  svg += Grid(x, y);
  svg += Text((x.at_lo + x.at_hi) / 2, kHeight - 14, "middle", "KV bytes per token");
  svg += "<g transform=\"translate(16 " + Fixed((y.at_lo + y.at_hi) / 2, 1) + ") rotate(-90)\">" +
         Text(0, 0, "middle", "promised perplexity increase") + "</g>\n";
  if (plan.ppl_base() > 0) {
    const double at = y(budget / plan.ppl_base());
    svg += Line(x.at_lo, at, x.at_hi, at, "stroke=\"#b3261e\" stroke-dasharray=\"6 4\"");
    svg += Text(x.at_hi, at - 5, "end", "+" + Fixed(budget, 2) + " perplexity", " fill=\"#b3261e\"");
  }
  std::string path;
  for (const Point& point : Frontier(points)) {
    path += (path.empty() ? "M" : " L") + Fixed(x(point.bytes), 1) + " " + Fixed(y(point.rel), 1);
  }
  if (!path.empty()) svg += "<path d=\"" + path + "\" fill=\"none\" stroke=\"#1f5fbf\" stroke-width=\"1.5\"/>\n";
  for (const Point& point : points) {
    svg += "<circle cx=\"" + Fixed(x(point.bytes), 1) + "\" cy=\"" + Fixed(y(point.rel), 1) +
           "\" r=\"4\" fill=\"#1f5fbf\"/>\n";
    svg += Text(x(point.bytes) + 7, y(point.rel) - 6, "start", point.name);
  }
  return svg + "</svg>\n";
}

}  // namespace zeroc
