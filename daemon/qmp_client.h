// SPDX-License-Identifier: Apache-2.0
// QEMU's control protocol, QMP: a line of JSON for each command, answer and event, over a UNIX socket.
//
// QEMU serves one client a socket, so all that this process has to say to one QEMU goes over one connection,
// which is made again where it was lost. Thread-safe; a call may wait for another's.
//
// Answers are matched by the ids of commands, so that one that comes too late is passed over. Events are
// passed over as well: whoever wants to know asks.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include <nlohmann/json_fwd.hpp>
#include <sys/types.h>

#include "blockio/base/clock.h"
#include "blockio/base/error.h"
#include "blockio/base/file_descriptor.h"

namespace blockferry {

struct QmpPatience {
  Nanoseconds connect = std::chrono::seconds(5);  ///< until QEMU greets: another client may have to go first
  Nanoseconds answer = std::chrono::seconds(10);
};

class QmpClient {
 public:
  /// Connects with the first command.
  explicit QmpClient(std::string socket, const QmpPatience& patience = {});

  /// What the command returned. Of errors: conflict, with QEMU's words, where it refused the command;
  /// unsupported where it has no such command; not_found where nobody listens; busy where QEMU serves another
  /// client; device_gone where the connection was lost; io where the answer was late or made no sense.
  Result<nlohmann::json> execute(const std::string& command, const nlohmann::json& arguments);
  Result<nlohmann::json> execute(const std::string& command);

  /// Somebody else talks over descriptor() until this is unlocked, and leaves whole lines behind.
  std::recursive_mutex& mutex() { return mutex_; }
  /// Connected: for a process that is to say something by itself.
  Result<int> descriptor();
  /// Who QEMU runs as. Precondition: descriptor() succeeded.
  uid_t user() const { return user_; }
  const std::string& socket() const { return socket_; }

 private:
  Result<void> connect();
  Result<void> greet();
  Result<void> send(const std::string& line);
  Result<std::string> read_line(Nanoseconds deadline);
  Result<nlohmann::json> read_object(Nanoseconds deadline);
  Result<nlohmann::json> talk(const std::string& command, const nlohmann::json& arguments);
  Error failure(ErrorCode code, const std::string& why) const;

  const std::string socket_;
  const QmpPatience patience_;
  std::recursive_mutex mutex_;
  // All guarded by mutex_.
  FileDescriptor fd_;
  uid_t user_ = 0;
  std::string received_;      ///< the beginning of a line
  std::size_t searched_ = 0;  ///< of received_: there is no end of a line
  std::uint64_t last_id_ = 0;
  std::optional<Nanoseconds> silent_since_;  ///< an answer did not come in time, and none has come since
};

/// The one that this process has for a socket, as long as somebody uses it.
std::shared_ptr<QmpClient> shared_qmp_client(const std::string& socket);

}  // namespace blockferry
