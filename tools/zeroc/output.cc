#include "tools/zeroc/output.h"

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <iostream>
#include <nlohmann/json.hpp>

namespace zeroc {

void PrintJson(const nlohmann::ordered_json& object) {
  std::cout << object.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace) << '\n';
}

std::string Table::ToString() const {
  std::vector<std::size_t> widths;
  for (const auto& row : rows_) {
    widths.resize(std::max(widths.size(), row.size()));
    for (std::size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], row[i].size());
  }
  std::string text;
  for (const auto& row : rows_) {
    std::string line;
    for (std::size_t i = 0; i < row.size(); ++i) {
      const std::string pad(widths[i] - row[i].size(), ' ');
      line += (i > 0 ? "  " : "") + (i == 0 ? row[i] + pad : pad + row[i]);
    }
    text += line.substr(0, line.find_last_not_of(' ') + 1) + '\n';
  }
  return text;
}

std::string Fixed(double value, int n_decimals) {
  if (!std::isfinite(value)) return "-";
  char buffer[352];  // the largest double has 309 digits before the point
  std::snprintf(buffer, sizeof buffer, "%.*f", std::clamp(n_decimals, 0, 17), value);
  return buffer;
}

std::string WithPrefix(double value, std::string_view unit) {
  if (!std::isfinite(value)) return "-";
  constexpr std::string_view kPrefixes[] = {"", "k", "M", "G", "T", "P"};
  std::size_t i = 0;
  for (; std::abs(value) >= 1000 && i + 1 < std::size(kPrefixes); ++i) value /= 1000;
  return Fixed(value, 2) + ' ' + std::string(kPrefixes[i]) + std::string(unit);
}

Progress::Progress() : on_terminal_(isatty(STDERR_FILENO) == 1), started_(Clock::now()) {}

Progress::~Progress() {
  if (drawn_) std::cerr << "\r\x1b[K" << std::flush;
}

void Progress::Show(std::string_view stage, double done) {
  if (!on_terminal_) return;
  const Clock::time_point now = Clock::now();
  if (stage != stage_) {
    stage_ = stage;
    started_ = now;
  }
  constexpr auto kQuiet = std::chrono::seconds(1);
  constexpr auto kBetween = std::chrono::milliseconds(100);
  if (now - started_ < kQuiet || now - last_drawn_ < kBetween) return;
  last_drawn_ = now;
  drawn_ = true;
  done = std::isfinite(done) ? std::clamp(done, 0.0, 1.0) : 0.0;
  constexpr int kWidth = 30;  // cells; with the texts beside it the line fits 80 columns
  const auto filled = static_cast<std::size_t>(done * kWidth);
  const double elapsed_s = std::chrono::duration<double>(now - started_).count();
  std::string line = '\r' + stage_ + " [" + std::string(filled, '#') + std::string(kWidth - filled, '.') + "] " +
                     Fixed(100 * done, 0) + " %";
  if (done > 0.01) line += ", " + Fixed(elapsed_s * (1 - done) / done, 0) + " s left";
  std::cerr << line << "\x1b[K" << std::flush;
}

}  // namespace zeroc
