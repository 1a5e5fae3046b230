#include "libzeroc/tokenizer/added_tokens.h"

#include <algorithm>

#include "libzeroc/tokenizer/utf8.h"

namespace zeroc {
namespace {

// Rust's \w, which decides single_word.
constexpr std::string_view kWordCharacter = R"([\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\x{200c}\x{200d}])";

// The text is well formed: it is a shadow.
std::size_t SkipWhiteSpaceBack(std::string_view text, std::size_t floor) {
  std::size_t end = text.size();
  while (end > floor) {
    const std::size_t begin = LastUtf8(text.substr(0, end));
    if (begin < floor || !IsWhiteSpace(NextUtf8(text.substr(begin)).code_point)) break;
    end = begin;
  }
  return end;
}

std::size_t SkipWhiteSpace(std::string_view text, std::size_t begin) {
  while (begin < text.size()) {
    const Utf8Step step = NextUtf8(text.substr(begin));
    if (!IsWhiteSpace(step.code_point)) break;
    begin += step.length;
  }
  return begin;
}

}  // namespace

Result<std::unique_ptr<AddedTokenMatcher>> AddedTokenMatcher::Create(std::vector<AddedToken> tokens) {
  auto out = std::make_unique<AddedTokenMatcher>();
  out->tokens_ = std::move(tokens);
  ZEROC_ASSIGN_OR_RETURN(out->word_character_, Regex::Compile(kWordCharacter));
  out->plain_.token_of_node = out->normalized_.token_of_node = {-1};
  for (std::size_t i = 0; i < out->tokens_.size(); ++i) {
    out->Insert(out->tokens_[i].normalized ? &out->normalized_ : &out->plain_, static_cast<int>(i));
  }
  return out;
}

void AddedTokenMatcher::Insert(Trie* trie, int token) {
  const std::string& content = tokens_[static_cast<std::size_t>(token)].content;
  std::uint32_t node = 0;
  for (const char c : content) {
    const auto byte = static_cast<unsigned char>(c);
    const std::optional<std::uint64_t> child = trie->edges.Find(node, byte);
    if (!child) {
      trie->edges.Insert(node, byte, trie->token_of_node.size());
      node = static_cast<std::uint32_t>(trie->token_of_node.size());
      trie->token_of_node.push_back(-1);
    } else {
      node = static_cast<std::uint32_t>(*child);
    }
  }
  trie->token_of_node[node] = token;
  trie->first[static_cast<unsigned char>(content[0])] = true;
}

AddedTokenMatcher::Hit AddedTokenMatcher::LongestAt(const Trie& trie, std::string_view text) {
  Hit hit = {-1, 0};
  std::uint32_t node = 0;
  for (std::size_t i = 0; i < text.size(); ++i) {
    const std::optional<std::uint64_t> child = trie.edges.Find(node, static_cast<unsigned char>(text[i]));
    if (!child) break;
    node = static_cast<std::uint32_t>(*child);
    if (trie.token_of_node[node] >= 0) hit = {trie.token_of_node[node], i + 1};
  }
  return hit;
}

Result<bool> AddedTokenMatcher::IsSingleWord(std::string_view shadow, std::size_t begin, std::size_t end) const {
  Regex::Matcher matcher(*word_character_);
  const auto is_word = [&](std::size_t at) -> Result<bool> {
    const std::string_view character = shadow.substr(at, NextUtf8(shadow.substr(at)).length);
    ZEROC_ASSIGN_OR_RETURN(const Regex::Matcher::Match match, matcher.Find(character, 0));
    return match.found;
  };
  if (begin > 0) {
    ZEROC_ASSIGN_OR_RETURN(const bool before, is_word(LastUtf8(shadow.substr(0, begin))));
    if (before) return false;
  }
  if (end == shadow.size()) return true;
  ZEROC_ASSIGN_OR_RETURN(const bool behind, is_word(end));
  return !behind;
}

// Neighbours (for single_word, lstrip and rstrip) are looked at inside `range` only: the second pass sees each piece of
// the first as a text of its own.
Status AddedTokenMatcher::CutPass(const Trie& trie, std::string_view text, std::string_view shadow, bool parse_special,
                                  Piece range, std::vector<Piece>* out) const {
  text = text.substr(range.begin, range.end - range.begin);
  shadow = shadow.substr(range.begin, range.end - range.begin);
  const auto add = [&](std::size_t begin, std::size_t end, int id) {
    out->push_back({range.begin + begin, range.begin + end, id});
  };
  std::size_t done = 0;
  for (std::size_t at = 0; at < text.size();) {
    const Hit hit = trie.first[static_cast<unsigned char>(text[at])] ? LongestAt(trie, text.substr(at)) : Hit{-1, 0};
    if (hit.token < 0) {
      ++at;
      continue;
    }
    const AddedToken& token = tokens_[static_cast<std::size_t>(hit.token)];
    std::size_t begin = at;
    std::size_t end = at + hit.length;
    at = end;
    if (token.special && !parse_special) continue;
    if (token.single_word) {
      ZEROC_ASSIGN_OR_RETURN(const bool single, IsSingleWord(shadow, begin, end));
      if (!single) continue;
    }
    if (token.lstrip) begin = std::max(SkipWhiteSpaceBack(shadow.substr(0, begin), 0), done);
    if (token.rstrip) end = SkipWhiteSpace(shadow, end);
    if (done < begin) add(done, begin, -1);
    add(begin, end, token.id);
    done = end;
  }
  if (done < text.size()) add(done, text.size(), -1);
  return OkStatus();
}

Result<std::vector<AddedTokenMatcher::Piece>> AddedTokenMatcher::Cut(std::string_view text, std::string_view shadow,
                                                                     bool parse_special) const {
  std::vector<Piece> out;
  ZEROC_RETURN_IF_ERROR(CutPass(plain_, text, shadow, parse_special, {0, text.size(), -1}, &out));
  return out;
}

Result<std::vector<AddedTokenMatcher::Piece>> AddedTokenMatcher::CutNormalized(std::vector<Piece> pieces,
                                                                               std::string_view text,
                                                                               std::string_view shadow,
                                                                               bool parse_special) const {
  if (normalized_.token_of_node.size() == 1) return pieces;
  std::vector<Piece> out;
  for (const Piece& piece : pieces) {
    if (piece.id >= 0) {
      out.push_back(piece);
    } else {
      ZEROC_RETURN_IF_ERROR(CutPass(normalized_, text, shadow, parse_special, piece, &out));
    }
  }
  return out;
}

}  // namespace zeroc
