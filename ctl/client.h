// SPDX-License-Identifier: Apache-2.0
// The control API over its UNIX socket. One connection, kept alive; one request at a time.
#pragma once

#include <memory>
#include <string>

#include <nlohmann/json_fwd.hpp>

#include "blockio/base/clock.h"
#include "blockio/base/error.h"

namespace blockferry {

struct ClientTimeouts {
  Nanoseconds connect = std::chrono::seconds(5);
  Nanoseconds answer = std::chrono::seconds(120);  ///< preflight may have to wait for a slow device
};

class Client {
 public:
  explicit Client(std::string socket_path, const ClientTimeouts& timeouts = {});
  ~Client();

  /// `path` follows "/v1". An answer that is not a success becomes its error; a ferryd that cannot be
  /// reached, goes away or refuses the caller is ErrorCode::unreachable, and so is a wait that Ctrl-C ended
  /// (interrupt.h). `body` null: none.
  Result<nlohmann::json> request(const char* method, const std::string& path, const nlohmann::json& body);
  Result<nlohmann::json> get(const std::string& path);

 private:
  struct Connection;
  Result<void> connect();

  const std::string socket_path_;
  const ClientTimeouts timeouts_;
  std::unique_ptr<Connection> connection_;  ///< null: not connected
};

}  // namespace blockferry
