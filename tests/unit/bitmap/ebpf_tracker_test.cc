// SPDX-License-Identifier: Apache-2.0
// The kernel's view of writes against what was really written: on whole disks, partitions and devices
// without requests, under load too.
#include <fstream>

#include <fcntl.h>
#include <linux/loop.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "tests/unit/bitmap/tracked_volume.h"

namespace blockferry::test {
namespace {

/// A disk without requests: its writes end within the call that began them.
class ZramDevice {
 public:
  explicit ZramDevice(std::uint64_t bytes) {
    std::ifstream add("/sys/class/zram-control/hot_add");
    if (!(add >> number_)) return;
    std::ofstream(sysfs("disksize")) << bytes;
  }
  ~ZramDevice() {
    if (!valid()) return;
    std::ofstream(sysfs("reset")) << 1;
    std::ofstream("/sys/class/zram-control/hot_remove") << number_;
  }
  ZramDevice(const ZramDevice&) = delete;
  ZramDevice& operator=(const ZramDevice&) = delete;
  bool valid() const { return number_ >= 0; }
  std::string path() const { return "/dev/zram" + std::to_string(number_); }

 private:
  std::string sysfs(const char* name) const {
    return "/sys/block/zram" + std::to_string(number_) + "/" + name;
  }
  int number_ = -1;
};

TEST_F(EbpfTrackerTest, MarksWhatWasWrittenToADisk) {
  for (const unsigned sector_bytes : {512U, 4096U}) {
    LoopOptions options;
    options.sector_bytes = sector_bytes;
    const LoopDevice disk(scratch_.file("disk" + std::to_string(sector_bytes), 64 * MiB), options);
    ASSERT_TRUE(disk.valid());
    expect_exact_marks(disk.path(), 64 * MiB);
  }
}

TEST_F(EbpfTrackerTest, MarksWhatWasWrittenToAPartition) {
  LoopDevice disk(scratch_.file("disk", 64 * MiB));
  ASSERT_TRUE(disk.valid());
  const std::string part = disk.add_partition(1, 16 * MiB + 512 * 3, 32 * MiB);
  ASSERT_NE(part, "");
  expect_exact_marks(part, 32 * MiB);
}

TEST_F(EbpfTrackerTest, WritesToAPartitionAreTheDisksAndNotItsNeighbours) {
  LoopDevice disk(scratch_.file("disk", 64 * MiB));
  ASSERT_TRUE(disk.valid());
  const std::string first = disk.add_partition(1, MiB, 16 * MiB),
                    second = disk.add_partition(2, 32 * MiB, 16 * MiB);
  ASSERT_NE(second, "");
  auto whole = attached(disk.path()), other = attached(first);
  ASSERT_TRUE(whole && other);
  const auto fd = open_direct(second);
  std::mt19937_64 random(3);
  std::set<std::uint64_t> expected;
  for (const auto granule : change_at_random(fd.get(), 16 * MiB / page, random, true))
    expected.insert(granule + 32 * MiB / page);
  expect_marks(*whole, collected(*whole, 64 * MiB / page), expected);
  EXPECT_TRUE(collected(*other, 16 * MiB / page).empty());
}

TEST_F(EbpfTrackerTest, MarksWhatWasWrittenToADiskWithoutRequests) {
  const ZramDevice disk(32 * MiB);
  if (!disk.valid()) GTEST_SKIP() << "no zram device to be had";
  expect_exact_marks(disk.path(), 32 * MiB);
}

TEST_F(EbpfTrackerTest, PassesUnderLoadEndWithAFaithfulCopyOfADisk) {
  const LoopDevice disk(scratch_.file("disk", 32 * MiB));
  ASSERT_TRUE(disk.valid());
  expect_faithful_copy(disk.path(), 32 * MiB);
}

TEST_F(EbpfTrackerTest, PassesUnderLoadEndWithAFaithfulCopyOfADiskWithoutRequests) {
  const ZramDevice disk(32 * MiB);
  if (!disk.valid()) GTEST_SKIP() << "no zram device to be had";
  expect_faithful_copy(disk.path(), 32 * MiB);
}

TEST_F(EbpfTrackerTest, MoreWritesAtATimeThanThereIsRoomForAreALoss) {
  const LoopDevice disk(scratch_.file("disk", 64 * MiB));
  ASSERT_TRUE(disk.valid());
  EbpfTrackerOptions options;
  options.queued_writes_max = 1;
  auto tracker = attached(disk.path(), options);
  ASSERT_TRUE(tracker);
  const auto fd = open_direct(disk.path());
  std::mt19937_64 random(5);
  Granules data(1024);  // more than one request takes
  data.fill(random);
  std::vector<std::thread> writers;
  for (off_t at = 0; at < 4; ++at) {
    writers.emplace_back([&, at] {
      for (int i = 0; i < 20; ++i)
        EXPECT_EQ(::pwrite(fd.get(), data.data(), data.bytes(), at * off_t(data.bytes())),
                  ssize_t(data.bytes()));
    });
  }
  for (auto& writer : writers) writer.join();
  EXPECT_GT(tracker->losses().records_refused, 0U);
  EXPECT_TRUE(tracker->losses().any());
}

/// Sixteen writes at a time, in a table of eight buckets.
TEST_F(EbpfTrackerTest, RecordsWhoseBucketIsFullFindRoomInTheNext) {
  const LoopDevice disk(scratch_.file("disk", 64 * MiB));
  ASSERT_TRUE(disk.valid());
  EbpfTrackerOptions options;
  options.queued_writes_max = 8;
  auto tracker = attached(disk.path(), options);
  ASSERT_TRUE(tracker);
  const auto fd = open_direct(disk.path());
  constexpr unsigned writers_count = 16, rounds = 200;
  std::vector<std::thread> writers;
  for (unsigned writer = 0; writer < writers_count; ++writer) {
    writers.emplace_back([&, writer] {
      Granules data(1);
      for (unsigned i = 0; i < rounds; ++i) {
        const off_t granule = off_t(i) * writers_count * 2 + writer * 2;  // every other one
        EXPECT_EQ(::pwrite(fd.get(), data.data(), page, granule * off_t(page)), ssize_t(page));
      }
    });
  }
  for (auto& writer : writers) writer.join();
  std::set<std::uint64_t> written;
  for (std::uint64_t i = 0; i < std::uint64_t(rounds) * writers_count; ++i) written.insert(i * 2);
  expect_marks(*tracker, collected(*tracker, 64 * MiB / page), written);
  expect_no_losses(*tracker);
}

TEST_F(EbpfTrackerTest, GranulesMayBeLarger) {
  const LoopDevice disk(scratch_.file("disk", 64 * MiB + 512 * 7));
  ASSERT_TRUE(disk.valid());
  EbpfTrackerOptions options;
  options.granule_bytes = 64 * KiB;
  auto tracker = attached(disk.path(), options);
  ASSERT_TRUE(tracker);
  const auto fd = open_direct(disk.path());
  Granules data(17);
  ASSERT_EQ(::pwrite(fd.get(), data.data(), 512, 64 * MiB + 512 * 6), 512);  // the last sector of all
  ASSERT_EQ(::pwrite(fd.get(), data.data(), data.bytes(), 60 * KiB), ssize_t(data.bytes()));
  EXPECT_EQ(collected(*tracker, 1025), (std::set<std::uint64_t>{0, 1, 1024}));
}

/// A bpf filesystem of the test's own, and a disk.
class PinnedTrackerTest : public EbpfTrackerTest {
 protected:
  static constexpr std::uint64_t bytes = 32 * MiB, granules = bytes / page;

  void SetUp() override {
    EbpfTrackerTest::SetUp();
    if (IsSkipped()) return;
    pins_ = std::make_unique<MountedVolume>("none", scratch_.directory("pins"), "bpf");
    if (!pins_->valid()) GTEST_SKIP() << "no bpf filesystem to be had";
    disk_ = std::make_unique<LoopDevice>(scratch_.file("disk", bytes));
    ASSERT_TRUE(disk_->valid());
    auto tracker = attached(disk_->path());
    ASSERT_TRUE(tracker);
    const auto pinned = tracker->pin(directory());
    ASSERT_TRUE(pinned) << pinned.error().message();
    tracker_ = std::move(tracker);
    fd_ = open_direct(disk_->path());
  }

  std::string directory() const { return scratch_.path("pins/run"); }
  std::set<std::uint64_t> change(std::uint64_t seed) {
    std::mt19937_64 random(seed);
    return change_at_random(fd_.get(), granules, random, true);
  }
  Result<std::unique_ptr<EbpfTracker>> adopt(const std::string& path, std::uint64_t granule_bytes = page) {
    return EbpfTracker::adopt(directory(), *tracked_range_of(path), granule_bytes);
  }

  std::unique_ptr<MountedVolume> pins_;
  std::unique_ptr<LoopDevice> disk_;
  FileDescriptor fd_;
  std::unique_ptr<EbpfTracker> tracker_;
};

TEST_F(PinnedTrackerTest, GoesOnWhileNobodyIsThere) {
  auto expected = change(1);
  tracker_.reset();
  expected.merge(change(2));
  auto tracker = adopt(disk_->path());
  ASSERT_TRUE(tracker) << tracker.error().message();
  auto found = collected(**tracker, granules);  // what was not released: nothing, or all
  found.merge(collected(**tracker, granules));
  expect_marks(**tracker, found, expected);
  expect_no_losses(**tracker);
}

TEST_F(PinnedTrackerTest, WhatWasNotReleasedIsGivenAgain) {
  auto all = change(3);
  ChangeBitmap dirty(granules);
  ASSERT_TRUE(tracker_->collect(dirty));
  all.merge(change(4));
  tracker_.reset();
  all.merge(change(5));
  auto tracker = adopt(disk_->path());
  ASSERT_TRUE(tracker) << tracker.error().message();
  expect_marks(**tracker, collected(**tracker, granules), all);
  expect_marks(**tracker, collected(**tracker, granules), {}, all);
}

TEST_F(PinnedTrackerTest, WhatWasCollectedInPartsIsGivenAgainAsAWhole) {
  std::set<std::uint64_t> all;
  for (const std::uint64_t seed : {6, 7, 8}) {
    const auto changed = change(seed);
    ChangeBitmap dirty(granules);
    ASSERT_TRUE(tracker_->collect(dirty));
    EXPECT_GE(dirty.count(), changed.size());
    all.insert(changed.begin(), changed.end());
  }
  tracker_.reset();
  auto tracker = adopt(disk_->path());
  ASSERT_TRUE(tracker) << tracker.error().message();
  expect_marks(**tracker, collected(**tracker, granules), all);
  expect_marks(**tracker, collected(**tracker, granules), {}, all);
}

TEST_F(PinnedTrackerTest, IsNotTakenForAnothers) {
  tracker_.reset();
  const LoopDevice other(scratch_.file("other", bytes));
  ASSERT_TRUE(other.valid());
  for (const auto& refused : {adopt(other.path()), adopt(disk_->path(), 2 * page)}) {
    ASSERT_FALSE(refused);
    EXPECT_EQ(refused.error().code, ErrorCode::state_damaged);
  }
  EXPECT_TRUE(adopt(disk_->path()));
}

TEST_F(PinnedTrackerTest, AnotherCannotTakeItsPlace) {
  tracker_.reset();
  auto other = attached(disk_->path());
  ASSERT_TRUE(other);
  EXPECT_FALSE(other->pin(directory()));
  EXPECT_TRUE(adopt(disk_->path()));
}

TEST_F(PinnedTrackerTest, WithAnyPinGoneIsNotTrusted) {
  tracker_.reset();
  ASSERT_EQ(::unlink((directory() + "/on_bio_queue").c_str()), 0);
  const auto refused = adopt(disk_->path());
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code, ErrorCode::state_damaged);
}

TEST_F(PinnedTrackerTest, EndsWithItsPins) {
  tracker_.reset();
  EbpfTracker::remove_pins(directory());
  EXPECT_NE(::access(directory().c_str(), F_OK), 0);
  EXPECT_FALSE(adopt(disk_->path()));
}

TEST_F(EbpfTrackerTest, AVolumeThatIsGoneOrHasAnotherSizeIsNot) {
  const std::string file = scratch_.file("disk", 64 * MiB);
  LoopDevice disk(file);
  ASSERT_TRUE(disk.valid());
  auto tracker = attached(disk.path());
  ASSERT_TRUE(tracker);
  ASSERT_EQ(::truncate(file.c_str(), 96 * MiB), 0);
  const FileDescriptor fd(::open(disk.path().c_str(), O_RDWR | O_CLOEXEC));
  ASSERT_EQ(::ioctl(fd.get(), LOOP_SET_CAPACITY, 0), 0);
  ChangeBitmap dirty(64 * MiB / page);
  const auto done = tracker->collect(dirty);
  ASSERT_FALSE(done);
  EXPECT_EQ(done.error().code, ErrorCode::device_gone);
}

TEST_F(EbpfTrackerTest, NothingElseIsTracked) {
  const std::string file = scratch_.file("file", MiB);
  const auto range = tracked_range_of(file);
  ASSERT_FALSE(range);
  EXPECT_EQ(range.error().code, ErrorCode::unsupported);
}

}  // namespace
}  // namespace blockferry::test
