// SPDX-License-Identifier: Apache-2.0
#include "daemon/service.h"

#include <systemd/sd-daemon.h>

namespace blockferry {

Result<int> activated_socket() {
  const int count = ::sd_listen_fds(1);
  if (count < 0) return fail(error_from_errno(-count, "take the activated socket", ""));
  if (count == 0) return -1;
  if (count > 1 || ::sd_is_socket_unix(SD_LISTEN_FDS_START, SOCK_STREAM, 1, nullptr, 0) <= 0) {
    return fail(make_error(ErrorCode::invalid_argument, "take the activated socket", "ferryd.socket",
                           "one listening UNIX stream socket is expected"));
  }
  return SD_LISTEN_FDS_START;
}

void notify_ready() {
  ::sd_notify(0, "READY=1");
}
void notify_stopping() {
  ::sd_notify(0, "STOPPING=1");
}
void notify_alive() {
  ::sd_notify(0, "WATCHDOG=1");
}

Nanoseconds watchdog_interval() {
  std::uint64_t microseconds = 0;
  if (::sd_watchdog_enabled(0, &microseconds) <= 0) return Nanoseconds(0);
  return std::chrono::microseconds(microseconds) / 3;
}

}  // namespace blockferry
