// SPDX-License-Identifier: Apache-2.0
// The kernel's device-mapper, through libdevmapper: tables are read, and maps of ferryd's own are made and
// removed. Suspending and resuming is the guard's. Thread-safe.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include <sys/types.h>

#include "blockio/base/error.h"

namespace blockferry {

/// A line of a table; in sectors of 512 bytes, as the kernel counts.
struct MapLine {
  std::uint64_t start = 0;
  std::uint64_t sectors = 0;
  std::string type;        ///< "linear", "crypt", …
  std::string parameters;  ///< as `dmsetup table` shows them
  bool operator==(const MapLine&) const = default;
};
using MapTable = std::vector<MapLine>;

/// Nothing where it is not a device-mapper device.
std::string map_name(dev_t device);
/// "LVM-…", "CRYPT-…", "mpath-…": who made it.
std::string map_uuid(dev_t device);

/// The table in use. Keys of ciphers are not told.
Result<MapTable> live_table(dev_t device);

/// A map of our own, which udev leaves alone: it is not probed, and no link leads to it. One that is left
/// over from a process that was killed is taken where it has this table, and made anew otherwise.
Result<dev_t> make_private_map(const std::string& name, const MapTable& table);
/// Tries for a while where the kernel still has it open.
void remove_private_map(const std::string& name);
/// Of all that begin with `prefix`.
std::vector<std::string> private_maps(const std::string& prefix);

}  // namespace blockferry
