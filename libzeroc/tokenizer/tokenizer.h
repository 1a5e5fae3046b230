// Text to token ids and back, for byte-level BPE tokenizers (Llama-3, GPT-2, Qwen styles), from a Hugging Face
// tokenizer.json and with the same results.
//
// Thread-safety: const after Open; Encode and Decode may run on any number of threads. Text is bytes and need not be
// valid UTF-8: an undecodable byte is a character that is neither letter, digit nor white space. The file is untrusted.
// Not supported, and refused with the field's name: other models than BPE, byte_fallback, normalizers, pre-tokenizers
// other than Split and ByteLevel. Letters, digits and so on are those of PCRE2's Unicode version (14 in Debian 12):
// characters assigned since then may split differently from Hugging Face.
#pragma once

#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "libzeroc/base/status.h"

namespace zeroc {

namespace internal {
struct TokenizerTables;
}

struct EncodeOptions {
  bool parse_special = true;  // special tokens written in the text become their ids; false: they are ordinary text
  bool add_special = false;   // put before and behind what the post-processor adds
};

class Tokenizer {
 public:
  // Reads dir/tokenizer.json. kNotFound, kInvalidArgument for a malformed file, kUnimplemented naming the field.
  static Result<std::unique_ptr<Tokenizer>> Open(const std::string& dir);

  // The same from the file's text; `name` is used in messages.
  static Result<std::unique_ptr<Tokenizer>> Parse(std::string_view json, std::string_view name);

  ~Tokenizer();
  Tokenizer(const Tokenizer&) = delete;
  Tokenizer& operator=(const Tokenizer&) = delete;

  // kInvalidArgument for a text above 256 MiB or a word of it (a piece between splits) above 16 MiB;
  // kResourceExhausted when a pattern of the file needs too many steps on this text.
  Result<std::vector<int>> Encode(std::string_view bytes, const EncodeOptions& options = {}) const;

  // A prompt as a model expects it: Encode, with the post-processor's prefix (BOS) in front unless the ids start with
  // it already; its suffix is not added.
  Result<std::vector<int>> EncodePrompt(std::string_view bytes, bool parse_special = true) const;

  // The exact bytes of the ids, which may be cut or invalid UTF-8 (StreamingDecoder replaces such bytes). An id that is
  // no token gives U+FFFD. Added tokens give their own text.
  std::string Decode(std::span<const int> ids, bool skip_special = false) const;

  // One more than the largest id. Ids may have holes, and a model's output may be wider than this.
  int vocab_size() const;
  bool HasId(int id) const;
  bool IsSpecial(int id) const;              // false for an id that is no token
  std::string_view IdToBytes(int id) const;  // empty for an id that is no token
  std::optional<int> bos_id() const;         // the first id that the post-processor adds before a text

 private:
  explicit Tokenizer(std::unique_ptr<const internal::TokenizerTables> tables);
  std::unique_ptr<const internal::TokenizerTables> tables_;
};

}  // namespace zeroc
