// SPDX-License-Identifier: Apache-2.0
// What refers to a volume by name: tables and links below a root of the test's own.
#include "daemon/references.h"

#include <fstream>

#include <unistd.h>

#include "tests/unit/daemon/preflight_fixture.h"

namespace blockferry {
namespace {

using namespace test;

constexpr const char* uuid = "11111111-2222-3333-4444-555555555555";

class ReferencesTest : public ::testing::Test {
 protected:
  void SetUp() override {
    scratch_.directory("etc");
    scratch_.directory("dev");
    scratch_.directory("dev/disk");
  }
  std::string make_ext4(const std::string& path) {
    return run_program({"mkfs.ext4", "-q", "-F", "-L", "here", "-U", uuid, path}) == 0 ? path : "";
  }
  void write(const std::string& name, const std::string& text) { std::ofstream(scratch_.path(name)) << text; }
  std::string found(const std::string& path) {
    VolumeNode node;
    EXPECT_TRUE(node_of_path(path, node));
    return text_of(references_to(path, node, scratch_.path()));
  }
  ScratchDirectory scratch_;
  const std::string file_ = scratch_.file("volume", 8 * MiB);
};

TEST_F(ReferencesTest, NothingRefersToAnEmptyFile) {
  write("etc/fstab", "# " + file_ + " /srv ext4\nUUID= /a ext4\nLABEL= /b ext4\n\n/dev/none /c ext4\n");
  write("etc/crypttab", "\nroot\n");
  EXPECT_EQ(found(file_), "");
}

TEST_F(ReferencesTest, TablesThatAreMissingSayNothing) {
  EXPECT_EQ(found(file_), "");
}

TEST_F(ReferencesTest, TablesNameAVolumeByPathByLinkUuidAndLabel) {
  ASSERT_EQ(make_ext4(file_), file_);
  ASSERT_EQ(::symlink(file_.c_str(), scratch_.path("link").c_str()), 0);
  const std::vector<std::string> lines{file_ + " /a ext4 loop 0 0",
                                       scratch_.path("link") + " /b ext4 loop 0 0",
                                       std::string("UUID=") + uuid + " /c ext4",
                                       std::string("UUID=\"") + uuid + "\" /d ext4", "LABEL=here /e ext4"};
  std::string table = "UUID=99999999-2222-3333-4444-555555555555 /x ext4\nLABEL=there /y ext4\n";
  for (const auto& line : lines) table += line + "\n";
  write("etc/fstab", table);
  write("etc/crypttab", "data " + file_ + " none luks\n" + file_ + " /dev/none none\n");
  const std::string text = found(file_);
  for (const auto& line : lines) EXPECT_TRUE(contains(text, "/etc/fstab names it: " + line + "\n")) << line;
  EXPECT_TRUE(contains(text, "/etc/crypttab names it: data "));
  for (const char* other : {"/x ext4", "/y ext4", "/dev/none none"})
    EXPECT_FALSE(contains(text, other)) << other;
}

TEST_F(ReferencesTest, TablesWriteNamesInTheirOwnWays) {
  const std::string file = scratch_.file("a volume", 8 * MiB);
  ASSERT_EQ(run_program({"mkfs.ext4", "-q", "-F", "-U", "abcdef01-2222-3333-4444-555555555555", file}), 0);
  const std::string escaped = scratch_.path("a\\040volume") + " /a ext4";
  const std::string upper = "UUID=ABCDEF01-2222-3333-4444-555555555555 /b ext4";
  write("etc/fstab", escaped + "\n" + upper + "\n");
  const std::string text = found(file);
  EXPECT_TRUE(contains(text, "names it: " + escaped)) << text;
  EXPECT_TRUE(contains(text, "names it: " + upper)) << text;
}

TEST_F(ReferencesTest, ACloneDoublesIdentifiers) {
  ASSERT_EQ(make_ext4(file_), file_);
  const std::string text = found(file_);
  EXPECT_TRUE(contains(text, std::string("the same ext4 UUID ") + uuid));
  EXPECT_TRUE(contains(text, "the same label here"));
}

class ReferencesToDevicesTest : public ReferencesTest {
 protected:
  void SetUp() override {
    if (const std::string why = volumes_missing(); !why.empty()) GTEST_SKIP() << why;
    ReferencesTest::SetUp();
  }
};

TEST_F(ReferencesToDevicesTest, LinksLeadToADevice) {
  const LoopDevice loop(file_), other(scratch_.file("other", 1 * MiB));
  ASSERT_TRUE(loop.valid() && other.valid());
  for (const char* kind : {"by-id", "by-partuuid"}) scratch_.directory(std::string("dev/disk/") + kind);
  ASSERT_EQ(::symlink(loop.path().c_str(), scratch_.path("dev/disk/by-id/mine").c_str()), 0);
  ASSERT_EQ(::symlink(other.path().c_str(), scratch_.path("dev/disk/by-id/others").c_str()), 0);
  ASSERT_EQ(::symlink("nowhere", scratch_.path("dev/disk/by-id/dangling").c_str()), 0);
  ASSERT_EQ(::symlink(loop.path().c_str(), scratch_.path("dev/disk/by-partuuid/abcd-01").c_str()), 0);
  write("etc/fstab", "PARTUUID=abcd-01 /a ext4\nPARTUUID=abcd-02 /b ext4\nPARTLABEL=abcd-01 /c ext4\n");
  const std::string text = found(loop.path());
  EXPECT_TRUE(contains(text, "the link /dev/disk/by-id/mine leads to it"));
  EXPECT_TRUE(contains(text, "the link /dev/disk/by-partuuid/abcd-01 leads to it"));
  EXPECT_TRUE(contains(text, "names it: PARTUUID=abcd-01 /a"));
  for (const char* none : {"others", "dangling", "/b ext4", "/c ext4"})
    EXPECT_FALSE(contains(text, none)) << none;
}

TEST_F(ReferencesToDevicesTest, ADisksPartitionsCountToo) {
  LoopDevice disk(scratch_.file("disk", 32 * MiB));
  ASSERT_TRUE(disk.valid());
  const std::string part = disk.add_partition(1, 1 * MiB, 16 * MiB);
  if (part.empty()) GTEST_SKIP() << "no nodes of partitions here";
  ASSERT_EQ(make_ext4(part), part);
  write("etc/fstab", std::string("UUID=") + uuid + " /srv ext4\n" + part + " /mnt ext4\n");
  const std::string text = found(disk.path());
  EXPECT_TRUE(contains(text, part + ": /etc/fstab names it: UUID="));
  EXPECT_TRUE(contains(text, part + ": /etc/fstab names it: " + part));
  EXPECT_TRUE(contains(text, part + ": the clone will bear the same ext4 UUID"));
}

TEST_F(ReferencesToDevicesTest, PartitionsAreKnownByTheirEntriesInTheTable) {
  LoopDevice disk(scratch_.file("disk", 8 * MiB));
  ASSERT_TRUE(disk.valid());
  write("script",
        "label: gpt\nstart=1MiB, size=2MiB, uuid=ABCDEF01-2222-3333-4444-555555555555, name=home\n");
  const std::string command = "sfdisk --quiet --no-reread " + disk.path() + " < " + scratch_.path("script");
  ASSERT_EQ(run_program({"sh", "-c", command}), 0);
  const std::string part = disk.add_partition(1, 1 * MiB, 2 * MiB);
  if (part.empty()) GTEST_SKIP() << "no nodes of partitions here";
  write("etc/fstab",
        "PARTUUID=ABCDEF01-2222-3333-4444-555555555555 /a ext4\nPARTLABEL=home /b ext4\nPARTLABEL=root /c "
        "ext4\n");
  const std::string text = found(disk.path());
  EXPECT_TRUE(contains(text, part + ": /etc/fstab names it: PARTUUID=ABCDEF01")) << text;
  EXPECT_TRUE(contains(text, part + ": /etc/fstab names it: PARTLABEL=home")) << text;
  EXPECT_FALSE(contains(text, "PARTLABEL=root")) << text;
  EXPECT_TRUE(contains(text, "the same partition table identifier")) << text;
  EXPECT_TRUE(contains(text, "the same PARTUUID abcdef01-2222-3333-4444-555555555555")) << text;
  EXPECT_FALSE(contains(found(part), "the same PARTUUID")) << "the table stays behind";
}

TEST_F(ReferencesToDevicesTest, PreflightReportsWhatTheCloneDoubles) {
  const LoopDevice loop(file_);
  ASSERT_TRUE(loop.valid());
  ASSERT_EQ(make_ext4(loop.path()), loop.path());
  const PreflightReport report = report_on(clone_of(loop.path(), scratch_.path("target")));
  EXPECT_EQ(text_of(report.refusals), "");
  EXPECT_TRUE(contains(text_of(report.references), std::string("the same ext4 UUID ") + uuid));
}

}  // namespace
}  // namespace blockferry
