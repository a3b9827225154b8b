// SPDX-License-Identifier: Apache-2.0
// Loop devices of both sector sizes through both I/O engines: data, claims and locks, identity, change
// stamps.
#include <cstring>

#include <linux/blkpg.h>
#include <linux/fs.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include "blockio/block_identity.h"
#include "tests/unit/blockio/volumes.h"

namespace blockferry {
namespace {

struct Kind {
  IoEngine engine;
  unsigned sector_bytes;
};

class BlockDeviceTest : public VolumeTest, public ::testing::WithParamInterface<Kind> {
 protected:
  void SetUp() override {
    if (const std::string why = loop_devices_missing(); !why.empty()) GTEST_SKIP() << why;
    set_up_queue(GetParam().engine);
  }
  std::unique_ptr<Loop> make_loop(const std::string& name, std::uint64_t bytes) {
    auto loop = std::make_unique<Loop>(scratch_.make_file(name, bytes), GetParam().sector_bytes);
    EXPECT_TRUE(loop->valid());
    return loop;
  }
};

TEST_P(BlockDeviceTest, IsWhatTheKernelSays) {
  const auto loop = make_loop("volume", 2 * MiB);
  const auto device = open(loop->path(), DeviceRole::source);
  ASSERT_NE(device, nullptr);
  const DeviceInfo& info = device->info();
  EXPECT_EQ(info.kind, DeviceKind::block);
  EXPECT_EQ(info.bytes, 2 * MiB);
  EXPECT_EQ(info.logical_block_bytes, GetParam().sector_bytes);
  EXPECT_EQ(info.zero_run_bytes_min, 64 * KiB);
  const auto region = device->region_at(4096);
  ASSERT_TRUE(region);
  EXPECT_FALSE(region->hole);
  EXPECT_EQ(region->end, 2 * MiB);
  const auto probed = probe_file_device(loop->path());
  ASSERT_TRUE(probed) << "a claimed device can be looked at";
  EXPECT_EQ(probed->identity, info.identity);
  EXPECT_EQ(probed->bytes, info.bytes);
  EXPECT_EQ(probed->logical_block_bytes, info.logical_block_bytes);
}

TEST_P(BlockDeviceTest, KeepsWhatIsWritten) {
  const auto loop = make_loop("volume", 2 * MiB);
  const auto device = open(loop->path(), DeviceRole::target);
  ASSERT_NE(device, nullptr);
  for (std::size_t i = 0; i < 1 * MiB; ++i) memory_[i] = std::byte(i * 31 % 253);
  ASSERT_EQ(run(*device, IoOperation::write, 512 * KiB, 1 * MiB, memory_), std::int64_t(1 * MiB));
  ASSERT_EQ(run(*device, IoOperation::flush, 0, 0), 0);
  ASSERT_EQ(run(*device, IoOperation::read, 512 * KiB, 1 * MiB, memory_ + 2 * MiB), std::int64_t(1 * MiB));
  EXPECT_EQ(std::memcmp(memory_, memory_ + 2 * MiB, 1 * MiB), 0);
}

TEST_P(BlockDeviceTest, AnUnalignedEndIsFilledUpWithZeroesToItsSector) {
  const auto loop = make_loop("volume", 1 * MiB);
  const auto device = open(loop->path(), DeviceRole::target);
  ASSERT_NE(device, nullptr);
  const unsigned sector = GetParam().sector_bytes;
  std::memset(memory_, 0x5A, 64 * KiB);
  ASSERT_EQ(run(*device, IoOperation::write, 0, 64 * KiB, memory_), std::int64_t(64 * KiB));
  std::memset(memory_, 0x77, 8192);
  ASSERT_EQ(run(*device, IoOperation::write, 4096, 100, memory_), 100) << "counted as asked for";
  std::byte* const back = memory_ + 2 * MiB;
  ASSERT_EQ(run(*device, IoOperation::read, 4096, 8192, back), 8192);
  EXPECT_EQ(back[99], std::byte(0x77));
  for (std::size_t i = 100; i < sector; ++i) ASSERT_EQ(back[i], std::byte(0)) << i;
  for (std::size_t i = sector; i < 8192; ++i) ASSERT_EQ(back[i], std::byte(0x5A)) << i;
  EXPECT_EQ(run(*device, IoOperation::read, 4096, 100, back), 100);
  EXPECT_EQ(run(*device, IoOperation::zero, 0, 100), -EOPNOTSUPP) << "a zero request would reach too far";
}

TEST_P(BlockDeviceTest, ZeroingZeroesThatRangeAndNoMore) {
  const auto loop = make_loop("volume", 1 * MiB);
  const auto device = open(loop->path(), DeviceRole::target);
  ASSERT_NE(device, nullptr);
  std::memset(memory_, 0x5A, 1 * MiB);
  ASSERT_EQ(run(*device, IoOperation::write, 0, 1 * MiB, memory_), std::int64_t(1 * MiB));
  ASSERT_EQ(run(*device, IoOperation::zero, 64 * KiB, 132 * KiB), 0);
  std::byte* const back = memory_ + 2 * MiB;
  ASSERT_EQ(run(*device, IoOperation::read, 0, 1 * MiB, back), std::int64_t(1 * MiB));
  for (std::size_t i = 0; i < 1 * MiB; ++i) {
    const bool zeroed = i >= 64 * KiB && i < 196 * KiB;
    ASSERT_EQ(back[i], std::byte(zeroed ? 0 : 0x5A)) << i;
  }
}

TEST_P(BlockDeviceTest, NothingIsReadOrWrittenBeyondTheEnd) {
  const auto loop = make_loop("volume", 1 * MiB);
  const auto device = open(loop->path(), DeviceRole::target);
  ASSERT_NE(device, nullptr);
  EXPECT_EQ(run(*device, IoOperation::read, 1 * MiB - 8192, 64 * KiB, memory_), 8192);
  EXPECT_EQ(run(*device, IoOperation::read, 1 * MiB, 4096, memory_), 0);
  EXPECT_LT(run(*device, IoOperation::write, 1 * MiB, 4096, memory_), 0);
}

TEST_P(BlockDeviceTest, EndsAtItsLastWholeSector) {
  const auto loop = make_loop("volume", 1 * MiB + 1536 + 123);
  const auto device = open(loop->path(), DeviceRole::source);
  ASSERT_NE(device, nullptr);
  const std::uint64_t tail = GetParam().sector_bytes == 512 ? 1536 : 0;
  EXPECT_EQ(device->info().bytes, 1 * MiB + tail);
  EXPECT_EQ(probe_file_device(loop->path())->bytes, 1 * MiB + tail);
  EXPECT_EQ(run(*device, IoOperation::read, 1 * MiB - 4096, 4096 + tail, memory_), std::int64_t(4096 + tail));
}

TEST_P(BlockDeviceTest, IsClaimedUntilItIsDestroyed) {
  const auto loop = make_loop("volume", 1 * MiB);
  for (const DeviceRole role : {DeviceRole::source, DeviceRole::target}) {
    const auto first = open(loop->path(), role);
    ASSERT_NE(first, nullptr) << "released too late";
    ASSERT_EQ(run(*first, IoOperation::read, 0, 4096, memory_), 4096);
    for (const DeviceRole other : {DeviceRole::source, DeviceRole::target}) {
      const auto second = try_open(loop->path(), other);
      ASSERT_FALSE(second) << "claimed twice";
      EXPECT_EQ(second.error().code, ErrorCode::busy);
      EXPECT_NE(second.error().message().find("mounted or held"), std::string::npos);
    }
    FileDeviceOptions shared;
    shared.shared = true;
    EXPECT_NE(open(loop->path(), shared), nullptr) << "a shared source claims nothing";
  }
}

TEST_P(BlockDeviceTest, WhoWaitsForABusyDeviceGetsItWhenItIsFree) {
  const auto loop = make_loop("volume", 1 * MiB);
  FileDescriptor holder(::open(loop->path().c_str(), O_RDWR | O_EXCL | O_CLOEXEC));
  ASSERT_TRUE(holder.valid());
  FileDeviceOptions options;
  options.role = DeviceRole::target;
  options.busy_wait = std::chrono::milliseconds(50);
  const Nanoseconds start = system_clock().now();
  const auto refused = open_file_device(*queue_, loop->path(), options);
  ASSERT_FALSE(refused);
  EXPECT_GE(system_clock().now() - start, std::chrono::milliseconds(50)) << "it did not try again";
  const pid_t child = ::fork();  // a process that dies while the device is held
  ASSERT_GE(child, 0);
  if (child == 0) {
    system_clock().sleep_for(std::chrono::milliseconds(100));
    ::_exit(0);
  }
  holder.reset();  // the child has it still
  options.busy_wait = std::chrono::seconds(60);
  const auto device = open_file_device(*queue_, loop->path(), options);
  EXPECT_TRUE(device) << device.error().message();
  ::waitpid(child, nullptr, 0);
}

TEST_P(BlockDeviceTest, ATargetsDiskIsLockedAgainstUdev) {
  const auto loop = make_loop("volume", 1 * MiB);
  const FileDescriptor udev(::open(loop->path().c_str(), O_RDONLY | O_CLOEXEC));
  {
    const auto device = open(loop->path(), DeviceRole::target);
    ASSERT_NE(device, nullptr);
    EXPECT_NE(::flock(udev.get(), LOCK_SH | LOCK_NB), 0) << "udev would probe it";
    EXPECT_EQ(errno, EWOULDBLOCK);
  }
  EXPECT_EQ(::flock(udev.get(), LOCK_SH | LOCK_NB), 0) << "released too late";
  const auto device = try_open(loop->path(), DeviceRole::target);
  ASSERT_FALSE(device);
  EXPECT_EQ(device.error().code, ErrorCode::busy);
  EXPECT_NE(device.error().message().find("lock"), std::string::npos);
  EXPECT_TRUE(try_open(loop->path(), DeviceRole::source)) << "a source needs no lock";
}

TEST_P(BlockDeviceTest, IsKnownByItsBackingFileWhateverItsName) {
  const std::string file = scratch_.make_file("volume", 1 * MiB);
  std::string first;
  {
    const Loop loop(file, GetParam().sector_bytes);
    first = probe_file_device(loop.path())->identity;
    const std::string link = scratch_.file("link");
    ASSERT_EQ(::symlink(loop.path().c_str(), link.c_str()), 0);
    EXPECT_EQ(probe_file_device(link)->identity, first);
  }
  const auto other = make_loop("other", 1 * MiB);
  EXPECT_NE(probe_file_device(other->path())->identity, first);
  const Loop again(file, GetParam().sector_bytes);
  EXPECT_EQ(probe_file_device(again.path())->identity, first);
}

TEST_P(BlockDeviceTest, TheChangeStampTellsOfEveryWayToWrite) {
  const std::string file = scratch_.make_file("volume", 1 * MiB);
  const Loop loop(file, GetParam().sector_bytes);
  FileDeviceOptions shared;
  shared.shared = true;
  const auto device = open(loop.path(), shared);
  ASSERT_NE(device, nullptr);
  auto before = device->change_stamp();
  ASSERT_TRUE(before);
  ASSERT_EQ(run(*device, IoOperation::read, 0, 64 * KiB, memory_), std::int64_t(64 * KiB));
  ASSERT_EQ(device->change_stamp(), before) << "reading changes nothing";
  const auto expect_change = [&](const char* what) {
    const auto after = device->change_stamp();
    ASSERT_TRUE(after) << what;
    EXPECT_NE(after, before) << what;
    before = after;
  };
  {
    const FileDescriptor writer(::open(loop.path().c_str(), O_WRONLY | O_CLOEXEC));
    ASSERT_EQ(::pwrite(writer.get(), "x", 1, 5), 1);
    ASSERT_EQ(::fsync(writer.get()), 0);
    expect_change("a write");
    ASSERT_EQ(::fallocate(writer.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 8192, 8192), 0);
    expect_change("write zeroes");
    const std::uint64_t range[2] = {65536, 65536};
    ASSERT_EQ(::ioctl(writer.get(), BLKDISCARD, range), 0);
    expect_change("a discard");
  }
  const FileDescriptor behind(::open(file.c_str(), O_WRONLY | O_CLOEXEC));
  ASSERT_EQ(::pwrite(behind.get(), "y", 1, 5), 1);
  expect_change("a write to the backing file");
}

TEST_P(BlockDeviceTest, ADiskThatDoesNotCountIsNotVouchedFor) {
  const auto loop = make_loop("volume", 1 * MiB);
  const std::string iostats = "/sys/block/" + loop->path().substr(5) + "/queue/iostats";
  const auto set = [&](const char* value) {
    const FileDescriptor file(::open(iostats.c_str(), O_WRONLY | O_CLOEXEC));
    return ::write(file.get(), value, 1) == 1;
  };
  const auto device = open(loop->path(), DeviceRole::source);
  ASSERT_NE(device, nullptr);
  ASSERT_TRUE(set("0"));
  const auto stamp = device->change_stamp();
  ASSERT_TRUE(set("1"));
  EXPECT_FALSE(stamp);
  EXPECT_TRUE(device->change_stamp());
}

/// Two partitions, from 1 MiB and from 2 MiB on, each 1 MiB long.
bool add_partitions(const std::string& disk) {
  const FileDescriptor fd(::open(disk.c_str(), O_RDWR | O_CLOEXEC));
  for (int number = 1; number <= 2; ++number) {
    blkpg_partition partition{};
    partition.start = (long long)(std::uint64_t(number) * MiB);
    partition.length = 1 * MiB;
    partition.pno = number;
    blkpg_ioctl_arg argument{BLKPG_ADD_PARTITION, 0, sizeof partition, &partition};
    if (::ioctl(fd.get(), BLKPG, &argument) != 0) return false;
  }
  return true;
}

TEST_P(BlockDeviceTest, TwoPartitionsOfOneDiskMayBeTargets) {
  const std::string file = scratch_.make_file("disk", 4 * MiB);
  const Loop loop(file, GetParam().sector_bytes, LO_FLAGS_PARTSCAN);
  ASSERT_TRUE(loop.valid());
  if (!add_partitions(loop.path()) || ::access((loop.path() + "p2").c_str(), F_OK) != 0) {
    GTEST_SKIP() << "no partitions on loop devices here";
  }
  const std::string disk = probe_file_device(loop.path())->identity;
  const FileDescriptor udev(::open(loop.path().c_str(), O_RDONLY | O_CLOEXEC));
  auto first = open(loop.path() + "p1", DeviceRole::target);
  auto second = open(loop.path() + "p2", DeviceRole::target);
  ASSERT_TRUE(first && second);
  EXPECT_EQ(first->info().identity, disk + "-part1");
  EXPECT_EQ(second->info().identity, disk + "-part2");
  EXPECT_EQ(first->info().bytes, 1 * MiB);
  EXPECT_FALSE(try_open(loop.path(), DeviceRole::target)) << "the disk under its partitions";
  EXPECT_FALSE(try_open(loop.path() + "p1", DeviceRole::source));

  EXPECT_FALSE(second->change_stamp()) << "its neighbour's writes change the backing file";
  const auto counters = [&](const char* suffix) {
    struct stat status {};
    EXPECT_EQ(::stat((loop.path() + suffix).c_str(), &status), 0);
    return write_counters(status.st_rdev);
  };
  const auto of_disk = counters(""), of_first = counters("p1"), of_second = counters("p2");
  ASSERT_TRUE(of_disk && of_first && of_second);
  std::memset(memory_, 0x33, 4096);
  ASSERT_EQ(run(*first, IoOperation::write, 0, 4096, memory_), 4096);
  EXPECT_NE(counters(""), of_disk);
  EXPECT_NE(counters("p1"), of_first);
  EXPECT_EQ(counters("p2"), of_second) << "nothing was written there";
  const FileDescriptor behind(::open(file.c_str(), O_RDONLY | O_CLOEXEC));
  char byte = 0;
  ASSERT_EQ(run(*first, IoOperation::flush, 0, 0), 0);
  ASSERT_EQ(::pread(behind.get(), &byte, 1, 1 * MiB), 1);
  EXPECT_EQ(byte, 0x33);

  first.reset();
  // By way of the whole disk, every partition can be reached.
  const FileDescriptor whole(::open(loop.path().c_str(), O_WRONLY | O_DSYNC | O_CLOEXEC));
  ASSERT_EQ(::pwrite(whole.get(), &byte, 1, 2 * MiB), 1);
  EXPECT_NE(counters("p2"), of_second);
  EXPECT_NE(::flock(udev.get(), LOCK_SH | LOCK_NB), 0) << "the other partition still needs the lock";
  second.reset();
  EXPECT_EQ(::flock(udev.get(), LOCK_SH | LOCK_NB), 0);
}

INSTANTIATE_TEST_SUITE_P(Kinds, BlockDeviceTest,
                         ::testing::Values(Kind{IoEngine::uring, 512}, Kind{IoEngine::uring, 4096},
                                           Kind{IoEngine::aio, 512}, Kind{IoEngine::aio, 4096}),
                         [](const auto& param) {
                           return std::string(engine_test_name(param.param.engine)) +
                                  std::to_string(param.param.sector_bytes);
                         });

}  // namespace
}  // namespace blockferry
