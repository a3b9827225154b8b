// SPDX-License-Identifier: Apache-2.0
#include "daemon/metrics.h"

#include <array>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>

#include <gtest/gtest.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tests/unit/daemon/fake_control.h"

namespace blockferry {
namespace {

RunStatus copying_run() {
  RunStatus run = FakeControl::sample_run();
  run.state = RunState::copying;
  run.mode = "hybrid";
  run.tracker = "ebpf";
  run.request.name = "odd \"name\"\n";
  run.granules_dirty = 17;
  run.io_in_flight = 5;
  run.progress = 0.25;
  return run;
}

/// The value of the line that begins so; what is missing shows as "absent".
std::string value_of(const std::string& text, const std::string& series) {
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);)
    if (line.starts_with(series + " ")) return line.substr(series.size() + 1);
  return "absent";
}

TEST(Metrics, CountersAddWhatHappenedBetweenReadings) {
  Metrics metrics;
  CopyEngineStats before, now;
  before.bytes_read = 100;
  now.bytes_read = 350;
  now.bytes_written = 200;
  now.bytes_zeroed = 50;
  now.read_errors = 2;
  now.write_errors = 3;
  now.retries = 4;
  metrics.add_io(before, now);
  metrics.add_io(now, now);
  metrics.add_verified(4096, 1);
  const auto text = metrics.text({}, true);
  EXPECT_EQ(value_of(text, "blockferry_read_bytes_total"), "250");
  EXPECT_EQ(value_of(text, "blockferry_written_bytes_total"), "200");
  EXPECT_EQ(value_of(text, "blockferry_zeroed_bytes_total"), "50");
  EXPECT_EQ(value_of(text, "blockferry_verified_bytes_total"), "4096");
  EXPECT_EQ(value_of(text, "blockferry_checksum_mismatches_total"), "1");
  EXPECT_EQ(value_of(text, "blockferry_io_errors_total{operation=\"read\"}"), "2");
  EXPECT_EQ(value_of(text, "blockferry_io_errors_total{operation=\"write\"}"), "3");
  EXPECT_EQ(value_of(text, "blockferry_io_retries_total"), "4");
}

TEST(Metrics, LatencyBucketsAreTheEngines) {
  Metrics metrics;
  CopyEngineStats before, now;
  now.reads.counts[0] = 1;
  now.reads.counts[3] = 2;
  now.reads.counts[Latencies::buckets - 1] = 4;
  now.reads.seconds_sum = 1.5;
  metrics.add_io(before, now);
  const auto text = metrics.text({}, true);
  const auto bucket = [&](const std::string& bound) {
    return value_of(text, "blockferry_io_latency_seconds_bucket{operation=\"read\",le=\"" + bound + "\"}");
  };
  EXPECT_EQ(bucket("8e-06"), "1");
  EXPECT_EQ(bucket("6.4e-05"), "3");
  EXPECT_EQ(bucket("33.554432"), "3");
  EXPECT_EQ(bucket("+Inf"), "7");
  EXPECT_EQ(value_of(text, "blockferry_io_latency_seconds_count{operation=\"read\"}"), "7");
  EXPECT_EQ(value_of(text, "blockferry_io_latency_seconds_sum{operation=\"read\"}"), "1.5");
  EXPECT_EQ(value_of(text, "blockferry_io_latency_seconds_count{operation=\"write\"}"), "0");
}

TEST(Metrics, EventsCountUnderTheirLabel) {
  Metrics metrics;
  metrics.add_pass(PassKind::checksum);
  metrics.add_error(ErrorCode::no_space);
  metrics.add_run_ended(RunState::completed);
  metrics.add_run_ended(RunState::copying);  // has not ended: counts nowhere
  metrics.add_checkpoint(0.003);
  const auto text = metrics.text({}, true);
  EXPECT_EQ(value_of(text, "blockferry_passes_total{kind=\"checksum\"}"), "1");
  EXPECT_EQ(value_of(text, "blockferry_passes_total{kind=\"full\"}"), "0");
  EXPECT_EQ(value_of(text, "blockferry_errors_total{code=\"no_space\"}"), "1");
  EXPECT_EQ(value_of(text, "blockferry_errors_total{code=\"internal\"}"), "0");
  EXPECT_EQ(value_of(text, "blockferry_runs_ended_total{state=\"completed\"}"), "1");
  EXPECT_EQ(value_of(text, "blockferry_runs_ended_total{state=\"copying\"}"), "absent");
  EXPECT_EQ(value_of(text, "blockferry_checkpoint_seconds_bucket{le=\"0.0025\"}"), "0");
  EXPECT_EQ(value_of(text, "blockferry_checkpoint_seconds_bucket{le=\"0.005\"}"), "1");
}

TEST(Metrics, GaugesFollowTheRuns) {
  const Metrics metrics;
  const auto none = metrics.text({}, false);
  EXPECT_EQ(value_of(none, "blockferry_live_tracking_available"), "0");
  EXPECT_EQ(value_of(none, "blockferry_runs{state=\"cutting-over\"}"), "0");
  EXPECT_EQ(none.find("blockferry_run_"), std::string::npos);
  const auto text = metrics.text({copying_run(), FakeControl::sample_run()}, true);
  EXPECT_EQ(value_of(text, "blockferry_runs{state=\"copying\"}"), "1");
  EXPECT_EQ(value_of(text, "blockferry_runs{state=\"failed\"}"), "1");
  EXPECT_EQ(value_of(text, "blockferry_runs{state=\"queued\"}"), "0");
  const std::string labels = R"({run="20261123-1",name="odd \"name\"\n"})";
  EXPECT_EQ(value_of(text, "blockferry_run_dirty_granules" + labels), "17");
  EXPECT_EQ(value_of(text, "blockferry_run_io_in_flight" + labels), "5");
  EXPECT_EQ(value_of(text, "blockferry_run_progress_ratio" + labels), "0.25");
  EXPECT_EQ(value_of(text, "blockferry_run_passes" + labels), "1");
  EXPECT_EQ(
      value_of(text,
               R"(blockferry_run_info{run="20261123-1",name="odd \"name\"\n",mode="hybrid",tracker="ebpf"})"),
      "1");
  EXPECT_EQ(value_of(text, "blockferry_live_tracking_available"), "1");
}

TEST(Metrics, DescribeTheProcess) {
  const auto text = Metrics().text({}, true);
  EXPECT_GT(std::stod(value_of(text, "process_resident_memory_bytes")), 100e3);
  EXPECT_GE(std::stod(value_of(text, "process_cpu_seconds_total")), 0.0);
  EXPECT_GT(std::stod(value_of(text, "process_open_fds")), 0.0);
  const double age =
      static_cast<double>(::time(nullptr)) - std::stod(value_of(text, "process_start_time_seconds"));
  EXPECT_GE(age, -2.0);
  EXPECT_LT(age, 3600.0);
  EXPECT_EQ(value_of(text, "blockferry_build_info{version=\"" + std::string(blockferry_version()) + "\"}"),
            "1");
}

TEST(Metrics, PromtoolFindsNothingToSay) {
  if (::system("command -v promtool >/dev/null 2>&1") != 0) GTEST_SKIP() << "promtool is not installed";
  Metrics metrics;
  metrics.add_checkpoint(0.1);
  std::string path = std::filesystem::temp_directory_path() / "blockferry-metrics-XXXXXX";
  ::close(::mkstemp(path.data()));
  std::ofstream(path) << metrics.text({copying_run()}, true);
  FILE* promtool = ::popen(("promtool check metrics <'" + path + "' 2>&1").c_str(), "r");
  ASSERT_NE(promtool, nullptr);
  std::string said;
  std::array<char, 4096> buffer{};
  while (const std::size_t bytes = std::fread(buffer.data(), 1, buffer.size(), promtool))
    said.append(buffer.data(), bytes);
  const int status = ::pclose(promtool);
  std::filesystem::remove(path);
  EXPECT_EQ(said, "");
  EXPECT_EQ(WEXITSTATUS(status), 0);
}

}  // namespace
}  // namespace blockferry
