// Regular expressions of tokenizer files, matched by PCRE2 with the meaning that Hugging Face's engine (Oniguruma, Ruby
// syntax) gives them. PCRE2 stays in regex.cc.
//
// Thread-safety: Regex is const after Compile; each thread makes its own Matcher.
#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "libzeroc/base/status.h"

namespace zeroc {

class Regex {
 public:
  // kInvalidArgument for a pattern that does not compile, kUnimplemented for a construct whose meaning differs between
  // the engines (word classes, POSIX classes, class intersection, back-references, ...).
  static Result<std::unique_ptr<Regex>> Compile(std::string_view pattern);

  // Matches exactly this text.
  static Result<std::unique_ptr<Regex>> CompileLiteral(std::string_view text);

  ~Regex();
  Regex(const Regex&) = delete;
  Regex& operator=(const Regex&) = delete;

  class Matcher {
   public:
    explicit Matcher(const Regex& regex);
    ~Matcher();
    Matcher(const Matcher&) = delete;
    Matcher& operator=(const Matcher&) = delete;

    struct Match {
      bool found;
      std::size_t begin;  // bytes from the start of the subject
      std::size_t end;
    };
    // The first match at or after `from`; look-behind sees the bytes before. `subject` must be well-formed UTF-8.
    // kResourceExhausted when the pattern needs too many steps.
    Result<Match> Find(std::string_view subject, std::size_t from);

   private:
    const Regex& regex_;
    void* data_;
  };

 private:
  Regex() = default;
  static Result<std::unique_ptr<Regex>> CompileOptions(std::string_view pattern, std::uint32_t options);

  void* code_ = nullptr;
  void* context_ = nullptr;
  bool jit_ = false;
};

}  // namespace zeroc
