// What a subcommand of `zeroc` is, and the program that runs one.
//
// A command registers its flags with CLI11 (which stays in .cc files), checks what flags alone can be wrong about, then
// runs. Exit codes: 0 done, 1 failed, 2 bad usage. Results go to stdout, everything else to stderr. Not thread-safe.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "libzeroc/base/status.h"

namespace CLI {  // NOLINT(readability-identifier-naming): CLI11's name
class App;
}

namespace zeroc {

class Command {
 public:
  virtual ~Command() = default;
  // Combinations that the flags' own checks do not see; an error is bad usage (exit code 2).
  virtual Status CheckUsage() { return OkStatus(); }
  // Does the work and prints the result; an error is one line on stderr (exit code 1).
  virtual Status Run() = 0;
};

// One subcommand: its flags are set by the parser, its work is in `command`.
struct CommandEntry {
  CLI::App* app = nullptr;  // owned by the parent
  std::unique_ptr<Command> command;
};

// Adds a subcommand to the parent. The command holds what the flags fill, so it must live as long as the parent.
using AddCommandFn = CommandEntry (*)(CLI::App& parent);

// Runs the subcommand that argv names, out of the tool's own and `more`; returns the exit code of the process.
int RunCli(int argc, const char* const* argv, std::span<const AddCommandFn> more = {});

CommandEntry AddTokenizeCommand(CLI::App& parent);
CommandEntry AddDetokenizeCommand(CLI::App& parent);
CommandEntry AddLogitsCommand(CLI::App& parent);
CommandEntry AddGenerateCommand(CLI::App& parent);
CommandEntry AddPerplexityCommand(CLI::App& parent);
CommandEntry AddRecallCommand(CLI::App& parent);
CommandEntry AddCalibrateCommand(CLI::App& parent);
CommandEntry AddPlanCommand(CLI::App& parent);
CommandEntry AddBenchCommand(CLI::App& parent);

}  // namespace zeroc
