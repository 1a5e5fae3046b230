#include "libzeroc/engine/calibration_log.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <sstream>

#include "libzeroc/base/check.h"

namespace zeroc {
namespace {

constexpr std::string_view kHeader = "zeroc-calibration 2 ";
constexpr std::uintmax_t kMaxBytes = std::uintmax_t{64} << 20;

// Shortest decimal that reads back as the same number.
std::string ToText(double value) {
  std::array<char, 32> buffer;
  const auto end = std::to_chars(buffer.data(), buffer.data() + buffer.size(), value).ptr;
  return {buffer.data(), end};
}

// Whole lines only. Empty when there is no log of this key.
std::vector<std::string> ReadLines(const std::string& path, const std::string& key) {
  std::error_code error;
  const std::uintmax_t size = std::filesystem::file_size(path, error);
  if (error || size > kMaxBytes) return {};
  std::ifstream in(path, std::ios::binary);
  const std::string text{std::istreambuf_iterator<char>(in), {}};
  std::vector<std::string> lines;
  std::size_t begin = 0;
  for (std::size_t end = text.find('\n'); end != std::string::npos; end = text.find('\n', begin)) {
    lines.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  if (lines.empty() || lines[0] != std::string(kHeader) + key) return {};
  return lines;
}

}  // namespace

Result<std::unique_ptr<CalibrationLog>> CalibrationLog::Open(const std::string& path, const std::string& key) {
  std::unique_ptr<CalibrationLog> log(new CalibrationLog(path));
  if (path.empty()) return log;
  const std::vector<std::string> lines = ReadLines(path, key);
  for (std::size_t i = 1; i < lines.size(); ++i) {
    std::istringstream in(lines[i]);
    std::string name;
    in >> name;
    std::vector<double> figures;
    bool good = !name.empty();
    for (std::string word; in >> word;) {
      char* end = nullptr;
      figures.push_back(std::strtod(word.c_str(), &end));
      good = good && *end == '\0' && std::isfinite(figures.back());
    }
    if (good) log->figures_[name] = std::move(figures);
  }
  log->n_resumed_ = log->figures_.size();
  // Written anew, so that a torn last line cannot join the next one.
  log->file_.reset(std::fopen(path.c_str(), "wb"));
  if (log->file_ == nullptr) return Unavailable(path + ": cannot be written");
  std::fputs((std::string(kHeader) + key + "\n").c_str(), log->file_.get());
  const std::map<std::string, std::vector<double>> resumed = std::move(log->figures_);
  log->figures_.clear();
  for (const auto& [name, figures] : resumed) ZEROC_RETURN_IF_ERROR(log->Add(name, figures));
  return log;
}

const std::vector<double>* CalibrationLog::Find(const std::string& name) const {
  const auto found = figures_.find(name);
  return found == figures_.end() ? nullptr : &found->second;
}

Status CalibrationLog::Add(const std::string& name, std::vector<double> figures) {
  ZEROC_CHECK(!name.empty() && name.find_first_of(" \t\r\n") == std::string::npos, name);
  if (file_ != nullptr) {
    std::string line = name;
    for (const double value : figures) {
      line += ' ';
      line += ToText(value);
    }
    line += '\n';
    if (std::fputs(line.c_str(), file_.get()) < 0 || std::fflush(file_.get()) != 0) {
      return Unavailable(path_ + ": cannot be written");
    }
  }
  figures_[name] = std::move(figures);
  return OkStatus();
}

void CalibrationLog::Remove() {
  file_.reset();
  std::error_code ignored;
  if (!path_.empty()) std::filesystem::remove(path_, ignored);
}

}  // namespace zeroc
