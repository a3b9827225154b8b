// SPDX-License-Identifier: Apache-2.0
// The tracker on devices that cut bios to pieces (device-mapper at the ends of segments, md at those of
// chunks), that write others in their place (dm-crypt, md's mirrors), and on drivers that few machines have.
#include <cstdlib>
#include <fstream>
#include <sstream>

#include "tests/unit/bitmap/tracked_volume.h"

namespace blockferry::test {
namespace {

constexpr std::uint64_t segment = 16 * MiB, granules = 2 * segment / page;

/// A device-mapper device with this table. Not valid() where there is no device-mapper.
class MappedDevice {
 public:
  explicit MappedDevice(const std::string& table) {
    static int count = 0;
    name_ = "blockferry-test-" + std::to_string(::getpid()) + "-" + std::to_string(count++);
    valid_ = dmsetup("create", "printf '" + table + "' |") == 0;
  }
  ~MappedDevice() {
    if (valid_) dmsetup("remove --retry", "");
  }
  MappedDevice(const MappedDevice&) = delete;
  MappedDevice& operator=(const MappedDevice&) = delete;
  bool valid() const { return valid_; }
  std::string path() const { return "/dev/mapper/" + name_; }

 private:
  /// Its nodes are made by itself: there may be no udev.
  int dmsetup(const std::string& verb, const std::string& before) {
    return run_program({"sh", "-c", before + " DM_DISABLE_UDEV=1 dmsetup " + verb + " " + name_});
  }

  std::string name_;
  bool valid_ = false;
};

/// Two disks, of which the mapped devices have a segment each.
class EbpfTrackerMappedTest : public EbpfTrackerTest {
 protected:
  void SetUp() override {
    EbpfTrackerTest::SetUp();
    if (IsSkipped()) return;
    if (::access("/dev/mapper/control", F_OK) != 0) GTEST_SKIP() << "no device-mapper in this kernel";
    ASSERT_TRUE(first_.valid() && second_.valid());
  }
  static std::string line(std::uint64_t start, const std::string& target) {
    return std::to_string(start / 512) + " " + std::to_string(segment / 512) + " " + target + "\\n";
  }

  LoopDevice first_{scratch_.file("first", segment)}, second_{scratch_.file("second", segment)};
};

TEST_F(EbpfTrackerMappedTest, MarksWhatWasWrittenAcrossSegments) {
  const MappedDevice mapped(line(0, "linear " + first_.path() + " 0") +
                            line(segment, "linear " + second_.path() + " 0"));
  ASSERT_TRUE(mapped.valid());
  expect_exact_marks(mapped.path(), 2 * segment);
  expect_faithful_copy(mapped.path(), 2 * segment);
}

/// The kernel cuts a discard to what the device takes at a time.
TEST_F(EbpfTrackerMappedTest, NothingStandsOfADiscardInManyParts) {
  const MappedDevice mapped(line(0, "linear " + first_.path() + " 0") +
                            line(segment, "linear " + second_.path() + " 0"));
  ASSERT_TRUE(mapped.valid());
  auto tracker = attached(mapped.path());
  ASSERT_TRUE(tracker);
  std::ofstream(tracked_range_of(mapped.path())->sysfs + "/queue/discard_max_bytes") << 64 * KiB;
  const auto fd = open_direct(mapped.path());
  constexpr std::uint64_t first = segment / page - 256, count = 512;
  std::uint64_t range[2] = {first * page, count * page};
  ASSERT_EQ(::ioctl(fd.get(), BLKDISCARD, range), 0) << std::strerror(errno);
  std::set<std::uint64_t> discarded;
  for (std::uint64_t granule = first; granule < first + count; ++granule) discarded.insert(granule);
  expect_marks(*tracker, collected(*tracker, granules), discarded);
  const auto queued = tracker->queued();
  EXPECT_TRUE(queued.empty()) << queued.size() << " ranges stand";
  expect_no_losses(*tracker);
}

/// Its first part lands long after the second one, when the pass that took the marks of both is over.
TEST_F(EbpfTrackerMappedTest, APartThatLandsLateIsMarkedThen) {
  const MappedDevice mapped(line(0, "delay " + first_.path() + " 0 0 " + first_.path() + " 0 1000") +
                            line(segment, "linear " + second_.path() + " 0"));
  ASSERT_TRUE(mapped.valid());
  auto tracker = attached(mapped.path());
  ASSERT_TRUE(tracker);
  const auto fd = open_direct(mapped.path()), second = open_direct(second_.path());
  constexpr std::uint64_t first = segment / page - 4, count = 8;
  std::set<std::uint64_t> written;
  for (std::uint64_t granule = first; granule < first + count; ++granule) written.insert(granule);
  std::atomic<bool> landed{false};
  std::thread writer([&] {
    Granules data(count);
    std::memset(data.data(), 0xab, data.bytes());
    EXPECT_EQ(::pwrite(fd.get(), data.data(), data.bytes(), off_t(first * page)), ssize_t(data.bytes()));
    landed = true;
  });
  Granules there(1);
  while (there[0].bytes[0] != std::byte(0xab) && !landed)
    EXPECT_EQ(::pread(second.get(), there.data(), page, 0), ssize_t(page));
  expect_marks(*tracker, collected(*tracker, granules), written);
  EXPECT_FALSE(landed) << "the first part has landed too soon for this test to tell anything";
  writer.join();
  expect_marks(*tracker, collected(*tracker, granules), written);
  EXPECT_TRUE(collected(*tracker, granules).empty());
  expect_no_losses(*tracker);
}

/// What is written is a copy, and its end tells that of the original. With a cipher that costs nothing: this
/// may be emulated.
TEST_F(EbpfTrackerMappedTest, MarksWhatWasWrittenEncrypted) {
  const MappedDevice mapped(
      line(0, "crypt cipher_null-ecb - 0 " + first_.path() + " 0 1 allow_discards") +
      line(segment, "crypt cipher_null-ecb - 0 " + second_.path() + " 0 1 allow_discards"));
  ASSERT_TRUE(mapped.valid());
  expect_exact_marks(mapped.path(), 2 * segment);
  expect_faithful_copy(mapped.path(), 2 * segment);
}

/// Two disks joined by md.
class RaidDevice {
 public:
  /// `words`: level, and the disks.
  explicit RaidDevice(const std::vector<std::string>& words) {
    std::vector<std::string> command{"mdadm", "--build", path(), "--raid-devices=2"};
    command.insert(command.end(), words.begin(), words.end());
    made_ = run_program(command) == 0;
  }
  ~RaidDevice() {
    if (made_) run_program({"mdadm", "--stop", path()});
  }
  RaidDevice(const RaidDevice&) = delete;
  RaidDevice& operator=(const RaidDevice&) = delete;
  bool valid() const { return made_; }
  static std::string path() { return "/dev/md177"; }

 private:
  bool made_ = false;
};

/// md tells of the ends of parts of whose beginnings it did not tell.
TEST_F(EbpfTrackerMappedTest, MarksWhatWasWrittenAcrossChunks) {
  const RaidDevice striped({"--level=0", "--chunk=64", first_.path(), second_.path()});
  ASSERT_TRUE(striped.valid());
  expect_exact_marks(RaidDevice::path(), 2 * segment);
  expect_faithful_copy(RaidDevice::path(), 2 * segment);
}

/// One disk is read: where two write to one place at a time, the other may come to hold another's bytes.
TEST_F(EbpfTrackerMappedTest, MarksWhatWasWrittenToBothSidesOfAMirror) {
  const RaidDevice mirror({"--level=1", "--assume-clean", first_.path(), "--write-mostly", second_.path()});
  ASSERT_TRUE(mirror.valid());
  expect_exact_marks(RaidDevice::path(), segment);
  expect_faithful_copy(RaidDevice::path(), segment);
}

using EbpfTrackerDriversTest = EbpfTrackerTest;

/// Those that the environment names, which has loaded their drivers.
TEST_F(EbpfTrackerDriversTest, MarksWhatWasWritten) {
  const char* const disks = std::getenv("BLOCKFERRY_TEST_DISKS");
  if (disks == nullptr) GTEST_SKIP() << "BLOCKFERRY_TEST_DISKS names none";
  std::istringstream words(disks);
  for (std::string disk; words >> disk;) {
    SCOPED_TRACE(disk);
    std::uint64_t bytes = 0;
    ASSERT_EQ(::ioctl(open_direct(disk).get(), BLKGETSIZE64, &bytes), 0) << std::strerror(errno);
    expect_exact_marks(disk, bytes);
    expect_faithful_copy(disk, bytes);
  }
}

}  // namespace
}  // namespace blockferry::test
