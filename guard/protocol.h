// SPDX-License-Identifier: Apache-2.0
// Between ferryd and its guard: one process a cutover, which alone quiesces the source and releases it, so
// that it is released whatever becomes of ferryd (invariant 7), and so that handing over is decided in one
// place only, while everything is still quiesced (attack G).
//
//   ferryd                       guard
//     freeze{limit}     ─────>     freezes every filesystem, or runs the quiesce command
//                       <─────   frozen{at} or failed{which}: then all is released again
//     hand_over or thaw ─────>     hand_over: the cutover command; marks it done; fences; releases. thaw:
//     releases
//                       <─────   released{at}, or expired{at}: it was released before, and nothing was handed
//                       over
//
// The guard lets go by itself when the limit has passed, and when the other end of the socket is closed. It
// serves one freeze and ends.
//
// Descriptors: 3 the socket (SOCK_SEQPACKET), 4 the directory for the mark of a hand-over, or /dev/null, 5 …
// one of each filesystem. Arguments: QUIESCE_CMD RESUME_CMD CUTOVER_CMD FENCE ("fence" or ""); empty: none.
#pragma once

#include <cstdint>

namespace blockferry {

constexpr int guard_socket_fd = 3, guard_mark_fd = 4, guard_filesystems_fd = 5;
/// A directory of this name below descriptor 4: the volume was handed over.
constexpr const char* guard_mark = "handed-over";

struct GuardRequest {
  enum Kind : std::uint32_t { freeze = 1, thaw = 2, hand_over = 3 } kind;
  std::uint32_t limit_ms;  ///< freeze: from now on until all is released again
};

struct GuardAnswer {
  enum Kind : std::uint32_t { frozen = 1, failed = 2, released = 3, expired = 4 } kind;
  enum Step : std::uint32_t {
    freezing,
    quiesce_command,
    cutover_command,
    marking,
    fencing
  } step;                    ///< failed: at
  std::uint32_t filesystem;  ///< failed: which one, from 0
  std::int32_t errno_value;  ///< failed; of commands 0
  std::int64_t at_ns;        ///< CLOCK_MONOTONIC: before the first freeze, or after the last thaw
  std::int64_t command_ns;   ///< released: what the cutover command took
  char detail[200];          ///< failed commands: status and the end of what they said, with a NUL
};

}  // namespace blockferry
