// Values of templates, and the string functions of Python that templates call.
#include <cctype>

#include "libzeroc/tokenizer/jinja.h"

namespace zeroc::jinja {

const List* Value::list() const {
  const auto* held = std::get_if<std::shared_ptr<const List>>(&v);
  return held == nullptr ? nullptr : held->get();
}
Map* Value::map() const {
  const auto* held = std::get_if<std::shared_ptr<Map>>(&v);
  return held == nullptr ? nullptr : held->get();
}
Value MakeList(List list) { return {std::make_shared<const List>(std::move(list))}; }
Value MakeMap(Map map) { return {std::make_shared<Map>(std::move(map))}; }

std::string Strip(const std::string& text, const std::string& characters, bool left, bool right) {
  const std::size_t first = left ? text.find_first_not_of(characters) : 0;
  if (first == std::string::npos) return {};
  const std::size_t last = right ? text.find_last_not_of(characters) : text.size() - 1;
  return last == std::string::npos ? "" : text.substr(first, last + 1 - first);
}

std::string Mapped(std::string text, int (*f)(int)) {
  for (char& c : text) {
    if (static_cast<unsigned char>(c) < 0x80) c = static_cast<char>(f(static_cast<unsigned char>(c)));
  }
  return text;
}

std::vector<std::string> Characters(const std::string& text) {
  std::vector<std::string> characters;
  for (const char c : text) {
    const bool continues = (static_cast<unsigned char>(c) & 0xc0) == 0x80;
    if (continues && !characters.empty() && characters.back().size() < 4) {
      characters.back() += c;
    } else {
      characters.emplace_back(1, c);
    }
  }
  return characters;
}

std::string Capitalized(std::string text, bool every_word) {
  bool start = true;
  for (char& c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte < 0x80) c = static_cast<char>(start ? std::toupper(byte) : std::tolower(byte));
    start = every_word && byte < 0x80 && std::isalpha(byte) == 0;
  }
  return text;
}

}  // namespace zeroc::jinja
