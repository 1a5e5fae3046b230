// zeroc: the command-line tool.
#include "tools/zeroc/command.h"
#include "tools/zeroc/request_command.h"

int main(int argc, char** argv) {
  constexpr zeroc::AddCommandFn kOfTheCluster[] = {zeroc::AddRequestCommand};
  return zeroc::RunCli(argc, argv, kOfTheCluster);
}
