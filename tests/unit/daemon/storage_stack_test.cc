// SPDX-License-Identifier: Apache-2.0
// What stands on what, on real loop devices, partitions, mounts and swap.
#include "daemon/storage_stack.h"

#include <algorithm>

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include "blockio/base/units.h"
#include "tests/support/loop_device.h"

namespace blockferry {
namespace {

using namespace test;

VolumeNode node_of(const std::string& path) {
  VolumeNode node;
  EXPECT_TRUE(node_of_path(path, node)) << path;
  return node;
}

bool holds(const std::vector<std::string>& list, const std::string& text) {
  return std::find(list.begin(), list.end(), text) != list.end();
}

TEST(StorageStackOfFiles, AFileIsTheSameByEachOfItsNames) {
  const ScratchDirectory scratch;
  const std::string file = scratch.file("file", 1 * MiB), other = scratch.file("other", 1 * MiB);
  ASSERT_EQ(::link(file.c_str(), scratch.path("hard").c_str()), 0);
  ASSERT_EQ(::symlink("file", scratch.path("soft").c_str()), 0);
  for (const char* name : {"hard", "soft"}) {
    EXPECT_EQ(node_of(file), node_of(scratch.path(name))) << name;
    EXPECT_TRUE(same_storage(node_of(file), node_of(scratch.path(name)))) << name;
  }
  EXPECT_FALSE(node_of(file).block);
  EXPECT_FALSE(node_of(file) == node_of(other));
  EXPECT_FALSE(same_storage(node_of(file), node_of(other))) << "two files of one filesystem are two volumes";
  VolumeNode node;
  EXPECT_FALSE(node_of_path(scratch.path("missing"), node));
}

TEST(StorageStackOfFiles, AFileIsInUseWhileSomebodyElseMayWriteIt) {
  const ScratchDirectory scratch;
  const std::string file = scratch.file("file", 1 * MiB);
  EXPECT_FALSE(use_of(node_of(file), true).any());
  EXPECT_EQ(use_of(node_of(file), true).reason(), "");
  {
    const auto reader = open_elsewhere(file, O_RDONLY);
    ASSERT_TRUE(reader->valid());
    EXPECT_FALSE(use_of(node_of(file), true).any()) << "a reader changes nothing";
  }
  for (const int flags : {O_WRONLY, O_RDWR, O_WRONLY | O_APPEND}) {
    const auto writer = open_elsewhere(file, flags);
    ASSERT_TRUE(writer->valid());
    const VolumeUse use = use_of(node_of(file), true);
    ASSERT_EQ(use.writers.size(), 1u) << flags;
    const std::string process = "process " + std::to_string(writer->pid()) + " (";
    EXPECT_TRUE(use.writers[0].starts_with(process)) << use.writers[0];
    EXPECT_TRUE(use.reason().starts_with("open for writing in " + process)) << use.reason();
    EXPECT_FALSE(use_of(node_of(file), false).any()) << "asked not to look";
  }
  EXPECT_FALSE(use_of(node_of(file), true).any()) << "the writer has gone";
}

TEST(StorageStackOfFiles, OurOwnDescriptorsAreNoWriters) {
  const ScratchDirectory scratch;
  const std::string file = scratch.file("file", 1 * MiB);
  const int fd = ::open(file.c_str(), O_RDWR | O_CLOEXEC);
  ASSERT_GE(fd, 0);
  EXPECT_FALSE(use_of(node_of(file), true).any());
  ::close(fd);
}

TEST(VolumeUseReason, TheWeightiestComesFirst) {
  VolumeUse use;
  EXPECT_EQ(use.reason(), "");
  use.writers = {"process 7 (qemu)"};
  EXPECT_EQ(use.reason(), "open for writing in process 7 (qemu)");
  use.holders = {"dm-0 (vg-root)", "swap"};
  EXPECT_EQ(use.reason(), "held by dm-0 (vg-root)");
  use.holders = {"swap"};
  EXPECT_EQ(use.reason(), "in use as swap");
  use.readers = {"loop4"};
  EXPECT_EQ(use.reason(), "in use as swap");
  use.mounts = {"/srv", "/mnt"};
  EXPECT_EQ(use.reason(), "mounted on /srv");
}

TEST(UnescapeOctal, UndoesWhatTheKernelEscapes) {
  EXPECT_EQ(unescape_octal(""), "");
  EXPECT_EQ(unescape_octal("/a\\040b\\011c\\134d\\012"), "/a b\tc\\d\n");
  EXPECT_EQ(unescape_octal("\\303\\244"), "\xC3\xA4");
  for (const char* text : {"\\", "\\04", "\\400", "\\089", "\\x41", "a\\"})
    EXPECT_EQ(unescape_octal(text), text);
}

class StorageStackTest : public ::testing::TestWithParam<unsigned> {
 protected:
  void SetUp() override {
    if (const std::string why = volumes_missing(); !why.empty()) GTEST_SKIP() << why;
  }
  LoopOptions sectors() const {
    LoopOptions options;
    options.sector_bytes = GetParam();
    return options;
  }
  ScratchDirectory scratch_;
};

TEST_P(StorageStackTest, ALoopDeviceStandsOnItsFile) {
  const std::string file = scratch_.file("file", 4 * MiB);
  const LoopDevice loop(file, sectors());
  ASSERT_TRUE(loop.valid());
  const VolumeNode on = node_of(loop.path()), below = node_of(file);
  EXPECT_TRUE(on.block);
  EXPECT_EQ(device_path(on.device), loop.path());
  EXPECT_FALSE(is_partition(on.device));
  EXPECT_TRUE(partitions_of(on.device).empty());
  const auto extents = extents_below(on);
  ASSERT_GE(extents.size(), 2u);
  EXPECT_EQ(extents[0].node, on);
  EXPECT_EQ(extents[1], (StorageExtent{below, 0, 4 * MiB, true}));
  EXPECT_TRUE(same_storage(on, below));
  EXPECT_TRUE(same_storage(below, on));
  EXPECT_EQ(use_of(below, false).holders, std::vector<std::string>{loop.name()});
  EXPECT_FALSE(use_of(on, true).any());
}

TEST_P(StorageStackTest, LoopDevicesStackUp) {
  const std::string file = scratch_.file("file", 4 * MiB);
  const LoopDevice first(file, sectors());
  const LoopDevice second(first.path(), sectors());
  ASSERT_TRUE(first.valid() && second.valid());
  EXPECT_TRUE(same_storage(node_of(second.path()), node_of(file)));
  EXPECT_TRUE(same_storage(node_of(file), node_of(second.path())));
  EXPECT_EQ(use_of(node_of(first.path()), false).holders, std::vector<std::string>{second.name()});
  const auto extents = extents_below(node_of(second.path()));
  ASSERT_GE(extents.size(), 3u);
  EXPECT_EQ(extents[1].node, node_of(first.path()));
  EXPECT_EQ(extents[2].node, node_of(file));
}

TEST_P(StorageStackTest, OneFileUnderTwoLoopDevicesIsOneStorage) {
  const std::string file = scratch_.file("file", 4 * MiB);
  const LoopDevice first(file, sectors()), second(file, sectors());
  ASSERT_TRUE(first.valid() && second.valid());
  EXPECT_TRUE(same_storage(node_of(first.path()), node_of(second.path())));
}

TEST_P(StorageStackTest, LoopDevicesOnPartsOfOneFileShareOnlyWhereTheyOverlap) {
  const std::string file = scratch_.file("file", 8 * MiB);
  const auto part = [&](std::uint64_t offset, std::uint64_t bytes) {
    LoopOptions options = sectors();
    options.offset = offset;
    options.bytes = bytes;
    return std::make_unique<LoopDevice>(file, options);
  };
  const auto first = part(0, 4 * MiB), second = part(4 * MiB, 4 * MiB), across = part(4 * MiB - 4096, 8192);
  ASSERT_TRUE(first->valid() && second->valid() && across->valid());
  EXPECT_FALSE(same_storage(node_of(first->path()), node_of(second->path())));
  EXPECT_TRUE(same_storage(node_of(first->path()), node_of(across->path())));
  EXPECT_TRUE(same_storage(node_of(across->path()), node_of(second->path())));
}

TEST_P(StorageStackTest, AReadOnlyLoopDeviceIsAReader) {
  const std::string file = scratch_.file("file", 4 * MiB);
  LoopOptions options = sectors();
  options.read_only = true;
  const LoopDevice loop(file, options);
  ASSERT_TRUE(loop.valid());
  const VolumeUse use = use_of(node_of(file), false);
  EXPECT_TRUE(use.holders.empty());
  EXPECT_EQ(use.readers, std::vector<std::string>{loop.name()});
  EXPECT_FALSE(use.may_be_written());
  EXPECT_TRUE(use.any());
  EXPECT_EQ(use.reason(), "held by " + loop.name() + " (read-only)");
}

TEST_P(StorageStackTest, AFileOfAMountedImageStandsOnIt) {
  const std::string image = scratch_.file("image", 16 * MiB);
  const LoopDevice loop(image, sectors());
  ASSERT_TRUE(loop.valid());
  ASSERT_EQ(run_program({"mkfs.ext4", "-q", "-F", loop.path()}), 0);
  const std::string point = scratch_.directory("point");
  const MountedVolume mount(loop.path(), point);
  ASSERT_TRUE(mount.valid());
  for (const char* name : {"/one", "/two"}) ASSERT_EQ(::mknod((point + name).c_str(), S_IFREG | 0600, 0), 0);
  EXPECT_TRUE(same_storage(node_of(point + "/one"), node_of(image)));
  EXPECT_TRUE(same_storage(node_of(loop.path()), node_of(point + "/one")));
  EXPECT_FALSE(same_storage(node_of(point + "/one"), node_of(point + "/two")));
}

TEST_P(StorageStackTest, TwoLoopDevicesOnTwoFilesHaveNothingToDoWithEachOther) {
  const LoopDevice first(scratch_.file("one", 4 * MiB), sectors()),
      second(scratch_.file("two", 4 * MiB), sectors());
  ASSERT_TRUE(first.valid() && second.valid());
  EXPECT_FALSE(same_storage(node_of(first.path()), node_of(second.path())));
}

TEST_P(StorageStackTest, PartitionsStandOnTheirDiskAndNotOnEachOther) {
  LoopDevice disk(scratch_.file("disk", 8 * MiB), sectors());
  ASSERT_TRUE(disk.valid());
  const std::string first = disk.add_partition(1, 1 * MiB, 2 * MiB),
                    second = disk.add_partition(2, 4 * MiB, 2 * MiB);
  if (first.empty() || second.empty()) GTEST_SKIP() << "no nodes of partitions here";
  const VolumeNode whole = node_of(disk.path()), one = node_of(first), two = node_of(second);
  EXPECT_TRUE(is_partition(one.device));
  EXPECT_EQ(device_path(one.device), first);
  auto partitions = partitions_of(whole.device);
  std::sort(partitions.begin(), partitions.end());
  auto expected = std::vector<dev_t>{one.device, two.device};
  std::sort(expected.begin(), expected.end());
  EXPECT_EQ(partitions, expected);
  EXPECT_TRUE(same_storage(whole, one));
  EXPECT_TRUE(same_storage(two, whole));
  EXPECT_FALSE(same_storage(one, two));
}

TEST_P(StorageStackTest, AMountedPartitionKeepsItsDiskBusyAndItsNeighbourFree) {
  LoopDevice disk(scratch_.file("disk", 32 * MiB), sectors());
  ASSERT_TRUE(disk.valid());
  const std::string first = disk.add_partition(1, 1 * MiB, 16 * MiB),
                    second = disk.add_partition(2, 20 * MiB, 8 * MiB);
  if (first.empty() || second.empty()) GTEST_SKIP() << "no nodes of partitions here";
  ASSERT_EQ(run_program({"mkfs.ext4", "-q", "-F", first}), 0);
  const std::string point = scratch_.directory("point");
  const MountedVolume mount(first, point);
  ASSERT_TRUE(mount.valid());
  EXPECT_EQ(use_of(node_of(first), false).mounts, std::vector<std::string>{point});
  EXPECT_EQ(use_of(node_of(disk.path()), false).mounts, std::vector<std::string>{point});
  EXPECT_FALSE(use_of(node_of(second), false).any());
}

TEST_P(StorageStackTest, ADiskInUseAsAWholeKeepsItsPartitionsBusy) {
  LoopDevice disk(scratch_.file("disk", 8 * MiB), sectors());
  ASSERT_TRUE(disk.valid());
  const std::string part = disk.add_partition(1, 1 * MiB, 2 * MiB);
  if (part.empty()) GTEST_SKIP() << "no nodes of partitions here";
  EXPECT_FALSE(use_of(node_of(part), true).any());
  const auto writer = open_elsewhere(disk.path(), O_RDWR);
  ASSERT_TRUE(writer->valid());
  EXPECT_EQ(use_of(node_of(part), true).writers.size(), 1u);
}

TEST_P(StorageStackTest, AMountIsSeenByItsPlainName) {
  const LoopDevice loop(scratch_.file("file", 16 * MiB), sectors());
  ASSERT_TRUE(loop.valid());
  ASSERT_EQ(run_program({"mkfs.ext4", "-q", "-F", loop.path()}), 0);
  const std::string point = scratch_.directory("a point\twith\\everything");
  const MountedVolume mount(loop.path(), point);
  ASSERT_TRUE(mount.valid());
  const VolumeUse use = use_of(node_of(loop.path()), false);
  EXPECT_EQ(use.mounts, std::vector<std::string>{point}) << "mountinfo escapes blanks";
  EXPECT_EQ(use.reason(), "mounted on " + point);
  const std::string file = point + "/file";
  const int fd = ::open(file.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  ASSERT_GE(fd, 0);
  ::close(fd);
  EXPECT_TRUE(same_storage(node_of(file), node_of(loop.path())))
      << "a file stands on its filesystem's device";
}

TEST_P(StorageStackTest, AMountInAnotherNamespaceIsSeen) {
  const LoopDevice loop(scratch_.file("file", 16 * MiB), sectors());
  ASSERT_TRUE(loop.valid());
  ASSERT_EQ(run_program({"mkfs.ext4", "-q", "-F", loop.path()}), 0);
  const std::string point = scratch_.directory("point");
  {
    const auto other = mounted_elsewhere(loop.path(), point);
    if (!other->valid()) GTEST_SKIP() << "no mount namespaces here";
    EXPECT_EQ(use_of(node_of(loop.path()), false).mounts, std::vector<std::string>{point});
  }
  EXPECT_TRUE(use_of(node_of(loop.path()), false).mounts.empty()) << "gone with its namespace";
}

TEST_P(StorageStackTest, SwapIsAHolder) {
  const LoopDevice loop(scratch_.file("file", 4 * MiB), sectors());
  ASSERT_TRUE(loop.valid());
  ASSERT_EQ(run_program({"mkswap", loop.path()}), 0);
  EXPECT_FALSE(use_of(node_of(loop.path()), false).any()) << "prepared is not in use";
  const SwapArea swap(loop.path());
  if (!swap.valid()) GTEST_SKIP() << "no swap here";
  const VolumeUse use = use_of(node_of(loop.path()), false);
  EXPECT_TRUE(holds(use.holders, "swap"));
  EXPECT_EQ(use.reason(), "in use as swap");
}

TEST_P(StorageStackTest, ADeviceOpenForWritingElsewhereIsInUse) {
  const LoopDevice loop(scratch_.file("file", 4 * MiB), sectors());
  ASSERT_TRUE(loop.valid());
  {
    const auto reader = open_elsewhere(loop.path(), O_RDONLY);
    ASSERT_TRUE(reader->valid());
    EXPECT_FALSE(use_of(node_of(loop.path()), true).any());
  }
  const auto writer = open_elsewhere(loop.path(), O_RDWR);
  ASSERT_TRUE(writer->valid());
  EXPECT_EQ(use_of(node_of(loop.path()), true).writers.size(), 1u);
}

INSTANTIATE_TEST_SUITE_P(Sectors, StorageStackTest, ::testing::Values(512u, 4096u),
                         [](const auto& parameter) { return std::to_string(parameter.param); });

}  // namespace
}  // namespace blockferry
