#include "libzeroc/tokenizer/utf8.h"

namespace zeroc {
namespace {

// Length of the sequence that `lead` opens and the range of its second byte; 0 for a byte that opens none.
struct LeadByte {
  int length;
  unsigned char second_min;
  unsigned char second_max;
};

LeadByte Classify(unsigned char lead) {
  if (lead < 0x80) return {1, 0, 0};
  if (lead < 0xc2) return {0, 0, 0};
  if (lead < 0xe0) return {2, 0x80, 0xbf};
  if (lead == 0xe0) return {3, 0xa0, 0xbf};
  if (lead == 0xed) return {3, 0x80, 0x9f};  // no surrogates
  if (lead < 0xf0) return {3, 0x80, 0xbf};
  if (lead == 0xf0) return {4, 0x90, 0xbf};
  if (lead < 0xf4) return {4, 0x80, 0xbf};
  if (lead == 0xf4) return {4, 0x80, 0x8f};
  return {0, 0, 0};
}

}  // namespace

Utf8Step NextUtf8(std::string_view text) {
  const auto lead = static_cast<unsigned char>(text[0]);
  const LeadByte info = Classify(lead);
  if (info.length == 1) return {Utf8Step::Kind::kValid, 1, lead};
  if (info.length == 0) return {Utf8Step::Kind::kInvalid, 1, 0};
  char32_t code = lead & (0x7f >> info.length);
  for (int i = 1; i < info.length; ++i) {
    if (static_cast<std::size_t>(i) == text.size()) {
      return {Utf8Step::Kind::kIncomplete, static_cast<std::uint8_t>(i), 0};
    }
    const auto byte = static_cast<unsigned char>(text[static_cast<std::size_t>(i)]);
    const unsigned char low = i == 1 ? info.second_min : 0x80;
    const unsigned char high = i == 1 ? info.second_max : 0xbf;
    if (byte < low || byte > high) return {Utf8Step::Kind::kInvalid, static_cast<std::uint8_t>(i), 0};
    code = code << 6 | (byte & 0x3f);
  }
  return {Utf8Step::Kind::kValid, static_cast<std::uint8_t>(info.length), code};
}

std::size_t LastUtf8(std::string_view text) {
  std::size_t i = text.size() - 1;
  while (i > 0 && (static_cast<unsigned char>(text[i]) & 0xc0) == 0x80) --i;
  return i;
}

std::string ReplaceInvalidUtf8(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  while (!text.empty()) {
    const Utf8Step step = NextUtf8(text);
    out += step.kind == Utf8Step::Kind::kValid ? text.substr(0, step.length) : kReplacementCharacter;
    text.remove_prefix(step.length);
  }
  return out;
}

bool IsWhiteSpace(char32_t c) {
  return (c >= 0x09 && c <= 0x0d) || c == 0x20 || c == 0x85 || c == 0xa0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 || c == 0x202f || c == 0x205f || c == 0x3000;
}

}  // namespace zeroc
