// Opaque bytes of UCX (worker addresses, remote keys) in an envelope of ours: UCX parses them without checking, so
// bytes that were cut, mixed up or damaged on their way through RPC must not reach it. Guards against accidents, not
// against malice. Pure. Any thread.
#pragma once

#include <string>
#include <string_view>

#include "libzeroc/base/status.h"

namespace zeroc {

std::string SealUcx(std::string_view bytes);
Result<std::string> UnsealUcx(std::string_view sealed, std::string_view what);  // kInvalidArgument naming `what`

}  // namespace zeroc
