// SPDX-License-Identifier: Apache-2.0
#include "bitmap/storage.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <set>

#include <dirent.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <sys/stat.h>
#include <unistd.h>

#include "blockio/base/file_descriptor.h"

namespace blockferry {

namespace {

class RealStateFile : public StateFile {
 public:
  RealStateFile(FileDescriptor fd, std::string path) : fd_(std::move(fd)), path_(std::move(path)) {}

  Result<std::uint64_t> size() override {
    struct stat status {};
    if (::fstat(fd_.get(), &status) != 0) return fail(error("examine"));
    return std::uint64_t(status.st_size);
  }

  Result<void> resize(std::uint64_t bytes) override {
    if (::ftruncate(fd_.get(), off_t(bytes)) != 0) return fail(error("resize"));
    return {};
  }

  Result<void> read(std::uint64_t offset, std::span<std::byte> buffer) override {
    while (!buffer.empty()) {
      const ssize_t count = ::pread(fd_.get(), buffer.data(), buffer.size(), off_t(offset));
      if (count < 0 && errno == EINTR) continue;
      if (count < 0) return fail(error("read"));
      if (count == 0) {
        std::fill(buffer.begin(), buffer.end(), std::byte(0));
        return {};
      }
      offset += std::uint64_t(count);
      buffer = buffer.subspan(std::size_t(count));
    }
    return {};
  }

  Result<void> write(std::uint64_t offset, std::span<const std::byte> data) override {
    while (!data.empty()) {
      const ssize_t count = ::pwrite(fd_.get(), data.data(), data.size(), off_t(offset));
      if (count < 0 && errno == EINTR) continue;
      if (count <= 0) return fail(error("write", count < 0 ? errno : EIO));
      offset += std::uint64_t(count);
      data = data.subspan(std::size_t(count));
    }
    return {};
  }

  Result<void> sync() override {
    if (::fdatasync(fd_.get()) != 0) return fail(error("sync"));
    return {};
  }

  Result<std::uint64_t> next_data(std::uint64_t offset) override {
    const off_t data = ::lseek(fd_.get(), off_t(offset), SEEK_DATA);
    if (data >= 0) return std::uint64_t(data);
    if (errno == ENXIO) return size();
    return offset;  // a filesystem that does not tell: anything may be there
  }

  Result<void> punch(std::uint64_t offset, std::uint64_t bytes) override {
    if (bytes == 0) return {};
    while (::fallocate(fd_.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, off_t(offset), off_t(bytes)) !=
           0) {
      if (errno == EOPNOTSUPP) return write_zeroes(offset, bytes);
      if (errno != EINTR) return fail(error("punch"));
    }
    return {};
  }

 private:
  /// For filesystems that cannot punch. What lies beyond the end reads as zeroes by itself.
  Result<void> write_zeroes(std::uint64_t offset, std::uint64_t bytes) {
    const auto length = size();
    if (!length) return fail(length.error());
    const std::uint64_t end = std::min(offset + bytes, *length);
    const std::vector<std::byte> zeroes(65536);
    while (offset < end) {
      const auto piece = std::min<std::uint64_t>(zeroes.size(), end - offset);
      if (auto written = write(offset, std::span(zeroes).first(piece)); !written) return written;
      offset += piece;
    }
    return {};
  }

  Error error(const char* operation, int errno_value = errno) const {
    Error failure = error_from_errno(errno_value, operation, path_);
    if (failure.code == ErrorCode::no_space)
      failure.hint = "the state directory's filesystem is full; make room";
    return failure;
  }

  const FileDescriptor fd_;
  const std::string path_;
};

class RealStateDirectory : public StateDirectory {
 public:
  RealStateDirectory(FileDescriptor fd, std::string path) : fd_(std::move(fd)), path_(std::move(path)) {}

  Result<std::unique_ptr<StateFile>> open(const std::string& name, bool create) override {
    const int flags = O_RDWR | O_CLOEXEC | (create ? O_CREAT : 0);
    FileDescriptor file(::openat(fd_.get(), name.c_str(), flags, 0600));
    if (!file.valid()) return fail(error("open", name));
    // Also where it was there already: whoever made it may have died before its name was durable.
    if (create) ++names_made_;
    return std::make_unique<RealStateFile>(std::move(file), path_ + "/" + name);
  }

  Result<void> replace(const std::string& name, std::span<const std::byte> content) override {
    const BeingReplaced turn(*this, name);
    const std::string temporary = name + ".new";
    auto done = write_new(temporary, content);
    if (done) done = sync_names();
    if (!done) {
      ::unlinkat(fd_.get(), temporary.c_str(), 0);  // on a full disk the room is needed
      return done;
    }
    if (::renameat(fd_.get(), temporary.c_str(), fd_.get(), name.c_str()) != 0)
      return fail(error("replace", name));
    if (::fsync(fd_.get()) != 0) return fail(error("sync", ""));
    return {};
  }

  Result<std::vector<std::byte>> read_all(const std::string& name, std::uint64_t bytes_max) override {
    auto file = open(name, false);
    if (!file) return fail(file.error());
    const auto size = (*file)->size();
    if (!size) return fail(size.error());
    if (*size > bytes_max)
      return fail(make_error(ErrorCode::state_damaged, "read", path_ + "/" + name, "it is too large"));
    std::vector<std::byte> content(*size);
    if (auto done = (*file)->read(0, content); !done) return fail(done.error());
    return content;
  }

  Result<void> remove(const std::string& name) override {
    if (::unlinkat(fd_.get(), name.c_str(), 0) != 0 && errno != ENOENT) return fail(error("remove", name));
    if (::fsync(fd_.get()) != 0) return fail(error("sync", ""));
    return {};
  }

  Result<std::vector<std::string>> list() override {
    const int copy = ::openat(fd_.get(), ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR* directory = copy >= 0 ? ::fdopendir(copy) : nullptr;
    if (directory == nullptr) {
      const Error failure = error("list", "");
      if (copy >= 0) ::close(copy);
      return fail(failure);
    }
    std::vector<std::string> names;
    errno = 0;  // readdir tells an error from the end by it alone
    while (const dirent* entry = ::readdir(directory)) {
      if (std::strcmp(entry->d_name, ".") != 0 && std::strcmp(entry->d_name, "..") != 0)
        names.emplace_back(entry->d_name);
    }
    const int errno_value = errno;
    ::closedir(directory);
    if (errno_value != 0) return fail(error_from_errno(errno_value, "list", path_));
    std::sort(names.begin(), names.end());
    return names;
  }

 private:
  /// Two replacements of one file would share its temporary one: the second waits.
  class BeingReplaced {
   public:
    BeingReplaced(RealStateDirectory& directory, std::string name)
        : directory_(directory), name_(std::move(name)) {
      std::unique_lock lock(directory_.mutex_);
      directory_.replaced_.wait(lock, [&] { return directory_.being_replaced_.insert(name_).second; });
    }
    ~BeingReplaced() {
      const std::lock_guard lock(directory_.mutex_);
      directory_.being_replaced_.erase(name_);
      directory_.replaced_.notify_all();
    }
    BeingReplaced(const BeingReplaced&) = delete;
    BeingReplaced& operator=(const BeingReplaced&) = delete;

   private:
    RealStateDirectory& directory_;
    const std::string name_;
  };

  Result<void> sync_names() {
    const std::uint64_t made = names_made_;
    if (names_synced_ >= made) return {};
    if (::fsync(fd_.get()) != 0) return fail(error("sync", ""));
    names_synced_ = made;  // two at once may set it back: that costs a sync, no more
    return {};
  }

  Result<void> write_new(const std::string& name, std::span<const std::byte> content) {
    FileDescriptor fd(::openat(fd_.get(), name.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600));
    if (!fd.valid()) return fail(error("create", name));
    RealStateFile file(std::move(fd), path_ + "/" + name);
    if (auto done = file.write(0, content); !done) return done;
    return file.sync();
  }

  Error error(const char* operation, const std::string& name) const {
    return error_from_errno(errno, operation, name.empty() ? path_ : path_ + "/" + name);
  }

  const FileDescriptor fd_;
  const std::string path_;
  std::atomic<std::uint64_t> names_made_ = 0, names_synced_ = 0;
  std::mutex mutex_;
  std::condition_variable replaced_;
  std::set<std::string> being_replaced_;
};

/// A directory that was just made must not vanish with what is put into it.
Result<void> sync_directory_of(const std::string& path) {
  const std::string parent = path + "/..";
  FileDescriptor fd(::open(parent.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!fd.valid() || ::fsync(fd.get()) != 0) return fail(error_from_errno(errno, "sync", parent));
  return {};
}

}  // namespace

Result<std::unique_ptr<StateDirectory>> open_state_directory(const std::string& path, bool create) {
  if (create) {
    if (::mkdir(path.c_str(), 0700) == 0) {
      if (auto done = sync_directory_of(path); !done) return fail(done.error());
    } else if (errno != EEXIST) {
      return fail(error_from_errno(errno, "create state directory", path));
    }
  }
  FileDescriptor fd(::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!fd.valid()) return fail(error_from_errno(errno, "open state directory", path));
  return std::make_unique<RealStateDirectory>(std::move(fd), path);
}

}  // namespace blockferry
