// SPDX-License-Identifier: Apache-2.0
// Between ferryd and its guard: one process a cutover, which alone quiesces the source and releases it, so
// that it is released whatever becomes of ferryd (invariant 7), and so that handing over is decided in one
// place only, while everything is still quiesced (attack G).
//
//   ferryd                       guard
//     quiesce{limit}    ─────>     takes every hold, in order (hold.h)
//                       <─────   quiesced{at} or failed{which}: then all is released again
//     hand_over or release ──>     hand_over: the cutover command; marks it done; hands every hold over; then
//                                  it releases all, as it does at once when asked for no more than that
//                       <─────   released{at}, or expired{at}: it was released before, and nothing was handed
//                                over
//
// The guard lets go by itself when the limit has passed, and when the other end of the socket is closed. It
// serves one cutover and ends.
//
// Descriptors: 3 the socket (SOCK_SEQPACKET), 4 the directory for the mark of a hand-over, with a shared BSD
// lock on it that tells whoever comes next that the guard still lives; or /dev/null.
// Arguments: HOW ("units": commands are run as transient units of systemd's; "children": by itself),
// CUTOVER_CMD (empty: none), and then each hold's words:
//
//   filesystem FD            freezes it; handed over, its writers go on
//   fenced-filesystem FD     freezes it; handed over, it is shut down, so that its writers get errors
//   map FD NUMBER TABLE      suspends this device-mapper device, FD being the control node; handed over, it
//                            is resumed with TABLE
//   record FD CHANGE UNDO    handing over, runs CHANGE before anything is released; UNDO where it came to
//                            nothing all the same, before anything is released if there is time. FD is a
//                            lock, which is kept until the guard and these commands have ended
//   commands QUIESCE RESUME  runs these; handed over, the second one is not run
//   commands-of-moved …      likewise; handed over, it is: the writers have been moved, and go on
//   guest FD                 stops the guest of the QEMU whose QMP that is, and starts it again
//   guest-for-good FD        likewise; handed over, it stays stopped
//   guest-disk FD DO UNDO    handed over, QEMU does what DO says: it gives the guest another disk
//   node FD DO UNDO JOB      handed over, QEMU does what DO says: by this job it gives whoever uses a block
//                            node another one
//   guest-agent FD           freezes the guest's filesystems by its agent, and thaws them
#pragma once

#include <cstdint>

namespace blockferry {

constexpr int guard_socket_fd = 3, guard_mark_fd = 4, guard_holds_fd = 5;
constexpr const char* guard_commands_as_units = "units";
constexpr const char* guard_commands_as_children = "children";
/// A directory of this name below descriptor 4: the volume was handed over.
constexpr const char* guard_mark = "handed-over";

struct GuardRequest {
  enum Kind : std::uint32_t { quiesce = 1, release = 2, hand_over = 3 } kind;
  std::uint32_t limit_ms;  ///< quiesce: from now on until all is released again
};

struct GuardAnswer {
  enum Kind : std::uint32_t { quiesced = 1, failed = 2, released = 3, expired = 4 } kind;
  enum Step : std::uint32_t { quiescing, cutover_command, marking, handing_over } step;  ///< failed: at
  std::uint32_t hold;        ///< failed while quiescing or handing over: which one, from 0
  std::int32_t errno_value;  ///< failed; of commands 0
  std::int64_t at_ns;        ///< CLOCK_MONOTONIC: before the first hold, or after the last release
  std::int64_t command_ns;   ///< released: what the cutover command took
  char detail[200];          ///< failed, where errno does not say it: words, with a NUL
};

}  // namespace blockferry
