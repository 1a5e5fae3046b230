// Tokens of the code between a template's delimiters.
#include <algorithm>
#include <array>

#include "libzeroc/tokenizer/jinja.h"

namespace zeroc::jinja {
namespace {

constexpr std::array<std::string_view, 5> kTwoCharacters = {"==", "!=", "<=", ">=", "//"};
constexpr std::string_view kOneCharacter = "+-*/%~()[]{},.:|=<>";

bool IsNameStart(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_'; }
bool IsDigit(char c) { return c >= '0' && c <= '9'; }

Status Error(int line, const std::string& why) { return InvalidArgument("line " + std::to_string(line) + ": " + why); }

// The text of a quoted string whose quote is at code[*at]; leaves *at behind the closing quote.
Result<std::string> ReadString(std::string_view code, std::size_t* at, int line) {
  const char quote = code[(*at)++];
  std::string text;
  while (*at < code.size() && code[*at] != quote) {
    char c = code[(*at)++];
    if (c != '\\') {
      text += c;
      continue;
    }
    if (*at == code.size()) break;
    c = code[(*at)++];
    switch (c) {
      case 'n':
        text += '\n';
        break;
      case 't':
        text += '\t';
        break;
      case 'r':
        text += '\r';
        break;
      case '\\':
      case '\'':
      case '"':
        text += c;
        break;
      default:
        return Error(line, std::string("the escape \\") + c + " is not supported");
    }
  }
  if (*at >= code.size()) return Error(line, "a string does not end");
  ++*at;
  return text;
}

}  // namespace

Result<std::vector<Token>> Tokenize(std::string_view code, int line) {
  std::vector<Token> tokens;
  std::size_t at = 0;
  while (at < code.size()) {
    const char c = code[at];
    if (c == '\n') ++line;
    if (c == ' ' || c == '\t' || c == '\n' || c == '\r') {
      ++at;
      continue;
    }
    const std::size_t begin = at;
    if (c == '\'' || c == '"') {
      std::string text;
      ZEROC_ASSIGN_OR_RETURN(text, ReadString(code, &at, line));
      const auto breaks = std::count(code.begin() + static_cast<std::ptrdiff_t>(begin),
                                     code.begin() + static_cast<std::ptrdiff_t>(at), '\n');
      tokens.push_back({Token::Kind::kString, std::move(text), line});
      line += static_cast<int>(breaks);
    } else if (IsNameStart(c)) {
      while (at < code.size() && (IsNameStart(code[at]) || IsDigit(code[at]))) ++at;
      tokens.push_back({Token::Kind::kName, std::string(code.substr(begin, at - begin)), line});
    } else if (IsDigit(c)) {
      while (at < code.size() && IsDigit(code[at])) ++at;
      if (at - begin > 15 || (at < code.size() && IsNameStart(code[at]))) return Error(line, "a number is malformed");
      tokens.push_back({Token::Kind::kInteger, std::string(code.substr(begin, at - begin)), line});
    } else {
      const std::string_view two = code.substr(at, 2);
      const bool is_two = std::find(kTwoCharacters.begin(), kTwoCharacters.end(), two) != kTwoCharacters.end();
      if (!is_two && kOneCharacter.find(c) == std::string_view::npos) {
        return Error(line, "a character is not expected here: '" + std::string(1, c >= ' ' ? c : '?') + "'");
      }
      at += is_two ? 2 : 1;
      tokens.push_back({Token::Kind::kOperator, std::string(code.substr(begin, at - begin)), line});
    }
  }
  tokens.push_back({Token::Kind::kEnd, "", line});
  return tokens;
}

}  // namespace zeroc::jinja
