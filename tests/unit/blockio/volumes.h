// SPDX-License-Identifier: Apache-2.0
// Real volumes for tests: files in a scratch directory, loop devices over them. Everything is gone with the
// test.
#pragma once

#include <cerrno>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include <fcntl.h>
#include <gtest/gtest.h>
#include <linux/loop.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "blockio/base/file_descriptor.h"
#include "blockio/file_device.h"

namespace blockferry {

/// A scratch directory, and the files in it.
class Scratch {
 public:
  explicit Scratch(const std::string& directory) : path_(directory + "/blockferry-test-XXXXXX") {
    if (::mkdtemp(path_.data()) == nullptr) path_.clear();
  }
  ~Scratch() {
    for (const auto& file : files_) ::unlink(file.c_str());
    ::rmdir(path_.c_str());
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  bool valid() const { return !path_.empty(); }
  const std::string& path() const { return path_; }
  /// A name that will be removed; nothing is created.
  std::string file(const std::string& name) {
    files_.push_back(path_ + "/" + name);
    return files_.back();
  }
  std::string make_file(const std::string& name, std::uint64_t bytes) {
    const std::string path = file(name);
    const FileDescriptor fd(::open(path.c_str(), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600));
    EXPECT_EQ(::ftruncate(fd.get(), off_t(bytes)), 0);
    return path;
  }

 private:
  std::string path_;
  std::vector<std::string> files_;
};

/// A loop device over a file, detached at the end.
class Loop {
 public:
  Loop(const std::string& path, unsigned sector_bytes, std::uint32_t flags = 0) {
    const FileDescriptor control(::open("/dev/loop-control", O_RDWR | O_CLOEXEC));
    const FileDescriptor backing(::open(path.c_str(), O_RDWR | O_CLOEXEC));
    // Another test may take the free device between the two calls.
    for (int tries = 0; control.valid() && backing.valid() && tries < 50; ++tries) {
      const int number = ::ioctl(control.get(), LOOP_CTL_GET_FREE);
      if (number < 0) return;
      path_ = "/dev/loop" + std::to_string(number);
      const FileDescriptor loop(::open(path_.c_str(), O_RDWR | O_CLOEXEC));
      loop_config config{};
      config.fd = std::uint32_t(backing.get());
      config.block_size = sector_bytes;
      config.info.lo_flags = flags;
      if (loop.valid() && ::ioctl(loop.get(), LOOP_CONFIGURE, &config) == 0) {
        attached_ = true;
        return;
      }
    }
  }
  ~Loop() {
    if (!attached_) return;
    const FileDescriptor loop(::open(path_.c_str(), O_RDWR | O_CLOEXEC));
    if (loop.valid()) ::ioctl(loop.get(), LOOP_CLR_FD);
  }
  Loop(const Loop&) = delete;
  Loop& operator=(const Loop&) = delete;

  bool valid() const { return attached_; }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
  bool attached_ = false;
};

/// A queue with registered memory, and ways to put single requests through it.
class VolumeTest : public ::testing::Test {
 protected:
  void set_up_queue(IoEngine engine) {
    auto made = make_file_queue(engine, 8);
    if (!made) GTEST_SKIP() << made.error().message();
    queue_ = std::move(*made);
    memory_ = static_cast<std::byte*>(
        ::mmap(nullptr, memory_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    ASSERT_NE(memory_, MAP_FAILED);
    ASSERT_TRUE(queue_->register_memory({memory_, memory_bytes}));
    ASSERT_TRUE(scratch_.valid());
  }
  void TearDown() override {
    queue_.reset();
    if (memory_ != nullptr) ::munmap(memory_, memory_bytes);
  }

  /// Why there are no loop devices to test on; empty where there are.
  std::string loop_devices_missing() {
    if (::geteuid() != 0) return "loop devices need root";
    return Loop(scratch_.make_file("probe", 1 * MiB), 512).valid() ? "" : "no loop device is to be had";
  }

  /// One request, to its end; bounded.
  std::int64_t run(Device& device, IoOperation operation, std::uint64_t offset, std::uint64_t bytes,
                   std::byte* data = nullptr) {
    IoRequest request;
    request.operation = operation;
    request.offset = offset;
    request.bytes = bytes;
    request.data = data;
    device.submit(request);
    std::vector<IoRequest*> completed;
    for (int i = 0; i < 100 && completed.empty(); ++i)
      queue_->wait(std::chrono::milliseconds(100), completed);
    EXPECT_EQ(completed.size(), 1u);
    EXPECT_EQ(queue_->in_flight(), 0u);
    EXPECT_EQ(request.device, &device);
    EXPECT_GE(request.completed_at_ns, request.submitted_at_ns);
    return request.result;
  }

  Result<std::unique_ptr<Device>> try_open(const std::string& path, DeviceRole role) {
    FileDeviceOptions options;
    options.role = role;
    return open_file_device(*queue_, path, options);
  }
  std::unique_ptr<Device> open(const std::string& path, const FileDeviceOptions& options) {
    auto device = open_file_device(*queue_, path, options);
    EXPECT_TRUE(device) << device.error().message();
    return device ? std::move(*device) : nullptr;
  }
  std::unique_ptr<Device> open(const std::string& path, DeviceRole role, bool create = false,
                               std::uint64_t bytes = 0) {
    FileDeviceOptions options;
    options.role = role;
    options.create = create;
    options.file_bytes = bytes;
    return open(path, options);
  }

  static constexpr std::size_t memory_bytes = 4 * MiB;
  Scratch scratch_{"/var/tmp"};
  std::byte* memory_ = nullptr;
  std::unique_ptr<FileQueue> queue_;
};

inline const char* engine_test_name(IoEngine engine) {
  return engine == IoEngine::uring ? "uring" : "aio";
}

}  // namespace blockferry
