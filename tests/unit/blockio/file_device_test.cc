// SPDX-License-Identifier: Apache-2.0
// Files on a disk's filesystem and in memory, through both I/O engines.
#include "blockio/file_device.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include <sys/file.h>
#include <sys/stat.h>

#include "tests/unit/blockio/volumes.h"

namespace blockferry {
namespace {

struct Kind {
  IoEngine engine;
  const char* directory;
};

class FileDeviceTest : public VolumeTest, public ::testing::WithParamInterface<Kind> {
 protected:
  void SetUp() override { set_up_queue(GetParam().engine); }

  std::uint64_t size_of(const std::string& path) {
    struct stat status {};
    return ::stat(path.c_str(), &status) == 0 ? std::uint64_t(status.st_size) : UINT64_MAX;
  }
  Scratch files_{GetParam().directory};
};

TEST_P(FileDeviceTest, WritesAndReadsBackWithAnUnalignedTail) {
  constexpr std::uint64_t bytes = 1 * MiB + 123;
  const std::string path = files_.file("new");
  auto device = open(path, DeviceRole::target, true, bytes);
  ASSERT_NE(device, nullptr);
  EXPECT_EQ(device->info().bytes, bytes);
  EXPECT_EQ(device->info().kind, DeviceKind::file);
  for (std::size_t i = 0; i < bytes; ++i) memory_[i] = std::byte(i * 31 % 253);
  EXPECT_EQ(run(*device, IoOperation::write, 0, 1 * MiB, memory_), std::int64_t(1 * MiB));
  EXPECT_EQ(run(*device, IoOperation::write, 1 * MiB, 123, memory_ + 1 * MiB), 123);
  EXPECT_EQ(run(*device, IoOperation::flush, 0, 0), 0);
  std::byte* back = memory_ + 2 * MiB;
  EXPECT_EQ(run(*device, IoOperation::read, 0, 1 * MiB, back), std::int64_t(1 * MiB));
  EXPECT_EQ(run(*device, IoOperation::read, 1 * MiB, 123, back + 1 * MiB), 123);
  EXPECT_EQ(std::memcmp(memory_, back, bytes), 0);
  device.reset();
  EXPECT_EQ(size_of(path), bytes) << "the tail was not rounded up";
}

TEST_P(FileDeviceTest, ZeroingMakesAHoleAndItsTailIsZeroToo) {
  constexpr std::uint64_t bytes = 1 * MiB + 123;
  const auto device = open(files_.file("holes"), DeviceRole::target, true, bytes);
  ASSERT_NE(device, nullptr);
  std::memset(memory_, 7, 1 * MiB + 4096);
  ASSERT_EQ(run(*device, IoOperation::write, 0, bytes, memory_), std::int64_t(bytes));
  ASSERT_EQ(run(*device, IoOperation::zero, 64 * KiB, 512 * KiB), 0);
  ASSERT_EQ(run(*device, IoOperation::zero, 1 * MiB, 123), 0);
  ASSERT_EQ(run(*device, IoOperation::flush, 0, 0), 0);
  EXPECT_EQ(device->info().bytes, bytes);
  auto region = device->region_at(0);
  ASSERT_TRUE(region);
  EXPECT_FALSE(region->hole);
  EXPECT_EQ(region->end, 64 * KiB);
  region = device->region_at(68 * KiB);
  ASSERT_TRUE(region);
  EXPECT_TRUE(region->hole);
  EXPECT_EQ(region->end, 576 * KiB);
  std::byte* const back = memory_ + 2 * MiB;
  ASSERT_EQ(run(*device, IoOperation::read, 0, bytes, back), std::int64_t(bytes));
  for (std::size_t i = 0; i < bytes; ++i) {
    const bool zeroed = (i >= 64 * KiB && i < 576 * KiB) || i >= 1 * MiB;
    ASSERT_EQ(back[i], std::byte(zeroed ? 0 : 7)) << i;
  }
}

/// A look for holes may come while a write is on its way: it then sees a hole where data will be.
TEST_P(FileDeviceTest, WhatWasWrittenIsNotTakenForAHoleSeenMeanwhile) {
  const auto device = open(files_.file("holes"), DeviceRole::target, true, 1 * MiB);
  ASSERT_NE(device, nullptr);
  std::memset(memory_, 7, 64 * KiB);
  IoRequest write;
  write.operation = IoOperation::write;
  write.offset = 512 * KiB;
  write.bytes = 64 * KiB;
  write.data = memory_;
  device->submit(write);  // reaches the kernel with the next wait
  IoRequest zero;
  zero.operation = IoOperation::zero;
  zero.offset = 256 * KiB;
  zero.bytes = 128 * KiB;
  device->submit(zero);
  std::vector<IoRequest*> completed;
  for (int i = 0; i < 1000 && completed.size() < 2; ++i) queue_->wait(std::chrono::seconds(1), completed);
  ASSERT_EQ(completed.size(), 2U);
  ASSERT_EQ(run(*device, IoOperation::zero, 512 * KiB, 64 * KiB), 0);
  std::byte* const back = memory_ + 2 * MiB;
  ASSERT_EQ(run(*device, IoOperation::read, 512 * KiB, 64 * KiB, back), std::int64_t(64 * KiB));
  EXPECT_TRUE(std::all_of(back, back + 64 * KiB, [](std::byte byte) { return byte == std::byte(0); }));
}

TEST_P(FileDeviceTest, HolesAreToldFromData) {
  const std::string path = files_.make_file("sparse", 64 * GiB);
  const FileDescriptor writer(::open(path.c_str(), O_WRONLY | O_CLOEXEC));
  const std::vector<char> data(64 * KiB, 'x');
  for (const std::uint64_t at : {1 * GiB, 2 * GiB})
    ASSERT_EQ(::pwrite(writer.get(), data.data(), data.size(), off_t(at)), 64 * KiB);
  const auto device = open(path, DeviceRole::source);
  ASSERT_NE(device, nullptr);
  std::vector<std::uint64_t> ends;
  bool hole = true;
  for (std::uint64_t at = 0; at < 64 * GiB && ends.size() < 10; hole = !hole) {
    const auto region = device->region_at(at);
    ASSERT_TRUE(region);
    EXPECT_EQ(region->hole, hole) << "at " << at;
    ASSERT_GT(region->end, at);
    ends.push_back(at = region->end);
  }
  EXPECT_EQ(ends,
            (std::vector<std::uint64_t>{1 * GiB, 1 * GiB + 64 * KiB, 2 * GiB, 2 * GiB + 64 * KiB, 64 * GiB}));
}

TEST_P(FileDeviceTest, AFileCutShortIsNoHole) {
  const std::string path = files_.make_file("cut", 4 * MiB);
  const auto device = open(path, DeviceRole::source);
  ASSERT_NE(device, nullptr);
  ASSERT_EQ(::truncate(path.c_str(), 1 * MiB), 0);
  const auto region = device->region_at(2 * MiB);
  ASSERT_FALSE(region) << "lost data would be copied as zeroes";
  EXPECT_EQ(region.error().code, ErrorCode::device_gone);
  EXPECT_EQ(region.error().offset, 1 * MiB);
  EXPECT_EQ(run(*device, IoOperation::read, 2 * MiB, 4096, memory_), 0);
}

TEST_P(FileDeviceTest, ReadingBeyondTheEndIsShort) {
  const auto device = open(files_.make_file("short", 10000), DeviceRole::source);
  ASSERT_NE(device, nullptr);
  EXPECT_EQ(run(*device, IoOperation::read, 8192, 4096, memory_), 10000 - 8192);
  EXPECT_EQ(run(*device, IoOperation::read, 12288, 4096, memory_), 0);
}

TEST_P(FileDeviceTest, AnEmptyFileIsAVolumeOfNothing) {
  const std::string path = files_.file("empty");
  const auto target = open(path, DeviceRole::target, true, 0);
  ASSERT_NE(target, nullptr);
  EXPECT_EQ(target->info().bytes, 0u);
  EXPECT_EQ(run(*target, IoOperation::flush, 0, 0), 0);
  EXPECT_EQ(size_of(path), 0u);
}

TEST_P(FileDeviceTest, ATargetsSizeIsSetWhenItIsNewEmptyOrAskedFor) {
  FileDeviceOptions options;
  options.role = DeviceRole::target;
  options.file_bytes = 1 * MiB;
  const std::string missing = files_.file("missing");
  const auto refused = open_file_device(*queue_, missing, options);
  ASSERT_FALSE(refused) << "created without being asked to";
  EXPECT_EQ(refused.error().code, ErrorCode::not_found);
  EXPECT_EQ(open(files_.make_file("empty", 0), options)->info().bytes, 1 * MiB);
  EXPECT_EQ(open(files_.make_file("larger", 2 * MiB), options)->info().bytes, 2 * MiB);
  EXPECT_EQ(open(files_.make_file("smaller", 4096), options)->info().bytes, 4096u);
  options.resize = true;
  EXPECT_EQ(open(files_.make_file("cut", 2 * MiB), options)->info().bytes, 1 * MiB);
  EXPECT_EQ(open(files_.make_file("grown", 4096), options)->info().bytes, 1 * MiB);
}

TEST_P(FileDeviceTest, AFileThatCannotBeMadeLargeEnoughIsNotLeftBehind) {
  FileDeviceOptions options;
  options.role = DeviceRole::target;
  options.create = true;
  options.file_bytes = 1ULL << 63;  // more than any file may have
  const std::string path = files_.file("impossible");
  const auto device = open_file_device(*queue_, path, options);
  ASSERT_FALSE(device);
  EXPECT_NE(device.error().message().find("set the size of " + path), std::string::npos);
  EXPECT_EQ(size_of(path), UINT64_MAX) << "an empty file is left";
}

TEST_P(FileDeviceTest, ATargetIsLockedForItselfASourceWithOthers) {
  const std::string path = files_.make_file("locked", 8192);
  {
    const auto target = open(path, DeviceRole::target);
    ASSERT_NE(target, nullptr);
    ASSERT_EQ(run(*target, IoOperation::read, 0, 4096, memory_), 4096);
    for (const DeviceRole role : {DeviceRole::source, DeviceRole::target}) {
      const auto second = try_open(path, role);
      ASSERT_FALSE(second);
      EXPECT_EQ(second.error().code, ErrorCode::busy);
    }
    FileDeviceOptions shared;
    shared.shared = true;
    EXPECT_NE(open(path, shared), nullptr);
  }
  const auto source = open(path, DeviceRole::source);
  ASSERT_NE(source, nullptr) << "released too late";
  EXPECT_TRUE(try_open(path, DeviceRole::source));
  EXPECT_FALSE(try_open(path, DeviceRole::target));
}

TEST_P(FileDeviceTest, WhoWaitsForALockGetsItWhenItIsFree) {
  const std::string path = files_.make_file("locked", 8192);
  const FileDescriptor holder(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  ASSERT_EQ(::flock(holder.get(), LOCK_SH), 0);
  FileDeviceOptions options;
  options.role = DeviceRole::target;
  options.busy_wait = std::chrono::milliseconds(60);
  const Nanoseconds start = system_clock().now();
  EXPECT_FALSE(open_file_device(*queue_, path, options));
  EXPECT_GE(system_clock().now() - start, std::chrono::milliseconds(60)) << "it did not try again";
  ASSERT_EQ(::flock(holder.get(), LOCK_UN), 0);
  EXPECT_TRUE(open_file_device(*queue_, path, options));
}

TEST_P(FileDeviceTest, IsKnownByItsInodeWhateverItsName) {
  const std::string path = files_.make_file("volume", 8192), link = files_.file("link");
  const auto identity = probe_file_device(path)->identity;
  ASSERT_EQ(::link(path.c_str(), link.c_str()), 0);
  EXPECT_EQ(probe_file_device(link)->identity, identity);
  EXPECT_EQ(open(link, DeviceRole::source)->info().identity, identity);
  EXPECT_NE(probe_file_device(files_.make_file("other", 8192))->identity, identity);
}

/// Even a write right after the stamp, within one tick of the clock that dates files.
TEST_P(FileDeviceTest, TheChangeStampTellsOfEveryWrite) {
  const std::string path = files_.make_file("stamp", 8192);
  const auto device = open(path, DeviceRole::source);
  ASSERT_NE(device, nullptr);
  const FileDescriptor writer(::open(path.c_str(), O_WRONLY | O_CLOEXEC));
  for (int i = 0; i < 20; ++i) {
    const auto before = device->change_stamp();
    ASSERT_TRUE(before);
    ASSERT_EQ(::pwrite(writer.get(), "x", 1, 5), 1);
    ASSERT_NE(device->change_stamp(), before) << "write " << i;
  }
  const auto before = device->change_stamp();
  ASSERT_TRUE(before);
  EXPECT_EQ(run(*device, IoOperation::read, 0, 8192, memory_), 8192);
  EXPECT_EQ(device->change_stamp(), before) << "reading changes nothing";
}

TEST_P(FileDeviceTest, WhatIsNoVolumeIsRefused) {
  const std::string fifo = files_.file("fifo"), loop = files_.file("loop");
  ASSERT_EQ(::mkfifo(fifo.c_str(), 0600), 0);
  ASSERT_EQ(::symlink(loop.c_str(), loop.c_str()), 0);
  for (const std::string& path : {std::string("/dev/null"), files_.path(), fifo}) {
    for (const DeviceRole role : {DeviceRole::source, DeviceRole::target}) {
      const auto device = try_open(path, role);
      ASSERT_FALSE(device) << path;
      EXPECT_EQ(device.error().code, ErrorCode::invalid_argument) << path;
    }
    EXPECT_FALSE(probe_file_device(path));
  }
  EXPECT_FALSE(try_open(loop, DeviceRole::source));
  const auto missing = try_open(files_.path() + "/no/such/volume", DeviceRole::source);
  ASSERT_FALSE(missing);
  EXPECT_EQ(missing.error().code, ErrorCode::not_found);
}

INSTANTIATE_TEST_SUITE_P(Kinds, FileDeviceTest,
                         ::testing::Values(Kind{IoEngine::uring, "/var/tmp"},
                                           Kind{IoEngine::uring, "/dev/shm"}, Kind{IoEngine::aio, "/var/tmp"},
                                           Kind{IoEngine::aio, "/dev/shm"}),
                         [](const auto& param) {
                           return std::string(engine_test_name(param.param.engine)) +
                                  (param.param.directory[1] == 'v' ? "_disk" : "_memory");
                         });

}  // namespace
}  // namespace blockferry
