// Reads the tokenizer.json of a byte-level BPE tokenizer into plain tables. The file is untrusted.
// Pure function, thread-safe.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "libzeroc/base/status.h"
#include "libzeroc/tokenizer/added_tokens.h"
#include "libzeroc/tokenizer/bpe.h"
#include "libzeroc/tokenizer/pre_tokenizer.h"

namespace zeroc::internal {

struct TokenEntry {
  std::string bytes;        // what the token decodes to
  bool present = false;     // ids may have holes
  bool byte_level = false;  // written in the byte alphabet, so that a word can be this token
  bool special = false;
};

struct TokenizerSpec {
  std::vector<TokenEntry> tokens;  // by id
  std::array<int, 256> byte_ids{};
  std::vector<BpeMerge> merges;
  bool ignore_merges = false;
  std::vector<AddedToken> added;
  bool nfc = false;  // text is brought into Unicode form C first
  std::vector<PreTokenizerStep> steps;
  std::vector<int> prefix;  // ids that the post-processor puts before a single text
  std::vector<int> suffix;  // and behind it
};

inline constexpr std::size_t kTokenizerBytesMax = 64 << 20;
inline constexpr std::size_t kJsonValuesMax = 8 << 20;  // four times the largest published tokenizer
inline constexpr int kTokenIdMax = (1 << 21) - 1;

// kInvalidArgument for a malformed file, kUnimplemented for a kind of tokenizer that is not supported; the message
// names the field.
Result<TokenizerSpec> ParseTokenizerJson(std::string_view text);

}  // namespace zeroc::internal
