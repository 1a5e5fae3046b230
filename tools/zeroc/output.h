// What commands show: one JSON object, tables for people, and progress on a terminal's stderr. Single-threaded.
#pragma once

#include <chrono>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>
#include <vector>

namespace zeroc {

// One line on stdout. Strings should be UTF-8 (bytes that are not become U+FFFD); numbers that are not finite
// become null.
void PrintJson(const nlohmann::ordered_json& object);

// Columns are as wide as their widest cell; the first column is set left, the others right.
class Table {
 public:
  explicit Table(std::vector<std::string> head) : rows_{std::move(head)} {}
  void Add(std::vector<std::string> row) { rows_.push_back(std::move(row)); }
  std::string ToString() const;

 private:
  std::vector<std::vector<std::string>> rows_;
};

// 1234.5678 with 2 decimals: "1234.57"; not finite: "-".
std::string Fixed(double value, int n_decimals);
// 1.5e9 with unit "FLOP/s": "1.50 GFLOP/s".
std::string WithPrefix(double value, std::string_view unit);

// A bar on stderr, only when stderr is a terminal and the work lasts: nothing is drawn in the first second.
class Progress {
 public:
  Progress();
  ~Progress();  // clears the line
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  // done in [0, 1]. A new stage starts a new bar with its own clock.
  void Show(std::string_view stage, double done);

 private:
  using Clock = std::chrono::steady_clock;
  bool on_terminal_;
  bool drawn_ = false;
  std::string stage_;
  Clock::time_point started_;
  Clock::time_point last_drawn_;
};

}  // namespace zeroc
