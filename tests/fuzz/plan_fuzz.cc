// Plans from strangers: parsing never crashes, and what it accepts keeps the promises of plan.h.
#include <cstddef>
#include <cstdint>
#include <span>

#include "libzeroc/base/check.h"
#include "libzeroc/compression/plan.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const auto plan = zeroc::Plan::Parse({reinterpret_cast<const std::byte*>(data), size}, "fuzz");
  if (!plan.ok()) {
    ZEROC_CHECK(!plan.status().message().empty());
    return 0;
  }
  ZEROC_CHECK(plan->plan_id().size() == 32, plan->plan_id());
  for (const char* name : {"bf16", "q8", "q4", "q3", "q2"}) ZEROC_CHECK(plan->FindProfile(name) != nullptr, name);
  return 0;
}
