// Headers that our own code reads, as text from strangers. The head itself is Beast's.
#include <string_view>

#include "libzeroc/base/check.h"
#include "services/common/trace_context.h"
#include "services/router/request_check.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace zeroc;
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  if (const auto trace = ParseTraceparent(text)) {
    const auto again = ParseTraceparent(trace->Header());
    ZEROC_CHECK(again.has_value() && again->trace_id == trace->trace_id && again->parent_id == trace->parent_id);
    const TraceContext child = ChildOf(*trace);
    ZEROC_CHECK(child.trace_id == trace->trace_id && ParseTraceparent(child.Header()).has_value());
  }
  // An accepted id stands in log lines and headers as it came.
  if (IsGoodRequestId(text)) ZEROC_CHECK(text.find_first_of(" \r\n\t") == std::string_view::npos, text.size());
  return 0;
}
