#include "tools/zeroc/stop_filter.h"

#include <algorithm>
#include <utility>

namespace zeroc {

StopFilter::StopFilter(std::vector<std::string> stops) : stops_(std::move(stops)) {
  for (const std::string& stop : stops_) held_max_ = std::max(held_max_, stop.size() - 1);
}

std::string StopFilter::Push(const std::string& piece) {
  if (stopped_) return {};
  held_ += piece;
  std::size_t cut = std::string::npos;
  for (const std::string& stop : stops_) cut = std::min(cut, held_.find(stop));
  if (cut != std::string::npos) {
    stopped_ = true;
    held_.resize(cut);
    return std::exchange(held_, {});
  }
  std::size_t n = held_.size() - std::min(held_.size(), held_max_);
  while (n > 0 && (static_cast<unsigned char>(held_[n]) & 0xc0) == 0x80) --n;  // never inside a character
  std::string text = held_.substr(0, n);
  held_.erase(0, n);
  return text;
}

std::string StopFilter::Flush() { return std::exchange(held_, {}); }

}  // namespace zeroc
