// SPDX-License-Identifier: Apache-2.0
// Assertions that stay on in production: a broken invariant must stop the program before it harms data.
// Never for bad input or failing devices: those are errors (see error.h).
#pragma once

#include <cstdio>
#include <cstdlib>

namespace blockferry {

[[noreturn]] inline void check_failed(const char* condition, const char* why, const char* file, int line) {
  std::fprintf(stderr, "%s:%d: broken invariant: %s (%s)\n", file, line, why, condition);
  std::abort();
}

}  // namespace blockferry

#define BLOCKFERRY_CHECK(condition, why) \
  ((condition) ? static_cast<void>(0) : ::blockferry::check_failed(#condition, why, __FILE__, __LINE__))
