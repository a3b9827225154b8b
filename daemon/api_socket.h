// SPDX-License-Identifier: Apache-2.0
// The listening sockets, and who may speak on the control socket: plain POSIX.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>

#include <sys/types.h>

#include "blockio/base/error.h"
#include "blockio/base/file_descriptor.h"

namespace blockferry {

/// A listening socket; the file it made, if it made one, goes with it, unless another one stands there by
/// then.
class ListeningSocket {
 public:
  ListeningSocket() = default;
  ListeningSocket(FileDescriptor fd, std::string path, std::uint64_t device, std::uint64_t inode)
      : fd_(std::move(fd)), path_(std::move(path)), device_(device), inode_(inode) {}
  ListeningSocket(ListeningSocket&& other) noexcept = default;
  ListeningSocket& operator=(ListeningSocket&& other) noexcept = default;
  ~ListeningSocket() = default;

  bool valid() const { return fd_.valid(); }
  int get() const { return fd_.get(); }
  /// Gives the descriptor away; remove_file() works on.
  int release() { return fd_.release(); }
  void remove_file();

 private:
  FileDescriptor fd_;
  std::string path_;
  std::uint64_t device_ = 0, inode_ = 0;
};

/// Mode 0660 and `group` where there is one, else 0600. Replaces a socket file that nobody answers on; `busy`
/// where somebody does.
Result<ListeningSocket> listen_on_path(const std::string& path, std::optional<gid_t> group);
/// From socket activation: checks that it is what it should be.
Result<ListeningSocket> take_over_socket(int fd);
/// "ADDR:PORT", "[ADDR]:PORT".
Result<ListeningSocket> listen_on_address(const std::string& address);
/// What a TCP socket is really bound to.
std::string bound_address(int fd);

std::optional<gid_t> group_id(const std::string& name);

/// root, the daemon's own user, or a member of the group, as the kernel recorded the peer when it connected.
bool peer_may_operate(int fd, std::optional<gid_t> group);

}  // namespace blockferry
