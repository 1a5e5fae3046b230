// Stop strings on streamed text: passes text on as soon as it cannot be part of a stop string any more.
//
// Not thread-safe. Text must come in pieces that never split a UTF-8 character, then neither does the output.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

namespace zeroc {

class StopMatcher {
 public:
  // Empty strings are not allowed (the request check refuses them).
  explicit StopMatcher(std::vector<std::string> stops);

  struct Output {
    std::string text;      // to be shown now
    bool stopped = false;  // a stop string was found; it and all after it are cut off
    std::string stop;      // .. which one
  };
  // After `stopped`, nothing more may be pushed. The earliest match wins, of two that begin together the first listed.
  Output Push(std::string_view piece);
  // The end came without a match: what was held back.
  std::string Flush();

 private:
  std::vector<std::string> stops_;
  std::size_t longest_ = 0;
  std::string held_;
};

}  // namespace zeroc
