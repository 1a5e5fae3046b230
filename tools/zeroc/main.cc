// zeroc: the command-line tool.
#include "tools/zeroc/command.h"

int main(int argc, char** argv) { return zeroc::RunCli(argc, argv); }
