// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "ctl/verbs.h"

int main(int argc, char** argv) {
  const std::vector<std::string> arguments(argv + 1, argv + argc);
  const auto command = blockferry::parse_command(arguments);
  if (command) return blockferry::run_command(*command);
  const bool json = std::find(arguments.begin(), arguments.end(), "--json") != arguments.end();
  return blockferry::report_error(command.error(), json);
}
