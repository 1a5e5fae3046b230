#include "libzeroc/tokenizer/pre_tokenizer.h"

#include <optional>
#include <utility>

#include "libzeroc/tokenizer/utf8.h"

namespace zeroc {
namespace {

// GPT-2's pattern (encoder.py of the original release), which ByteLevel applies by default.
constexpr std::string_view kGpt2Pattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

struct Piece {
  std::size_t begin;
  std::size_t end;
  bool is_match;
};

// Turns the alternation of gaps and matches into words by the behaviour, one piece late.
class Merger {
 public:
  using Emit = std::function<Status(std::size_t begin, std::size_t end)>;
  Merger(SplitBehavior behavior, bool invert, const Emit& emit) : behavior_(behavior), invert_(invert), emit_(emit) {}

  Status Add(Piece piece) {
    piece.is_match = piece.is_match != invert_;
    if (behavior_ == SplitBehavior::kIsolated) return emit_(piece.begin, piece.end);
    if (behavior_ == SplitBehavior::kRemoved) return piece.is_match ? OkStatus() : emit_(piece.begin, piece.end);
    if (held_ && Joins(piece.is_match)) {
      held_->end = piece.end;
      // A match that took the gap behind it is complete.
      last_is_match_ = piece.is_match && behavior_ != SplitBehavior::kMergedWithNext;
      return OkStatus();
    }
    last_is_match_ = piece.is_match;
    const std::optional<Piece> done = std::exchange(held_, piece);
    return done ? emit_(done->begin, done->end) : OkStatus();
  }

  Status Finish() { return held_ ? emit_(held_->begin, held_->end) : OkStatus(); }

 private:
  // Whether a piece joins the one before it.
  bool Joins(bool is_match) const {
    switch (behavior_) {
      case SplitBehavior::kMergedWithPrevious:
        return is_match && !last_is_match_;
      case SplitBehavior::kMergedWithNext:
        return !is_match && last_is_match_;
      default:
        return is_match == last_is_match_;
    }
  }

  SplitBehavior behavior_;
  bool invert_;
  const Emit& emit_;
  std::optional<Piece> held_;
  bool last_is_match_ = false;
};

}  // namespace

Result<std::unique_ptr<PreTokenizer>> PreTokenizer::Create(const std::vector<PreTokenizerStep>& steps) {
  auto out = std::make_unique<PreTokenizer>();
  for (const PreTokenizerStep& step : steps) {
    const bool byte_level = step.kind == PreTokenizerStep::Kind::kByteLevel;
    std::unique_ptr<Regex> regex;
    if (byte_level && step.use_regex) {
      ZEROC_ASSIGN_OR_RETURN(regex, Regex::Compile(kGpt2Pattern));
    } else if (!byte_level) {
      ZEROC_ASSIGN_OR_RETURN(regex, step.literal ? Regex::CompileLiteral(step.pattern) : Regex::Compile(step.pattern));
    }
    out->steps_.push_back({.kind = step.kind,
                           .behavior = byte_level ? SplitBehavior::kIsolated : step.behavior,
                           .invert = !byte_level && step.invert,
                           .add_prefix_space = byte_level && step.add_prefix_space,
                           .regex = std::move(regex)});
  }
  return out;
}

PreTokenizer::Session::Session(const PreTokenizer& pre_tokenizer) : pre_tokenizer_(pre_tokenizer) {
  for (const Step& step : pre_tokenizer.steps_) {
    matchers_.push_back(step.regex ? std::make_unique<Regex::Matcher>(*step.regex) : nullptr);
  }
}

Status PreTokenizer::Session::Run(std::string_view text, std::string_view shadow, const Sink& sink) {
  return Apply(0, text, shadow, sink);
}

Status PreTokenizer::Session::Apply(std::size_t step, std::string_view text, std::string_view shadow,
                                    const Sink& sink) {
  if (text.empty()) return OkStatus();
  if (step == pre_tokenizer_.steps_.size()) return sink(text);
  if (pre_tokenizer_.steps_[step].add_prefix_space && text[0] != ' ') {
    const std::string spaced_text = std::string(1, ' ').append(text);
    const std::string spaced_shadow = std::string(1, ' ').append(shadow);
    return ApplySplit(step, spaced_text, spaced_shadow, sink);
  }
  return ApplySplit(step, text, shadow, sink);
}

Status PreTokenizer::Session::ApplySplit(std::size_t step, std::string_view text, std::string_view shadow,
                                         const Sink& sink) {
  if (matchers_[step] == nullptr) return Apply(step + 1, text, shadow, sink);
  const Merger::Emit emit = [&](std::size_t begin, std::size_t end) {
    return Apply(step + 1, text.substr(begin, end - begin), shadow.substr(begin, end - begin), sink);
  };
  Merger merger(pre_tokenizer_.steps_[step].behavior, pre_tokenizer_.steps_[step].invert, emit);
  std::size_t done = 0;  // everything before is handed over
  std::size_t from = 0;
  std::optional<std::size_t> last_end;
  while (from <= shadow.size()) {
    ZEROC_ASSIGN_OR_RETURN(const Regex::Matcher::Match match, matchers_[step]->Find(shadow, from));
    if (!match.found) break;
    if (match.begin == match.end && last_end == match.end) {
      // An empty match right behind the last one does not count; look one character further.
      from += from < shadow.size() ? NextUtf8(shadow.substr(from)).length : 1;
      continue;
    }
    if (done != match.begin) ZEROC_RETURN_IF_ERROR(merger.Add({done, match.begin, false}));
    ZEROC_RETURN_IF_ERROR(merger.Add({match.begin, match.end, true}));
    done = from = match.end;
    last_end = match.end;
  }
  if (done != shadow.size()) ZEROC_RETURN_IF_ERROR(merger.Add({done, shadow.size(), false}));
  return merger.Finish();
}

}  // namespace zeroc
