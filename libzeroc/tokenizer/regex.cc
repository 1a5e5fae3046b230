#include "libzeroc/tokenizer/regex.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <cctype>
#include <new>

namespace zeroc {
namespace {

constexpr std::size_t kPatternBytesMax = 1 << 16;
// Real patterns take a few steps per byte; these stop a hostile one within about a second and a few MiB.
constexpr std::uint32_t kStepsMax = 20'000'000;
constexpr std::uint32_t kHeapKibMax = 64 * 1024;

// Oniguruma's \s is Unicode White_Space; PCRE2's adds U+180E.
constexpr std::string_view kSpaceSet = "\\t-\\r\\x{85}\\p{Z}";

// Rewrites a pattern of Oniguruma's Ruby syntax for PCRE2, construct by construct.
class Translator {
 public:
  explicit Translator(std::string_view pattern) : pattern_(pattern) {}

  Result<std::string> Run() {
    while (at_ < pattern_.size()) {
      const char c = pattern_[at_];
      if (c == '\\') {
        ZEROC_RETURN_IF_ERROR(Escape());
      } else if (in_class_) {
        ZEROC_RETURN_IF_ERROR(InClass(c));
      } else {
        ZEROC_RETURN_IF_ERROR(Outside(c));
      }
    }
    return std::move(out_);
  }

 private:
  Status Refuse(std::string_view what) const {
    return Unimplemented("regular expression: " + std::string(what) + " at byte " + std::to_string(at_) +
                         " is not supported");
  }
  void Copy(std::size_t n) {
    out_ += pattern_.substr(at_, n);
    at_ += n;
  }

  Status Escape() {
    if (at_ + 1 == pattern_.size()) return InvalidArgument("regular expression: ends in a backslash");
    const char c = pattern_[at_ + 1];
    if (c == 's' || c == 'S') {
      if (c == 'S' && in_class_) return Refuse("\\S inside a class");
      if (!in_class_) out_ += c == 's' ? "[" : "[^";
      out_ += kSpaceSet;
      if (!in_class_) out_ += ']';
      at_ += 2;
      return OkStatus();
    }
    const bool punctuation = static_cast<unsigned char>(c) < 0x80 && !std::isalnum(static_cast<unsigned char>(c));
    // The rest means the same to both engines, PCRE2 being in UTF and UCP mode.
    if (!punctuation && std::string_view("dDpPrntfxAz").find(c) == std::string_view::npos) {
      return Refuse(std::string("\\") + c);
    }
    const std::size_t brace =
        pattern_.substr(at_ + 2).starts_with("{") ? pattern_.find('}', at_) : std::string_view::npos;
    const bool has_argument = (c == 'p' || c == 'P' || c == 'x') && brace != std::string_view::npos;
    Copy(has_argument ? brace + 1 - at_ : 2);
    return OkStatus();
  }

  Status InClass(char c) {
    if (c == '[') return Refuse("a class inside a class");  // a set operation to Oniguruma, a plain '[' to PCRE2
    if (c == '&' && pattern_.substr(at_).starts_with("&&")) return Refuse("class intersection");
    if (c == ']') in_class_ = false;
    Copy(1);
    return OkStatus();
  }

  Status Outside(char c) {
    if (c == '[') {
      in_class_ = true;
      Copy(pattern_.substr(at_).starts_with("[^") ? 2 : 1);
      if (pattern_.substr(at_).starts_with("]")) return Refuse("an empty class");
      return OkStatus();
    }
    if (c == '(' && pattern_.substr(at_).starts_with("(?")) return Group();
    if (c == '(' && pattern_.substr(at_).starts_with("(*")) return Refuse("a verb");
    // {n,m}+ repeats a repetition in Ruby syntax and is possessive in PCRE2.
    if (c == '}' && pattern_.substr(at_).starts_with("}+")) return Refuse("'+' after '}'");
    if (c == '{' && pattern_.substr(at_).starts_with("{,")) return Refuse("'{,'");  // text to PCRE2
    Copy(1);
    return OkStatus();
  }

  Status Group() {
    for (const std::string_view opening : {"(?:", "(?=", "(?!", "(?<=", "(?<!", "(?>", "(?i:", "(?-i:"}) {
      if (pattern_.substr(at_).starts_with(opening)) {
        Copy(opening.size());
        return OkStatus();
      }
    }
    if (at_ == 0 && pattern_.starts_with("(?i)")) {  // further on, Ruby and Perl differ in how far it reaches
      Copy(4);
      return OkStatus();
    }
    return Refuse("this kind of group");
  }

  std::string_view pattern_;
  std::size_t at_ = 0;
  bool in_class_ = false;
  std::string out_;
};

}  // namespace

Result<std::unique_ptr<Regex>> Regex::Compile(std::string_view pattern) {
  ZEROC_ASSIGN_OR_RETURN(const std::string translated, Translator(pattern).Run());
  return CompileOptions(translated, PCRE2_MULTILINE | PCRE2_ALT_CIRCUMFLEX);  // ^ and $ are line anchors in Ruby
}

Result<std::unique_ptr<Regex>> Regex::CompileLiteral(std::string_view text) {
  return CompileOptions(text, PCRE2_LITERAL);
}

Result<std::unique_ptr<Regex>> Regex::CompileOptions(std::string_view pattern, std::uint32_t options) {
  if (pattern.size() > kPatternBytesMax) return InvalidArgument("regular expression: longer than 64 KiB");
  const std::unique_ptr<pcre2_compile_context, decltype(&pcre2_compile_context_free)> compile_context(
      pcre2_compile_context_create(nullptr), &pcre2_compile_context_free);
  std::unique_ptr<Regex> out(new Regex());
  auto* const context = pcre2_match_context_create(nullptr);
  out->context_ = context;
  if (compile_context == nullptr || context == nullptr) throw std::bad_alloc();
  pcre2_set_newline(compile_context.get(), PCRE2_NEWLINE_LF);
  pcre2_set_match_limit(context, kStepsMax);
  pcre2_set_heap_limit(context, kHeapKibMax);

  const std::uint32_t unicode = (options & PCRE2_LITERAL) != 0 ? PCRE2_UTF : PCRE2_UTF | PCRE2_UCP;
  int error = 0;
  PCRE2_SIZE where = 0;
  auto* const code = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(), options | unicode,
                                   &error, &where, compile_context.get());
  if (code == nullptr) {
    unsigned char message[160] = {};
    pcre2_get_error_message(error, message, sizeof message);
    return InvalidArgument("regular expression: " + std::string(reinterpret_cast<const char*>(message)) + " (at byte " +
                           std::to_string(where) + " of its PCRE2 form)");
  }
  out->code_ = code;
  out->jit_ = pcre2_jit_compile(code, PCRE2_JIT_COMPLETE) == 0;
  return out;
}

Regex::~Regex() {
  pcre2_code_free(static_cast<pcre2_code*>(code_));
  pcre2_match_context_free(static_cast<pcre2_match_context*>(context_));
}

Regex::Matcher::Matcher(const Regex& regex)
    : regex_(regex), data_(pcre2_match_data_create_from_pattern(static_cast<pcre2_code*>(regex.code_), nullptr)) {
  if (data_ == nullptr) throw std::bad_alloc();
}

Regex::Matcher::~Matcher() { pcre2_match_data_free(static_cast<pcre2_match_data*>(data_)); }

Result<Regex::Matcher::Match> Regex::Matcher::Find(std::string_view subject, std::size_t from) {
  const auto* const code = static_cast<const pcre2_code*>(regex_.code_);
  auto* const data = static_cast<pcre2_match_data*>(data_);
  auto* const context = static_cast<pcre2_match_context*>(regex_.context_);
  const auto* const text = reinterpret_cast<PCRE2_SPTR>(subject.data());
  int rc = PCRE2_ERROR_JIT_STACKLIMIT;
  if (regex_.jit_) rc = pcre2_jit_match(code, text, subject.size(), from, 0, data, context);
  if (rc == PCRE2_ERROR_JIT_STACKLIMIT) {  // the interpreter keeps its frames on the heap
    rc = pcre2_match(code, text, subject.size(), from, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT, data, context);
  }
  if (rc == PCRE2_ERROR_NOMATCH) return Match{false, 0, 0};
  if (rc < 0) {
    return ResourceExhausted("regular expression: the text needs too many steps (PCRE2 error " + std::to_string(rc) +
                             ")");
  }
  const PCRE2_SIZE* const span = pcre2_get_ovector_pointer(data);
  return Match{true, span[0], span[1]};
}

}  // namespace zeroc
