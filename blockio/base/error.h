// SPDX-License-Identifier: Apache-2.0
// Errors are values. Libraries return them, the daemon logs them once, the user reads message() as one line.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include <tl/expected.hpp>

namespace blockferry {

/// A code exists only where some caller reacts to it differently (the reaction is named beside it).
enum class ErrorCode : std::uint8_t {
  io,  // a device failed a request: retried, then at granule size, then the run fails and can be resumed
  no_space,          // a target is full: never retried; the run fails and can be resumed
  device_gone,       // the device vanished or shrank: never retried
  busy,              // held by somebody: retried after a crash of our own, refused otherwise
  unsupported,       // the device or kernel cannot do this: the caller takes another way
  refused,           // preflight: exit status 4
  invalid_argument,  // usage: exit status 2
  not_found,         // no such run: exit status 2
  conflict,          // the run's state does not allow this verb: exit status 1
  state_damaged,     // durable state does not pass its checks: the run is failed, never guessed at
  state_newer,       // durable state of a later version: left untouched
  unreachable,       // ferryd cannot be reached or refused the caller: exit status 3
  internal,          // anything else
};

/// The code's name in JSON, e.g. "no_space".
const char* error_code_name(ErrorCode code);
std::optional<ErrorCode> error_code_from_name(const std::string& name);

struct Error {
  ErrorCode code = ErrorCode::internal;
  std::string operation;                ///< what was tried, a verb phrase: "read", "open for writing"
  std::string device;                   ///< where: a path or URI; may be empty
  std::optional<std::uint64_t> offset;  ///< bytes from the device's start
  int errno_value = 0;                  ///< 0 where the kernel was not the one to complain
  std::string hint;  ///< what is wrong in words where errno does not say it, and what to do

  /// One line: "read /dev/sda at offset 4096: Input/output error; hint".
  std::string message() const;
};

template <typename T>
using Result = tl::expected<T, Error>;

/// An error from errno, with the code chosen from it (ENOSPC, ENODEV, EBUSY, EOPNOTSUPP… else io).
Error error_from_errno(int errno_value, std::string operation, std::string device,
                       std::optional<std::uint64_t> offset = std::nullopt);

/// An error of words.
Error make_error(ErrorCode code, std::string operation, std::string device, std::string hint);

inline tl::unexpected<Error> fail(Error error) {
  return tl::unexpected<Error>(std::move(error));
}

}  // namespace blockferry
