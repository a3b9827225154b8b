// SPDX-License-Identifier: Apache-2.0
// Speaks QMP over a connection that is another process's as well.
//
// It looks at what has come in and leaves it there: the other process may go on reading at any time, from the
// beginning of a line, and passes over answers to commands that were not its own. So this needs no word of
// JSON, and nothing that either may have read in part.
#pragma once

#include <atomic>
#include <chrono>
#include <optional>
#include <string>
#include <vector>

namespace blockferry {

class GuestLine {
 public:
  explicit GuestLine(int fd);

  /// `members` are the command's, without braces. The whole line that answers it; nothing: none came in time.
  std::optional<std::string> ask(const std::string& members, std::chrono::milliseconds limit,
                                 const std::atomic<bool>& give_up);
  std::optional<std::string> ask(const std::string& members, std::chrono::milliseconds limit);

  static bool succeeded(const std::string& answer);
  /// Of an answer that is an error: what it says. Empty: it says nothing.
  static std::string words_of(const std::string& answer);

 private:
  bool send(const std::string& line);
  std::optional<std::string> find(const std::string& id);

  const int fd_;
  bool closed_ = false;  ///< the other end has
  std::vector<char> seen_;
};

}  // namespace blockferry
