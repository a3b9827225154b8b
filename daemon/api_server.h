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
  std::string socket_path;           ///< made with mode 0660, group `blockferry` where that exists
  int socket_fd = -1;                ///< from socket activation: taken instead of socket_path
  std::string metrics_listen;        ///< "ADDR:PORT" or "none"
  std::string group = "blockferry";  ///< members operate, as does root; peers checked by SO_PEERCRED
  unsigned connections_max = 512;
  unsigned idle_timeout_seconds = 60;
  unsigned request_timeout_seconds = 10;  ///< from a request's first byte to its last
  unsigned stop_timeout_seconds = 5;      ///< for requests under way
};

class ApiServer {
 public:
  /// Binds and listens; serving begins with start(). An old socket file is replaced only when nobody answers
  /// on it.
  static Result<std::unique_ptr<ApiServer>> create(const ApiServerOptions& options, Control& control);
  ~ApiServer();  ///< stops

  void start();  ///< its own threads
  /// Ends connections, joins; the socket file it made is removed. Requests under way get some seconds to end:
  /// false when a call into Control did not come back (a device that hangs), and Control must then not be
  /// destroyed.
  bool stop();
  std::string metrics_address() const;  ///< with the port really bound (":0" asks for any)

 private:
  struct Parts;
  explicit ApiServer(std::shared_ptr<Parts> parts);
  std::shared_ptr<Parts> parts_;  ///< shared with calls that have not come back
};

}  // namespace blockferry
