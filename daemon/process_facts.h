// SPDX-License-Identifier: Apache-2.0
// What /proc says of this process, under the names that Prometheus clients use everywhere.
#pragma once

#include <cstdint>

namespace blockferry {

struct ProcessFacts {
  double cpu_seconds = 0;
  double start_time_seconds = 0;  ///< since 1970
  std::uint64_t resident_bytes = 0;
  unsigned open_descriptors = 0;
};

/// Zeroes where /proc is not to be had.
ProcessFacts read_process_facts();

}  // namespace blockferry
