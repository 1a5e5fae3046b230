// Text of a completion while its tokens arrive: valid UTF-8 at every moment, although tokens may end inside a
// character.
//
// One object per completion; not thread-safe. The tokenizer must outlive it.
#pragma once

#include <string>

#include "libzeroc/tokenizer/tokenizer.h"

namespace zeroc {

class StreamingDecoder {
 public:
  explicit StreamingDecoder(const Tokenizer& tokenizer, bool skip_special = false)
      : tokenizer_(tokenizer), skip_special_(skip_special) {}

  // The text that the id completes; maybe empty, as at most 3 bytes of an unfinished character are held back. Bytes
  // that can no longer become a character are U+FFFD at once, and so is an id that is no token.
  std::string Push(int id);

  // The end: an unfinished character becomes U+FFFD. The decoder may be used again for another completion.
  std::string Flush();

 private:
  const Tokenizer& tokenizer_;
  bool skip_special_;
  std::string pending_;
};

}  // namespace zeroc
