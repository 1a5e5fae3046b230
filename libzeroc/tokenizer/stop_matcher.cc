#include "libzeroc/tokenizer/stop_matcher.h"

#include <algorithm>
#include <utility>

namespace zeroc {

StopMatcher::StopMatcher(std::vector<std::string> stops) : stops_(std::move(stops)) {
  for (const std::string& stop : stops_) longest_ = std::max(longest_, stop.size());
}

StopMatcher::Output StopMatcher::Push(std::string_view piece) {
  if (stops_.empty()) return {std::string(piece), false, {}};
  held_ += piece;
  std::size_t found = std::string::npos;
  const std::string* which = nullptr;
  for (const std::string& stop : stops_) {
    const std::size_t at = held_.find(stop);
    if (at < found) which = &stop;
    found = std::min(found, at);
  }
  if (which != nullptr) {
    Output output{held_.substr(0, found), true, *which};
    held_.clear();
    return output;
  }
  // Hold back the longest tail that begins some stop string.
  std::size_t keep = std::min(longest_ - 1, held_.size());
  const auto begins_a_stop = [this](std::string_view tail) {
    return std::any_of(stops_.begin(), stops_.end(),
                       [tail](const std::string& stop) { return stop.starts_with(tail); });
  };
  const std::string_view held = held_;
  while (keep > 0 && !begins_a_stop(held.substr(held.size() - keep))) --keep;
  Output output{held_.substr(0, held_.size() - keep), false, {}};
  held_.erase(0, held_.size() - keep);
  return output;
}

std::string StopMatcher::Flush() { return std::exchange(held_, {}); }

}  // namespace zeroc
