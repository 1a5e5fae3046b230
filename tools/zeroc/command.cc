#include "tools/zeroc/command.h"

#include <CLI/CLI.hpp>
#include <exception>
#include <iostream>
#include <string>

namespace zeroc {
namespace {

constexpr int kExitOk = 0;
constexpr int kExitFailed = 1;
constexpr int kExitUsage = 2;

constexpr AddCommandFn kOwnCommands[] = {
    AddTokenizeCommand, AddDetokenizeCommand, AddLogitsCommand, AddGenerateCommand, AddPerplexityCommand,
    AddRecallCommand,   AddCalibrateCommand,  AddPlanCommand,   AddBenchCommand,
};

// One line, whatever a path or a foreign file put into the message.
std::string OneLine(std::string text) {
  for (char& c : text) {
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) c = ' ';
  }
  return text;
}

int Fail(const std::string& command, const Status& status, int exit_code) {
  std::cout.flush();
  std::cerr << "zeroc " << command << ": " << OneLine(std::string(status.message())) << std::endl;
  return exit_code;
}

int RunEntry(const CommandEntry& entry) {
  const std::string name = entry.app->get_name();
  if (const Status status = entry.command->CheckUsage(); !status.ok()) {
    std::cerr << "zeroc " << name << ": " << OneLine(std::string(status.message())) << " (zeroc " << name
              << " --help lists the flags)" << std::endl;
    return kExitUsage;
  }
  if (const Status status = entry.command->Run(); !status.ok()) return Fail(name, status, kExitFailed);
  std::cout.flush();
  return std::cout ? kExitOk
                   : Fail(name, Internal("standard output cannot be written (disk full or pipe closed?)"), kExitFailed);
}

}  // namespace

int RunCli(int argc, const char* const* argv, std::span<const AddCommandFn> more) {
  CLI::App app(
      "ZeroC: serves language models over a compressed KV cache. This tool works on one machine, without services.",
      "zeroc");
  app.require_subcommand(1);
  app.footer("Exit codes: 0 done, 1 failed, 2 bad usage. With --json every command prints one JSON object on stdout.");
  std::vector<CommandEntry> entries;
  for (const AddCommandFn add : kOwnCommands) entries.push_back(add(app));
  for (const AddCommandFn add : more) entries.push_back(add(app));
  try {
    app.parse(argc, argv);
  } catch (const CLI::Success& help) {
    return app.exit(help);
  } catch (const CLI::ParseError& error) {
    std::cerr << "zeroc: " << OneLine(error.what()) << " (zeroc --help and zeroc COMMAND --help list the flags)"
              << std::endl;
    return kExitUsage;
  }
  for (const CommandEntry& entry : entries) {
    if (entry.app->parsed()) return RunEntry(entry);
  }
  return kExitUsage;
}

}  // namespace zeroc
