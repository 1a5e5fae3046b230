#include "libzeroc/tokenizer/tokenizer.h"

#include <xxhash.h>

#include <algorithm>
#include <bit>
#include <filesystem>
#include <fstream>
#include <functional>
#include <unordered_map>
#include <utility>

#include "libzeroc/tokenizer/added_tokens.h"
#include "libzeroc/tokenizer/bpe.h"
#include "libzeroc/tokenizer/nfc.h"
#include "libzeroc/tokenizer/pre_tokenizer.h"
#include "libzeroc/tokenizer/tokenizer_json.h"
#include "libzeroc/tokenizer/utf8.h"

namespace zeroc {

struct internal::TokenizerTables {
  std::vector<internal::TokenEntry> tokens;
  std::unique_ptr<Bpe> bpe;
  std::unique_ptr<PreTokenizer> pre_tokenizer;
  std::unique_ptr<AddedTokenMatcher> added;
  std::unordered_map<std::string_view, int> whole_words;  // into tokens; filled only when merges are ignored for them
  std::vector<int> prefix;
  std::vector<int> suffix;
  bool nfc = false;
};

namespace {

using internal::TokenizerTables;

constexpr std::size_t kTextBytesMax = std::size_t{256} << 20;
constexpr std::size_t kWordBytesMax = std::size_t{16} << 20;  // about 640 MiB of scratch

// The text with every undecodable byte replaced by a control character, which patterns take for neither letter, digit
// nor white space. Keeps `storage` empty and returns the text itself when there is none.
std::string_view MakeShadow(std::string_view text, std::string* storage) {
  constexpr char kUndecodable = '\x01';
  for (std::size_t i = 0; i < text.size();) {
    if (static_cast<unsigned char>(text[i]) < 0x80) {
      ++i;
      continue;
    }
    const Utf8Step step = NextUtf8(text.substr(i));
    if (step.kind != Utf8Step::Kind::kValid) {
      if (storage->empty()) *storage = text;
      std::fill_n(storage->begin() + static_cast<std::ptrdiff_t>(i), step.length, kUndecodable);
    }
    i += step.length;
  }
  return storage->empty() ? text : std::string_view(*storage);
}

Result<std::string> ReadFile(const std::string& path) {
  std::error_code error;
  if (std::filesystem::exists(path, error) && !std::filesystem::is_regular_file(path, error)) {
    return InvalidArgument(path + ": not a regular file");  // opening a FIFO would hang
  }
  std::ifstream in(path, std::ios::binary | std::ios::ate);
  if (!in) return NotFound(path + ": cannot be opened");
  const std::streamoff size = in.tellg();
  if (size < 0 || size > static_cast<std::streamoff>(internal::kTokenizerBytesMax)) {
    return InvalidArgument(path + ": not a file of at most " + std::to_string(internal::kTokenizerBytesMax) + " bytes");
  }
  std::string text(static_cast<std::size_t>(size), '\0');
  in.seekg(0);
  in.read(text.data(), size);
  if (in.gcount() != size) return DataLoss(path + ": read only " + std::to_string(in.gcount()) + " bytes");
  return text;
}

// Remembers where in this text, and where in its ids, a word was seen last, so that a word that comes again costs a
// copy. Direct-mapped: bounded, and a hostile text can only make it miss.
class WordCache {
 public:
  explicit WordCache(std::size_t text_bytes)
      : slots_(std::bit_ceil(std::clamp<std::size_t>(text_bytes / 16, 16, kSlotsMax))) {}

  struct Slot {
    std::string_view word;  // inside the text
    std::size_t ids_begin = 0;
    std::size_t n_ids = 0;
  };
  Slot* Find(std::string_view word) { return &slots_[XXH3_64bits(word.data(), word.size()) & (slots_.size() - 1)]; }

 private:
  static constexpr std::size_t kSlotsMax = 1 << 14;  // 512 KiB: stays in the L2 cache
  std::vector<Slot> slots_;
};

// One Encode call.
class Encoder {
 public:
  Encoder(const TokenizerTables& tables, std::string_view text)
      : tables_(tables), text_(text), session_(*tables.pre_tokenizer), cache_(text.size()) {}

  Result<std::vector<int>> Run(bool parse_special) {
    std::string storage;
    std::string_view shadow = MakeShadow(text_, &storage);
    ZEROC_ASSIGN_OR_RETURN(auto pieces, tables_.added->Cut(text_, shadow, parse_special));
    if (tables_.nfc) {
      ZEROC_RETURN_IF_ERROR(Normalize(&pieces));
      storage.clear();
      shadow = MakeShadow(text_, &storage);
    }
    ZEROC_ASSIGN_OR_RETURN(pieces, tables_.added->CutNormalized(std::move(pieces), text_, shadow, parse_special));
    ids_.reserve(text_.size() / 4 + 8);
    const PreTokenizer::Sink sink = [this](std::string_view word) { return AddWord(word); };
    for (const AddedTokenMatcher::Piece& piece : pieces) {
      const std::size_t length = piece.end - piece.begin;
      if (piece.id >= 0) {
        ids_.push_back(piece.id);
      } else {
        ZEROC_RETURN_IF_ERROR(
            session_.Run(text_.substr(piece.begin, length), shadow.substr(piece.begin, length), sink));
      }
    }
    return std::move(ids_);
  }

 private:
  // text_ becomes a text of our own, with every ordinary piece in form C.
  Status Normalize(std::vector<AddedTokenMatcher::Piece>* pieces) {
    normalized_.reserve(text_.size());
    for (AddedTokenMatcher::Piece& piece : *pieces) {
      const std::string_view raw = text_.substr(piece.begin, piece.end - piece.begin);
      piece.begin = normalized_.size();
      if (piece.id >= 0) {
        normalized_ += raw;
      } else {
        ZEROC_RETURN_IF_ERROR(AppendNfc(raw, &normalized_));
      }
      piece.end = normalized_.size();
    }
    text_ = normalized_;
    return OkStatus();
  }

  Status AddWord(std::string_view word) {
    if (word.size() == 1) {
      ids_.push_back(tables_.bpe->ByteId(word[0]));
      return OkStatus();
    }
    if (word.size() > kWordBytesMax) {
      return InvalidArgument("a word of " + std::to_string(word.size()) + " bytes, more than the limit of " +
                             std::to_string(kWordBytesMax));
    }
    WordCache::Slot* const slot = cache_.Find(word);
    if (slot->word == word) {
      for (std::size_t i = 0; i < slot->n_ids; ++i) ids_.push_back(ids_[slot->ids_begin + i]);
      return OkStatus();
    }
    const std::size_t begin = ids_.size();
    const auto whole = tables_.whole_words.empty() ? tables_.whole_words.end() : tables_.whole_words.find(word);
    if (whole != tables_.whole_words.end()) {
      ids_.push_back(whole->second);
    } else {
      tables_.bpe->Encode(word, &scratch_, &ids_);
    }
    // A word with an added prefix space lies in a buffer that is about to go.
    const std::less<> before;
    const bool inside = !before(word.data(), text_.data()) && before(word.data(), text_.data() + text_.size());
    if (inside) *slot = {word, begin, ids_.size() - begin};
    return OkStatus();
  }

  const TokenizerTables& tables_;
  std::string_view text_;
  std::string normalized_;  // what text_ points into, if the tokenizer normalises
  PreTokenizer::Session session_;
  WordCache cache_;
  Bpe::Scratch scratch_;
  std::vector<int> ids_;
};

}  // namespace

Tokenizer::Tokenizer(std::unique_ptr<const TokenizerTables> tables) : tables_(std::move(tables)) {}
Tokenizer::~Tokenizer() = default;

Result<std::unique_ptr<Tokenizer>> Tokenizer::Open(const std::string& dir) {
  const std::string path = dir + "/tokenizer.json";
  ZEROC_ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
  return Parse(text, path);
}

Result<std::unique_ptr<Tokenizer>> Tokenizer::Parse(std::string_view json, std::string_view name) {
  Result<internal::TokenizerSpec> spec = internal::ParseTokenizerJson(json);
  if (!spec.ok()) return spec.status().WithContext(name);
  auto tables = std::make_unique<TokenizerTables>();
  tables->tokens = std::move(spec->tokens);
  tables->bpe = std::make_unique<Bpe>(spec->byte_ids, spec->merges);
  Result<std::unique_ptr<PreTokenizer>> pre_tokenizer = PreTokenizer::Create(spec->steps);
  if (!pre_tokenizer.ok()) return pre_tokenizer.status().WithContext(std::string(name) + ": pre_tokenizer");
  tables->pre_tokenizer = *std::move(pre_tokenizer);
  for (AddedToken& token : spec->added) {
    if (!spec->nfc || !token.normalized) continue;
    std::string content;
    ZEROC_RETURN_IF_ERROR(AppendNfc(token.content, &content).WithContext(name));
    token.content = std::move(content);
  }
  ZEROC_ASSIGN_OR_RETURN(tables->added, AddedTokenMatcher::Create(std::move(spec->added)));
  if (spec->ignore_merges) {
    for (std::size_t id = 0; id < tables->tokens.size(); ++id) {
      const internal::TokenEntry& token = tables->tokens[id];
      if (token.byte_level) tables->whole_words.emplace(token.bytes, static_cast<int>(id));
    }
  }
  tables->nfc = spec->nfc;
  tables->prefix = std::move(spec->prefix);
  tables->suffix = std::move(spec->suffix);
  return std::unique_ptr<Tokenizer>(new Tokenizer(std::move(tables)));
}

Result<std::vector<int>> Tokenizer::Encode(std::string_view bytes, const EncodeOptions& options) const {
  if (bytes.size() > kTextBytesMax) {
    return InvalidArgument("tokenizer: a text of " + std::to_string(bytes.size()) + " bytes, more than the limit of " +
                           std::to_string(kTextBytesMax));
  }
  Result<std::vector<int>> ids = Encoder(*tables_, bytes).Run(options.parse_special);
  if (!ids.ok()) return ids.status().WithContext("tokenizer");
  if (options.add_special) {
    ids->insert(ids->begin(), tables_->prefix.begin(), tables_->prefix.end());
    ids->insert(ids->end(), tables_->suffix.begin(), tables_->suffix.end());
  }
  return ids;
}

Result<std::vector<int>> Tokenizer::EncodePrompt(std::string_view bytes, bool parse_special) const {
  ZEROC_ASSIGN_OR_RETURN(std::vector<int> ids, Encode(bytes, {.parse_special = parse_special, .add_special = false}));
  const std::vector<int>& prefix = tables_->prefix;
  const bool has_it = ids.size() >= prefix.size() && std::equal(prefix.begin(), prefix.end(), ids.begin());
  if (!has_it) ids.insert(ids.begin(), prefix.begin(), prefix.end());
  return ids;
}

std::string Tokenizer::Decode(std::span<const int> ids, bool skip_special) const {
  std::string out;
  for (const int id : ids) {
    if (!HasId(id)) {
      out += kReplacementCharacter;
    } else if (!skip_special || !IsSpecial(id)) {
      out += IdToBytes(id);
    }
  }
  return out;
}

int Tokenizer::vocab_size() const { return static_cast<int>(tables_->tokens.size()); }

bool Tokenizer::HasId(int id) const {
  return id >= 0 && id < vocab_size() && tables_->tokens[static_cast<std::size_t>(id)].present;
}

bool Tokenizer::IsSpecial(int id) const { return HasId(id) && tables_->tokens[static_cast<std::size_t>(id)].special; }

std::string_view Tokenizer::IdToBytes(int id) const {
  return HasId(id) ? std::string_view(tables_->tokens[static_cast<std::size_t>(id)].bytes) : std::string_view();
}

std::optional<int> Tokenizer::bos_id() const {
  return tables_->prefix.empty() ? std::nullopt : std::optional<int>(tables_->prefix.front());
}

}  // namespace zeroc
