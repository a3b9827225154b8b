// SPDX-License-Identifier: Apache-2.0
// A disk of a QEMU guest as a source: what its URI says, and what QEMU says of it.
//
//   qemu:QMP_SOCKET?node=NODE      a block node by its name
//   qemu:QMP_SOCKET?device=ID      whatever node the guest's device has at the moment
//            …&agent=SOCKET        the guest agent's: it freezes the guest's filesystems for the cutover
//            …&bitmap=NAME         bitmaps are kept in the image, by names that begin like this one
//
// A `%XX` in a path or value is one byte; `&`, `=` and `%` need it.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "blockio/base/error.h"
#include "daemon/qmp_client.h"

namespace blockferry {

struct QemuUri {
  std::string socket;
  std::string node, device;  ///< one of them is empty
  std::string agent;
  std::string bitmap;
};

bool is_qemu_uri(const std::string& uri);
/// invalid_argument: it is none, and why.
Result<QemuUri> parse_qemu_uri(const std::string& uri);
/// What it names for bitmaps that outlive the run; empty: they do not, or the URI is of something else.
std::string bitmap_named_by(const std::string& uri);

struct QemuBitmap {
  std::string name;
  std::uint64_t granularity = 0, count = 0;  ///< bytes; count: of what is dirty
  bool recording = false, persistent = false, busy = false, inconsistent = false;
};

struct QemuNode {
  std::string name;
  std::string device;  ///< of the guest, whose node it is: its id or its path; empty: none
  std::string driver, filename;
  std::uint64_t bytes = 0;
  bool read_only = false;
  bool direct = false, no_flush = false;  ///< its cache
  std::string detect_zeroes = "off";
  std::vector<QemuBitmap> bitmaps;

  const QemuBitmap* bitmap(const std::string& wanted) const;
};

/// The node that the URI means now. refused: there is none, or nothing that could be a source; why, and what
/// to do.
Result<QemuNode> find_qemu_node(QmpClient& client, const QemuUri& uri);
/// Every node.
Result<std::vector<QemuNode>> list_qemu_nodes(QmpClient& client);

/// Names the disk over restarts, whatever node it is: the guest by its UUID, or by its socket where it has
/// none.
Result<std::string> qemu_identity(QmpClient& client, const QemuUri& uri);

/// Why its NBD server may not be used for this node; empty: it may. Before 8.2 QEMU aborts, and the guest
/// with it, when somebody who reads a disk of an iothread's goes away, as a process that is killed does.
Result<std::string> qemu_export_unsafe(QmpClient& client, const QemuNode& node);

/// Whether the guest runs; nothing: there is none, it is a storage daemon.
Result<std::optional<bool>> qemu_guest_runs(QmpClient& client);

struct QemuExport {
  std::string id, node;
  bool ours() const { return id.starts_with("blockferry-"); }  ///< of a run of Blockferry's
};
Result<std::vector<QemuExport>> list_qemu_exports(QmpClient& client);

}  // namespace blockferry
