// SPDX-License-Identifier: Apache-2.0
// Preflight on files: what it says of the request itself, and of volumes that need no root.
#include "daemon/preflight.h"

#include <thread>

#include <fcntl.h>
#include <nlohmann/json.hpp>
#include <sys/stat.h>
#include <unistd.h>

#include "tests/unit/daemon/preflight_fixture.h"

namespace blockferry {
namespace {

using namespace test;

class PreflightFilesTest : public ::testing::Test {
 protected:
  ScratchDirectory scratch_;
  const std::string source_ = scratch_.file("source", 4 * MiB, "some data");
  const std::string target_ = scratch_.path("target");
};

TEST_F(PreflightFilesTest, ANewFileIsAFineTarget) {
  const PreflightReport report = report_on(clone_of(source_, target_));
  EXPECT_EQ(text_of(report.refusals), "");
  EXPECT_EQ(report.mode, "full");
  EXPECT_EQ(report.tracker, "checksum");
  EXPECT_EQ(report.source.kind, "file");
  EXPECT_EQ(report.source.bytes, 4 * MiB);
  EXPECT_FALSE(report.source.in_use);
  ASSERT_EQ(report.targets.size(), 1u);
  EXPECT_EQ(report.targets[0].kind, "missing");
  EXPECT_EQ(report.targets[0].resolved, target_);
  EXPECT_NE(::access(target_.c_str(), F_OK), 0) << "preflight makes nothing";
}

TEST_F(PreflightFilesTest, WhatMakesNoSenseIsUsage) {
  const auto refused_as_usage = [](const RunRequest& request, const char* what) {
    const auto report = preflight(request, {});
    ASSERT_FALSE(report) << what;
    EXPECT_EQ(report.error().code, ErrorCode::invalid_argument) << what;
    EXPECT_TRUE(contains(report.error().message(), what)) << report.error().message();
  };
  refused_as_usage(clone_of("http://host/export", target_), "http://host/export");
  refused_as_usage(clone_of("nbd://host:port/export", target_), "HOST:PORT");
  refused_as_usage(clone_of(source_, "qemu:disk0"), "qemu:disk0");
  refused_as_usage(clone_of("relative", target_), "relative");
  refused_as_usage(clone_of(source_, ""), "absolute");
  RunRequest request = clone_of(source_, target_);
  for (const std::uint64_t granule : {1ull, 2048ull, 4097ull, 12288ull, 128ull << 20}) {
    request.granule_bytes = granule;
    refused_as_usage(request, "--granule");
  }
  request = clone_of(source_, target_);
  for (const std::uint64_t size : {1ull, 4097ull, (64ull << 20) + 4096}) {
    request.io_size_bytes = size;
    refused_as_usage(request, "--io-size");
  }
  request = clone_of(source_, target_);
  request.queue_depth = 1025;
  refused_as_usage(request, "--queue-depth");
}

TEST_F(PreflightFilesTest, EdgesOfWhatMakesSenseAreAccepted) {
  RunRequest request = clone_of(source_, target_);
  request.queue_depth = 1024;
  request.io_size_bytes = 64 * MiB;
  for (const std::uint64_t granule : {4 * KiB, 64 * MiB}) {
    request.granule_bytes = granule;
    expect_accepted(request);
  }
}

TEST_F(PreflightFilesTest, OptionsOfLiveSourcesAreRefusedForOthers) {
  const auto refused_by_name = [&](const char* option, auto change) {
    RunRequest request = clone_of(source_, target_);
    change(request);
    expect_refused(request, source_, option);
  };
  refused_by_name("cannot be tracked", [](auto& request) { request.kind = RunKind::migrate; });
  refused_by_name("cannot be tracked", [](auto& request) { request.mode = RunMode::hybrid; });
  refused_by_name("cannot be tracked", [](auto& request) { request.tracker = TrackerChoice::ebpf; });
  refused_by_name("--tracker qemu", [](auto& request) { request.tracker = TrackerChoice::qemu; });
  refused_by_name("--cutover manual", [](auto& request) { request.cutover = CutoverChoice::manual; });
  refused_by_name("--quiesce-cmd", [](auto& request) { request.quiesce_cmd = "true"; });
  refused_by_name("--resume-cmd", [](auto& request) { request.resume_cmd = "true"; });
  refused_by_name("--cutover-cmd", [](auto& request) { request.cutover_cmd = "true"; });
  refused_by_name("--handover", [](auto& request) { request.handover = "fs"; });
  refused_by_name("--sync-every", [](auto& request) { request.sync_every_ms = 1000; });
  refused_by_name("--tracker none", [](auto& request) {
    request.mode = RunMode::incremental;
    request.tracker = TrackerChoice::none;
  });
}

TEST_F(PreflightFilesTest, WhatIsNoVolumeIsRefused) {
  const std::string pipe = scratch_.path("pipe"), directory = scratch_.directory("directory");
  ASSERT_EQ(::mkfifo(pipe.c_str(), 0600), 0);
  for (const std::string& path : {directory, pipe, std::string("/dev/null")}) {
    EXPECT_TRUE(contains(refusals_of(clone_of(path, target_)), path + ": ")) << path;
    EXPECT_TRUE(contains(refusals_of(clone_of(source_, path)), path + ": ")) << path;
  }
  expect_refused(clone_of(source_, directory), directory, "it is a directory");
  expect_refused(clone_of(scratch_.path("missing"), target_), scratch_.path("missing"),
                 "no such device or file");
  ASSERT_EQ(::symlink("missing", scratch_.path("dangling").c_str()), 0);
  expect_refused(clone_of(scratch_.path("dangling"), target_), scratch_.path("dangling"),
                 "no such device or file");
}

TEST_F(PreflightFilesTest, AMissingTargetMustBePossible) {
  for (const char* path : {"/dev/blockferry-none", "/dev/disk/blockferry-none", "/proc/none", "/sys/none"})
    expect_refused(clone_of(source_, path), path, "there is no such device");
  const std::string nowhere = scratch_.path("none/target"), below_file = source_ + "/target";
  expect_refused(clone_of(source_, nowhere), nowhere, "does not exist");
  EXPECT_NE(refusals_of(clone_of(source_, below_file)), "");
  ASSERT_EQ(::symlink("/dev", scratch_.path("devices").c_str()), 0);
  const std::string hidden = scratch_.path("devices/blockferry-none");
  expect_refused(clone_of(source_, hidden), hidden, "there is no such device");
}

TEST_F(PreflightFilesTest, ATargetThatNamesNoFileIsRefused) {
  ASSERT_EQ(::symlink("missing", scratch_.path("dangling").c_str()), 0);
  expect_refused(clone_of(source_, scratch_.path("dangling")), scratch_.path("dangling"), "leads nowhere");
  const std::string slash = scratch_.path("target/");
  EXPECT_NE(refusals_of(clone_of(source_, slash)), "");
  EXPECT_FALSE(preflight(clone_of(source_, target_ + std::string("\0x", 2)), {}));
}

TEST_F(PreflightFilesTest, ASourceThatIsOnlyReadElsewhereIsFree) {
  scratch_.file("target", 4 * MiB);
  const auto reader = open_elsewhere(source_, O_RDONLY), other = open_elsewhere(target_, O_RDONLY);
  ASSERT_TRUE(reader->valid() && other->valid());
  expect_accepted(clone_of(source_, target_));
}

TEST_F(PreflightFilesTest, ATargetFileMustFitUnlessItMayBeMadeToFit) {
  for (const std::uint64_t bytes : {4 * MiB - 1, 4 * MiB + 1}) {
    scratch_.file("target", bytes);
    RunRequest request = clone_of(source_, target_);
    expect_refused(request, target_, bytes < 4 * MiB ? "smaller than the source" : "larger than the source");
    request.overwrite = true;
    expect_accepted(request);
  }
  for (const std::uint64_t bytes : {std::uint64_t(0), 4 * MiB}) {
    scratch_.file("target", bytes);
    expect_accepted(clone_of(source_, target_));
  }
}

TEST_F(PreflightFilesTest, TheSourceItselfIsNoTargetByAnyName) {
  ASSERT_EQ(::link(source_.c_str(), scratch_.path("hard").c_str()), 0);
  ASSERT_EQ(::symlink("source", scratch_.path("soft").c_str()), 0);
  ASSERT_EQ(::symlink(".", scratch_.path("here").c_str()), 0);
  for (const char* name : {"source", "hard", "soft", "here/source", "here/here/hard"}) {
    RunRequest request = clone_of(source_, scratch_.path(name));
    request.overwrite = request.force = true;
    expect_refused(request, scratch_.path(name), "it is the source itself");
  }
}

TEST_F(PreflightFilesTest, OneTargetNamedTwiceIsRefused) {
  scratch_.file("target", 4 * MiB);
  ASSERT_EQ(::symlink("target", scratch_.path("soft").c_str()), 0);
  ASSERT_EQ(::link(target_.c_str(), scratch_.path("hard").c_str()), 0);
  for (const char* name : {"target", "soft", "hard"}) {
    RunRequest request = clone_of(source_, target_);
    request.targets.push_back(scratch_.path(name));
    expect_refused(request, scratch_.path(name), "named twice");
  }
}

TEST_F(PreflightFilesTest, OneNewFileNamedTwiceIsRefused) {
  ASSERT_EQ(::symlink(".", scratch_.path("here").c_str()), 0);
  RunRequest request = clone_of(source_, target_);
  request.targets.push_back(scratch_.path("here/target"));
  expect_refused(request, scratch_.path("here/target"), "named twice");
}

TEST_F(PreflightFilesTest, EachOfSeveralTargetsIsLookedAt) {
  RunRequest request = clone_of(source_, target_);
  request.targets.push_back(scratch_.file("short", 1 * MiB));
  request.targets.push_back("/dev/blockferry-none");
  const PreflightReport report = report_on(request);
  EXPECT_EQ(report.targets.size(), 3u);
  expect_refused(request, request.targets[1], "smaller");
  expect_refused(request, request.targets[2], "no such device");
}

TEST_F(PreflightFilesTest, VolumesOfOtherRunsAreRefused) {
  const std::string other = scratch_.file("other", 4 * MiB);
  ASSERT_EQ(::link(other.c_str(), scratch_.path("hard").c_str()), 0);
  for (const std::string& name : {other, scratch_.path("hard")}) {
    expect_refused(clone_of(source_, name), name, "it is the target of run 7", {{other, "7", true}});
    expect_refused(clone_of(source_, name), name, "it is the source of run 7", {{other, "7", false}});
    expect_refused(clone_of(name, target_), name, "it is the target of run 7", {{other, "7", true}});
    expect_accepted(clone_of(name, target_), {{other, "7", false}});
  }
  expect_accepted(clone_of(source_, target_), {{other, "7", true}, {scratch_.path("gone"), "8", true}});
}

TEST_F(PreflightFilesTest, ANewFileOfAnotherRunIsRefusedByAnyName) {
  expect_refused(clone_of(source_, target_), target_, "run 7", {{target_, "7", true}});
  ASSERT_EQ(::symlink(".", scratch_.path("here").c_str()), 0);
  const std::string alias = scratch_.path("here/target");
  expect_refused(clone_of(source_, alias), alias, "run 7", {{target_, "7", true}});
}

TEST_F(PreflightFilesTest, ASourceThatSomebodyMayWriteNeedsBothWords) {
  const auto writer = open_elsewhere(source_, O_RDWR);
  ASSERT_TRUE(writer->valid());
  RunRequest request = clone_of(source_, target_);
  expect_refused(request, source_, "open for writing in process " + std::to_string(writer->pid()));
  request.force = true;
  expect_refused(request, source_, "open for writing");
  request.force = false;
  request.tracker = TrackerChoice::none;
  expect_refused(request, source_, "open for writing");
  request.force = true;
  const PreflightReport report = report_on(request);
  EXPECT_EQ(text_of(report.refusals), "");
  EXPECT_TRUE(contains(text_of(report.warnings), "will not be consistent")) << text_of(report.warnings);
  EXPECT_TRUE(report.source.in_use);
  EXPECT_EQ(report.tracker, "none");
}

TEST_F(PreflightFilesTest, ATargetThatSomebodyMayWriteIsRefused) {
  scratch_.file("target", 4 * MiB);
  const auto writer = open_elsewhere(target_, O_RDWR);
  ASSERT_TRUE(writer->valid());
  RunRequest request = clone_of(source_, target_);
  request.force = request.overwrite = true;
  expect_refused(request, target_, "open for writing");
}

TEST_F(PreflightFilesTest, AWriterThatWasOnlyPassingIsForgiven) {
  scratch_.file("target", 4 * MiB);
  auto writer = open_elsewhere(target_, O_RDWR);
  ASSERT_TRUE(writer->valid());
  std::thread leaving([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    writer.reset();
  });
  RunRequest request = clone_of(source_, target_);
  request.overwrite = true;
  const PreflightReport report = report_on(request);
  leaving.join();
  EXPECT_EQ(text_of(report.refusals), "");
}

TEST_F(PreflightFilesTest, TheReportIsOneObject) {
  RunRequest request = clone_of(source_, scratch_.file("short", 1 * MiB));
  request.sync_every_ms = 1000;
  const PreflightReport report = report_on(request);
  const nlohmann::json object = to_json(report);
  EXPECT_EQ(object["ok"], false);
  EXPECT_EQ(object["refusals"].size(), 2u);
  EXPECT_EQ(object["refusals"][1]["device"], scratch_.path("short"));
  EXPECT_EQ(object["source"]["bytes"], 4 * MiB);
  EXPECT_EQ(object["source"]["mounts"], nlohmann::json::array());
  EXPECT_EQ(object["targets"].size(), 1u);
  const Error error = refusal_error(report);
  EXPECT_EQ(error.code, ErrorCode::refused);
  EXPECT_TRUE(contains(error.message(), "and 1 more")) << error.message();
  EXPECT_TRUE(contains(error.message(), "--sync-every")) << "the first is named: " << error.message();
  EXPECT_EQ(to_json(report_on(clone_of(source_, target_)))["ok"], true);
}

}  // namespace
}  // namespace blockferry
