#include "services/common/trace_context.h"

#include <algorithm>
#include <cstdio>
#include <random>

namespace zeroc {
namespace {

constexpr std::size_t kHeaderBytes = 2 + 1 + 32 + 1 + 16 + 1 + 2;

// Lower case only, as the standard has it.
bool IsHex(std::string_view text) {
  return std::all_of(text.begin(), text.end(), [](char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'); });
}

bool IsId(std::string_view text) { return IsHex(text) && text.find_first_not_of('0') != std::string_view::npos; }

}  // namespace

std::optional<TraceContext> ParseTraceparent(std::string_view header) {
  if (header.size() < kHeaderBytes || header[2] != '-' || header[35] != '-' || header[52] != '-') return std::nullopt;
  const std::string_view version = header.substr(0, 2);
  if (!IsHex(version) || version == "ff") return std::nullopt;
  const bool longer = header.size() > kHeaderBytes;
  if (longer && (version == "00" || header[kHeaderBytes] != '-')) return std::nullopt;
  const std::string_view trace = header.substr(3, 32), parent = header.substr(36, 16), flags = header.substr(53, 2);
  if (!IsId(trace) || !IsId(parent) || !IsHex(flags)) return std::nullopt;
  return TraceContext{std::string(trace), std::string(parent), std::string(flags)};
}

TraceContext ChildOf(const TraceContext& parent) {
  thread_local std::mt19937_64 generator{std::random_device{}()};
  char id[17];
  std::snprintf(id, sizeof id, "%016llx", static_cast<unsigned long long>(generator() | 1));
  return {parent.trace_id, id, parent.flags};
}

}  // namespace zeroc
