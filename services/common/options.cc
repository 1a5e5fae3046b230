#include "services/common/options.h"

#include <yaml-cpp/yaml.h>

#include <CLI/CLI.hpp>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <set>
#include <sstream>
#include <utility>

#include "libzeroc/base/check.h"

namespace zeroc {
namespace {

// A configuration is a page of text; anything larger is the wrong file.
constexpr std::size_t kConfigBytesMax = 1 << 20;

std::string NumberText(double value) {
  char buffer[32];
  std::snprintf(buffer, sizeof buffer, "%.12g", value);
  return buffer;
}

std::string FlagName(const std::string& name) {
  std::string flag = "--" + name;
  for (char& c : flag) {
    if (c == '_') c = '-';
  }
  return flag;
}

template <typename T>
Status ParseNumber(std::string_view text, T min, T max, const char* what, T* target) {
  T value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || text.empty()) {
    return InvalidArgument("'" + std::string(text) + "' is not " + what);
  }
  if (!(value >= min && value <= max)) {  // also catches NaN
    return InvalidArgument(std::string(text) + " is not in " + NumberText(static_cast<double>(min)) + ".." +
                           NumberText(static_cast<double>(max)));
  }
  *target = value;
  return OkStatus();
}

Status ParseBool(std::string_view text, bool* target) {
  if (text != "true" && text != "false")
    return InvalidArgument("'" + std::string(text) + "' is neither true nor false");
  *target = text == "true";
  return OkStatus();
}

}  // namespace

OptionSet::OptionSet(std::string program, std::string purpose)
    : program_(std::move(program)), purpose_(std::move(purpose)) {}

void OptionSet::AddString(std::string name, std::string* target, OptionDoc doc) {
  auto set = [target](std::string_view text) {
    *target = std::string(text);
    return OkStatus();
  };
  Add({std::move(name), "STRING", "", "", std::move(doc), set, [target] { return '"' + *target + '"'; }});
}

void OptionSet::AddInt(std::string name, std::int64_t* target, std::int64_t min, std::int64_t max, OptionDoc doc) {
  auto set = [=](std::string_view text) { return ParseNumber(text, min, max, "a whole number", target); };
  Add({std::move(name), "INT", std::to_string(min) + ".." + std::to_string(max), "", std::move(doc), set,
       [target] { return std::to_string(*target); }});
}

void OptionSet::AddDouble(std::string name, double* target, double min, double max, OptionDoc doc) {
  auto set = [=](std::string_view text) { return ParseNumber(text, min, max, "a number", target); };
  Add({std::move(name), "NUMBER", NumberText(min) + ".." + NumberText(max), "", std::move(doc), set,
       [target] { return NumberText(*target); }});
}

void OptionSet::AddBool(std::string name, bool* target, OptionDoc doc) {
  auto set = [target](std::string_view text) { return ParseBool(text, target); };
  Add({std::move(name), "BOOL", "true|false", "", std::move(doc), set,
       [target] { return std::string(*target ? "true" : "false"); }});
}

void OptionSet::Add(Option option) {
  ZEROC_CHECK(Find(option.name) == nullptr, option.name);
  option.default_text = option.get();
  options_.push_back(std::move(option));
}

const OptionSet::Option* OptionSet::Find(std::string_view name) const {
  for (const Option& option : options_) {
    if (option.name == name) return &option;
  }
  return nullptr;
}

Status OptionSet::ReadYaml(const std::string& text, const std::string& name) {
  const auto at = [&name](const YAML::Mark& mark) { return name + ":" + std::to_string(mark.line + 1); };
  try {
    const YAML::Node root = YAML::Load(text);
    if (root.IsNull()) return OkStatus();
    if (!root.IsMap()) return InvalidArgument(at(root.Mark()) + ": not a mapping of settings");
    std::set<std::string> seen;
    for (const auto& entry : root) {
      if (!entry.first.IsScalar()) return InvalidArgument(at(entry.first.Mark()) + ": a key is not plain text");
      const std::string key = entry.first.Scalar();
      const std::string where = at(entry.first.Mark()) + ": " + key;
      const Option* option = Find(key);
      if (option == nullptr) return InvalidArgument(where + ": unknown setting");
      if (!seen.insert(key).second) return InvalidArgument(where + ": given twice");
      if (!entry.second.IsScalar()) return InvalidArgument(where + ": needs one plain value");
      if (Status status = option->set(entry.second.Scalar()); !status.ok()) return status.WithContext(where);
    }
  } catch (const YAML::Exception& error) {
    return InvalidArgument(at(error.mark) + ": " + error.msg);
  }
  return OkStatus();
}

Result<OptionSet::Outcome> OptionSet::Parse(int argc, const char* const* argv) {
  // The file comes first so that flags win; so --config is looked for before the rest is parsed.
  for (int i = 1; i < argc; ++i) {
    const std::string_view arg = argv[i];
    std::string path;
    if (arg == "--config" && i + 1 < argc) path = argv[i + 1];
    if (arg.starts_with("--config=")) path = arg.substr(9);
    if (path.empty()) continue;
    std::ifstream file(path, std::ios::binary);
    if (!file) return NotFound("--config " + path + ": cannot be read");
    std::string text(kConfigBytesMax + 1, '\0');
    file.read(text.data(), static_cast<std::streamsize>(text.size()));
    text.resize(static_cast<std::size_t>(file.gcount()));
    if (file.bad()) return InvalidArgument("--config " + path + ": cannot be read");
    if (text.size() > kConfigBytesMax) return InvalidArgument("--config " + path + ": larger than 1 MiB");
    ZEROC_RETURN_IF_ERROR(ReadYaml(text, path));
  }
  return ParseFlags(argc, argv);
}

Result<OptionSet::Outcome> OptionSet::ParseFlags(int argc, const char* const* argv) {
  CLI::App app(purpose_, program_);
  app.set_help_flag();
  bool help = false;
  app.add_flag("-h,--help", help);
  std::string config;
  app.add_option("--config", config);
  Status status;
  for (const Option& option : options_) {
    app.add_option_function<std::string>(FlagName(option.name),
                                         [&](const std::string& text) {
                                           if (status.ok())
                                             status = option.set(text).WithContext(FlagName(option.name));
                                         })
        ->multi_option_policy(CLI::MultiOptionPolicy::Throw);
  }
  try {
    app.parse(argc, const_cast<char**>(argv));  // CLI11 2.1 asks for non-const and does not write
  } catch (const CLI::ParseError& error) {
    return InvalidArgument(error.what());
  }
  if (help) {
    std::fputs(Help().c_str(), stdout);
    return Outcome::kHelpShown;
  }
  if (!status.ok()) return status;
  return Outcome::kRun;
}

std::string OptionSet::Help() const {
  std::ostringstream out;
  out << purpose_ << "\n\nUsage: " << program_ << " [--config FILE] [--SETTING VALUE ..]\n\n"
      << "  --config FILE\n      YAML, one `setting: value` per line; flags win over it.\n";
  for (const Option& option : options_) {
    out << "  " << FlagName(option.name) << ' ' << option.type << "\n      " << option.doc.doc << " [";
    if (!option.doc.unit.empty()) out << "unit: " << option.doc.unit << "; ";
    if (!option.range.empty()) out << "range: " << option.range << "; ";
    out << "default: " << option.default_text << "]\n";
  }
  return out.str();
}

std::string OptionSet::Effective() const {
  std::string out;
  for (const Option& option : options_) {
    out += option.name + " = " + option.get();
    if (!option.doc.unit.empty()) out += " " + option.doc.unit;
    out += '\n';
  }
  return out;
}

Result<HostPort> ParseHostPort(std::string_view text) {
  const std::size_t colon = text.rfind(':');
  if (colon == std::string_view::npos || colon == 0)
    return InvalidArgument("'" + std::string(text) + "' is not HOST:PORT");
  HostPort result;
  std::int64_t port = 0;
  ZEROC_RETURN_IF_ERROR(ParseNumber<std::int64_t>(text.substr(colon + 1), 0, 65535, "a port", &port)
                            .WithContext("'" + std::string(text) + "'"));
  std::string_view host = text.substr(0, colon);
  const bool bracketed = host.size() > 2 && host.front() == '[' && host.back() == ']';
  if (!bracketed && host.find(':') != std::string_view::npos) {
    return InvalidArgument("'" + std::string(text) + "': an IPv6 host needs brackets");
  }
  result.host = std::string(bracketed ? host.substr(1, host.size() - 2) : host);
  result.port = static_cast<int>(port);
  return result;
}

}  // namespace zeroc
