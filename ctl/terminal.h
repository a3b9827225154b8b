// SPDX-License-Identifier: Apache-2.0
// What the terminal can show.
#pragma once

#include <cstddef>

namespace blockferry {

/// A terminal that can move its cursor: TERM=dumb cannot.
bool is_terminal(int fd);
/// 80 and 24 where nobody knows.
std::size_t terminal_columns(int fd);
std::size_t terminal_rows(int fd);
/// A terminal, and NO_COLOR is not set.
bool wants_colour(int fd);
/// By the locale's variables: block characters come out as such.
bool speaks_utf8();

}  // namespace blockferry
