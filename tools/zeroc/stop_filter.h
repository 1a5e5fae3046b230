// Cuts a streamed text at the first stop string. The router has a matcher of its own, on a layer that this tool cannot
// use.
// Not thread-safe. Pieces are whole UTF-8 characters, and so are the results.
#pragma once

#include <string>
#include <vector>

namespace zeroc {

class StopFilter {
 public:
  // No stop string is empty.
  explicit StopFilter(std::vector<std::string> stops);

  // The text that is certainly in front of every stop string. Empty once stopped.
  std::string Push(const std::string& piece);
  // The end: what was held back. Empty once stopped.
  std::string Flush();
  bool stopped() const { return stopped_; }

 private:
  std::vector<std::string> stops_;
  std::size_t held_max_ = 0;  // bytes that may begin a stop string: one less than the longest
  std::string held_;
  bool stopped_ = false;
};

}  // namespace zeroc
