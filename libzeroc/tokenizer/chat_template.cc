#include "libzeroc/tokenizer/chat_template.h"

#include <nlohmann/json.hpp>
#include <optional>
#include <utility>

#include "libzeroc/base/check.h"
#include "libzeroc/tokenizer/config_files.h"
#include "libzeroc/tokenizer/jinja.h"

namespace zeroc {
namespace {

using Json = nlohmann::json;

constexpr char kDefault[] =
    "{% for message in messages %}{{ message.role ~ ': ' ~ message.content ~ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}";

// Special tokens are written as a string, or as an object with the string as its content.
std::string TokenText(const Json& config, const char* name) {
  const auto found = config.find(name);
  if (found == config.end()) return {};
  if (found->is_string()) return found->get<std::string>();
  if (found->is_object() && found->value("content", Json()).is_string()) return found->at("content").get<std::string>();
  return {};
}

// The template's text; nothing when the file has none.
Result<std::optional<std::string>> TemplateText(const Json& config, const std::string& path) {
  const auto found = config.find("chat_template");
  if (found == config.end() || found->is_null()) return std::optional<std::string>();
  if (found->is_string()) return std::optional(found->get<std::string>());
  if (found->is_array()) {
    for (const Json& entry : *found) {
      if (entry.is_object() && entry.value("name", Json()) == "default" &&
          entry.value("template", Json()).is_string()) {
        return std::optional(entry["template"].get<std::string>());
      }
    }
  }
  return InvalidArgument(path + ": chat_template is neither a string nor a list with one named \"default\"");
}

}  // namespace

struct ChatTemplate::Program {
  jinja::Block block;
  std::string bos_token, eos_token, name;
};

ChatTemplate::ChatTemplate(std::unique_ptr<const Program> program) : program_(std::move(program)) {}
ChatTemplate::~ChatTemplate() = default;

Result<std::shared_ptr<const ChatTemplate>> ChatTemplate::Parse(std::string_view source, std::string bos_token,
                                                                std::string eos_token, std::string_view name) {
  Result<jinja::Block> block = jinja::Parse(source);
  if (!block.ok()) return block.status().WithContext(std::string(name));
  auto program = std::make_unique<Program>();
  *program = {std::move(*block), std::move(bos_token), std::move(eos_token), std::string(name)};
  return std::shared_ptr<const ChatTemplate>(new ChatTemplate(std::move(program)));
}

std::shared_ptr<const ChatTemplate> ChatTemplate::Default() {
  static const std::shared_ptr<const ChatTemplate> instance = [] {
    auto made = Parse(kDefault, "", "", "the default chat template");
    ZEROC_CHECK(made.ok(), made.status().ToString());
    return *made;
  }();
  return instance;
}

Result<std::shared_ptr<const ChatTemplate>> ChatTemplate::Open(const std::string& dir) {
  const std::string path = dir + "/tokenizer_config.json";
  std::optional<std::string> text, source;
  ZEROC_ASSIGN_OR_RETURN(text, ReadSmallFile(path));
  ZEROC_ASSIGN_OR_RETURN(source, ReadSmallFile(dir + "/chat_template.jinja"));
  Json config = Json::object();
  if (text.has_value()) config = Json::parse(*text, nullptr, /*allow_exceptions=*/false);
  if (!config.is_object()) return InvalidArgument(path + ": is not a JSON object");
  std::string name = dir + "/chat_template.jinja";
  if (!source.has_value()) {
    ZEROC_ASSIGN_OR_RETURN(source, TemplateText(config, path));
    name = path + ": chat_template";
  }
  if (!source.has_value()) return Default();
  return Parse(*source, TokenText(config, "bos_token"), TokenText(config, "eos_token"), name);
}

Result<std::string> ChatTemplate::Render(std::span<const ChatMessage> messages, bool add_generation_prompt) const {
  jinja::List list;
  for (const ChatMessage& message : messages) {
    list.push_back(jinja::MakeMap({{"role", {message.role}}, {"content", {message.content}}}));
  }
  const jinja::Map globals = {{"messages", jinja::MakeList(std::move(list))},
                              {"add_generation_prompt", {add_generation_prompt}},
                              {"bos_token", {program_->bos_token}},
                              {"eos_token", {program_->eos_token}},
                              {"tools", {jinja::None{}}},
                              {"documents", {jinja::None{}}}};
  Result<std::string> text = jinja::Run(program_->block, globals);
  if (!text.ok()) return text.status().WithContext("messages: the chat template refuses them");
  return text;
}

}  // namespace zeroc
