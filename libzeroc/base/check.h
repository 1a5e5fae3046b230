// ZEROC_CHECK: a condition that only a bug of ours can break. On in release builds; prints the values and aborts.
// Foreign bytes and peers never reach a check: they get a Status.
#pragma once

#include <sstream>
#include <string>

namespace zeroc::internal {

[[noreturn]] void CheckFailed(const char* file, int line, const char* condition, const std::string& values);

template <typename... Args>
std::string FormatValues(const Args&... args) {
  std::ostringstream out;
  ((out << ' ' << args), ...);
  return out.str();
}

}  // namespace zeroc::internal

// ZEROC_CHECK(used <= capacity, used, capacity);
#define ZEROC_CHECK(condition, ...) \
  (static_cast<bool>(condition)     \
       ? void(0)                    \
       : ::zeroc::internal::CheckFailed(__FILE__, __LINE__, #condition, ::zeroc::internal::FormatValues(__VA_ARGS__)))
