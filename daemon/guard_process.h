// SPDX-License-Identifier: Apache-2.0
// ferryd's end of guard/protocol.h: one guard process, started with all that it will hold.
#pragma once

#include <string>
#include <vector>

#include <sys/types.h>

#include "blockio/base/clock.h"
#include "blockio/base/error.h"
#include "blockio/base/file_descriptor.h"
#include "guard/protocol.h"

namespace blockferry {

/// What the guard is to hold, as guard/protocol.h lists it: `kind`, a number for each descriptor, `words`.
struct GuardHold {
  std::string kind;
  std::vector<int> descriptors;  ///< the quiesced volume's, open until the guard was started
  std::vector<std::string> words;
  std::string key;  ///< the same for what two volumes share, as one filesystem on both: it is held once
  // For errors: "freeze", "shut down", "/srv".
  std::string take_verb, hand_over_verb, where;
};

struct GuardOptions {
  std::vector<GuardHold> holds;
  std::string cutover_cmd;
  int mark = -1;                         ///< the directory for the mark of a hand-over
  std::vector<std::string> environment;  ///< of the commands, besides ferryd's own
};

class GuardProcess {
 public:
  GuardProcess() = default;
  ~GuardProcess();  ///< upon which it lets go of everything, and ends
  GuardProcess(const GuardProcess&) = delete;
  GuardProcess& operator=(const GuardProcess&) = delete;

  Result<void> start(const GuardOptions& options);
  /// internal: it is gone, or did not answer in time and has been ended. Whatever it held may still be so.
  Result<GuardAnswer> ask(GuardRequest request, Nanoseconds patience);

 private:
  Result<GuardAnswer> answer_to(GuardRequest request, Nanoseconds patience);
  void kill();

  FileDescriptor socket_;
  pid_t process_ = 0;
};

}  // namespace blockferry
