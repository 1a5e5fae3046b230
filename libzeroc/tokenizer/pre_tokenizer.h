// Cuts text into words before byte-pair encoding, as the pre_tokenizer of a tokenizer.json says.
// Const after Create and thread-safe; each thread runs its own Session.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "libzeroc/base/status.h"
#include "libzeroc/tokenizer/regex.h"

namespace zeroc {

// What becomes of the matches of a Split's pattern.
enum class SplitBehavior { kRemoved, kIsolated, kMergedWithPrevious, kMergedWithNext, kContiguous };

struct PreTokenizerStep {
  enum class Kind { kSplit, kByteLevel };
  Kind kind = Kind::kSplit;
  std::string pattern;   // kSplit
  bool literal = false;  // kSplit: the pattern is plain text
  SplitBehavior behavior = SplitBehavior::kIsolated;
  bool invert = false;            // kSplit: matches and gaps change places
  bool add_prefix_space = false;  // kByteLevel: " " before every piece that does not start with one
  bool use_regex = true;          // kByteLevel: split by GPT-2's pattern
};

class PreTokenizer {
 public:
  // Steps in order; a kByteLevel step comes last, if at all (the caller has checked).
  static Result<std::unique_ptr<PreTokenizer>> Create(const std::vector<PreTokenizerStep>& steps);

  using Sink = std::function<Status(std::string_view word)>;

  // Holds one thread's match buffers.
  class Session {
   public:
    explicit Session(const PreTokenizer& pre_tokenizer);

    // Calls sink for each word in order; words are never empty. `shadow` is the text with every undecodable byte
    // replaced by one ASCII byte: patterns see the shadow, words are cut from the text. A word lies inside `text`,
    // or, where a prefix space was added, in a buffer that dies after the call.
    Status Run(std::string_view text, std::string_view shadow, const Sink& sink);

   private:
    Status Apply(std::size_t step, std::string_view text, std::string_view shadow, const Sink& sink);
    Status ApplySplit(std::size_t step, std::string_view text, std::string_view shadow, const Sink& sink);

    const PreTokenizer& pre_tokenizer_;
    std::vector<std::unique_ptr<Regex::Matcher>> matchers_;  // one per step; null where a step has no pattern
  };

 private:
  struct Step {
    PreTokenizerStep::Kind kind;
    SplitBehavior behavior;
    bool invert;
    bool add_prefix_space;
    std::unique_ptr<Regex> regex;  // null: the step does not split
  };
  std::vector<Step> steps_;
};

}  // namespace zeroc
