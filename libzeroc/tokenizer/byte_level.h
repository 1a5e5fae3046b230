// The byte alphabet of GPT-2 style tokenizers: each of the 256 bytes is written as one visible character, so that
// tokens of arbitrary bytes can stand in JSON text. Pure functions, thread-safe.
#pragma once

#include <optional>
#include <string>
#include <string_view>

namespace zeroc {

// The UTF-8 character that stands for the byte.
std::string ByteToCharacter(unsigned char byte);

// The bytes that a token's text stands for; nothing when one of its characters stands for no byte.
std::optional<std::string> CharactersToBytes(std::string_view token);

}  // namespace zeroc
