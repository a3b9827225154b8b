// SPDX-License-Identifier: Apache-2.0
// The control API over its UNIX socket. One connection, kept alive; one request at a time.
#pragma once

#include <memory>
#include <string>

#include <nlohmann/json_fwd.hpp>

#include "blockio/base/error.h"

namespace blockferry {

class Client {
 public:
  explicit Client(std::string socket_path);
  ~Client();

  /// `path` follows "/v1". An answer that is not a success becomes its error; a ferryd that cannot be
  /// reached, goes away or refuses the caller is ErrorCode::unreachable. `body` null: none.
  Result<nlohmann::json> request(const char* method, const std::string& path, const nlohmann::json& body);
  Result<nlohmann::json> get(const std::string& path);

 private:
  struct Connection;
  const std::string socket_path_;
  std::unique_ptr<Connection> connection_;  ///< null: not connected
};

/// For a run's id or name within a path.
std::string percent_encode(const std::string& text);

}  // namespace blockferry
