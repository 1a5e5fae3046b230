// Finds the added tokens of a tokenizer (special tokens among them) in raw text, before any pre-tokenisation.
// Const after construction and thread-safe.
#pragma once

#include <array>
#include <string>
#include <string_view>
#include <vector>

#include "libzeroc/base/status.h"
#include "libzeroc/tokenizer/pair_map.h"
#include "libzeroc/tokenizer/regex.h"

namespace zeroc {

struct AddedToken {
  int id = -1;
  std::string content;  // UTF-8, not empty, at most kAddedTokenBytesMax
  bool special = false;
  bool lstrip = false;       // takes the white space before it
  bool rstrip = false;       // takes the white space behind it
  bool single_word = false;  // counts only where no word character touches it
  bool normalized = false;   // looked for after the others, in the text that they leave
};

// Bounds the matcher's work per byte of text; published tokens stay below 200.
inline constexpr std::size_t kAddedTokenBytesMax = 512;

class AddedTokenMatcher {
 public:
  static Result<std::unique_ptr<AddedTokenMatcher>> Create(std::vector<AddedToken> tokens);

  struct Piece {
    std::size_t begin;
    std::size_t end;
    int id;  // -1: ordinary text
  };
  // Cuts the text into tokens and the text between, in order; tokens with `normalized` are left to CutNormalized.
  // `shadow` is as for PreTokenizer::Session::Run. Without parse_special, special tokens are ordinary text. At each
  // place the longest token wins; one that single_word or parse_special rejects still hides whatever begins inside it,
  // as in Hugging Face tokenizers.
  Result<std::vector<Piece>> Cut(std::string_view text, std::string_view shadow, bool parse_special) const;

  // The second pass: looks for the other tokens in the ordinary pieces, normalised by now if the tokenizer normalises.
  Result<std::vector<Piece>> CutNormalized(std::vector<Piece> pieces, std::string_view text, std::string_view shadow,
                                           bool parse_special) const;

 private:
  // One pass: a byte trie over token contents.
  struct Trie {
    PairMap edges;                   // (node, byte) -> node
    std::vector<int> token_of_node;  // index into tokens_, or -1
    std::array<bool, 256> first{};   // bytes that begin a token
  };
  struct Hit {
    int token;  // -1: none
    std::size_t length;
  };
  void Insert(Trie* trie, int token);
  static Hit LongestAt(const Trie& trie, std::string_view text);
  Result<bool> IsSingleWord(std::string_view shadow, std::size_t begin, std::size_t end) const;
  Status CutPass(const Trie& trie, std::string_view text, std::string_view shadow, bool parse_special, Piece range,
                 std::vector<Piece>* out) const;

  std::vector<AddedToken> tokens_;
  Trie plain_;
  Trie normalized_;
  std::unique_ptr<Regex> word_character_;
};

}  // namespace zeroc
