// SPDX-License-Identifier: Apache-2.0
// What went wrong with a device, in words, and what to do.
#pragma once

#include <cerrno>
#include <optional>

#include "blockio/base/error.h"
#include "blockio/device.h"

namespace blockferry {

inline Error request_error(int errno_value, const char* operation, const Device& device,
                           std::optional<std::uint64_t> offset) {
  Error error = error_from_errno(errno_value, operation, device.info().uri, offset);
  if (errno_value == ENOTCONN)
    error.hint = "the connection broke and could not be made anew; resume the run when the server is back";
  if (error.code == ErrorCode::no_space) error.hint = "make room and resume the run";
  return error;
}

inline Error ended_early(const Device& device, std::uint64_t offset) {
  Error error =
      make_error(ErrorCode::device_gone, "read", device.info().uri, "it ended early; has it shrunk?");
  error.offset = offset;
  return error;
}

}  // namespace blockferry
