// W3C trace context: the `traceparent` header, version 00. Pure.
#pragma once

#include <optional>
#include <string>
#include <string_view>

namespace zeroc {

struct TraceContext {
  std::string trace_id;   // 32 hexadecimal digits, not all 0
  std::string parent_id;  // 16, not all 0
  std::string flags;      // 2

  std::string Header() const { return "00-" + trace_id + "-" + parent_id + "-" + flags; }
};

// Nothing for a header that is absent or malformed, which the standard says to ignore. Later versions are read as 00.
std::optional<TraceContext> ParseTraceparent(std::string_view header);

// The span of this service under a caller's: same trace and flags, a new random id.
TraceContext ChildOf(const TraceContext& parent);

}  // namespace zeroc
