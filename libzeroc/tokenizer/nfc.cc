#include "libzeroc/tokenizer/nfc.h"

#include <utf8proc.h>

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "libzeroc/tokenizer/utf8.h"

namespace zeroc {
namespace {

// All characters below U+0300 are in form C, whatever stands beside them; their first bytes are below 0xcc.
bool IsSurelyNfc(std::string_view text) {
  return std::all_of(text.begin(), text.end(), [](char c) { return static_cast<unsigned char>(c) < 0xcc; });
}

Status AppendWellFormed(std::string_view text, std::string* out) {
  if (text.empty()) return OkStatus();
  utf8proc_uint8_t* made = nullptr;
  const utf8proc_ssize_t length =
      utf8proc_map(reinterpret_cast<const utf8proc_uint8_t*>(text.data()), static_cast<utf8proc_ssize_t>(text.size()),
                   &made, static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE));
  const std::unique_ptr<utf8proc_uint8_t, decltype(&std::free)> owner(made, &std::free);
  if (length < 0) return ResourceExhausted(std::string("normalisation: ") + utf8proc_errmsg(length));
  out->append(reinterpret_cast<const char*>(made), static_cast<std::size_t>(length));
  return OkStatus();
}

}  // namespace

Status AppendNfc(std::string_view text, std::string* out) {
  if (IsSurelyNfc(text)) {
    out->append(text);
    return OkStatus();
  }
  std::size_t begin = 0;
  for (std::size_t at = 0; at < text.size();) {
    const Utf8Step step = NextUtf8(text.substr(at));
    at += step.length;
    if (step.kind == Utf8Step::Kind::kValid) continue;
    ZEROC_RETURN_IF_ERROR(AppendWellFormed(text.substr(begin, at - step.length - begin), out));
    out->append(text.substr(at - step.length, step.length));
    begin = at;
  }
  return AppendWellFormed(text.substr(begin), out);
}

}  // namespace zeroc
