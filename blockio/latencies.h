// SPDX-License-Identifier: Apache-2.0
// How long requests took: a histogram that only grows.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>

namespace blockferry {

struct Latencies {
  static constexpr std::size_t buckets = 24;
  std::uint64_t counts[buckets] = {};  ///< [i]: requests that took under 2^i × 8 µs; the last: all others
  double seconds_sum = 0;

  void add(std::int64_t nanoseconds) {
    const auto units = std::uint64_t(std::max<std::int64_t>(nanoseconds, 0)) / 8000;
    ++counts[std::min<std::size_t>(std::size_t(std::bit_width(units)), buckets - 1)];
    seconds_sum += double(nanoseconds) * 1e-9;
  }
  std::uint64_t count() const {
    std::uint64_t sum = 0;
    for (const auto bucket : counts) sum += bucket;
    return sum;
  }
};

}  // namespace blockferry
