// SPDX-License-Identifier: Apache-2.0
#include "ctl/verbs.h"

int main(int argc, char** argv) {
  return blockferry::run_ferryctl({argv + 1, argv + argc});
}
