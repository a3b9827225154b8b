// SPDX-License-Identifier: Apache-2.0
// Sizes take K, M, G, T (powers of 1024), times take ms, s, m, h: what people type and read.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>
#include <string_view>

#include "blockio/base/error.h"

namespace blockferry {

constexpr std::uint64_t KiB = 1024;
constexpr std::uint64_t MiB = 1024 * KiB;
constexpr std::uint64_t GiB = 1024 * MiB;
constexpr std::uint64_t TiB = 1024 * GiB;

/// A half-open range of bytes on a device.
struct ByteRange {
  std::uint64_t offset = 0;
  std::uint64_t bytes = 0;
  std::uint64_t end() const { return offset + bytes; }
  bool operator==(const ByteRange&) const = default;
};

constexpr std::uint64_t round_up(std::uint64_t value, std::uint64_t unit) {
  return (value + unit - 1) / unit * unit;
}
constexpr std::uint64_t divide_up(std::uint64_t value, std::uint64_t unit) {
  return value / unit + (value % unit != 0);
}

/// "4K", "500M", "1.5G", "123": bytes. Refuses anything else, and what does not fit 64 bits.
Result<std::uint64_t> parse_size(std::string_view text);

/// "300ms", "10s", "15m", "2h"; a bare number is refused except 0.
Result<std::chrono::milliseconds> parse_duration(std::string_view text);

/// 1610612736 -> "1.5 GiB".
std::string format_size(std::uint64_t bytes);

/// 75 s -> "1m15s"; under 10 s with a tenth: "4.2s".
std::string format_duration(double seconds);

}  // namespace blockferry
