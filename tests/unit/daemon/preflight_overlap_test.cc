// SPDX-License-Identifier: Apache-2.0
// Volumes that share bytes without standing on one another, uses that leave few traces, and that preflight
// itself leaves none.
#include <cstdio>

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/inotify.h>
#include <unistd.h>

#include "blockio/base/file_descriptor.h"
#include "daemon/references.h"
#include "daemon/storage_stack.h"
#include "tests/unit/daemon/preflight_fixture.h"

namespace blockferry {
namespace {

using namespace test;

VolumeNode node_of(const std::string& path) {
  VolumeNode node;
  EXPECT_TRUE(node_of_path(path, node)) << path;
  return node;
}

LoopOptions part_of_file(std::uint64_t offset, std::uint64_t bytes) {
  LoopOptions options;
  options.offset = offset;
  options.bytes = bytes;
  return options;
}

std::string text_file(const ScratchDirectory& scratch, const std::string& name, const std::string& text) {
  return scratch.file(name, text.size(), text);
}

/// A table with one partition at 1 MiB; the test itself tells the kernel of it.
void write_table(const ScratchDirectory& scratch, const std::string& disk) {
  const std::string script = text_file(scratch, "script", "label: gpt\nstart=1MiB, size=4MiB, name=first\n");
  ASSERT_EQ(run_program({"sh", "-c", "sfdisk --quiet --no-reread " + disk + " < " + script}), 0);
}

class PreflightOverlapTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (const std::string why = volumes_missing(); !why.empty()) GTEST_SKIP() << why;
  }
  /// With every word that excuses something.
  static RunRequest insisting(const std::string& source, const std::string& target) {
    RunRequest request = clone_of(source, target);
    request.overwrite = request.force = true;
    return request;
  }
  ScratchDirectory scratch_;
  const std::string file_ = scratch_.file("file", 16 * MiB);
};

TEST_F(PreflightOverlapTest, LoopDevicesOnOneFileShareOnlyWhatTheyBothCover) {
  const LoopDevice first(file_, part_of_file(0, 4 * MiB)), next(file_, part_of_file(4 * MiB, 4 * MiB)),
      across(file_, part_of_file(2 * MiB, 4 * MiB));
  ASSERT_TRUE(first.valid() && next.valid() && across.valid());
  EXPECT_FALSE(same_storage(node_of(first.path()), node_of(next.path())));
  EXPECT_TRUE(same_storage(node_of(first.path()), node_of(across.path())));
  EXPECT_TRUE(same_storage(node_of(across.path()), node_of(next.path())));
  EXPECT_EQ(use_of(node_of(first.path()), false).holders, std::vector<std::string>{across.name()});
}

TEST_F(PreflightOverlapTest, PartitionsOfTwoLoopDevicesAreComparedByTheirBytes) {
  LoopDevice one(file_), other(file_);
  ASSERT_TRUE(one.valid() && other.valid());
  const std::string low = one.add_partition(1, 1 * MiB, 4 * MiB),
                    high = other.add_partition(1, 8 * MiB, 4 * MiB),
                    alias = other.add_partition(2, 2 * MiB, 2 * MiB);
  if (low.empty() || high.empty() || alias.empty()) GTEST_SKIP() << "no nodes of partitions here";
  EXPECT_FALSE(same_storage(node_of(low), node_of(high)));
  EXPECT_TRUE(same_storage(node_of(low), node_of(alias)));
  EXPECT_TRUE(same_storage(node_of(low), node_of(other.path())));
}

TEST_F(PreflightOverlapTest, ALoopDeviceOverTheDiskOfTheSourceIsRefused) {
  LoopDevice disk(file_);
  ASSERT_TRUE(disk.valid());
  const std::string part = disk.add_partition(1, 1 * MiB, 4 * MiB);
  const LoopDevice above(disk.path());
  ASSERT_TRUE(above.valid());
  if (part.empty()) GTEST_SKIP() << "no nodes of partitions here";
  expect_refused(insisting(part, above.path()), above.path(), "same bytes");
  expect_refused(insisting(above.path(), part), part, "same bytes");
}

TEST_F(PreflightOverlapTest, AReadOnlyLoopDeviceDisturbsATargetOnly) {
  LoopOptions options;
  options.read_only = true;
  const LoopDevice reader(file_, options);
  ASSERT_TRUE(reader.valid());
  const std::string other = scratch_.file("other", 16 * MiB);
  expect_accepted(clone_of(file_, scratch_.path("new")));
  expect_refused(insisting(other, file_), file_, "held by " + reader.name());
}

TEST_F(PreflightOverlapTest, WhoWritesBelowAVolumeWritesTheVolume) {
  LoopDevice disk(file_);
  ASSERT_TRUE(disk.valid());
  const std::string part = disk.add_partition(1, 1 * MiB, 4 * MiB), target = scratch_.path("new");
  {
    const auto writer = open_elsewhere(file_, O_RDWR);
    ASSERT_TRUE(writer->valid());
    expect_refused(clone_of(disk.path(), target), disk.path(), "open for writing");
  }
  if (part.empty()) GTEST_SKIP() << "no nodes of partitions here";
  {
    const auto writer = open_elsewhere(disk.path(), O_WRONLY);
    ASSERT_TRUE(writer->valid());
    expect_refused(clone_of(part, target), part, "open for writing");
  }
  expect_accepted(clone_of(part, target));
}

TEST_F(PreflightOverlapTest, ATargetHeldExclusivelyIsRefused) {
  const LoopDevice target(file_);
  ASSERT_TRUE(target.valid());
  const std::string source = scratch_.file("source", 1 * MiB);
  {
    const auto holder = open_elsewhere(target.path(), O_RDONLY | O_EXCL);
    ASSERT_TRUE(holder->valid());
    expect_refused(insisting(source, target.path()), target.path(), "held exclusively");
  }
  expect_accepted(clone_of(source, target.path()));
}

TEST_F(PreflightOverlapTest, NothingIsOpenedForWriting) {
  const LoopDevice target(file_);
  ASSERT_TRUE(target.valid());
  const std::string source = scratch_.file("source", 1 * MiB), image = scratch_.file("image", 1 * MiB);
  const FileDescriptor watch(::inotify_init1(IN_CLOEXEC | IN_NONBLOCK));
  for (const auto& path : {target.path(), source, image}) {
    ASSERT_GE(::inotify_add_watch(watch.get(), path.c_str(),
                                  IN_CLOSE_WRITE | IN_MODIFY | IN_ATTRIB | IN_CLOSE_NOWRITE),
              0);
  }
  RunRequest request = clone_of(source, target.path());
  request.targets.push_back(image);
  expect_accepted(request);
  alignas(inotify_event) char events[16384];
  const ssize_t bytes = ::read(watch.get(), events, sizeof events);
  ASSERT_GT(bytes, 0) << "it did look";
  for (ssize_t at = 0; at < bytes;) {
    const auto* event = reinterpret_cast<const inotify_event*>(events + at);
    EXPECT_EQ(event->mask & (IN_CLOSE_WRITE | IN_MODIFY | IN_ATTRIB), 0u);
    at += ssize_t(sizeof(inotify_event) + event->len);
  }
}

TEST_F(PreflightOverlapTest, AnImagesPartitionTableDoesNotGoToOtherSectorsByItself) {
  LoopOptions large;
  large.sector_bytes = 4096;
  const LoopDevice target(scratch_.file("target", 16 * MiB), large);
  ASSERT_TRUE(target.valid());
  write_table(scratch_, file_);
  expect_refused(clone_of(file_, target.path()), target.path(), "made for sectors of 512");
  RunRequest request = clone_of(file_, target.path());
  request.force = true;
  expect_accepted(request);
  // An image of a disk of large sectors knows them by its table.
  const std::string image = scratch_.file("image", 16 * MiB);
  {
    const LoopDevice disk(image, large);
    ASSERT_TRUE(disk.valid());
    write_table(scratch_, disk.path());
  }
  expect_accepted(clone_of(image, target.path()));
  const LoopDevice small(scratch_.file("small", 16 * MiB));
  ASSERT_TRUE(small.valid());
  expect_refused(clone_of(image, small.path()), small.path(), "made for sectors of 4096");
}

TEST_F(PreflightOverlapTest, ASparseSourceThatMightNotFitIsAWarning) {
  const LoopDevice source(scratch_.file("large", 1 * TiB));
  ASSERT_TRUE(source.valid());
  const std::string target = scratch_.path("new");
  const PreflightReport report = report_on(clone_of(source.path(), target));
  EXPECT_EQ(text_of(report.refusals), "");
  EXPECT_TRUE(contains(text_of(report.warnings), target + ": up to 1")) << text_of(report.warnings);
  EXPECT_EQ(text_of(report_on(clone_of(scratch_.path("large"), target)).warnings), "")
      << "of a sparse file it is known how little that is";
}

TEST_F(PreflightOverlapTest, APartitionIsKnownByItsTableWithoutLinks) {
  LoopDevice disk(file_);
  ASSERT_TRUE(disk.valid());
  write_table(scratch_, disk.path());
  const std::string part = disk.add_partition(1, 1 * MiB, 4 * MiB);
  if (part.empty()) GTEST_SKIP() << "no nodes of partitions here";
  scratch_.directory("etc");
  text_file(scratch_, "etc/fstab", "PARTLABEL=first /a ext4\nPARTLABEL=second /b ext4\n");
  const std::string of_disk = text_of(references_to(disk.path(), node_of(disk.path()), scratch_.path()));
  EXPECT_TRUE(contains(of_disk, part + ": /etc/fstab names it: PARTLABEL=first")) << of_disk;
  EXPECT_FALSE(contains(of_disk, "second"));
  EXPECT_TRUE(contains(of_disk, part + ": the clone's partition will bear the same PARTUUID ")) << of_disk;
  const std::string of_part = text_of(references_to(part, node_of(part), scratch_.path()));
  EXPECT_TRUE(contains(of_part, "PARTLABEL=first"));
  EXPECT_FALSE(contains(of_part, "PARTUUID")) << "the clone of a partition stands in another table";
}

TEST(PreflightTargetNames, ALinkThatLeadsNowhereIsNotFollowed) {
  const ScratchDirectory scratch;
  const std::string source = scratch.file("source", 1 * MiB), link = scratch.path("link");
  ASSERT_EQ(::symlink("/dev/blockferry-none", link.c_str()), 0);
  expect_refused(clone_of(source, link), link, "leads nowhere");
  EXPECT_NE(::access("/dev/blockferry-none", F_OK), 0);
}

TEST(PreflightTargetNames, ADirectorysNameAndABrokenPathAreRefused) {
  const ScratchDirectory scratch;
  const std::string source = scratch.file("source", 1 * MiB), directory = scratch.path("new/");
  expect_refused(clone_of(source, directory), directory, "directory");
  const auto report = preflight(clone_of(source, scratch.path("a") + std::string("\0b", 2)), {});
  ASSERT_FALSE(report);
  EXPECT_EQ(report.error().code, ErrorCode::invalid_argument);
}

}  // namespace
}  // namespace blockferry
