#include "libzeroc/tokenizer/streaming_decoder.h"

#include <span>
#include <utility>

#include "libzeroc/tokenizer/utf8.h"

namespace zeroc {

std::string StreamingDecoder::Push(int id) {
  const std::string bytes = std::exchange(pending_, {}) + tokenizer_.Decode(std::span(&id, 1), skip_special_);
  std::string_view rest = bytes;
  std::string out;
  while (!rest.empty()) {
    const Utf8Step step = NextUtf8(rest);
    if (step.kind == Utf8Step::Kind::kIncomplete) {
      pending_ = rest;
      break;
    }
    out += step.kind == Utf8Step::Kind::kValid ? rest.substr(0, step.length) : kReplacementCharacter;
    rest.remove_prefix(step.length);
  }
  return out;
}

std::string StreamingDecoder::Flush() { return ReplaceInvalidUtf8(std::exchange(pending_, {})); }

}  // namespace zeroc
