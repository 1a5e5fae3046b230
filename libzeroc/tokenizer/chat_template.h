// A chat as the one prompt that its model was trained on, by the template of tokenizer_config.json.
//
// Templates are Jinja; this is our own subset of it (docs/api.md lists it), with the whitespace rules that Hugging Face
// sets (trim_blocks, lstrip_blocks). The file is untrusted: sizes, nesting, steps and output are bounded, and what is
// not supported is refused with its name and line. Const and thread-safe once made.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "libzeroc/base/status.h"

namespace zeroc {

struct ChatMessage {
  std::string role;
  std::string content;
};

class ChatTemplate {
 public:
  // chat_template.jinja of the directory, else tokenizer_config.json's chat_template (of several, the one named
  // "default"), else Default. kInvalidArgument naming file and line for a template that cannot be read.
  static Result<std::shared_ptr<const ChatTemplate>> Open(const std::string& dir);
  // `name` stands in messages.
  static Result<std::shared_ptr<const ChatTemplate>> Parse(std::string_view source, std::string bos_token,
                                                           std::string eos_token, std::string_view name);
  // For models without a template: "role: content" lines, then "assistant:".
  static std::shared_ptr<const ChatTemplate> Default();

  ~ChatTemplate();
  ChatTemplate(const ChatTemplate&) = delete;
  ChatTemplate& operator=(const ChatTemplate&) = delete;

  // kInvalidArgument with the template's own words when it refuses the messages (raise_exception), or when rendering
  // fails or takes too much.
  Result<std::string> Render(std::span<const ChatMessage> messages, bool add_generation_prompt) const;

 private:
  struct Program;
  explicit ChatTemplate(std::unique_ptr<const Program> program);
  const std::unique_ptr<const Program> program_;
};

}  // namespace zeroc
