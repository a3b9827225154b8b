// SPDX-License-Identifier: Apache-2.0
// Preflight on real block devices of both sector sizes.
#include <fcntl.h>
#include <nlohmann/json.hpp>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "daemon/tracker_pins.h"
#include "daemon/volume_content.h"
#include "tests/unit/daemon/preflight_fixture.h"

namespace blockferry {
namespace {

using namespace test;

class PreflightDevicesTest : public ::testing::TestWithParam<unsigned> {
 protected:
  void SetUp() override {
    if (const std::string why = volumes_missing(); !why.empty()) GTEST_SKIP() << why;
  }
  LoopOptions sectors() const {
    LoopOptions options;
    options.sector_bytes = GetParam();
    return options;
  }
  std::unique_ptr<LoopDevice> loop(const std::string& name, std::uint64_t bytes, const LoopOptions& options) {
    auto made = std::make_unique<LoopDevice>(scratch_.file(name, bytes), options);
    EXPECT_TRUE(made->valid());
    return made;
  }
  std::unique_ptr<LoopDevice> loop(const std::string& name, std::uint64_t bytes) {
    return loop(name, bytes, sectors());
  }
  /// With every word that excuses something.
  static RunRequest insisting(const std::string& source, const std::string& target) {
    RunRequest request = clone_of(source, target);
    request.overwrite = request.force = true;
    return request;
  }
  ScratchDirectory scratch_;
};

TEST_P(PreflightDevicesTest, TwoFreeDevicesAreFine) {
  const auto source = loop("source", 4 * MiB), target = loop("target", 8 * MiB);
  const PreflightReport report = report_on(clone_of(source->path(), target->path()));
  EXPECT_EQ(text_of(report.refusals), "");
  EXPECT_EQ(text_of(report.warnings), "");
  EXPECT_EQ(report.source.kind, "block");
  EXPECT_EQ(report.source.bytes, 4 * MiB);
  EXPECT_EQ(report.source.logical_block_bytes, GetParam());
  EXPECT_EQ(report.source.resolved, source->path());
  EXPECT_EQ(report.targets.at(0).bytes, 8 * MiB);
  EXPECT_FALSE(report.targets[0].in_use);
  EXPECT_NE(report.source.identity, report.targets[0].identity);
}

TEST_P(PreflightDevicesTest, ATargetOneSectorTooSmallIsRefusedWhateverIsSaid) {
  const auto source = loop("source", 4 * MiB), target = loop("target", 4 * MiB - GetParam());
  expect_refused(clone_of(source->path(), target->path()), target->path(), "smaller than the source");
  expect_refused(insisting(source->path(), target->path()), target->path(), "smaller than the source");
  const std::string odd = scratch_.file("odd", 4 * MiB - GetParam() + 1);
  expect_refused(insisting(odd, target->path()), target->path(), "smaller than the source");
}

TEST_P(PreflightDevicesTest, ADeviceWithoutAMediumIsRefused) {
  const auto source = loop("source", 4 * MiB), empty = loop("empty", 0);
  EXPECT_NE(refusals_of(clone_of(empty->path(), source->path())), "");
  EXPECT_NE(refusals_of(clone_of(source->path(), empty->path())), "");
}

TEST_P(PreflightDevicesTest, AReadOnlyTargetIsRefused) {
  LoopOptions options = sectors();
  options.read_only = true;
  const auto source = loop("source", 4 * MiB), target = loop("target", 4 * MiB, options);
  expect_refused(insisting(source->path(), target->path()), target->path(), "read-only");
  expect_accepted(clone_of(target->path(), source->path()));
}

TEST_P(PreflightDevicesTest, TheSourceByAnotherNodeIsTheSourceItself) {
  const auto source = loop("source", 4 * MiB);
  ASSERT_EQ(::symlink(source->path().c_str(), scratch_.path("link").c_str()), 0);
  expect_refused(insisting(source->path(), scratch_.path("link")), scratch_.path("link"),
                 "the source itself");
  struct stat status {};
  ASSERT_EQ(::stat(source->path().c_str(), &status), 0);
  const std::string node = scratch_.path("node");
  if (::mknod(node.c_str(), S_IFBLK | 0600, status.st_rdev) != 0 || ::access(node.c_str(), R_OK) != 0) return;
  EXPECT_TRUE(contains(refusals_of(insisting(source->path(), node)), node + ": "));
}

TEST_P(PreflightDevicesTest, WhatLiesOnTheSourceOrUnderItIsRefused) {
  const std::string file = scratch_.file("file", 8 * MiB);
  const LoopDevice lower(file, sectors());
  const LoopDevice upper(lower.path(), sectors());
  ASSERT_TRUE(lower.valid() && upper.valid());
  const std::vector<std::string> stack{file, lower.path(), upper.path()};
  for (const auto& source : stack) {
    for (const auto& target : stack) {
      if (source == target) continue;
      expect_refused(insisting(source, target), target, "it lies on the source, or the source lies on it");
    }
  }
}

TEST_P(PreflightDevicesTest, AnotherLoopDeviceOnTheSourcesFileIsRefused) {
  const std::string file = scratch_.file("file", 8 * MiB);
  const LoopDevice source(file, sectors()), target(file, sectors());
  ASSERT_TRUE(source.valid() && target.valid());
  expect_refused(insisting(source.path(), target.path()), target.path(), "both on the same bytes");
}

TEST_P(PreflightDevicesTest, TwoTargetsOnOneFileAreRefused) {
  const auto source = loop("source", 4 * MiB);
  const std::string file = scratch_.file("file", 8 * MiB);
  const LoopDevice first(file, sectors()), second(file, sectors());
  ASSERT_TRUE(first.valid() && second.valid());
  RunRequest request = insisting(source->path(), first.path());
  request.targets.push_back(second.path());
  expect_refused(request, second.path(), "shares its storage with the target " + first.path());
}

TEST_P(PreflightDevicesTest, PartitionsAndTheirDiskAreNotCopiedOntoEachOther) {
  const auto disk = loop("disk", 16 * MiB);
  const std::string first = disk->add_partition(1, 1 * MiB, 4 * MiB),
                    second = disk->add_partition(2, 8 * MiB, 4 * MiB);
  if (first.empty() || second.empty()) GTEST_SKIP() << "no nodes of partitions here";
  expect_refused(insisting(disk->path(), first), first, "it lies on the source");
  expect_refused(insisting(first, disk->path()), disk->path(), "it lies on the source");
  expect_accepted(clone_of(first, second));
}

TEST_P(PreflightDevicesTest, ADiskAndItsPartitionAreNotTwoTargets) {
  const auto disk = loop("disk", 16 * MiB), source = loop("source", 2 * MiB);
  const std::string first = disk->add_partition(1, 1 * MiB, 4 * MiB);
  if (first.empty()) GTEST_SKIP() << "no nodes of partitions here";
  RunRequest request = insisting(source->path(), disk->path());
  request.targets.push_back(first);
  expect_refused(request, first, "shares its storage with the target " + disk->path());
}

TEST_P(PreflightDevicesTest, AMountedVolumeIsNoTargetAndALiveSource) {
  const auto mounted = loop("mounted", 16 * MiB), other = loop("other", 16 * MiB);
  ASSERT_EQ(run_program({"mkfs.ext4", "-q", "-F", mounted->path()}), 0);
  const std::string point = scratch_.directory("point");
  const MountedVolume mount(mounted->path(), point);
  ASSERT_TRUE(mount.valid());
  expect_refused(insisting(other->path(), mounted->path()), mounted->path(), "mounted on " + point);
  RunRequest request = clone_of(mounted->path(), other->path());
  if (live_tracking_missing().empty()) {
    const PreflightReport live = report_on(request);
    EXPECT_EQ(text_of(live.refusals), "");
    EXPECT_EQ(live.mode, "hybrid");
    EXPECT_EQ(live.tracker, "ebpf");
  }
  request.mode = RunMode::full;
  expect_refused(request, mounted->path(), "mounted on " + point);
  request.mode = RunMode::automatic;
  request.tracker = TrackerChoice::none;
  expect_refused(request, mounted->path(), "mounted on " + point);
  request.force = true;
  const PreflightReport report = report_on(request);
  EXPECT_EQ(text_of(report.refusals), "");
  EXPECT_TRUE(contains(text_of(report.warnings), "mounted on " + point));
  EXPECT_EQ(report.source.mounts, std::vector<std::string>{point});
  // A file on the source's own filesystem, there already or not.
  const std::string inside = point + "/target";
  request = insisting(mounted->path(), inside);
  request.tracker = TrackerChoice::none;
  expect_refused(request, inside, "on the source");
  ASSERT_EQ(::mknod(inside.c_str(), S_IFREG | 0600, 0), 0);
  expect_refused(request, inside, "on the source");
}

TEST_P(PreflightDevicesTest, AMountedFilesystemsFileUnderALoopDeviceIsInUse) {
  const std::string file = scratch_.file("file", 16 * MiB);
  const auto other = loop("other", 16 * MiB);
  const LoopDevice mounted(file, sectors()), alias(file, sectors());
  ASSERT_TRUE(mounted.valid() && alias.valid());
  ASSERT_EQ(run_program({"mkfs.ext4", "-q", "-F", mounted.path()}), 0);
  const MountedVolume mount(mounted.path(), scratch_.directory("point"));
  ASSERT_TRUE(mount.valid());
  expect_refused(insisting(other->path(), file), file, "held by");
  // What lies under the alias is mounted through another loop device.
  expect_refused(insisting(other->path(), alias.path()), alias.path(), "the target is ");
}

TEST_P(PreflightDevicesTest, ATargetMountedInAnotherNamespaceIsRefused) {
  const auto source = loop("source", 8 * MiB), target = loop("target", 16 * MiB);
  ASSERT_EQ(run_program({"mkfs.ext4", "-q", "-F", target->path()}), 0);
  const std::string point = scratch_.directory("point");
  const auto other = mounted_elsewhere(target->path(), point);
  if (!other->valid()) GTEST_SKIP() << "no mount namespaces here";
  expect_refused(insisting(source->path(), target->path()), target->path(), "mounted on " + point);
}

TEST_P(PreflightDevicesTest, ATargetHeldExclusivelyIsRefusedThoughNothingTellsWhoHoldsIt) {
  const auto source = loop("source", 4 * MiB), target = loop("target", 4 * MiB);
  const auto holder = open_elsewhere(target->path(), O_RDONLY | O_EXCL);
  ASSERT_TRUE(holder->valid());
  expect_refused(insisting(source->path(), target->path()), target->path(), "held exclusively");
  expect_accepted(clone_of(target->path(), source->path()));
}

TEST_P(PreflightDevicesTest, SwapIsInUse) {
  const auto source = loop("source", 4 * MiB), target = loop("target", 4 * MiB);
  ASSERT_EQ(run_program({"mkswap", target->path()}), 0);
  const SwapArea swap(target->path());
  if (!swap.valid()) GTEST_SKIP() << "no swap here";
  expect_refused(insisting(source->path(), target->path()), target->path(), "in use as swap");
  expect_refused(clone_of(target->path(), source->path()), target->path(), "in use as swap");
}

TEST_P(PreflightDevicesTest, ASignatureIsOverwrittenOnlyWhereSaid) {
  const auto source = loop("source", 4 * MiB), target = loop("target", 16 * MiB);
  const auto signed_by = [&](const std::vector<std::string>& program, const std::string& type) {
    ASSERT_EQ(run_program(program), 0) << program[0];
    EXPECT_EQ(content_of(target->path()).type, type);
    RunRequest request = clone_of(source->path(), target->path());
    expect_refused(request, target->path(), "a signature (" + type + ")");
    request.force = true;
    expect_refused(request, target->path(), "--overwrite replaces it");
    request.force = false;
    request.overwrite = true;
    expect_accepted(request);
  };
  signed_by(
      {"mkfs.ext4", "-q", "-F", "-L", "here", "-U", "11111111-2222-3333-4444-555555555555", target->path()},
      "ext4");
  const VolumeContent content = content_of(target->path());
  EXPECT_EQ(content.label, "here");
  EXPECT_EQ(content.uuid, "11111111-2222-3333-4444-555555555555");
  EXPECT_FALSE(content.partition_table);
  signed_by({"mkswap", target->path()}, "swap");
}

class PreflightTablesTest : public PreflightDevicesTest {
 protected:
  void write_table(const std::string& disk, const char* kind) {
    const std::string script = scratch_.file("script", 0);
    FILE* file = std::fopen(script.c_str(), "w");
    std::fprintf(file, "label: %s\nstart=1MiB, size=2MiB\n", kind);
    std::fclose(file);
    ASSERT_EQ(run_program({"sh", "-c", "sfdisk --quiet --no-reread " + disk + " < " + script}), 0);
  }
};

TEST_P(PreflightTablesTest, APartitionTableIsContent) {
  const auto source = loop("source", 4 * MiB), target = loop("target", 8 * MiB);
  for (const char* kind : {"dos", "gpt"}) {
    write_table(target->path(), kind);
    const VolumeContent content = content_of(target->path());
    EXPECT_TRUE(content.partition_table) << kind;
    EXPECT_EQ(content.type, kind);
    EXPECT_NE(content.table_uuid, "") << kind;
    RunRequest request = clone_of(source->path(), target->path());
    expect_refused(request, target->path(), std::string("a partition table (") + kind + ")");
    request.overwrite = true;
    expect_accepted(request);
  }
}

TEST_P(PreflightTablesTest, APartitionTableDoesNotGoToOtherSectorsByItself) {
  const auto source = loop("source", 4 * MiB), target = loop("target", 8 * MiB);
  LoopOptions others;
  others.sector_bytes = GetParam() == 512 ? 4096 : 512;
  const auto other = loop("other", 8 * MiB, others);
  expect_accepted(clone_of(source->path(), other->path()));
  for (const char* kind : {"dos", "gpt"}) {
    write_table(source->path(), kind);
    expect_accepted(clone_of(source->path(), target->path()));
    RunRequest request = clone_of(source->path(), other->path());
    request.overwrite = true;
    expect_refused(request, other->path(), "made for sectors of " + std::to_string(GetParam()));
    request.force = true;
    expect_accepted(request);
    expect_accepted(clone_of(source->path(), scratch_.path("file")));  // a file has no sectors
  }
}

TEST_P(PreflightDevicesTest, OtherRunsVolumesAreKnownByWhatTheyAre) {
  const auto source = loop("source", 4 * MiB), busy = loop("busy", 4 * MiB);
  ASSERT_EQ(::symlink(busy->path().c_str(), scratch_.path("link").c_str()), 0);
  for (const std::string& name : {busy->path(), scratch_.path("link")}) {
    expect_refused(clone_of(source->path(), name), name, "the target of run 7", {{busy->path(), "7", true}});
    expect_refused(clone_of(name, source->path()), name, "the target of run 7", {{busy->path(), "7", true}});
    expect_refused(clone_of(source->path(), name), name, "the source of run 7", {{busy->path(), "7", false}});
  }
  const LoopDevice above(busy->path(), sectors());
  ASSERT_TRUE(above.valid());
  expect_refused(clone_of(source->path(), above.path()), above.path(), "run 7", {{busy->path(), "7", true}});
}

TEST_P(PreflightDevicesTest, DevicesAreListedWithWhatIsKnownOfThem) {
  LoopOptions options = sectors();
  options.read_only = true;
  const auto plain = loop("plain", 4 * MiB, options), mounted = loop("mounted", 16 * MiB);
  ASSERT_EQ(run_program({"mkfs.ext4", "-q", "-F", mounted->path()}), 0);
  const std::string point = scratch_.directory("point");
  const MountedVolume mount(mounted->path(), point);
  ASSERT_TRUE(mount.valid());
  const auto list = list_devices();
  ASSERT_TRUE(list) << list.error().message();
  unsigned seen = 0;
  for (const auto& device : *list) {
    EXPECT_GT(device["bytes"].get<std::uint64_t>(), 0u) << device["path"];
    if (device["path"] == plain->path()) {
      ++seen;
      EXPECT_EQ(device["bytes"], 4 * MiB);
      EXPECT_EQ(device["logical_block_bytes"], GetParam());
      EXPECT_EQ(device["read_only"], true);
      EXPECT_EQ(device["in_use"], false);
      EXPECT_EQ(device["tracker"], "checksum");
      EXPECT_EQ(device["content"], "");
      const auto report = report_on(clone_of(plain->path(), scratch_.path("new")));
      EXPECT_EQ(device["identity"], report.source.identity);
    } else if (device["path"] == mounted->path()) {
      ++seen;
      EXPECT_EQ(device["in_use"], true);
      EXPECT_EQ(device["read_only"], false);
      EXPECT_EQ(device["mounts"], nlohmann::json::array({point}));
      EXPECT_EQ(device["content"], "ext4");
      EXPECT_EQ(device["tracker"],
                live_tracking_missing().empty() ? nlohmann::json("ebpf") : nlohmann::json());
    }
  }
  EXPECT_EQ(seen, 2u) << list->dump();
}

const auto sector_sizes = ::testing::Values(512u, 4096u);
const auto sector_name = [](const auto& parameter) { return std::to_string(parameter.param); };
INSTANTIATE_TEST_SUITE_P(Sectors, PreflightDevicesTest, sector_sizes, sector_name);
INSTANTIATE_TEST_SUITE_P(Sectors, PreflightTablesTest, sector_sizes, sector_name);

}  // namespace
}  // namespace blockferry
