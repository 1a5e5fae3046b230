// The services' log: one line per event on stderr, "2026-01-31T12:00:00.000Z I router message key=value ..".
//
// Thread-safe once SetUpLogging has returned. Prompts, completions, keys and tokens never go into a log line.
#pragma once

#include <string>
#include <string_view>

#include "libzeroc/base/status.h"

namespace zeroc {

enum class LogLevel { kDebug, kInfo, kWarning, kError };

// "debug", "info", "warning" or "error"; kInvalidArgument otherwise.
Result<LogLevel> ParseLogLevel(std::string_view text);

// Call once, before any thread logs. `component` ("router") stands in every line.
void SetUpLogging(const std::string& component, LogLevel level);

// Line breaks and other control characters of `message` are escaped, so that foreign text cannot forge a line.
void Log(LogLevel level, std::string_view message);
inline void LogDebug(std::string_view message) { Log(LogLevel::kDebug, message); }
inline void LogInfo(std::string_view message) { Log(LogLevel::kInfo, message); }
inline void LogWarning(std::string_view message) { Log(LogLevel::kWarning, message); }
inline void LogError(std::string_view message) { Log(LogLevel::kError, message); }

// The text with control characters as \xNN.
std::string EscapeControls(std::string_view text);

}  // namespace zeroc
