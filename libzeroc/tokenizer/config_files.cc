#include "libzeroc/tokenizer/config_files.h"

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <system_error>
#include <utility>

namespace zeroc {
namespace {

constexpr std::uintmax_t kConfigBytesMax = 64 << 20;

}  // namespace

Result<std::optional<std::string>> ReadSmallFile(const std::string& path) {
  std::error_code error;
  const std::uintmax_t size = std::filesystem::file_size(path, error);
  if (error) return std::optional<std::string>();
  if (size > kConfigBytesMax) return InvalidArgument(path + ": larger than 64 MiB");
  std::string text(static_cast<std::size_t>(size), '\0');
  std::ifstream file(path, std::ios::binary);
  if (!file.read(text.data(), static_cast<std::streamsize>(size))) return Unavailable(path + ": cannot be read");
  return std::optional<std::string>(std::move(text));
}

Result<std::string> TokenizerInfo(const std::string& dir) {
  using Json = nlohmann::ordered_json;
  const std::string path = dir + "/tokenizer_config.json";
  std::optional<std::string> text, source;
  ZEROC_ASSIGN_OR_RETURN(text, ReadSmallFile(path));
  ZEROC_ASSIGN_OR_RETURN(source, ReadSmallFile(dir + "/chat_template.jinja"));
  Json info = Json::object();
  if (text.has_value()) info = Json::parse(*text, nullptr, /*allow_exceptions=*/false);
  if (!info.is_object()) return InvalidArgument(path + ": is not a JSON object");
  if (source.has_value()) info["chat_template"] = *source;
  if (!info.contains("tokenizer_class")) info["tokenizer_class"] = "PreTrainedTokenizerFast";
  return info.dump(-1, ' ', false, Json::error_handler_t::replace);
}

}  // namespace zeroc
