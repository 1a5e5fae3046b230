#include "libzeroc/tokenizer/byte_level.h"

#include <array>

#include "libzeroc/tokenizer/utf8.h"

namespace zeroc {
namespace {

// Printable Latin-1 stands for itself; the other 68 bytes, in order, take U+0100 and up.
constexpr bool StandsForItself(unsigned c) {
  return (c >= 0x21 && c <= 0x7e) || (c >= 0xa1 && c <= 0xac) || (c >= 0xae && c <= 0xff);
}

constexpr unsigned kCodePointEnd = 0x144;

struct Alphabet {
  std::array<std::uint16_t, 256> code_of_byte{};
  std::array<std::int16_t, kCodePointEnd> byte_of_code{};
};

constexpr Alphabet MakeAlphabet() {
  Alphabet out;
  out.byte_of_code.fill(-1);
  unsigned next = 0x100;
  for (unsigned byte = 0; byte < 256; ++byte) {
    const unsigned code = StandsForItself(byte) ? byte : next++;
    out.code_of_byte[byte] = static_cast<std::uint16_t>(code);
    out.byte_of_code[code] = static_cast<std::int16_t>(byte);
  }
  return out;
}

constexpr Alphabet kAlphabet = MakeAlphabet();

}  // namespace

std::string ByteToCharacter(unsigned char byte) {
  const unsigned code = kAlphabet.code_of_byte[byte];
  if (code < 0x80) return {static_cast<char>(code)};
  return {static_cast<char>(0xc0 | code >> 6), static_cast<char>(0x80 | (code & 0x3f))};
}

std::optional<std::string> CharactersToBytes(std::string_view token) {
  std::string out;
  while (!token.empty()) {
    const Utf8Step step = NextUtf8(token);
    if (step.kind != Utf8Step::Kind::kValid || step.code_point >= kCodePointEnd) return std::nullopt;
    const int byte = kAlphabet.byte_of_code[step.code_point];
    if (byte < 0) return std::nullopt;
    out += static_cast<char>(byte);
    token.remove_prefix(step.length);
  }
  return out;
}

}  // namespace zeroc
