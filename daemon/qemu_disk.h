// SPDX-License-Identifier: Apache-2.0
// All that a run adds to QEMU for one of its disks, and takes away again: bitmaps, exports, the NBD server
// that serves them, and the node of the target that a guest is moved to.
//
// Everything is named blockferry-RUN…, so that a later process finds what an earlier one left. But for
// bitmaps that the user names: they are kept in the image, and go on where the run has ended.
// NAME-VOLUME-NUMBER is one, so that it fits only the state of that volume, and of that only the last commit
// (RunRecord).
#pragma once

#include <memory>
#include <string>

#include "daemon/qemu_node.h"

namespace blockferry {

class QemuDisk {
 public:
  /// `directory`: where the NBD server's socket may lie, in a directory that only QEMU and root enter.
  QemuDisk(std::shared_ptr<QmpClient> client, QemuUri uri, std::string run_id, const std::string& volume_id,
           const std::string& directory);

  QmpClient& client() const { return *client_; }
  const std::shared_ptr<QmpClient>& shared_client() const { return client_; }
  const QemuUri& uri() const { return uri_; }
  const std::string& run_id() const { return run_id_; }

  /// The node that the URI means now.
  Result<QemuNode> look() const { return find_qemu_node(*client_, uri_); }

  /// For reading the node; an earlier one is replaced. Its NBD URI.
  Result<std::string> export_source(const std::string& node);
  /// The node that was exported last; empty: none.
  const std::string& exported_node() const { return exported_node_; }
  /// A disabled bitmap of the node, as the meta context `qemu:dirty-bitmap:NAME`, at this NBD URI.
  Result<std::string> export_bitmap(const std::string& node, std::uint64_t number);
  Result<void> remove_bitmap_export(std::uint64_t number);
  /// All of this run's, and the server, if nobody else needs it.
  Result<void> remove_exports();

  Result<void> add_bitmap(const std::string& node, const std::string& name, std::uint64_t granularity);
  /// One moment ends `old` and begins `name`: all that is written is in one of them, or in both.
  Result<void> rotate_bitmaps(const std::string& node, const std::string& old, const std::string& name,
                              std::uint64_t granularity);
  /// Until those on their way have ended.
  Result<void> wait_for_writes();
  Result<void> remove_bitmap(const std::string& node, const std::string& name);
  Result<void> remove_bitmap_exports();
  /// Of this run, wherever they are, with their exports. One of a disk that can only be read stays.
  Result<void> remove_bitmaps();

  /// A raw node over a file or block device, not in use yet. Like `like` in how it is cached.
  Result<void> add_target(const std::string& path, const QemuNode& like);
  Result<void> remove_target();
  /// Whether what the guest, or an export's client, writes goes to the target already.
  Result<bool> target_in_use() const;

  /// Takes away whatever this run has added, but for a target that is in use, and bitmaps that outlive it.
  Result<void> remove_all();

  /// Kept in the image: they outlive the run, and QEMU.
  bool keeps_bitmaps() const { return !uri_.bitmap.empty(); }
  std::string bitmap_name(std::uint64_t number) const { return bitmap_prefix_ + std::to_string(number); }
  /// The number in a bitmap's name, if it is one of this run's.
  std::optional<std::uint64_t> bitmap_number(const std::string& name) const;
  std::string target_node() const { return prefix() + "-disk"; }
  /// Of QEMU, which gives users of a node the target.
  std::string move_job() const { return prefix() + "-move"; }

 private:
  std::string prefix() const { return "blockferry-" + run_id_; }
  std::string bitmap_export(std::uint64_t number) const { return prefix() + "-" + std::to_string(number); }
  nlohmann::json bitmap_options(const std::string& node, const std::string& name,
                                std::uint64_t granularity) const;
  Result<void> remove_export(const std::string& id);
  Result<bool> end_move();
  Result<void> start_server();
  Result<void> stop_server_if_unused();
  Result<std::string> add_export(const std::string& id, const std::string& node, const std::string& bitmap);

  const std::shared_ptr<QmpClient> client_;
  const QemuUri uri_;
  const std::string run_id_;
  const std::string bitmap_prefix_;
  const std::string nbd_directory_, nbd_socket_;
  std::string exported_node_;
};

}  // namespace blockferry
