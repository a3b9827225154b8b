// SPDX-License-Identifier: Apache-2.0
#include "tests/support/loop_device.h"

#include <cerrno>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>

#include <fcntl.h>
#include <linux/blkpg.h>
#include <linux/loop.h>
#include <sched.h>
#include <spawn.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/swap.h>
#include <sys/wait.h>
#include <unistd.h>

#include "blockio/base/file_descriptor.h"

namespace blockferry::test {

namespace {

int wait_for(pid_t process) {
  int status = 0;
  while (::waitpid(process, &status, 0) < 0) {
    if (errno != EINTR) return -1;
  }
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

/// Others look at every block device now and then (udev, blkid): what is busy for an instant is tried again.
template <typename Action>
bool until_not_busy(Action action) {
  for (int tries = 0; tries < 500; ++tries) {
    if (action()) return true;
    if (errno != EBUSY) return false;
    ::usleep(10'000);
  }
  return false;
}

}  // namespace

std::string volumes_missing() {
  if (::geteuid() != 0) return "loop devices and mounts need root";
  const ScratchDirectory scratch;
  if (!LoopDevice(scratch.file("probe", 1 << 20)).valid()) return "no loop device is to be had here";
  return "";
}

int run_program(const std::vector<std::string>& words) {
  std::vector<char*> arguments;
  arguments.reserve(words.size() + 1);
  for (const auto& word : words) arguments.push_back(const_cast<char*>(word.c_str()));
  arguments.push_back(nullptr);
  posix_spawn_file_actions_t actions;
  ::posix_spawn_file_actions_init(&actions);
  for (const int fd : {STDOUT_FILENO, STDERR_FILENO})
    ::posix_spawn_file_actions_addopen(&actions, fd, "/dev/null", O_WRONLY, 0);
  pid_t process = -1;
  // mkfs and its like are in /sbin, which not everybody's PATH has.
  std::string path = std::string("PATH=/usr/sbin:/usr/bin:/sbin:/bin");
  char* environment[] = {path.data(), nullptr};
  int error = ENOENT;
  for (const char* directory : {"/usr/sbin/", "/usr/bin/", "/sbin/", "/bin/"}) {
    if (error != ENOENT) break;
    error = ::posix_spawn(&process, (directory + words[0]).c_str(), &actions, nullptr, arguments.data(),
                          environment);
  }
  ::posix_spawn_file_actions_destroy(&actions);
  return error == 0 ? wait_for(process) : 127;
}

// Files.

ScratchDirectory::ScratchDirectory() : path_("/dev/shm/blockferry-unit-XXXXXX") {
  if (::mkdtemp(path_.data()) == nullptr) path_.clear();
}

ScratchDirectory::~ScratchDirectory() {
  std::error_code ignored;
  if (!path_.empty()) std::filesystem::remove_all(path_, ignored);
}

std::string ScratchDirectory::file(const std::string& name, std::uint64_t bytes,
                                   const std::string& content) const {
  const std::string made = path(name);
  std::ofstream(made, std::ios::binary) << content;
  std::filesystem::resize_file(made, bytes);
  return made;
}

std::string ScratchDirectory::directory(const std::string& name) const {
  std::filesystem::create_directory(path(name));
  return path(name);
}

// Loop devices.

LoopDevice::LoopDevice(const std::string& backing, const LoopOptions& options) {
  const FileDescriptor control(::open("/dev/loop-control", O_RDWR | O_CLOEXEC));
  const FileDescriptor file(::open(backing.c_str(), (options.read_only ? O_RDONLY : O_RDWR) | O_CLOEXEC));
  if (!control.valid() || !file.valid()) return;
  loop_config config{};
  config.fd = std::uint32_t(file.get());
  config.block_size = options.sector_bytes;
  config.info.lo_offset = options.offset;
  config.info.lo_sizelimit = options.bytes;
  config.info.lo_flags = options.read_only ? LO_FLAGS_READ_ONLY : 0;
  // Somebody else may take the free device between the two calls.
  attached_ = until_not_busy([&] {
    const int number = ::ioctl(control.get(), LOOP_CTL_GET_FREE);
    if (number < 0) return false;
    path_ = "/dev/loop" + std::to_string(number);
    const FileDescriptor loop(::open(path_.c_str(), O_RDWR | O_CLOEXEC));
    return loop.valid() && ::ioctl(loop.get(), LOOP_CONFIGURE, &config) == 0;
  });
}

LoopDevice::~LoopDevice() {
  if (!attached_) return;
  const FileDescriptor loop(::open(path_.c_str(), O_RDONLY | O_CLOEXEC));
  for (const int number : partitions_) {
    blkpg_partition partition{};
    partition.pno = number;
    blkpg_ioctl_arg argument{BLKPG_DEL_PARTITION, 0, sizeof partition, &partition};
    until_not_busy([&] { return ::ioctl(loop.get(), BLKPG, &argument) == 0; });
  }
  ::ioctl(loop.get(), LOOP_CLR_FD);
}

std::string LoopDevice::add_partition(int number, std::uint64_t offset, std::uint64_t bytes) {
  const FileDescriptor loop(::open(path_.c_str(), O_RDONLY | O_CLOEXEC));
  blkpg_partition partition{};
  partition.start = static_cast<long long>(offset);
  partition.length = static_cast<long long>(bytes);
  partition.pno = number;
  blkpg_ioctl_arg argument{BLKPG_ADD_PARTITION, 0, sizeof partition, &partition};
  if (::ioctl(loop.get(), BLKPG, &argument) != 0) return "";
  partitions_.push_back(number);
  const std::string node = path_ + "p" + std::to_string(number);
  return ::access(node.c_str(), F_OK) == 0 ? node : "";
}

// Use.

MountedVolume::MountedVolume(const std::string& device, const std::string& point, const char* type)
    : point_(point) {
  mounted_ = ::mount(device.c_str(), point.c_str(), type, 0, nullptr) == 0;
}

MountedVolume::~MountedVolume() {
  if (mounted_ && !until_not_busy([&] { return ::umount2(point_.c_str(), 0) == 0; }))
    ::umount2(point_.c_str(), MNT_DETACH);
}

SwapArea::SwapArea(const std::string& path) : path_(path) {
  on_ = ::swapon(path.c_str(), 0) == 0;
}

SwapArea::~SwapArea() {
  if (on_) ::swapoff(path_.c_str());
}

HelperProcess::HelperProcess(const std::function<bool()>& prepare) {
  int ends[2];
  if (::pipe2(ends, O_CLOEXEC) != 0) return;
  FileDescriptor reading(ends[0]), writing(ends[1]);
  pid_ = ::fork();
  if (pid_ == 0) {
    reading.reset();
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    const char answer = prepare() ? 1 : 0;
    if (::write(writing.get(), &answer, 1) != 1) ::_exit(1);
    for (;;) ::pause();
  }
  writing.reset();
  char answer = 0;
  ready_ = pid_ > 0 && ::read(reading.get(), &answer, 1) == 1 && answer == 1;
}

HelperProcess::~HelperProcess() {
  if (pid_ <= 0) return;
  ::kill(pid_, SIGKILL);
  wait_for(pid_);
}

std::unique_ptr<HelperProcess> open_elsewhere(const std::string& path, int flags) {
  return std::make_unique<HelperProcess>([=] { return ::open(path.c_str(), flags | O_CLOEXEC) >= 0; });
}

std::unique_ptr<HelperProcess> mounted_elsewhere(const std::string& device, const std::string& point) {
  return std::make_unique<HelperProcess>([=] {
    return ::unshare(CLONE_NEWNS) == 0 && ::mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) == 0 &&
           ::mount(device.c_str(), point.c_str(), "ext4", 0, nullptr) == 0;
  });
}

}  // namespace blockferry::test
