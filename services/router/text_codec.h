// Text to token ids and back, as the router needs it. Implemented over the model's tokenizer; tests bring their own.
//
// Thread-safe; a stream belongs to one caller.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "libzeroc/base/status.h"

namespace zeroc {

// Text of a growing token sequence. Pieces are whole UTF-8 characters; text may lag behind the tokens.
class TextStream {
 public:
  virtual ~TextStream() = default;
  virtual std::string Push(std::uint32_t token_id) = 0;
  virtual std::string Flush() = 0;  // what an unfinished character leaves, replaced by U+FFFD
};

class TextCodec {
 public:
  virtual ~TextCodec() = default;
  // With BOS as the tokenizer's post-processor adds it. kInvalidArgument for text that cannot be encoded.
  virtual Result<std::vector<std::uint32_t>> EncodePrompt(std::string_view text) const = 0;
  // Without BOS.
  virtual Result<std::vector<std::uint32_t>> EncodeText(std::string_view text) const { return EncodePrompt(text); }
  virtual std::unique_ptr<TextStream> NewStream() const = 0;
  // The text of one token by itself, for logprobs. Ids past the vocabulary give an empty string.
  virtual std::string TokenText(std::uint32_t token_id) const = 0;
  // Its exact bytes, which may be part of a character.
  virtual std::string TokenBytes(std::uint32_t token_id) const { return TokenText(token_id); }
  // UTF-8, U+FFFD for what is none.
  virtual std::string Decode(std::span<const std::uint32_t> ids) const = 0;
};

}  // namespace zeroc
