// SPDX-License-Identifier: Apache-2.0
// The tracker on devices that cut bios to pieces: device-mapper at the ends of segments, md at those of
// chunks.
#include <fstream>

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

/// Two disks striped by md.
class StripedDevice {
 public:
  StripedDevice(const std::string& first, const std::string& second) {
    made_ = run_program({"mdadm", "--build", path(), "--level=0", "--chunk=64", "--raid-devices=2", first,
                         second}) == 0;
  }
  ~StripedDevice() {
    if (made_) run_program({"mdadm", "--stop", path()});
  }
  StripedDevice(const StripedDevice&) = delete;
  StripedDevice& operator=(const StripedDevice&) = delete;
  bool valid() const { return made_; }
  static std::string path() { return "/dev/md177"; }

 private:
  bool made_ = false;
};

/// md tells of the ends of parts of whose beginnings it did not tell.
TEST_F(EbpfTrackerMappedTest, MarksWhatWasWrittenAcrossChunks) {
  const StripedDevice striped(first_.path(), second_.path());
  ASSERT_TRUE(striped.valid());
  expect_exact_marks(StripedDevice::path(), 2 * segment);
  expect_faithful_copy(StripedDevice::path(), 2 * segment);
}

}  // namespace
}  // namespace blockferry::test
