// SPDX-License-Identifier: Apache-2.0
// HTTP/JSON on the control socket, and /metrics on the metrics address. Boost.Beast inside, nowhere else.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "blockio/base/error.h"
#include "daemon/control.h"

namespace blockferry {

struct ApiServerOptions {
  std::string socket_path;          ///< made with mode 0660, group `blockferry` where that exists
  int socket_fd = -1;               ///< from socket activation: taken instead of socket_path
  std::string metrics_listen;       ///< "ADDR:PORT" or "none"
  std::string group = "blockferry"; ///< members operate, as does root; peers checked by SO_PEERCRED
  unsigned connections_max = 512;
  unsigned idle_timeout_seconds = 60;
};

class ApiServer {
 public:
  /// Binds and listens; serving begins with start(). An old socket file is replaced only when nobody answers on it.
  static Result<std::unique_ptr<ApiServer>> create(const ApiServerOptions& options, Control& control);
  ~ApiServer();  ///< stops

  void start();  ///< its own threads
  void stop();   ///< ends connections, joins; the socket file it made is removed
  std::string metrics_address() const;  ///< with the port really bound (":0" asks for any)

 private:
  struct Parts;
  explicit ApiServer(std::unique_ptr<Parts> parts);
  std::unique_ptr<Parts> parts_;
};

}  // namespace blockferry
