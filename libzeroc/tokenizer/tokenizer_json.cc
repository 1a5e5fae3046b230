#include "libzeroc/tokenizer/tokenizer_json.h"

#include <nlohmann/json.hpp>
#include <unordered_map>

#include "libzeroc/tokenizer/byte_level.h"
#include "libzeroc/tokenizer/utf8.h"

namespace zeroc::internal {
namespace {

using nlohmann::json;

// At most 80 bytes of a foreign text, in quotes, with anything unusual as '?': safe in any message.
std::string Quoted(std::string_view text) {
  std::string out = "\"";
  for (const char c : text.substr(0, 80)) out += c >= 0x20 && c < 0x7f ? c : '?';
  return out + (text.size() > 80 ? "...\"" : "\"");
}

Status WrongField(const std::string& field, std::string_view cause) {
  return InvalidArgument(field + " " + std::string(cause));
}

// Null stands for absent.
const json* Find(const json& object, const char* name) {
  const auto it = object.find(name);
  return it == object.end() || it->is_null() ? nullptr : &*it;
}

Result<const json*> RequireObject(const json& object, const std::string& prefix, const char* name) {
  const json* const value = Find(object, name);
  if (value == nullptr || !value->is_object()) return WrongField(prefix + name, "is missing or not an object");
  return value;
}

Result<std::string> RequireString(const json& object, const std::string& prefix, const char* name) {
  const json* const value = Find(object, name);
  if (value == nullptr || !value->is_string()) return WrongField(prefix + name, "is missing or not a string");
  return value->get<std::string>();
}

Result<bool> BoolOr(const json& object, const std::string& prefix, const char* name, bool otherwise) {
  const json* const value = Find(object, name);
  if (value == nullptr) return otherwise;
  if (!value->is_boolean()) return WrongField(prefix + name, "is not a boolean");
  return value->get<bool>();
}

Result<int> TokenId(const json& value, const std::string& field) {
  if (!value.is_number_unsigned() || value.get<std::uint64_t>() > static_cast<std::uint64_t>(kTokenIdMax)) {
    return WrongField(field, "is not a token id in [0, " + std::to_string(kTokenIdMax) + "]");
  }
  return value.get<int>();
}

// The elements of a Sequence, or the object itself as a list of one; null gives none. `list_name` is the Sequence's
// own word for its elements. Sequences do not nest.
struct Component {
  const json* object;
  std::string type;
  std::string field;  // "pre_tokenizer.pretokenizers[1]."
};

Result<std::vector<Component>> Components(const json& root, const char* name, const char* list_name) {
  const json* const top = Find(root, name);
  std::vector<Component> out;
  if (top == nullptr) return out;
  const auto add = [&out](const json& object, const std::string& field) -> Status {
    if (!object.is_object()) return WrongField(field, "is not an object");
    ZEROC_ASSIGN_OR_RETURN(std::string type, RequireString(object, field + ".", "type"));
    out.push_back({&object, std::move(type), field + "."});
    return OkStatus();
  };
  ZEROC_RETURN_IF_ERROR(add(*top, name));
  if (out[0].type != "Sequence") return out;
  out.clear();
  const std::string field = std::string(name) + "." + list_name;
  const json* const list = Find(*top, list_name);
  if (list == nullptr || !list->is_array()) return WrongField(field, "is missing or not a list");
  constexpr std::size_t kComponentsMax = 64;
  if (list->size() > kComponentsMax) return WrongField(field, "has more than 64 elements");
  for (std::size_t i = 0; i < list->size(); ++i) {
    ZEROC_RETURN_IF_ERROR(add((*list)[i], field + "[" + std::to_string(i) + "]"));
  }
  return out;
}

Status UnsupportedType(const Component& component, std::string_view supported) {
  return Unimplemented(component.field + "type " + Quoted(component.type) + " is not supported (" +
                       std::string(supported) + ")");
}

Result<SplitBehavior> ParseBehavior(const std::string& name, const std::string& field) {
  if (name == "Removed") return SplitBehavior::kRemoved;
  if (name == "Isolated") return SplitBehavior::kIsolated;
  if (name == "MergedWithPrevious") return SplitBehavior::kMergedWithPrevious;
  if (name == "MergedWithNext") return SplitBehavior::kMergedWithNext;
  if (name == "Contiguous") return SplitBehavior::kContiguous;
  return WrongField(field + "behavior", Quoted(name) + " is unknown");
}

Result<PreTokenizerStep> ParseSplit(const Component& component) {
  PreTokenizerStep step;
  ZEROC_ASSIGN_OR_RETURN(const json* pattern, RequireObject(*component.object, component.field, "pattern"));
  step.literal = Find(*pattern, "Regex") == nullptr;
  ZEROC_ASSIGN_OR_RETURN(step.pattern,
                         RequireString(*pattern, component.field + "pattern.", step.literal ? "String" : "Regex"));
  ZEROC_ASSIGN_OR_RETURN(const std::string behavior, RequireString(*component.object, component.field, "behavior"));
  ZEROC_ASSIGN_OR_RETURN(step.behavior, ParseBehavior(behavior, component.field));
  ZEROC_ASSIGN_OR_RETURN(step.invert, BoolOr(*component.object, component.field, "invert", false));
  return step;
}

Status ParsePreTokenizer(const json& root, TokenizerSpec* spec) {
  ZEROC_ASSIGN_OR_RETURN(const std::vector<Component> parts, Components(root, "pre_tokenizer", "pretokenizers"));
  for (const Component& part : parts) {
    if (!spec->steps.empty() && spec->steps.back().kind == PreTokenizerStep::Kind::kByteLevel) {
      return Unimplemented(part.field + "type: nothing may follow ByteLevel");
    }
    PreTokenizerStep step;
    if (part.type == "Split") {
      ZEROC_ASSIGN_OR_RETURN(step, ParseSplit(part));
    } else if (part.type == "ByteLevel") {
      step.kind = PreTokenizerStep::Kind::kByteLevel;
      ZEROC_ASSIGN_OR_RETURN(step.add_prefix_space, BoolOr(*part.object, part.field, "add_prefix_space", true));
      ZEROC_ASSIGN_OR_RETURN(step.use_regex, BoolOr(*part.object, part.field, "use_regex", true));
    } else {
      return UnsupportedType(part, "Sequence, Split and ByteLevel are");
    }
    spec->steps.push_back(std::move(step));
  }
  if (spec->steps.empty() || spec->steps.back().kind != PreTokenizerStep::Kind::kByteLevel) {
    return Unimplemented("pre_tokenizer does not end in ByteLevel: only byte-level tokenizers are supported");
  }
  return OkStatus();
}

Status ParseNormalizer(const json& root, TokenizerSpec* spec) {
  ZEROC_ASSIGN_OR_RETURN(const std::vector<Component> normalizers, Components(root, "normalizer", "normalizers"));
  for (const Component& normalizer : normalizers) {
    if (normalizer.type != "NFC") return UnsupportedType(normalizer, "NFC is, and no normalizer");
    spec->nfc = true;
  }
  return OkStatus();
}

Status CheckDecoder(const json& root) {
  ZEROC_ASSIGN_OR_RETURN(const std::vector<Component> decoders, Components(root, "decoder", "decoders"));
  if (decoders.size() != 1) return Unimplemented("decoder is not ByteLevel");
  if (decoders[0].type != "ByteLevel") return UnsupportedType(decoders[0], "ByteLevel is");
  return OkStatus();
}

using Vocab = std::unordered_map<std::string, int>;

Status SetToken(int id, std::string bytes, bool byte_level, const std::string& field, TokenizerSpec* spec) {
  const auto index = static_cast<std::size_t>(id);
  if (index >= spec->tokens.size()) spec->tokens.resize(index + 1);
  TokenEntry& entry = spec->tokens[index];
  if (entry.present) return WrongField(field, "repeats token id " + std::to_string(id));
  entry.bytes = std::move(bytes);
  entry.present = true;
  entry.byte_level = byte_level;
  return OkStatus();
}

Result<Vocab> ParseVocab(const json& model, TokenizerSpec* spec) {
  ZEROC_ASSIGN_OR_RETURN(const json* list, RequireObject(model, "model.", "vocab"));
  Vocab vocab;
  vocab.reserve(list->size());
  for (const auto& [token, value] : list->items()) {
    const std::string field = "model.vocab " + Quoted(token);
    ZEROC_ASSIGN_OR_RETURN(const int id, TokenId(value, field));
    std::optional<std::string> bytes = CharactersToBytes(token);
    const bool byte_level = bytes.has_value();
    ZEROC_RETURN_IF_ERROR(SetToken(id, byte_level ? std::move(*bytes) : token, byte_level, field, spec));
    vocab.emplace(token, id);
  }
  for (int byte = 0; byte < 256; ++byte) {
    const auto it = vocab.find(ByteToCharacter(static_cast<unsigned char>(byte)));
    if (it == vocab.end()) {
      return Unimplemented("model.vocab has no token for byte " + std::to_string(byte) +
                           ": only complete byte-level vocabularies are supported");
    }
    spec->byte_ids[static_cast<std::size_t>(byte)] = it->second;
  }
  return vocab;
}

// A merge is "left right" or ["left", "right"]. Nothing for any other form.
std::optional<std::pair<std::string, std::string>> SplitMerge(const json& merge) {
  if (merge.is_array()) {
    if (merge.size() != 2 || !merge[0].is_string() || !merge[1].is_string()) return std::nullopt;
    return std::pair(merge[0].get<std::string>(), merge[1].get<std::string>());
  }
  if (!merge.is_string()) return std::nullopt;
  const auto& text = merge.get_ref<const std::string&>();
  const std::size_t space = text.find(' ');
  if (space == std::string::npos || text.find(' ', space + 1) != std::string::npos) return std::nullopt;
  return std::pair(text.substr(0, space), text.substr(space + 1));
}

Status ParseMerges(const json& model, const Vocab& vocab, TokenizerSpec* spec) {
  const json* const list = Find(model, "merges");
  if (list == nullptr || !list->is_array()) return WrongField("model.merges", "is missing or not a list");
  spec->merges.reserve(list->size());
  for (std::size_t i = 0; i < list->size(); ++i) {
    const std::string field = "model.merges[" + std::to_string(i) + "]";
    const json& merge = (*list)[i];
    if (merge.is_string() && merge.get_ref<const std::string&>().starts_with("#version")) continue;
    const auto parts = SplitMerge(merge);
    if (!parts) return WrongField(field, "is neither \"left right\" nor [\"left\", \"right\"]");
    const auto left = vocab.find(parts->first);
    const auto right = vocab.find(parts->second);
    const auto result = vocab.find(parts->first + parts->second);
    if (left == vocab.end() || right == vocab.end() || result == vocab.end()) {
      return WrongField(field, "(" + Quoted(parts->first) + ", " + Quoted(parts->second) +
                                   ") has a part or a result that is not in model.vocab");
    }
    spec->merges.push_back({left->second, right->second, result->second});
  }
  return OkStatus();
}

Result<Vocab> ParseModel(const json& root, TokenizerSpec* spec) {
  ZEROC_ASSIGN_OR_RETURN(const json* model, RequireObject(root, "", "model"));
  if (const json* const type = Find(*model, "type"); type != nullptr) {
    ZEROC_ASSIGN_OR_RETURN(const std::string name, RequireString(*model, "model.", "type"));
    if (name != "BPE") return Unimplemented("model.type " + Quoted(name) + " is not supported (BPE is)");
  }
  ZEROC_ASSIGN_OR_RETURN(const bool byte_fallback, BoolOr(*model, "model.", "byte_fallback", false));
  if (byte_fallback) return Unimplemented("model.byte_fallback true is not supported");
  if (const json* const dropout = Find(*model, "dropout"); dropout != nullptr && *dropout != 0.0) {
    return Unimplemented("model.dropout is not supported");
  }
  for (const char* name : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    if (const json* const text = Find(*model, name); text != nullptr && *text != "") {
      return Unimplemented(std::string("model.") + name + " is not supported");
    }
  }
  ZEROC_ASSIGN_OR_RETURN(spec->ignore_merges, BoolOr(*model, "model.", "ignore_merges", false));
  ZEROC_ASSIGN_OR_RETURN(Vocab vocab, ParseVocab(*model, spec));
  ZEROC_RETURN_IF_ERROR(ParseMerges(*model, vocab, spec));
  return vocab;
}

Result<AddedToken> ParseAddedToken(const json& object, const std::string& field) {
  AddedToken token;
  if (!object.is_object()) return WrongField(field, "is not an object");
  const std::string prefix = field + ".";
  const json* const id = Find(object, "id");
  if (id == nullptr) return WrongField(prefix + "id", "is missing");
  ZEROC_ASSIGN_OR_RETURN(token.id, TokenId(*id, prefix + "id"));
  ZEROC_ASSIGN_OR_RETURN(token.content, RequireString(object, prefix, "content"));
  ZEROC_ASSIGN_OR_RETURN(token.special, BoolOr(object, prefix, "special", false));
  ZEROC_ASSIGN_OR_RETURN(token.lstrip, BoolOr(object, prefix, "lstrip", false));
  ZEROC_ASSIGN_OR_RETURN(token.rstrip, BoolOr(object, prefix, "rstrip", false));
  ZEROC_ASSIGN_OR_RETURN(token.single_word, BoolOr(object, prefix, "single_word", false));
  ZEROC_ASSIGN_OR_RETURN(token.normalized, BoolOr(object, prefix, "normalized", !token.special));
  if (token.content.empty() || token.content.size() > kAddedTokenBytesMax) {
    return WrongField(prefix + "content", "is empty or longer than " + std::to_string(kAddedTokenBytesMax) + " bytes");
  }
  return token;
}

Status ParseAddedTokens(const json& root, const Vocab& vocab, TokenizerSpec* spec) {
  const json* const list = Find(root, "added_tokens");
  if (list == nullptr) return OkStatus();
  if (!list->is_array()) return WrongField("added_tokens", "is not a list");
  std::unordered_map<std::string, int> seen;
  for (std::size_t i = 0; i < list->size(); ++i) {
    const std::string field = "added_tokens[" + std::to_string(i) + "]";
    ZEROC_ASSIGN_OR_RETURN(AddedToken token, ParseAddedToken((*list)[i], field));
    if (!seen.emplace(token.content, token.id).second) return WrongField(field + ".content", "stands twice");
    const auto in_vocab = vocab.find(token.content);
    if (in_vocab == vocab.end()) {
      ZEROC_RETURN_IF_ERROR(SetToken(token.id, token.content, /*byte_level=*/false, field, spec));
    } else if (in_vocab->second != token.id) {
      return WrongField(field + ".id",
                        std::to_string(token.id) + " is " + std::to_string(in_vocab->second) + " in model.vocab");
    }
    TokenEntry& entry = spec->tokens[static_cast<std::size_t>(token.id)];
    entry.special = token.special;
    entry.bytes = token.content;  // decodes to its own text
    spec->added.push_back(std::move(token));
  }
  return OkStatus();
}

// One element of TemplateProcessing.single: appends to prefix or suffix, or marks the place of the text.
Status ParseTemplateItem(const json& item, const json& specials, const std::string& field, bool* seen_text,
                         std::vector<int>* prefix, std::vector<int>* suffix, const TokenizerSpec& spec) {
  if (!item.is_object()) return WrongField(field, "is not an object");
  if (const json* const sequence = Find(item, "Sequence"); sequence != nullptr) {
    const json* const id = sequence->is_object() ? Find(*sequence, "id") : nullptr;
    if (id == nullptr || *id != "A" || std::exchange(*seen_text, true)) {
      return Unimplemented(field + " is not the one text \"A\"");
    }
    return OkStatus();
  }
  ZEROC_ASSIGN_OR_RETURN(const json* special, RequireObject(item, field + ".", "SpecialToken"));
  ZEROC_ASSIGN_OR_RETURN(const std::string name, RequireString(*special, field + ".SpecialToken.", "id"));
  const json* const entry = Find(specials, name.c_str());
  const json* const ids = entry != nullptr && entry->is_object() ? Find(*entry, "ids") : nullptr;
  if (ids == nullptr || !ids->is_array()) {
    return WrongField(field, Quoted(name) + " has no ids in post_processor.special_tokens");
  }
  for (const json& value : *ids) {
    ZEROC_ASSIGN_OR_RETURN(const int id, TokenId(value, "post_processor.special_tokens " + Quoted(name)));
    if (static_cast<std::size_t>(id) >= spec.tokens.size() || !spec.tokens[static_cast<std::size_t>(id)].present) {
      return WrongField("post_processor.special_tokens " + Quoted(name), "is no token of this tokenizer");
    }
    (*seen_text ? suffix : prefix)->push_back(id);
  }
  return OkStatus();
}

Status ParseTemplate(const Component& part, TokenizerSpec* spec) {
  const json* const single = Find(*part.object, "single");
  if (single == nullptr || !single->is_array() || single->size() > 64) {
    return WrongField(part.field + "single", "is missing or not a list of at most 64 elements");
  }
  ZEROC_ASSIGN_OR_RETURN(const json* specials, RequireObject(*part.object, part.field, "special_tokens"));
  bool seen_text = false;
  std::vector<int> prefix;
  std::vector<int> suffix;
  for (std::size_t i = 0; i < single->size(); ++i) {
    ZEROC_RETURN_IF_ERROR(ParseTemplateItem((*single)[i], *specials, part.field + "single[" + std::to_string(i) + "]",
                                            &seen_text, &prefix, &suffix, *spec));
  }
  if (!seen_text) return Unimplemented(part.field + "single has no place for the text");
  // A later processor wraps what an earlier one made.
  spec->prefix.insert(spec->prefix.begin(), prefix.begin(), prefix.end());
  spec->suffix.insert(spec->suffix.end(), suffix.begin(), suffix.end());
  return OkStatus();
}

Status ParsePostProcessor(const json& root, TokenizerSpec* spec) {
  ZEROC_ASSIGN_OR_RETURN(const std::vector<Component> parts, Components(root, "post_processor", "processors"));
  for (const Component& part : parts) {
    if (part.type == "ByteLevel") continue;  // moves offsets only
    if (part.type != "TemplateProcessing") return UnsupportedType(part, "TemplateProcessing and ByteLevel are");
    ZEROC_RETURN_IF_ERROR(ParseTemplate(part, spec));
  }
  return OkStatus();
}

// An upper bound of the values in the text, so that the document tree stays in proportion.
std::size_t CountValues(std::string_view text) {
  std::size_t n = 1;
  for (const char c : text) n += c == ',' || c == '[' || c == '{' ? 1 : 0;
  return n;
}

}  // namespace

Result<TokenizerSpec> ParseTokenizerJson(std::string_view text) {
  if (text.size() > kTokenizerBytesMax || CountValues(text) > kJsonValuesMax) {
    return InvalidArgument("more than " + std::to_string(kTokenizerBytesMax) + " bytes or " +
                           std::to_string(kJsonValuesMax) + " values");
  }
  const json root = json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (root.is_discarded()) return InvalidArgument("not valid JSON");
  if (!root.is_object()) return InvalidArgument("not a JSON object");
  // `truncation` and `padding` are left aside: they are settings of one caller, which transformers overrides too.
  TokenizerSpec spec;
  ZEROC_ASSIGN_OR_RETURN(const Vocab vocab, ParseModel(root, &spec));
  ZEROC_RETURN_IF_ERROR(ParseNormalizer(root, &spec));
  ZEROC_RETURN_IF_ERROR(CheckDecoder(root));
  ZEROC_RETURN_IF_ERROR(ParsePreTokenizer(root, &spec));
  ZEROC_RETURN_IF_ERROR(ParseAddedTokens(root, vocab, &spec));
  ZEROC_RETURN_IF_ERROR(ParsePostProcessor(root, &spec));
  return spec;
}

}  // namespace zeroc::internal
