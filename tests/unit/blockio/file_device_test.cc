// SPDX-License-Identifier: Apache-2.0
// Real files and loop devices through both I/O engines.
#include "blockio/file_device.h"

#include <cerrno>
#include <cstring>

#include <fcntl.h>
#include <gtest/gtest.h>
#include <linux/loop.h>
#include <stdlib.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "blockio/base/file_descriptor.h"

namespace blockferry {
namespace {

/// A scratch directory that is gone with the test.
class Scratch {
 public:
  explicit Scratch(const char* pattern) : path_(pattern) {
    if (::mkdtemp(path_.data()) == nullptr) path_.clear();
  }
  ~Scratch() {
    for (const auto& file : files_) ::unlink(file.c_str());
    ::rmdir(path_.c_str());
  }
  std::string file(const std::string& name) {
    files_.push_back(path_ + "/" + name);
    return files_.back();
  }
  bool valid() const { return !path_.empty(); }

 private:
  std::string path_;
  std::vector<std::string> files_;
};

/// A loop device over a file, detached at the end.
class Loop {
 public:
  Loop(const std::string& path, unsigned sector_bytes) {
    const FileDescriptor control(::open("/dev/loop-control", O_RDWR | O_CLOEXEC));
    const FileDescriptor backing(::open(path.c_str(), O_RDWR | O_CLOEXEC));
    // Another test may take the free device between the two calls.
    for (int tries = 0; control.valid() && tries < 20; ++tries) {
      const int number = ::ioctl(control.get(), LOOP_CTL_GET_FREE);
      if (number < 0) return;
      path_ = "/dev/loop" + std::to_string(number);
      FileDescriptor loop(::open(path_.c_str(), O_RDWR | O_CLOEXEC));
      loop_config config{};
      config.fd = std::uint32_t(backing.get());
      config.block_size = sector_bytes;
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
  bool valid() const { return attached_; }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
  bool attached_ = false;
};

class FileDeviceTest : public ::testing::TestWithParam<IoEngine> {
 protected:
  void SetUp() override {
    auto made = make_file_queue(GetParam(), 8);
    if (!made) GTEST_SKIP() << made.error().message();
    queue_ = std::move(*made);
    memory_ = static_cast<std::byte*>(
        ::mmap(nullptr, memory_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    ASSERT_NE(memory_, MAP_FAILED);
    ASSERT_TRUE(queue_->register_memory({memory_, memory_bytes}));
    ASSERT_TRUE(scratch_.valid());
  }
  void TearDown() override {
    if (memory_ != nullptr) ::munmap(memory_, memory_bytes);
  }

  std::string make_file(const std::string& name, std::size_t bytes) {
    const std::string path = scratch_.file(name);
    const FileDescriptor fd(::open(path.c_str(), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600));
    EXPECT_EQ(::ftruncate(fd.get(), off_t(bytes)), 0);
    return path;
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
    return request.result;
  }

  std::unique_ptr<Device> open(const std::string& path, DeviceRole role, bool create = false,
                               std::uint64_t bytes = 0) {
    FileDeviceOptions options;
    options.role = role;
    options.create = create;
    options.file_bytes = bytes;
    auto device = open_file_device(*queue_, path, options);
    EXPECT_TRUE(device) << device.error().message();
    return device ? std::move(*device) : nullptr;
  }

  static constexpr std::size_t memory_bytes = 4 * MiB;
  Scratch scratch_{"/var/tmp/blockferry-test-XXXXXX"};
  std::byte* memory_ = nullptr;
  std::unique_ptr<FileQueue> queue_;
};

TEST_P(FileDeviceTest, WritesAndReadsBackWithAnUnalignedTail) {
  constexpr std::uint64_t bytes = 1 * MiB + 123;
  auto device = open(scratch_.file("new"), DeviceRole::target, true, bytes);
  ASSERT_NE(device, nullptr);
  EXPECT_EQ(device->info().bytes, bytes);
  for (std::size_t i = 0; i < bytes; ++i) memory_[i] = std::byte(i * 31 % 253);
  EXPECT_EQ(run(*device, IoOperation::write, 0, 1 * MiB, memory_), std::int64_t(1 * MiB));
  EXPECT_EQ(run(*device, IoOperation::write, 1 * MiB, 123, memory_ + 1 * MiB), 123);
  EXPECT_EQ(run(*device, IoOperation::flush, 0, 0), 0);
  std::byte* back = memory_ + 2 * MiB;
  EXPECT_EQ(run(*device, IoOperation::read, 0, 1 * MiB, back), std::int64_t(1 * MiB));
  EXPECT_EQ(run(*device, IoOperation::read, 1 * MiB, 123, back + 1 * MiB), 123);
  EXPECT_EQ(std::memcmp(memory_, back, bytes), 0);
}

TEST_P(FileDeviceTest, ZeroingMakesAHole) {
  auto device = open(scratch_.file("holes"), DeviceRole::target, true, 1 * MiB);
  ASSERT_NE(device, nullptr);
  std::memset(memory_, 7, 1 * MiB);
  ASSERT_EQ(run(*device, IoOperation::write, 0, 1 * MiB, memory_), std::int64_t(1 * MiB));
  ASSERT_EQ(run(*device, IoOperation::zero, 64 * KiB, 512 * KiB), 0);
  ASSERT_EQ(run(*device, IoOperation::flush, 0, 0), 0);
  auto region = device->region_at(0);
  ASSERT_TRUE(region);
  EXPECT_FALSE(region->hole);
  EXPECT_EQ(region->end, 64 * KiB);
  region = device->region_at(64 * KiB);
  ASSERT_TRUE(region);
  EXPECT_TRUE(region->hole);
  EXPECT_EQ(region->end, 576 * KiB);
  ASSERT_EQ(run(*device, IoOperation::read, 64 * KiB, 4 * KiB, memory_), std::int64_t(4 * KiB));
  EXPECT_EQ(memory_[0], std::byte(0));
}

TEST_P(FileDeviceTest, ManyMoreRequestsThanDepthAllComeBack) {
  auto device = open(scratch_.file("many"), DeviceRole::target, true, 1 * MiB);
  ASSERT_NE(device, nullptr);
  std::vector<IoRequest> requests(256);
  for (std::size_t i = 0; i < requests.size(); ++i) {
    requests[i].operation = IoOperation::write;
    requests[i].offset = i * 4096;
    requests[i].bytes = 4096;
    requests[i].data = memory_ + i * 4096;
    std::memset(requests[i].data, int(i), 4096);
    device->submit(requests[i]);
  }
  IoRequest posted;
  queue_->post(posted, -EIO);
  std::vector<IoRequest*> completed;
  for (int i = 0; i < 2000 && queue_->in_flight() > 0; ++i)
    queue_->wait(std::chrono::milliseconds(10), completed);
  EXPECT_EQ(completed.size(), 257u);
  EXPECT_EQ(posted.result, -EIO);
  for (const auto& request : requests) EXPECT_EQ(request.result, 4096);
  std::byte* back = memory_ + 2 * MiB;
  ASSERT_EQ(run(*device, IoOperation::read, 0, 1 * MiB, back), std::int64_t(1 * MiB));
  EXPECT_EQ(std::memcmp(back, memory_, 1 * MiB), 0);
}

TEST_P(FileDeviceTest, ReadingBeyondTheEndIsShort) {
  auto device = open(make_file("short", 10000), DeviceRole::source);
  ASSERT_NE(device, nullptr);
  EXPECT_EQ(run(*device, IoOperation::read, 8192, 4096, memory_), 10000 - 8192);
}

TEST_P(FileDeviceTest, ATargetFileIsLockedAndReleased) {
  const std::string path = make_file("locked", 8192);
  {
    auto first = open(path, DeviceRole::target);
    ASSERT_NE(first, nullptr);
    auto queue = make_file_queue(GetParam(), 4);
    ASSERT_TRUE(queue);
    FileDeviceOptions options;
    options.role = DeviceRole::source;
    const auto second = open_file_device(**queue, path, options);
    ASSERT_FALSE(second);
    EXPECT_EQ(second.error().code, ErrorCode::busy);
  }
  queue_.reset();  // registered files hold the lock as long as the queue lives
  auto again = make_file_queue(GetParam(), 4);
  ASSERT_TRUE(again);
  FileDeviceOptions options;
  options.role = DeviceRole::target;
  options.busy_wait = std::chrono::seconds(5);
  EXPECT_TRUE(open_file_device(**again, path, options));
}

TEST_P(FileDeviceTest, TheChangeStampTellsOfWrites) {
  const std::string path = make_file("stamp", 8192);
  auto device = open(path, DeviceRole::source);
  ASSERT_NE(device, nullptr);
  const auto before = device->change_stamp();
  ASSERT_TRUE(before);
  EXPECT_EQ(device->change_stamp(), before);
  const FileDescriptor writer(::open(path.c_str(), O_WRONLY | O_CLOEXEC));
  // File times move with the kernel's tick: written until it has moved, for a bounded while.
  bool moved = false;
  for (int i = 0; i < 1000 && !moved; ++i) {
    ASSERT_EQ(::pwrite(writer.get(), "x", 1, 5), 1);
    moved = device->change_stamp() != before;
    if (!moved) system_clock().sleep_for(std::chrono::milliseconds(1));
  }
  EXPECT_TRUE(moved);
}

TEST_P(FileDeviceTest, WhatIsNoVolumeIsRefused) {
  FileDeviceOptions options;
  for (const char* path : {"/dev/null", "/var/tmp"}) {
    const auto device = open_file_device(*queue_, path, options);
    ASSERT_FALSE(device) << path;
    EXPECT_EQ(device.error().code, ErrorCode::invalid_argument) << path;
  }
  const auto missing = open_file_device(*queue_, "/var/tmp/no-such-volume", options);
  ASSERT_FALSE(missing);
  EXPECT_EQ(missing.error().code, ErrorCode::not_found);
}

TEST_P(FileDeviceTest, BlockDevicesOfBothSectorSizes) {
  if (::geteuid() != 0) GTEST_SKIP() << "loop devices need root";
  for (const unsigned sector : {512U, 4096U}) {
    const Loop loop(make_file("backing" + std::to_string(sector), 2 * MiB), sector);
    if (!loop.valid()) GTEST_SKIP() << "no loop device is to be had";
    {
      auto device = open(loop.path(), DeviceRole::target);
      ASSERT_NE(device, nullptr);
      EXPECT_EQ(device->info().bytes, 2 * MiB);
      EXPECT_EQ(device->info().logical_block_bytes, sector);
      EXPECT_TRUE(device->change_stamp());
      std::memset(memory_, 0x5A, 1 * MiB);
      ASSERT_EQ(run(*device, IoOperation::write, 0, 1 * MiB, memory_), std::int64_t(1 * MiB));
      ASSERT_EQ(run(*device, IoOperation::flush, 0, 0), 0);
      // An unaligned end: written up to the sector's end with zeroes, and counted as asked for.
      std::memset(memory_, 0x77, 8192);
      ASSERT_EQ(run(*device, IoOperation::write, 4096, 100, memory_), 100);
      ASSERT_EQ(run(*device, IoOperation::read, 4096, 4096, memory_ + 2 * MiB), 4096);
      EXPECT_EQ(memory_[2 * MiB + 99], std::byte(0x77));
      EXPECT_EQ(memory_[2 * MiB + 100], std::byte(0));
      EXPECT_EQ(memory_[2 * MiB + sector - 1], std::byte(0));
      if (sector == 512) {
        EXPECT_EQ(memory_[2 * MiB + sector], std::byte(0x5A));
      }
      EXPECT_EQ(run(*device, IoOperation::zero, 0, 100), -EOPNOTSUPP)
          << "an unaligned zero would reach too far";
      ASSERT_EQ(run(*device, IoOperation::zero, 64 * KiB, 128 * KiB), 0);
      ASSERT_EQ(run(*device, IoOperation::read, 64 * KiB, 4096, memory_), 4096);
      EXPECT_EQ(memory_[0], std::byte(0));

      auto other = make_file_queue(GetParam(), 4);
      ASSERT_TRUE(other);
      FileDeviceOptions options;
      options.role = DeviceRole::target;
      const auto second = open_file_device(**other, loop.path(), options);
      ASSERT_FALSE(second) << "claimed twice";
      EXPECT_EQ(second.error().code, ErrorCode::busy);
    }
    queue_.reset();
    auto again = make_file_queue(GetParam(), 8);
    ASSERT_TRUE(again);
    queue_ = std::move(*again);
    ASSERT_TRUE(queue_->register_memory({memory_, memory_bytes}));
  }
}

INSTANTIATE_TEST_SUITE_P(Engines, FileDeviceTest, ::testing::Values(IoEngine::uring, IoEngine::aio),
                         [](const auto& param) { return param.param == IoEngine::uring ? "uring" : "aio"; });

}  // namespace
}  // namespace blockferry
