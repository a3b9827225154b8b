// SPDX-License-Identifier: Apache-2.0
#include "daemon/qemu_disk.h"

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstdio>
#include <cstring>

#include <nlohmann/json.hpp>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "blockio/base/checksum.h"
#include "blockio/base/percent_encoding.h"

namespace blockferry {

namespace {

using nlohmann::json;

// An export that is gone lets go of its bitmap a moment later.
constexpr Nanoseconds removal_patience = std::chrono::seconds(5);
constexpr Nanoseconds removal_pause = std::chrono::milliseconds(2);

std::string directory_name(const std::string& socket) {
  char name[32];
  const auto bytes = std::as_bytes(std::span(socket));
  std::snprintf(name, sizeof name, "qemu-%016llx", static_cast<unsigned long long>(crc64(bytes)));
  return name;
}

/// Whether somebody listens there: QEMU's NBD server is the one that this ferryd's directory knows of.
bool somebody_listens(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.size() >= sizeof address.sun_path) return false;
  std::memcpy(address.sun_path, path.c_str(), path.size() + 1);
  const FileDescriptor fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  return fd.valid() && ::connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0;
}

Result<void> done_of(const Result<json>& answer) {
  return answer ? Result<void>() : fail(answer.error());
}

bool refused_with(const Result<json>& answer, const char* words) {
  return !answer && answer.error().code == ErrorCode::conflict &&
         answer.error().hint.find(words) != std::string::npos;
}

/// NUMBER of a name that is `prefix`NUMBER.
std::optional<std::uint64_t> number_after(const std::string& prefix, const std::string& name) {
  if (!name.starts_with(prefix)) return std::nullopt;
  std::uint64_t number = 0;
  const char* const end = name.data() + name.size();
  const auto read = std::from_chars(name.data() + prefix.size(), end, number);
  if (read.ec != std::errc() || read.ptr != end) return std::nullopt;
  return number;
}

}  // namespace

QemuDisk::QemuDisk(std::shared_ptr<QmpClient> client, QemuUri uri, std::string run_id,
                   const std::string& volume_id, const std::string& directory)
    : client_(std::move(client)),
      uri_(std::move(uri)),
      run_id_(std::move(run_id)),
      bitmap_prefix_(uri_.bitmap.empty() ? prefix() + "-" : uri_.bitmap + "-" + volume_id + "-"),
      nbd_directory_(directory + "/" + directory_name(uri_.socket)),
      nbd_socket_(nbd_directory_ + "/nbd.sock") {}

std::optional<std::uint64_t> QemuDisk::bitmap_number(const std::string& name) const {
  return number_after(bitmap_prefix_, name);
}

// The server and its exports. QEMU has one NBD server, which all runs of this ferryd share.

Result<void> QemuDisk::start_server() {
  const auto user = client_->descriptor();
  if (!user) return fail(user.error());
  if (::mkdir(nbd_directory_.c_str(), 0700) != 0 && errno != EEXIST)
    return fail(error_from_errno(errno, "make", nbd_directory_));
  // QEMU makes the socket, and may be another user.
  if (client_->user() != ::geteuid() && ::chown(nbd_directory_.c_str(), client_->user(), gid_t(-1)) != 0)
    return fail(error_from_errno(errno, "hand to QEMU's user", nbd_directory_));
  const json address = {{"type", "unix"}, {"data", {{"path", nbd_socket_}}}};
  const auto started = client_->execute("nbd-server-start", {{"addr", address}});
  if (!refused_with(started, "already running")) return done_of(started);
  if (somebody_listens(nbd_socket_)) return {};
  return fail(make_error(
      ErrorCode::conflict, "start an NBD server in QEMU at", client_->socket(),
      "it has one already that another program uses (a backup?), and QEMU has only one: wait for that "
      "program, or stop the server (QMP command nbd-server-stop), and `ferryctl resume` the run"));
}

Result<void> QemuDisk::stop_server_if_unused() {
  const auto exports = list_qemu_exports(*client_);
  if (!exports) return fail(exports.error());
  if (!exports->empty() || !somebody_listens(nbd_socket_)) return {};
  const auto stopped = client_->execute("nbd-server-stop");
  if (!stopped && !refused_with(stopped, "not running")) return fail(stopped.error());
  ::unlink(nbd_socket_.c_str());
  ::rmdir(nbd_directory_.c_str());
  return {};
}

/// Its NBD URI.
Result<std::string> QemuDisk::add_export(const std::string& id, const std::string& node,
                                         const std::string& bitmap) {
  const std::lock_guard lock(client_->mutex());  // against another run's stop_server_if_unused()
  if (auto done = start_server(); !done) return fail(done.error());
  json options = {{"type", "nbd"}, {"id", id}, {"name", id}, {"node-name", node}, {"writable", false}};
  if (!bitmap.empty()) options["bitmaps"] = json::array({bitmap});
  if (const auto added = client_->execute("block-export-add", options); !added) return fail(added.error());
  return "nbd+unix:///" + id + "?socket=" + percent_encoded(nbd_socket_, "/");
}

Result<std::string> QemuDisk::export_source(const std::string& node) {
  if (auto done = remove_export(prefix()); !done) return fail(done.error());
  auto uri = add_export(prefix(), node, "");
  if (uri) exported_node_ = node;
  return uri;
}

Result<std::string> QemuDisk::export_bitmap(const std::string& node, std::uint64_t number) {
  return add_export(bitmap_export(number), node, bitmap_name(number));
}

Result<void> QemuDisk::remove_bitmap_export(std::uint64_t number) {
  return remove_export(bitmap_export(number));
}

Result<void> QemuDisk::remove_export(const std::string& id) {
  const auto removed = client_->execute("block-export-del", {{"id", id}, {"mode", "hard"}});
  if (!removed && !refused_with(removed, "not found")) return fail(removed.error());
  const Nanoseconds deadline = system_clock().now() + removal_patience;
  for (;;) {
    const auto exports = list_qemu_exports(*client_);
    if (!exports) return fail(exports.error());
    if (std::none_of(exports->begin(), exports->end(), [&](const auto& each) { return each.id == id; }))
      return {};
    if (system_clock().now() >= deadline) {
      return fail(make_error(ErrorCode::io, "remove an export in QEMU at", client_->socket(),
                             "QEMU does not let go of " + id));
    }
    system_clock().sleep_for(removal_pause);
  }
}

Result<void> QemuDisk::remove_exports() {
  const std::lock_guard lock(client_->mutex());
  Result<void> done = remove_export(prefix());
  if (done) done = remove_bitmap_exports();
  return done ? stop_server_if_unused() : done;
}

// Bitmaps.

json QemuDisk::bitmap_options(const std::string& node, const std::string& name,
                              std::uint64_t granularity) const {
  return {{"node", node}, {"name", name}, {"granularity", granularity}, {"persistent", keeps_bitmaps()}};
}

Result<void> QemuDisk::add_bitmap(const std::string& node, const std::string& name,
                                  std::uint64_t granularity) {
  return done_of(client_->execute("block-dirty-bitmap-add", bitmap_options(node, name, granularity)));
}

/// In this order: with iothreads the two are not quite one moment.
Result<void> QemuDisk::rotate_bitmaps(const std::string& node, const std::string& old,
                                      const std::string& name, std::uint64_t granularity) {
  const json add = {{"type", "block-dirty-bitmap-add"}, {"data", bitmap_options(node, name, granularity)}};
  const json disable = {{"type", "block-dirty-bitmap-disable"}, {"data", {{"node", node}, {"name", old}}}};
  return done_of(client_->execute("transaction", {{"actions", json::array({add, disable})}}));
}

/// A transaction does that before all else, and of nothing it does nothing else.
Result<void> QemuDisk::wait_for_writes() {
  return done_of(client_->execute("transaction", {{"actions", json::array()}}));
}

Result<void> QemuDisk::remove_bitmap(const std::string& node, const std::string& name) {
  const Nanoseconds deadline = system_clock().now() + removal_patience;
  for (;;) {
    const auto removed = client_->execute("block-dirty-bitmap-remove", {{"node", node}, {"name", name}});
    if (removed || refused_with(removed, "not found")) return {};
    if (!refused_with(removed, "in use") || system_clock().now() >= deadline) return fail(removed.error());
    system_clock().sleep_for(removal_pause);
  }
}

Result<void> QemuDisk::remove_bitmap_exports() {
  const auto exports = list_qemu_exports(*client_);
  if (!exports) return fail(exports.error());
  for (const auto& each : *exports) {
    if (!number_after(prefix() + "-", each.id)) continue;
    if (auto done = remove_export(each.id); !done) return done;
  }
  return {};
}

Result<void> QemuDisk::remove_bitmaps() {
  if (auto done = remove_bitmap_exports(); !done) return done;
  const auto nodes = list_qemu_nodes(*client_);
  if (!nodes) return fail(nodes.error());
  for (const auto& node : *nodes) {
    for (const auto& bitmap : node.bitmaps) {
      if (!bitmap_number(bitmap.name)) continue;
      const auto done = remove_bitmap(node.name, bitmap.name);
      // A snapshot has left it behind in an image that backs another one now.
      if (!done && !(node.read_only && done.error().code == ErrorCode::conflict)) return done;
    }
  }
  return {};
}

// The target.

Result<void> QemuDisk::add_target(const std::string& path, const QemuNode& like) {
  struct stat status {};
  if (::stat(path.c_str(), &status) != 0) return fail(error_from_errno(errno, "look at", path));
  const json cache = {{"direct", like.direct}, {"no-flush", like.no_flush}};
  const json file = {{"driver", S_ISBLK(status.st_mode) ? "host_device" : "file"},
                     {"filename", path},
                     {"node-name", target_node() + "-file"},
                     {"discard", "unmap"},
                     {"cache", cache}};
  const auto added = client_->execute("blockdev-add", {{"driver", "raw"},
                                                       {"node-name", target_node()},
                                                       {"discard", "unmap"},
                                                       {"detect-zeroes", like.detect_zeroes},
                                                       {"cache", cache},
                                                       {"file", file}});
  return done_of(added);
}

Result<void> QemuDisk::remove_target() {
  auto removed = client_->execute("blockdev-del", {{"node-name", target_node()}});
  if (refused_with(removed, "in use")) {
    const auto ended = end_move();
    if (!ended) return fail(ended.error());
    if (*ended) removed = client_->execute("blockdev-del", {{"node-name", target_node()}});
  }
  if (removed || refused_with(removed, "Failed to find") || refused_with(removed, "in use")) return {};
  return fail(removed.error());
}

/// A job that a guard has left, which was killed. False: there is none.
Result<bool> QemuDisk::end_move() {
  const json job = {{"id", move_job()}};
  const auto cancelled = client_->execute("job-cancel", job);  // refused where it has ended
  if (!cancelled && cancelled.error().code != ErrorCode::conflict) return fail(cancelled.error());
  const Nanoseconds deadline = system_clock().now() + removal_patience;
  for (;;) {
    const auto dismissed = client_->execute("job-dismiss", job);
    if (dismissed) return true;
    if (refused_with(dismissed, "not found")) return false;
    if (dismissed.error().code != ErrorCode::conflict || system_clock().now() >= deadline)
      return fail(dismissed.error());
    system_clock().sleep_for(removal_pause);
  }
}

Result<bool> QemuDisk::target_in_use() const {
  QemuUri uri = uri_;
  uri.node = target_node();
  uri.device.clear();
  const auto node = find_qemu_node(*client_, uri);
  if (!node && node.error().code == ErrorCode::refused) return false;
  if (!node) return fail(node.error());
  if (!node->device.empty()) return true;
  const auto exports = list_qemu_exports(*client_);
  if (!exports) return fail(exports.error());
  return std::any_of(exports->begin(), exports->end(),
                     [&](const QemuExport& each) { return each.node == node->name && !each.ours(); });
}

// The end.

Result<void> QemuDisk::remove_all() {
  const std::lock_guard lock(client_->mutex());
  Result<void> done = remove_exports();
  if (done) done = remove_target();
  return done && !keeps_bitmaps() ? remove_bitmaps() : done;
}

}  // namespace blockferry
