// Unicode normalisation form C (UAX #15), the one normalizer that byte-level tokenizers use (Qwen).
// Pure function, thread-safe.
#pragma once

#include <string>
#include <string_view>

#include "libzeroc/base/status.h"

namespace zeroc {

// Appends the text in form C. Bytes that are not UTF-8 stay as they are, and nothing composes across them.
// kResourceExhausted without memory (about five times the text).
Status AppendNfc(std::string_view text, std::string* out);

}  // namespace zeroc
