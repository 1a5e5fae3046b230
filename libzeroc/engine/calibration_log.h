// What a calibration has measured so far, so that one that was stopped goes on where it was.
//
// A text file of one header and one line per figure, each written whole and flushed; a line that a crash cut short is
// dropped. A log whose key (a hash over inputs and options) differs is started anew. Measurements are deterministic, so
// a resumed calibration writes the same plan as an undisturbed one. Not thread-safe.
#pragma once

#include <cstdio>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "libzeroc/base/status.h"

namespace zeroc {

class CalibrationLog {
 public:
  // An empty path keeps everything in memory. kUnavailable when the file cannot be written.
  static Result<std::unique_ptr<CalibrationLog>> Open(const std::string& path, const std::string& key);
  ~CalibrationLog() = default;
  CalibrationLog(const CalibrationLog&) = delete;
  CalibrationLog& operator=(const CalibrationLog&) = delete;

  // The figures under `name` (no white space); nullptr when there are none.
  const std::vector<double>* Find(const std::string& name) const;
  // Finite numbers. Replaces an older entry.
  Status Add(const std::string& name, std::vector<double> figures);

  std::size_t n_resumed() const { return n_resumed_; }

  // Deletes the file; what is in memory stays.
  void Remove();

 private:
  explicit CalibrationLog(std::string path) : path_(std::move(path)), file_(nullptr, &std::fclose) {}

  std::string path_;
  std::unique_ptr<std::FILE, int (*)(std::FILE*)> file_;
  std::map<std::string, std::vector<double>> figures_;
  std::size_t n_resumed_ = 0;
};

}  // namespace zeroc
