// SPDX-License-Identifier: Apache-2.0
// One connection: reads a request, has it answered, writes the answer, and so on until either side has
// enough. Heavy (Boost.Asio): only api_server.cc and api_session.cc include it.
#pragma once

#include <chrono>
#include <memory>
#include <mutex>
#include <optional>
#include <unordered_map>

#include <boost/asio/generic/stream_protocol.hpp>
#include <boost/asio/io_context.hpp>

#include "daemon/api_routes.h"
#include "daemon/control.h"
#include "daemon/worker_pool.h"

namespace blockferry {

using ApiStreamSocket = boost::asio::generic::stream_protocol::socket;

class ApiSession;

enum class ApiSessionKind : std::uint8_t { control, metrics, refused };

/// What all connections share. Outlives them: a worker's task keeps it.
struct ApiShared : std::enable_shared_from_this<ApiShared> {
  explicit ApiShared(Control& control_to_ask) : control(control_to_ask) {}

  void add(ApiSession* session, ApiSessionKind kind);
  void remove(ApiSession* session);
  unsigned count(ApiSessionKind kind) const;
  void close_all();  ///< I/O thread only

 private:
  // Before `io`, whose end is the end of the last sessions.
  mutable std::mutex mutex_;  ///< sessions may end on a worker's thread
  std::unordered_map<ApiSession*, ApiSessionKind> sessions_;

 public:
  Control& control;
  std::chrono::seconds idle_timeout{60}, request_timeout{10};
  boost::asio::io_context io{1};
  WorkerPool quick{2, "api-quick"};
  WorkerPool slow{4, "api-slow"};
  bool stopping = false;  ///< I/O thread only
};

/// Begins to serve a connection on the I/O thread. `refusal` answers its first request, whatever that is.
void serve_connection(ApiShared& shared, ApiStreamSocket socket, ApiSessionKind kind,
                      std::optional<ApiResponse> refusal);

}  // namespace blockferry
