// UTF-8 one character at a time, by the table of well-formed sequences (Unicode, section 3.9, table 3-7).
// Pure functions, thread-safe.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace zeroc {

struct Utf8Step {
  enum class Kind : std::uint8_t { kValid, kInvalid, kIncomplete };
  Kind kind;
  // kValid: bytes of the character. kInvalid: bytes of the longest prefix that could have begun one, at least 1.
  // kIncomplete: all bytes of the text, at most 3: more of them could complete the character.
  std::uint8_t length;
  char32_t code_point;  // kValid only
};

// Looks at the first character of a text that is not empty.
Utf8Step NextUtf8(std::string_view text);

// Start of the last character of a text that is well formed and not empty.
std::size_t LastUtf8(std::string_view text);

// The text with U+FFFD for every ill-formed prefix, as Python's errors="replace" and Rust's from_utf8_lossy give it.
std::string ReplaceInvalidUtf8(std::string_view text);

inline constexpr std::string_view kReplacementCharacter = "\xef\xbf\xbd";

// Unicode White_Space, which is what \s means to Hugging Face's tokenizers.
bool IsWhiteSpace(char32_t code_point);

}  // namespace zeroc
