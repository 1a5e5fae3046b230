// Tokenizer files and texts from strangers. An input that starts with '{' is a tokenizer.json, loaded and then used on
// a fixed text; any other input is a text for a fixed tokenizer, where encoding keeps every byte.
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "libzeroc/base/check.h"
#include "libzeroc/tokenizer/streaming_decoder.h"
#include "libzeroc/tokenizer/tokenizer.h"
#include "libzeroc/tokenizer/utf8.h"

namespace {

// Each byte is written as its character of the GPT-2 alphabet, in JSON escapes; one special token, a few merges.
std::string FixedFile() {
  std::string vocab;
  int next = 256;
  for (int byte = 0; byte < 256; ++byte) {
    const bool visible = (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;
    const int code = visible ? byte : next++;
    constexpr char kHex[] = "0123456789abcdef";
    vocab += "\"\\u0";
    for (int shift = 8; shift >= 0; shift -= 4) vocab += kHex[code >> shift & 15];
    vocab += "\":" + std::to_string(byte) + ",";
  }
  return R"({"added_tokens":[{"id":300,"content":"<|bos|>","special":true}],"decoder":{"type":"ByteLevel"},
    "pre_tokenizer":{"type":"Sequence","pretokenizers":[{"type":"Split","behavior":"Isolated","pattern":{"Regex":
      "[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"}},
      {"type":"ByteLevel","add_prefix_space":false,"use_regex":false}]},
    "model":{"type":"BPE","merges":["a b","b c","ab c",["a","a"],["aa","aa"]],"vocab":{)" +
         vocab + R"("ab":256,"bc":257,"abc":258,"aa":259,"aaaa":260}}})";
}

std::unique_ptr<zeroc::Tokenizer> FixedTokenizer() {
  auto tokenizer = zeroc::Tokenizer::Parse(FixedFile(), "fixed");
  ZEROC_CHECK(tokenizer.ok(), tokenizer.status().ToString());
  return *std::move(tokenizer);
}

void FuzzFile(std::string_view json) {
  const auto tokenizer = zeroc::Tokenizer::Parse(json, "fuzz");
  if (!tokenizer.ok()) {
    ZEROC_CHECK(!tokenizer.status().message().empty());
    return;
  }
  const auto ids = (*tokenizer)->EncodePrompt("abc aaaa <|bos|> x\n\n 123 e\xcc\x81 \xff \xe2\x82\xac");
  if (!ids.ok()) return;
  for (const int id : *ids) ZEROC_CHECK((*tokenizer)->HasId(id), id);
}

void FuzzText(std::string_view text) {
  static const std::unique_ptr<zeroc::Tokenizer> tokenizer = FixedTokenizer();
  const auto ids = tokenizer->Encode(text);
  ZEROC_CHECK(ids.ok(), ids.status().ToString());
  ZEROC_CHECK(tokenizer->Decode(*ids) == text, ids->size());
  zeroc::StreamingDecoder decoder(*tokenizer);
  std::string streamed;
  for (const int id : *ids) streamed += decoder.Push(id);
  streamed += decoder.Flush();
  ZEROC_CHECK(streamed == zeroc::ReplaceInvalidUtf8(text), streamed.size());
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view input(reinterpret_cast<const char*>(data), size);
  input.starts_with('{') ? FuzzFile(input) : FuzzText(input);
  return 0;
}
