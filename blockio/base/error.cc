// SPDX-License-Identifier: Apache-2.0
#include "blockio/base/error.h"

#include <array>
#include <cerrno>
#include <cstring>
#include <utility>

namespace blockferry {

namespace {

constexpr std::array<std::pair<ErrorCode, const char*>, 13> names{{
    {ErrorCode::io, "io"},
    {ErrorCode::no_space, "no_space"},
    {ErrorCode::device_gone, "device_gone"},
    {ErrorCode::busy, "busy"},
    {ErrorCode::unsupported, "unsupported"},
    {ErrorCode::refused, "refused"},
    {ErrorCode::invalid_argument, "invalid_argument"},
    {ErrorCode::not_found, "not_found"},
    {ErrorCode::conflict, "conflict"},
    {ErrorCode::state_damaged, "state_damaged"},
    {ErrorCode::state_newer, "state_newer"},
    {ErrorCode::unreachable, "unreachable"},
    {ErrorCode::internal, "internal"},
}};

ErrorCode code_of_errno(int errno_value) {
  switch (errno_value) {
    case ENOSPC:
    case EDQUOT:
      return ErrorCode::no_space;
    case ENODEV:
    case ENXIO:
    case ENOMEDIUM:
    case ENOTCONN:
      return ErrorCode::device_gone;
    case EBUSY:
    case EAGAIN:
      return ErrorCode::busy;
    case EOPNOTSUPP:
      return ErrorCode::unsupported;
    case ENOENT:
      return ErrorCode::not_found;
    default:
      return ErrorCode::io;
  }
}

}  // namespace

const char* error_code_name(ErrorCode code) {
  for (const auto& [known, name] : names) {
    if (known == code) return name;
  }
  return "internal";
}

std::optional<ErrorCode> error_code_from_name(const std::string& name) {
  for (const auto& [code, known] : names) {
    if (name == known) return code;
  }
  return std::nullopt;
}

std::string Error::message() const {
  std::string text = operation;
  if (!device.empty()) text += (text.empty() ? "" : " ") + device;
  if (offset) text += " at offset " + std::to_string(*offset);
  if (errno_value != 0) {
    const char* const words = ::strerrordesc_np(errno_value);  // null for an errno that libc has no words for
    text += words != nullptr ? std::string(": ") + words : ": error " + std::to_string(errno_value);
  }
  if (!hint.empty()) text += (errno_value != 0 ? "; " : ": ") + hint;
  // One line, whatever a device's name or a library's text holds.
  for (char& letter : text) {
    if (static_cast<unsigned char>(letter) < 0x20 || letter == 0x7f) letter = ' ';
  }
  return text;
}

Error error_from_errno(int errno_value, std::string operation, std::string device,
                       std::optional<std::uint64_t> offset) {
  return {code_of_errno(errno_value), std::move(operation), std::move(device), offset, errno_value, ""};
}

Error make_error(ErrorCode code, std::string operation, std::string device, std::string hint) {
  return {code, std::move(operation), std::move(device), std::nullopt, 0, std::move(hint)};
}

}  // namespace blockferry
