// The small files beside a tokenizer: tokenizer_config.json and chat_template.jinja. Bounded reads; any thread.
#pragma once

#include <optional>
#include <string>

#include "libzeroc/base/status.h"

namespace zeroc {

// nullopt when there is none; kInvalidArgument when it is larger than 64 MiB. Errors name the file.
Result<std::optional<std::string>> ReadSmallFile(const std::string& path);

// tokenizer_config.json as it is, as JSON text, with the template of chat_template.jinja where that file counts
// instead, and a tokenizer_class. kInvalidArgument naming the file when it is no JSON object.
Result<std::string> TokenizerInfo(const std::string& dir);

}  // namespace zeroc
