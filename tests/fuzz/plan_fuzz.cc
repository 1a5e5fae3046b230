// Plans from strangers: parsing never crashes, and what it accepts keeps the promises of plan.h.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "libzeroc/base/check.h"
#include "libzeroc/compression/plan.h"
#include "libzeroc/compression/plan_file.h"

namespace {

void CheckParse(std::span<const std::byte> bytes) {
  const auto plan = zeroc::Plan::Parse(bytes, "fuzz");
  if (!plan.ok()) {
    ZEROC_CHECK(!plan.status().message().empty());
    return;
  }
  ZEROC_CHECK(plan->plan_id().size() == 32, plan->plan_id());
  for (const char* name : {"bf16", "q8", "q4", "q3", "q2"}) ZEROC_CHECK(plan->FindProfile(name) != nullptr, name);
  for (const zeroc::Profile& profile : plan->ladder()) {
    ZEROC_CHECK(zeroc::ProfileLayouts::Make(profile, plan->geometry()).ok(), profile.name);
    const zeroc::KeyMaps maps = plan->KeyMapsOf(profile, plan->geometry().n_layers - 1);
    ZEROC_CHECK(maps.a.size() == maps.b.size() && maps.a.empty() != profile.packs(), profile.name);
  }
}

// A mutated file hardly ever carries the hash of its content; with the right one put in, the checks behind it are met.
bool RepairHash(std::vector<std::byte>& bytes) {
  const auto file = zeroc::SafetensorsFile::Parse(bytes, "fuzz");
  if (!file.ok()) return false;
  const auto& metadata = (*file)->metadata();
  const auto text = metadata.find(zeroc::internal::kPlanTextKey);
  const auto stated = metadata.find(zeroc::internal::kPlanHashKey);
  if (text == metadata.end() || stated == metadata.end()) return false;
  const auto hash = zeroc::internal::PlanContentHash(text->second, (*file)->tensors());
  if (!hash.ok() || stated->second.size() != hash->size() || stated->second == *hash) return false;
  const auto old = std::as_bytes(std::span(stated->second));
  const auto at = std::search(bytes.begin(), bytes.end(), old.begin(), old.end());
  if (at == bytes.end()) return false;
  const auto fresh = std::as_bytes(std::span(*hash));
  std::copy(fresh.begin(), fresh.end(), at);
  return true;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::span<const std::byte> bytes(reinterpret_cast<const std::byte*>(data), size);
  CheckParse(bytes);
  std::vector<std::byte> repaired(bytes.begin(), bytes.end());
  if (RepairHash(repaired)) CheckParse(repaired);
  return 0;
}
