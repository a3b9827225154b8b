// SPDX-License-Identifier: Apache-2.0
#include "blockio/file_device.h"

#include <algorithm>
#include <cerrno>
#include <cstring>

#include <fcntl.h>
#include <linux/fs.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "blockio/base/file_descriptor.h"
#include "blockio/block_identity.h"

namespace blockferry {

namespace {

constexpr std::uint64_t page_bytes = 4096;
constexpr std::uint64_t file_zero_run_bytes_min = 16 * KiB;
constexpr Nanoseconds busy_retry = std::chrono::milliseconds(20);

class FileDevice : public Device {
 public:
  FileDevice(FileQueue& queue, DeviceInfo info) : queue_(queue), info_(std::move(info)) {}

  Result<void> open(const FileDeviceOptions& options);

  const DeviceInfo& info() const override { return info_; }
  void submit(IoRequest& request) override;
  Result<DeviceRegion> region_at(std::uint64_t offset) override;
  std::optional<std::string> change_stamp() override;

 private:
  Result<void> open_block(const FileDeviceOptions& options);
  Result<void> open_file(const FileDeviceOptions& options);
  Result<void> lock_whole_disk(Nanoseconds busy_wait);
  Result<void> size_file(const FileDeviceOptions& options, bool created);
  Result<void> add_slots();
  Error error(int errno_value, const char* operation) const {
    return error_from_errno(errno_value, operation, info_.uri);
  }

  FileQueue& queue_;
  DeviceInfo info_;
  FileDescriptor fd_;           ///< O_DIRECT where that is to be had
  FileDescriptor buffered_fd_;  ///< files: for the unaligned tail
  FileDescriptor disk_fd_;      ///< targets: holds the whole disk's lock
  dev_t device_number_ = 0;
  unsigned slot_ = 0, buffered_slot_ = 0;
};

/// Tries until `attempt` gives other than EBUSY or EWOULDBLOCK, or the time is over.
template <typename Attempt>
int retry_while_busy(Nanoseconds busy_wait, Attempt attempt) {
  const Nanoseconds give_up = system_clock().now() + busy_wait;
  for (;;) {
    const int done = attempt();
    if (done >= 0 || (errno != EBUSY && errno != EWOULDBLOCK)) return done;
    const int why = errno;
    if (system_clock().now() >= give_up) {
      errno = why;
      return done;
    }
    system_clock().sleep_for(busy_retry);
  }
}

/// The kernel's direct-I/O alignment for a file; a page where it does not say.
std::uint32_t direct_alignment(int fd) {
#ifdef STATX_DIOALIGN
  struct statx status {};
  if (::statx(fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &status) == 0 && status.stx_dio_offset_align > 0) {
    return std::clamp<std::uint32_t>(status.stx_dio_offset_align, 512, page_bytes);
  }
#else
  static_cast<void>(fd);
#endif
  return page_bytes;
}

Result<void> FileDevice::open(const FileDeviceOptions& options) {
  auto opened = info_.kind == DeviceKind::block ? open_block(options) : open_file(options);
  return opened ? add_slots() : opened;
}

Result<void> FileDevice::open_block(const FileDeviceOptions& options) {
  const bool target = options.role == DeviceRole::target;
  const int flags = (target ? O_RDWR : O_RDONLY) | O_DIRECT | O_CLOEXEC | (options.shared ? 0 : O_EXCL);
  fd_.reset(retry_while_busy(options.busy_wait, [&] { return ::open(info_.uri.c_str(), flags); }));
  if (!fd_.valid()) {
    Error failure = error(errno, target ? "open for writing" : "open");
    if (failure.code == ErrorCode::busy)
      failure.hint = "it is mounted or held by another program; release it and try again";
    return fail(failure);
  }
  struct stat status {};
  if (::fstat(fd_.get(), &status) != 0) return fail(error(errno, "examine"));
  device_number_ = status.st_rdev;
  std::uint64_t bytes = 0;
  int sector = 0;
  if (::ioctl(fd_.get(), BLKGETSIZE64, &bytes) != 0 || ::ioctl(fd_.get(), BLKSSZGET, &sector) != 0) {
    return fail(error(errno, "examine"));
  }
  info_.bytes = bytes;
  info_.logical_block_bytes = std::uint32_t(sector);
  info_.identity = block_identity(device_number_, info_.uri);
  if (target) return lock_whole_disk(options.busy_wait);
  // What somebody wrote through the page cache goes out now, not when we read it: it would look like a later
  // write.
  if (!options.shared) ::fdatasync(fd_.get());
  return {};
}

/// systemd's block device locking: udev leaves a disk alone whose whole device somebody locked.
Result<void> FileDevice::lock_whole_disk(Nanoseconds busy_wait) {
  const dev_t disk = whole_disk_of(device_number_);
  const std::string path = "/dev/block/" + std::to_string(major(disk)) + ":" + std::to_string(minor(disk));
  disk_fd_.reset(::open(disk == device_number_ ? info_.uri.c_str() : path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!disk_fd_.valid()) return {};  // no udev that would make the link, so nobody to be kept off
  const auto mode = disk == device_number_ ? LOCK_EX : LOCK_SH;  // two partitions of one disk may be targets
  if (retry_while_busy(busy_wait, [&] { return ::flock(disk_fd_.get(), mode | LOCK_NB); }) != 0) {
    Error failure = error(errno, "lock");
    failure.hint = "another program holds the disk's lock; wait for it or end it";
    return fail(failure);
  }
  return {};
}

Result<void> FileDevice::open_file(const FileDeviceOptions& options) {
  const bool target = options.role == DeviceRole::target;
  const int access = (target ? O_RDWR : O_RDONLY) | O_CLOEXEC;
  bool created = false;
  buffered_fd_.reset(::open(info_.uri.c_str(), access));
  if (!buffered_fd_.valid() && errno == ENOENT && target && options.create) {
    buffered_fd_.reset(::open(info_.uri.c_str(), access | O_CREAT | O_EXCL, 0600));
    created = buffered_fd_.valid();
  }
  if (!buffered_fd_.valid()) return fail(error(errno, target ? "open for writing" : "open"));
  if (!options.shared) {
    const int mode = target ? LOCK_EX : LOCK_SH;
    if (retry_while_busy(options.busy_wait, [&] { return ::flock(buffered_fd_.get(), mode | LOCK_NB); }) !=
        0) {
      Error failure = error(errno, "lock");
      failure.hint = "another program has locked it; end that one and try again";
      return fail(failure);
    }
  }
  const std::string again = "/proc/self/fd/" + std::to_string(buffered_fd_.get());
  fd_.reset(::open(again.c_str(), access | O_DIRECT));
  const bool direct = fd_.valid();
  if (!direct) fd_.reset(::open(again.c_str(), access));
  if (!fd_.valid()) return fail(error(errno, "open"));
  info_.logical_block_bytes = direct ? direct_alignment(fd_.get()) : 512;
  if (target) {
    if (auto done = size_file(options, created); !done) return done;
  } else if (!options.shared) {
    ::fdatasync(buffered_fd_.get());
  }
  struct stat status {};
  if (::fstat(fd_.get(), &status) != 0) return fail(error(errno, "examine"));
  info_.bytes = std::uint64_t(status.st_size);
  info_.identity = "file:" + std::to_string(status.st_dev) + ":" + std::to_string(status.st_ino);
  info_.zero_run_bytes_min = file_zero_run_bytes_min;
  return {};
}

Result<void> FileDevice::size_file(const FileDeviceOptions& options, bool created) {
  struct stat status {};
  if (::fstat(buffered_fd_.get(), &status) != 0) return fail(error(errno, "examine"));
  const auto bytes = std::uint64_t(status.st_size);
  if ((bytes == 0 || options.resize) && bytes != options.file_bytes) {
    if (::ftruncate(buffered_fd_.get(), off_t(options.file_bytes)) != 0)
      return fail(error(errno, "set the size of"));
  }
  // fdatasync covers the size from now on, but neither a new file's inode nor its name.
  if (!created) return {};
  if (::fsync(buffered_fd_.get()) != 0) return fail(error(errno, "sync"));
  const auto slash = info_.uri.rfind('/');
  const std::string directory = slash == 0 || slash == std::string::npos ? "/" : info_.uri.substr(0, slash);
  const FileDescriptor parent(::open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!parent.valid() || ::fsync(parent.get()) != 0) return fail(error_from_errno(errno, "sync", directory));
  return {};
}

Result<void> FileDevice::add_slots() {
  auto slot = queue_.add_file(fd_.get());
  if (!slot) return fail(slot.error());
  slot_ = *slot;
  if (info_.kind == DeviceKind::block) return {};
  slot = queue_.add_file(buffered_fd_.get());
  if (!slot) return fail(slot.error());
  buffered_slot_ = *slot;
  return {};
}

void FileDevice::submit(IoRequest& request) {
  request.device = this;
  std::uint64_t bytes = request.bytes;
  unsigned slot = slot_;
  const bool unaligned = request.operation != IoOperation::flush && bytes % info_.logical_block_bytes != 0;
  if (unaligned && info_.kind == DeviceKind::file) {
    slot = buffered_slot_;
  } else if (unaligned && request.operation == IoOperation::zero) {
    request.submitted_at_ns = system_clock().now().count();
    return queue_.post(request, -EOPNOTSUPP);  // it would zero beyond what was asked for
  } else if (unaligned) {
    bytes = round_up(bytes, info_.logical_block_bytes);
    if (request.operation == IoOperation::write)
      std::memset(request.data + request.bytes, 0, bytes - request.bytes);
  }
  queue_.submit_file(slot, request, bytes);
}

Result<DeviceRegion> FileDevice::region_at(std::uint64_t offset) {
  if (info_.kind == DeviceKind::block) return DeviceRegion{false, info_.bytes};
  const off_t data = ::lseek(buffered_fd_.get(), off_t(offset), SEEK_DATA);
  if (data < 0 && errno == ENXIO) return DeviceRegion{true, info_.bytes};
  if (data < 0) return DeviceRegion{false, info_.bytes};  // a filesystem that does not tell: all is data
  if (std::uint64_t(data) > offset) return DeviceRegion{true, std::min(std::uint64_t(data), info_.bytes)};
  const off_t hole = ::lseek(buffered_fd_.get(), data, SEEK_HOLE);
  if (hole < 0) return DeviceRegion{false, info_.bytes};
  return DeviceRegion{false, std::min(std::uint64_t(hole), info_.bytes)};
}

std::optional<std::string> FileDevice::change_stamp() {
  if (info_.kind == DeviceKind::block) return block_change_stamp(device_number_);
  struct stat status {};
  if (::fstat(fd_.get(), &status) != 0) return std::nullopt;
  return info_.identity + ":" + std::to_string(status.st_size) + ":" + std::to_string(status.st_ctim.tv_sec) +
         "." + std::to_string(status.st_ctim.tv_nsec);
}

Result<DeviceInfo> info_of_path(const std::string& path, bool may_be_missing) {
  DeviceInfo info;
  info.uri = path;
  struct stat status {};
  if (::stat(path.c_str(), &status) != 0) {
    if (errno == ENOENT && may_be_missing) return info;
    return fail(error_from_errno(errno, "open", path));
  }
  if (S_ISBLK(status.st_mode)) {
    info.kind = DeviceKind::block;
  } else if (!S_ISREG(status.st_mode)) {
    return fail(
        make_error(ErrorCode::invalid_argument, "open", path, "neither a block device nor a regular file"));
  }
  return info;
}

}  // namespace

Result<std::unique_ptr<Device>> open_file_device(FileQueue& queue, const std::string& path,
                                                 const FileDeviceOptions& options) {
  auto info = info_of_path(path, options.role == DeviceRole::target && options.create);
  if (!info) return fail(info.error());
  auto device = std::make_unique<FileDevice>(queue, std::move(*info));
  if (auto done = device->open(options); !done) return fail(done.error());
  return device;
}

Result<DeviceInfo> probe_file_device(const std::string& path) {
  auto info = info_of_path(path, false);
  if (!info) return info;
  struct stat status {};
  if (::stat(path.c_str(), &status) != 0) return fail(error_from_errno(errno, "examine", path));
  info->bytes = std::uint64_t(status.st_size);
  info->identity = "file:" + std::to_string(status.st_dev) + ":" + std::to_string(status.st_ino);
  if (info->kind == DeviceKind::file) return info;
  const FileDescriptor fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  int sector = 0;
  if (!fd.valid() || ::ioctl(fd.get(), BLKGETSIZE64, &info->bytes) != 0 ||
      ::ioctl(fd.get(), BLKSSZGET, &sector) != 0) {
    return fail(error_from_errno(errno, "examine", path));
  }
  info->logical_block_bytes = std::uint32_t(sector);
  info->identity = block_identity(status.st_rdev, path);
  return info;
}

}  // namespace blockferry
