#include "tools/zeroc/text_input.h"

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstdio>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>

namespace zeroc {
namespace {

using Json = nlohmann::json;

// A parsed value takes eight times its shortest text, so this bounds the memory as well.
constexpr std::uint64_t kIdsBytesMax = std::uint64_t{32} << 20;

// Numbers like 12 or 12.5; nothing else may be in the text.
bool ParsePercent(std::string_view text, double* value) {
  if (text.empty() || text.find_first_not_of("0123456789.") != std::string_view::npos) return false;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), *value);
  return error == std::errc() && end == text.data() + text.size();
}

bool IsContinuation(char c) { return (static_cast<unsigned char>(c) & 0xc0) == 0x80; }

std::size_t CharacterStart(std::string_view text, double percent) {
  auto at = static_cast<std::size_t>(static_cast<double>(text.size()) * percent / 100.0);
  at = std::min(at, text.size());
  for (int i = 0; i < 3 && at < text.size() && IsContinuation(text[at]); ++i) ++at;
  return at;
}

Result<std::int32_t> IdOf(const Json& value) {
  if (!value.is_number_integer()) return InvalidArgument("is not an integer");
  const bool in_range = value.is_number_unsigned()
                            ? value.get<std::uint64_t>() <= std::numeric_limits<std::int32_t>::max()
                            : value.get<std::int64_t>() >= 0;
  if (!in_range) return InvalidArgument("is not a token id");
  return value.get<std::int32_t>();
}

Result<std::string> StringField(const Json& object, const char* name) {
  const auto found = object.find(name);
  if (found == object.end() || !found->is_string()) {
    return InvalidArgument("field '" + std::string(name) + "' is missing or not a string");
  }
  return found->get<std::string>();
}

Result<RecallLine> ParseRecallLine(std::string_view line) {
  const Json object = Json::parse(line, nullptr, false);
  if (!object.is_object()) return InvalidArgument("not a JSON object");
  RecallLine result;
  ZEROC_ASSIGN_OR_RETURN(result.prompt, StringField(object, "prompt"));
  ZEROC_ASSIGN_OR_RETURN(result.answer, StringField(object, "answer"));
  if (result.answer.empty()) return InvalidArgument("field 'answer' is empty");
  for (const char* name : {"group", "distance"}) {
    const auto found = object.find(name);
    if (found == object.end()) continue;
    result.group = found->is_string() ? found->get<std::string>() : found->dump();
    break;
  }
  return result;
}

}  // namespace

Result<std::string> ReadFile(const std::string& path, std::uint64_t bytes_max) {
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path.c_str(), "rb"), &std::fclose);
  if (file == nullptr) return NotFound(path + ": cannot be opened: " + std::strerror(errno));
  std::string text;
  char buffer[1 << 16];
  while (const std::size_t n = std::fread(buffer, 1, sizeof buffer, file.get())) {
    text.append(buffer, n);
    if (text.size() > bytes_max) {
      return InvalidArgument(path + ": larger than " + std::to_string(bytes_max >> 20) + " MiB; cut it into parts");
    }
  }
  if (std::ferror(file.get())) return InvalidArgument(path + ": cannot be read: " + std::strerror(errno));
  return text;
}

Result<TextSlice> ParseTextSlice(std::string_view argument) {
  TextSlice slice;
  slice.path = argument;
  const std::size_t at = argument.rfind('@');
  const std::size_t colon = argument.rfind(':');
  if (at == std::string_view::npos || colon == std::string_view::npos || colon < at) return slice;
  double begin = 0, end = 0;
  if (!ParsePercent(argument.substr(at + 1, colon - at - 1), &begin) ||
      !ParsePercent(argument.substr(colon + 1), &end)) {
    return slice;
  }
  if (begin >= end || end > 100) {
    return InvalidArgument(std::string(argument) + ": the part must be @A:B with 0 <= A < B <= 100 percent");
  }
  return TextSlice{std::string(argument.substr(0, at)), begin, end};
}

Result<std::string> ReadTextSlice(const TextSlice& slice) {
  ZEROC_ASSIGN_OR_RETURN(std::string text, ReadFile(slice.path));
  const std::size_t begin = CharacterStart(text, slice.begin_percent);
  const std::size_t end = CharacterStart(text, slice.end_percent);
  return text.substr(begin, end - begin);
}

Result<std::vector<std::int32_t>> ParseIdList(std::string_view text) {
  std::vector<std::int32_t> ids;
  constexpr std::string_view kSeparators = ", \t\r\n";
  std::size_t at = text.find_first_not_of(kSeparators);
  while (at != std::string_view::npos) {
    const std::size_t stop = std::min(text.find_first_of(kSeparators, at), text.size());
    const std::string_view entry = text.substr(at, stop - at);
    std::int32_t id = 0;
    const auto [end, error] = std::from_chars(entry.data(), entry.data() + entry.size(), id);
    if (error != std::errc() || end != entry.data() + entry.size() || id < 0) {
      return InvalidArgument("'" + std::string(entry.substr(0, 40)) + "' is not a number from 0 to 2147483647");
    }
    ids.push_back(id);
    at = text.find_first_not_of(kSeparators, stop);
  }
  return ids;
}

Result<std::vector<std::int32_t>> ReadIdsFile(const std::string& path) {
  ZEROC_ASSIGN_OR_RETURN(const std::string text, ReadFile(path, kIdsBytesMax));
  const Json root = Json::parse(text, nullptr, false);
  const Json* list = &root;
  if (root.is_object()) {
    const auto found = root.find("ids");
    if (found == root.end()) return InvalidArgument(path + ": the object has no field 'ids'");
    list = &*found;
  }
  if (!list->is_array()) return InvalidArgument(path + ": not a JSON array of token ids, nor an object with 'ids'");
  if (list->empty()) return InvalidArgument(path + ": the list of ids is empty");
  std::vector<std::int32_t> ids;
  ids.reserve(list->size());
  for (const Json& value : *list) {
    const Result<std::int32_t> id = IdOf(value);
    if (!id.ok()) return id.status().WithContext(path + ": ids[" + std::to_string(ids.size()) + "]");
    ids.push_back(*id);
  }
  return ids;
}

Result<std::vector<RecallLine>> ReadRecallSet(const std::string& path) {
  ZEROC_ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
  std::vector<RecallLine> cases;
  std::size_t number = 0;
  for (std::size_t begin = 0; begin < text.size();) {
    const std::size_t end = std::min(text.find('\n', begin), text.size());
    const std::string_view line = std::string_view(text).substr(begin, end - begin);
    begin = end + 1;
    ++number;
    if (line.find_first_not_of(" \t\r") == std::string_view::npos) continue;
    Result<RecallLine> parsed = ParseRecallLine(line);
    if (!parsed.ok()) return parsed.status().WithContext(path + ":" + std::to_string(number));
    cases.push_back(std::move(parsed).value());
  }
  if (cases.empty()) return InvalidArgument(path + ": holds no recall case");
  return cases;
}

std::vector<RecallLine> TakeEvenly(const std::vector<RecallLine>& cases, int n_max) {
  const auto wanted = static_cast<std::size_t>(std::max(n_max, 0));
  if (wanted == 0 || wanted >= cases.size()) return cases;
  std::map<std::string, std::vector<std::size_t>> groups;
  for (std::size_t i = 0; i < cases.size(); ++i) groups[cases[i].group].push_back(i);
  // One more for every group in turn until all are given out; small groups leave theirs to the others.
  std::map<std::string, std::size_t> share;
  for (std::size_t given = 0; given < wanted;) {
    for (const auto& [name, members] : groups) {
      if (given == wanted || share[name] == members.size()) continue;
      ++share[name];
      ++given;
    }
  }
  std::vector<std::size_t> chosen;
  for (const auto& [name, members] : groups) {
    for (std::size_t i = 0; i < share[name]; ++i) chosen.push_back(members[i * members.size() / share[name]]);
  }
  std::sort(chosen.begin(), chosen.end());
  std::vector<RecallLine> result;
  result.reserve(chosen.size());
  for (const std::size_t i : chosen) result.push_back(cases[i]);
  return result;
}

}  // namespace zeroc
