// SPDX-License-Identifier: Apache-2.0
#include "ctl/terminal.h"

#include <cstdlib>
#include <string>

#include <strings.h>
#include <sys/ioctl.h>
#include <unistd.h>

namespace blockferry {

namespace {

std::string variable(const char* name) {
  const char* const value = std::getenv(name);
  return value != nullptr ? value : "";
}

winsize size_of_terminal(int fd) {
  winsize size{};
  if (::ioctl(fd, TIOCGWINSZ, &size) != 0) size = {};
  return size;
}

}  // namespace

bool is_terminal(int fd) {
  const std::string terminal = variable("TERM");
  return ::isatty(fd) == 1 && !terminal.empty() && terminal != "dumb";
}

std::size_t terminal_columns(int fd) {
  const winsize size = size_of_terminal(fd);
  return size.ws_col > 0 ? size.ws_col : 80;
}

std::size_t terminal_rows(int fd) {
  const winsize size = size_of_terminal(fd);
  return size.ws_row > 0 ? size.ws_row : 24;
}

bool wants_colour(int fd) {
  return is_terminal(fd) && variable("NO_COLOR").empty();
}

bool speaks_utf8() {
  // The first one that is set decides, as for setlocale(), which would load the locale's files for this.
  for (const char* name : {"LC_ALL", "LC_CTYPE", "LANG"}) {
    const std::string locale = variable(name);
    if (locale.empty()) continue;
    const auto dot = locale.find('.');
    const std::string charset = dot == std::string::npos ? "" : locale.substr(dot + 1);
    return ::strncasecmp(charset.c_str(), "utf-8", 5) == 0 || ::strncasecmp(charset.c_str(), "utf8", 4) == 0;
  }
  return false;
}

}  // namespace blockferry
