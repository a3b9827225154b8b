// SPDX-License-Identifier: Apache-2.0
#include "blockio/file_device.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <map>
#include <mutex>

#include <fcntl.h>
#include <linux/fs.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
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
  ~FileDevice() override;

  Result<void> open(const FileDeviceOptions& options);

  const DeviceInfo& info() const override { return info_; }
  void submit(IoRequest& request) override;
  Result<DeviceRegion> region_at(std::uint64_t offset) override;
  std::optional<std::string> change_stamp() override;

 private:
  Result<void> open_block(const FileDeviceOptions& options);
  Result<void> take_identity(const std::string& stands_for);
  Result<void> open_file(const FileDeviceOptions& options);
  Result<void> lock_whole_disk(Nanoseconds busy_wait);
  Result<void> lock_file(const FileDeviceOptions& options);
  Result<void> open_direct(int access);
  Result<void> size_file(const FileDeviceOptions& options, bool created);
  Result<void> add_slots();
  Result<DeviceRegion> hole_to_the_end() const;
  bool is_hole(ByteRange range);
  void note_written(ByteRange range);
  Error error(int errno_value, const char* operation) const {
    return error_from_errno(errno_value, operation, info_.uri);
  }

  FileQueue& queue_;
  DeviceInfo info_;
  FileDescriptor fd_;                          ///< O_DIRECT where that is to be had
  FileDescriptor buffered_fd_;                 ///< files: for the unaligned tail
  std::shared_ptr<FileDescriptor> disk_lock_;  ///< targets: the whole disk's
  dev_t device_number_ = 0;
  bool stands_for_another_ = false;
  std::optional<unsigned> slot_, buffered_slot_;
  std::uint64_t written_end_ = 0;  ///< nothing was written beyond it
  ByteRange known_hole_{0, 0};     ///< of a file: seen to be a hole, and not written to before or since
};

FileDevice::~FileDevice() {
  for (const auto& slot : {slot_, buffered_slot_}) {
    if (slot) queue_.remove_file(*slot);
  }
}

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

/// Makes a new file's name durable.
Result<void> sync_directory_of(const std::string& path) {
  const auto slash = path.rfind('/');
  const std::string directory =
      slash == std::string::npos ? "." : path.substr(0, std::max<std::size_t>(slash, 1));
  const FileDescriptor parent(::open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!parent.valid()) return fail(error_from_errno(errno, "sync", directory));
  // EINVAL: a filesystem without durable names.
  if (::fsync(parent.get()) != 0 && errno != EINVAL) return fail(error_from_errno(errno, "sync", directory));
  return {};
}

/// The kernel's direct-I/O alignment for a file; a page where it does not say.
std::uint32_t direct_alignment(int fd) {
#ifdef STATX_DIOALIGN
  struct statx status {};
  if (::statx(fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &status) == 0 && status.stx_dio_offset_align > 0) {
    return std::max<std::uint32_t>(status.stx_dio_offset_align, 512);
  }
#else
  static_cast<void>(fd);
#endif
  return page_bytes;
}

Result<void> read_geometry(int fd, DeviceInfo& info) {
  std::uint64_t bytes = 0;
  int sector = 0;
  if (::ioctl(fd, BLKGETSIZE64, &bytes) != 0 || ::ioctl(fd, BLKSSZGET, &sector) != 0 || sector <= 0) {
    return fail(error_from_errno(errno, "examine", info.uri));
  }
  if (std::uint64_t(sector) > page_bytes) {
    return fail(make_error(ErrorCode::invalid_argument, "open", info.uri,
                           "its sectors of " + format_size(std::uint64_t(sector)) +
                               " are too large; at most 4 KiB can be copied"));
  }
  info.logical_block_bytes = std::uint32_t(sector);
  // The kernel gives nobody the part of a sector that a 4Kn loop device over an odd file ends in.
  info.bytes = bytes / std::uint64_t(sector) * std::uint64_t(sector);
  return {};
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
  if (auto done = read_geometry(fd_.get(), info_); !done) return done;
  if (auto done = take_identity(options.stands_for); !done) return done;
  if (target) return lock_whole_disk(options.busy_wait);
  // What somebody wrote through the page cache goes out now, not when we read it: it would look like a later
  // write.
  if (!options.shared) ::fdatasync(fd_.get());
  return {};
}

Result<void> FileDevice::take_identity(const std::string& stands_for) {
  info_.identity = block_identity(device_number_, info_.uri);
  if (stands_for.empty()) return {};
  struct stat status {};
  if (::stat(stands_for.c_str(), &status) != 0) return fail(error_from_errno(errno, "look at", stands_for));
  info_.uri = stands_for;
  stands_for_another_ = true;
  info_.identity = block_identity(status.st_rdev, stands_for);
  return {};
}

/// The lock of a whole disk. Two partitions of one disk may be targets of one process: they share it, since a
/// BSD lock belongs to one open file, and a shared lock would not keep udev off.
Result<std::shared_ptr<FileDescriptor>> lock_of_disk(dev_t disk, const std::string& path,
                                                     Nanoseconds busy_wait) {
  static std::mutex mutex;
  static std::map<dev_t, std::weak_ptr<FileDescriptor>> locks;
  const auto attempt = [&]() -> std::shared_ptr<FileDescriptor> {
    const std::lock_guard guard(mutex);
    std::erase_if(locks, [](const auto& entry) { return entry.second.expired(); });
    if (const auto held = locks.find(disk); held != locks.end()) {
      if (auto lock = held->second.lock()) return lock;
    }
    auto lock = std::make_shared<FileDescriptor>(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
    // Without such a node there is no udev either: nobody to be kept off.
    if (lock->valid() && ::flock(lock->get(), LOCK_EX | LOCK_NB) != 0) return nullptr;
    locks[disk] = lock;
    return lock;
  };
  std::shared_ptr<FileDescriptor> lock;
  if (retry_while_busy(busy_wait, [&] { return (lock = attempt()) ? 0 : -1; }) == 0) return lock;
  Error failure = error_from_errno(errno, "lock", path);
  failure.hint = "another program holds the disk's lock; wait for it or end it";
  return fail(failure);
}

/// systemd's block device locking: udev leaves a disk alone whose whole device somebody locked.
Result<void> FileDevice::lock_whole_disk(Nanoseconds busy_wait) {
  const dev_t disk = whole_disk_of(device_number_);
  const bool named = disk == device_number_ && !stands_for_another_;
  auto lock = lock_of_disk(disk, named ? info_.uri : device_node(disk), busy_wait);
  if (!lock) return fail(lock.error());
  disk_lock_ = std::move(*lock);
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
  auto done = lock_file(options);
  if (done) done = open_direct(access);
  if (done && target) done = size_file(options, created);
  if (!done) {
    if (created) ::unlink(info_.uri.c_str());
    return done;
  }
  // What a program wrote before us goes out now: its copying out would look like a later write.
  if (!target && !options.shared) ::fdatasync(buffered_fd_.get());
  struct stat status {};
  if (::fstat(fd_.get(), &status) != 0) return fail(error(errno, "examine"));
  info_.bytes = std::uint64_t(status.st_size);
  info_.identity = file_identity(status);
  info_.zero_run_bytes_min = file_zero_run_bytes_min;
  return {};
}

Result<void> FileDevice::lock_file(const FileDeviceOptions& options) {
  if (options.shared) return {};
  const int mode = (options.role == DeviceRole::target ? LOCK_EX : LOCK_SH) | LOCK_NB;
  if (retry_while_busy(options.busy_wait, [&] { return ::flock(buffered_fd_.get(), mode); }) == 0) return {};
  Error failure = error(errno, "lock");
  failure.hint = "another program has locked it; end that one and try again";
  return fail(failure);
}

/// Opened through the first descriptor, so that it is the same file whatever happens to its name.
Result<void> FileDevice::open_direct(int access) {
  const std::string again = "/proc/self/fd/" + std::to_string(buffered_fd_.get());
  fd_.reset(::open(again.c_str(), access | O_DIRECT));
  info_.logical_block_bytes = fd_.valid() ? direct_alignment(fd_.get()) : 512;
  if (!fd_.valid() || info_.logical_block_bytes > page_bytes) {  // no request could be aligned to more
    fd_.reset(::open(again.c_str(), access));
    info_.logical_block_bytes = 512;
  }
  if (!fd_.valid()) return fail(error(errno, "open"));
  return {};
}

Result<void> FileDevice::size_file(const FileDeviceOptions& options, bool created) {
  struct stat status {};
  if (::fstat(buffered_fd_.get(), &status) != 0) return fail(error(errno, "examine"));
  const auto bytes = std::uint64_t(status.st_size);
  const bool resized = (bytes == 0 || options.resize) && bytes != options.file_bytes;
  if (resized && ::ftruncate(buffered_fd_.get(), off_t(options.file_bytes)) != 0) {
    return fail(error(errno, "set the size of"));
  }
  // Later flushes cover the data, but neither a new file's inode nor its name.
  if ((created || resized) && ::fsync(buffered_fd_.get()) != 0) return fail(error(errno, "sync"));
  return created ? sync_directory_of(info_.uri) : Result<void>();
}

Result<void> FileDevice::add_slots() {
  auto slot = queue_.add_file(fd_.get());
  if (!slot) return fail(slot.error());
  slot_ = *slot;
  if (!buffered_fd_.valid()) return {};
  slot = queue_.add_file(buffered_fd_.get());
  if (!slot) return fail(slot.error());
  buffered_slot_ = *slot;
  return {};
}

void FileDevice::submit(IoRequest& request) {
  request.device = this;
  std::uint64_t bytes = request.bytes;
  unsigned slot = *slot_;
  if (request.operation == IoOperation::zero && is_hole({request.offset, request.bytes})) {
    request.submitted_at_ns = system_clock().now().count();
    return queue_.post(request, 0);
  }
  if (request.operation == IoOperation::write) note_written({request.offset, request.bytes});
  const bool unaligned = request.operation != IoOperation::flush && bytes % info_.logical_block_bytes != 0;
  if (unaligned && info_.kind == DeviceKind::file) {
    slot = *buffered_slot_;
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

/// It reads as zeroes already: a look is cheaper than a request, which goes through a thread of the kernel.
bool FileDevice::is_hole(ByteRange range) {
  if (info_.kind != DeviceKind::file) return false;
  if (range.offset >= known_hole_.offset && range.end() <= known_hole_.end()) return true;
  off_t data = ::lseek(buffered_fd_.get(), off_t(range.offset), SEEK_DATA);
  struct stat status {};
  if (data < 0 && (errno != ENXIO || ::fstat(buffered_fd_.get(), &status) != 0)) return false;
  if (data < 0) data = status.st_size;
  if (std::uint64_t(data) < range.end()) return false;
  // Not remembered where a write may be on its way that this look did not see.
  if (range.offset >= written_end_) known_hole_ = {range.offset, std::uint64_t(data) - range.offset};
  return true;
}

/// What is left of the known hole: the larger side.
void FileDevice::note_written(ByteRange range) {
  written_end_ = std::max(written_end_, range.end());
  const std::uint64_t begin = known_hole_.offset, end = known_hole_.end();
  if (range.offset >= end || range.end() <= begin) return;
  const std::uint64_t before = range.offset > begin ? range.offset - begin : 0;
  const std::uint64_t after = end > range.end() ? end - range.end() : 0;
  known_hole_ = before > after ? ByteRange{begin, before} : ByteRange{end - after, after};
}

Result<DeviceRegion> FileDevice::region_at(std::uint64_t offset) {
  if (info_.kind == DeviceKind::block) return DeviceRegion{false, info_.bytes};
  const off_t data = ::lseek(buffered_fd_.get(), off_t(offset), SEEK_DATA);
  if (data < 0 && errno == ENXIO) return hole_to_the_end();
  if (data < 0) return DeviceRegion{false, info_.bytes};  // a filesystem that does not tell: all is data
  if (std::uint64_t(data) > offset) return DeviceRegion{true, std::min(std::uint64_t(data), info_.bytes)};
  const off_t hole = ::lseek(buffered_fd_.get(), data, SEEK_HOLE);
  if (hole < 0) return DeviceRegion{false, info_.bytes};
  return DeviceRegion{false, std::min(std::uint64_t(hole), info_.bytes)};
}

/// A file that was cut short ends in what looks like a hole, and must not be copied as zeroes.
Result<DeviceRegion> FileDevice::hole_to_the_end() const {
  struct stat status {};
  if (::fstat(buffered_fd_.get(), &status) != 0) return fail(error(errno, "examine"));
  if (std::uint64_t(status.st_size) >= info_.bytes) return DeviceRegion{true, info_.bytes};
  Error failure = make_error(ErrorCode::device_gone, "read", info_.uri, "it has become shorter while in use");
  failure.offset = std::uint64_t(status.st_size);
  return fail(failure);
}

std::optional<std::string> FileDevice::change_stamp() {
  if (info_.kind == DeviceKind::block) return block_change_stamp(device_number_, fd_.get());
  return file_change_stamp("/proc/self/fd/" + std::to_string(fd_.get()));
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
  info->identity = file_identity(status);
  if (info->kind == DeviceKind::file) return info;
  const FileDescriptor fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (!fd.valid()) return fail(error_from_errno(errno, "open", path));
  if (auto done = read_geometry(fd.get(), *info); !done) return fail(done.error());
  info->identity = block_identity(status.st_rdev, path);
  return info;
}

}  // namespace blockferry
