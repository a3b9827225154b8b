// SPDX-License-Identifier: Apache-2.0
#include <cerrno>
#include <cstdint>

#include <linux/fs.h>
#include <sys/ioctl.h>

#include "guard/hold.h"

namespace blockferry {

namespace {

// Of ext4 and xfs alike (xfs calls it GOINGDOWN): the filesystem takes no more writes, and its log stays as
// it is.
constexpr unsigned long shut_down_filesystem = _IOR('X', 125, std::uint32_t);
constexpr std::uint32_t without_log_flush = 2;

class FilesystemHold : public Hold {
 public:
  FilesystemHold(int fd, bool fence) : fd_(fd), fence_(fence) {}

  std::optional<HoldFailure> take(std::chrono::milliseconds, const std::atomic<bool>&) override {
    if (::ioctl(fd_, FIFREEZE, 0) != 0) return HoldFailure{errno, ""};
    frozen_ = true;
    return std::nullopt;
  }

  /// Writers that wait must not write to the old disk once it is released: they get errors instead
  /// (attack H). There is no way back from it.
  std::optional<HoldFailure> hand_over() override {
    std::uint32_t how = without_log_flush;
    if (!fence_ || ::ioctl(fd_, shut_down_filesystem, &how) == 0) return std::nullopt;
    return HoldFailure{errno, ""};
  }

  /// Only what this one froze.
  void release(bool) override {
    if (frozen_) ::ioctl(fd_, FITHAW, 0);
    frozen_ = false;
  }

 private:
  const int fd_;
  const bool fence_;
  bool frozen_ = false;
};

}  // namespace

std::unique_ptr<Hold> make_filesystem_hold(int fd, bool fence) {
  return std::make_unique<FilesystemHold>(fd, fence);
}

}  // namespace blockferry
