// zeroc request: one completion through a running cluster, streamed as it comes, with the account of where its time and
// its KV bytes went.
//
// Shaped like the tool's other commands (command.h): hand AddRequestCommand to RunCli. Speaks gRPC to the router.
#pragma once

#include "tools/zeroc/command.h"

namespace zeroc {

CommandEntry AddRequestCommand(CLI::App& parent);

}  // namespace zeroc
