// SPDX-License-Identifier: Apache-2.0
// NBD devices against nbdkit: what is asked of a device, the server's abilities and limits, and connections
// that break.
#include "blockio/nbd_device.h"

#include <cstring>
#include <fstream>

#include <sys/socket.h>
#include <sys/un.h>

#include "tests/unit/blockio/nbd_server.h"

namespace blockferry {
namespace {

using Words = std::vector<std::string>;

bool has_line_with(const std::string& path, const std::string& text) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    if (line.find(text) != std::string::npos) return true;
  }
  return false;
}

class NbdDeviceTest : public VolumeTest, public ::testing::WithParamInterface<IoEngine> {
 protected:
  void SetUp() override {
    set_up_queue(GetParam());
    options_.role = DeviceRole::target;
    options_.patience = Nanoseconds(0);
    options_.reconnect_for = std::chrono::seconds(20);
    options_.connections = 4;
  }
  std::unique_ptr<Device> open_nbd(const NbdAddress& address) {
    auto device = open_nbd_device(*queue_, address, options_);
    EXPECT_TRUE(device) << device.error().message();
    return device ? std::move(*device) : nullptr;
  }
  /// What fill(1 * MiB, 4) makes, at its beginning; not flushed. Nothing where that failed.
  std::unique_ptr<Device> open_and_write_a_mib(const NbdServer& server) {
    auto device = open_nbd(server.address());
    if (device == nullptr) return nullptr;
    fill(1 * MiB, 4);
    const auto written = run(*device, IoOperation::write, 0, 1 * MiB, memory_);
    EXPECT_EQ(written, std::int64_t(1 * MiB));
    return written == std::int64_t(1 * MiB) ? std::move(device) : nullptr;
  }
  void fill(std::size_t bytes, int first) {
    for (std::size_t i = 0; i < bytes; ++i) memory_[i] = std::byte((std::size_t(first) + i / 512 + i) % 251);
  }
  /// What the device holds there is what fill() made.
  void expect_filled(Device& device, std::uint64_t offset, std::size_t bytes, int first) {
    std::vector<std::byte> expected(bytes);
    fill(bytes, first);
    std::memcpy(expected.data(), memory_, bytes);
    std::memset(memory_, 0x55, bytes);
    ASSERT_EQ(run(device, IoOperation::read, offset, bytes, memory_), std::int64_t(bytes));
    EXPECT_EQ(std::memcmp(expected.data(), memory_, bytes), 0) << "at " << offset;
  }

  NbdDeviceOptions options_;
};

TEST_P(NbdDeviceTest, WhatIsWrittenIsReadAndZeroesAreZeroes) {
  NbdServer server(scratch_, "memory", {"memory", "4M"});
  const auto device = open_nbd(server.address());
  ASSERT_NE(device, nullptr);
  EXPECT_EQ(device->info().kind, DeviceKind::nbd);
  EXPECT_EQ(device->info().bytes, 4 * MiB);
  EXPECT_EQ(device->change_stamp(), std::nullopt);
  fill(3 * MiB, 7);
  EXPECT_EQ(run(*device, IoOperation::write, 4096, 3 * MiB, memory_), std::int64_t(3 * MiB));
  EXPECT_EQ(run(*device, IoOperation::flush, 0, 0), 0);
  expect_filled(*device, 4096, 3 * MiB, 7);
  EXPECT_EQ(run(*device, IoOperation::zero, 1 * MiB, 1 * MiB), 0);
  ASSERT_EQ(run(*device, IoOperation::read, 1 * MiB, 1 * MiB, memory_), std::int64_t(1 * MiB));
  for (std::size_t i = 0; i < 1 * MiB; i += 512) ASSERT_EQ(memory_[i], std::byte(0));
}

TEST_P(NbdDeviceTest, OverTcpWithManyRequestsAtOnce) {
  NbdServer server(scratch_, "tcp", {"memory", "4M"}, std::to_string(20000 + ::getpid() % 20000));
  const auto device = open_nbd(server.address());
  ASSERT_NE(device, nullptr);
  fill(4 * MiB, 3);
  std::vector<IoRequest> requests(1024);
  for (std::size_t i = 0; i < requests.size(); ++i) {
    requests[i].operation = IoOperation::write;
    requests[i].offset = i * 4096;
    requests[i].bytes = 4096;
    requests[i].data = memory_ + i * 4096;
    device->submit(requests[i]);
  }
  EXPECT_EQ(queue_->in_flight(), requests.size());
  std::vector<IoRequest*> completed;
  for (int i = 0; i < 1000 && queue_->in_flight() > 0; ++i)
    queue_->wait(std::chrono::milliseconds(100), completed);
  ASSERT_EQ(completed.size(), requests.size());
  for (const auto& request : requests) EXPECT_EQ(request.result, 4096);
  expect_filled(*device, 0, 4 * MiB, 3);
}

TEST_P(NbdDeviceTest, HolesAreTold) {
  const std::string path = scratch_.make_file("holes", 8 * MiB);
  NbdServer server(scratch_, "file", {"file", path});
  const auto device = open_nbd(server.address());
  ASSERT_NE(device, nullptr);
  fill(64 * KiB, 1);
  ASSERT_EQ(run(*device, IoOperation::write, 1 * MiB, 64 * KiB, memory_), std::int64_t(64 * KiB));
  device->forget_regions();
  auto region = device->region_at(0);
  ASSERT_TRUE(region) << region.error().message();
  EXPECT_TRUE(region->hole);
  EXPECT_EQ(region->end, 1 * MiB);
  region = device->region_at(1 * MiB + 4096);
  ASSERT_TRUE(region);
  EXPECT_FALSE(region->hole);
  EXPECT_EQ(region->end, 1 * MiB + 64 * KiB);
  region = device->region_at(1 * MiB + 64 * KiB);
  ASSERT_TRUE(region);
  EXPECT_TRUE(region->hole);
  EXPECT_EQ(region->end, 8 * MiB);
  // Before what was asked last, and what was written since.
  ASSERT_EQ(run(*device, IoOperation::write, 4 * MiB, 64 * KiB, memory_), std::int64_t(64 * KiB));
  device->forget_regions();
  region = device->region_at(2 * MiB);
  ASSERT_TRUE(region);
  EXPECT_TRUE(region->hole);
  EXPECT_EQ(region->end, 4 * MiB);
}

TEST_P(NbdDeviceTest, HolesFarAheadAreAskedInTimeAndForgotten) {
  const std::string path = scratch_.make_file("large", 3 * GiB);
  NbdServer server(scratch_, "file", {"file", path});
  const auto device = open_nbd(server.address());
  ASSERT_NE(device, nullptr);
  fill(64 * KiB, 1);
  ASSERT_EQ(run(*device, IoOperation::write, 1 * GiB + 1 * MiB, 64 * KiB, memory_), std::int64_t(64 * KiB));
  // A region may be told in parts: what counts is that none goes beyond its end.
  const auto expect_region = [&device](std::uint64_t offset, bool hole, std::uint64_t end) {
    const auto region = device->region_at(offset);
    ASSERT_TRUE(region) << region.error().message();
    EXPECT_EQ(region->hole, hole) << "at " << offset;
    EXPECT_GT(region->end, offset);
    EXPECT_LE(region->end, end) << "at " << offset;
  };
  expect_region(0, true, 1 * GiB + 1 * MiB);
  expect_region(1 * GiB - 4096, true, 1 * GiB + 1 * MiB);  // from here on what follows is asked ahead
  expect_region(1 * GiB + 4096, true, 1 * GiB + 1 * MiB);
  expect_region(1 * GiB + 1 * MiB, false, 1 * GiB + 1 * MiB + 64 * KiB);
  expect_region(2 * GiB - 4096, true, 3 * GiB);  // and again
  ASSERT_EQ(run(*device, IoOperation::write, 2 * GiB + 2 * MiB, 64 * KiB, memory_), std::int64_t(64 * KiB));
  device->forget_regions();
  expect_region(2 * GiB + 2 * MiB, false, 2 * GiB + 2 * MiB + 64 * KiB);
  expect_region(2 * GiB, true, 2 * GiB + 2 * MiB);  // back, while something else may have been asked
  expect_region(3 * GiB - 4096, true, 3 * GiB);
}

TEST_P(NbdDeviceTest, ServersThatTellNoHolesAndCannotZero) {
  NbdServer server(scratch_, "plain", {"--filter=noextents", "--filter=nozero", "memory", "2M"});
  const auto device = open_nbd(server.address());
  ASSERT_NE(device, nullptr);
  const auto region = device->region_at(0);
  ASSERT_TRUE(region);
  EXPECT_FALSE(region->hole);
  EXPECT_EQ(region->end, 2 * MiB);
  EXPECT_EQ(run(*device, IoOperation::zero, 0, 64 * KiB), -EOPNOTSUPP);
}

TEST_P(NbdDeviceTest, LargeBlocksAndAnEndWithinABlock) {
  NbdServer server(scratch_, "blocks",
                   {"--filter=blocksize-policy", "memory", "1M", "blocksize-minimum=64K",
                    "blocksize-preferred=64K", "blocksize-maximum=128K", "blocksize-error-policy=error"});
  const auto device = open_nbd(server.address());
  ASSERT_NE(device, nullptr);
  EXPECT_EQ(device->info().logical_block_bytes, 64 * KiB);
  fill(960 * KiB, 9);
  ASSERT_EQ(run(*device, IoOperation::write, 0, 960 * KiB, memory_), std::int64_t(960 * KiB));
  expect_filled(*device, 0, 960 * KiB, 9);
  // What is copied ends within the last block: the rest of it becomes zeroes.
  fill(64 * KiB, 5);
  ASSERT_EQ(run(*device, IoOperation::write, 960 * KiB, 5000, memory_), 5000);
  expect_filled(*device, 960 * KiB, 5000, 5);
  EXPECT_EQ(run(*device, IoOperation::zero, 896 * KiB, 64 * KiB + 4096), 0);
  ASSERT_EQ(run(*device, IoOperation::read, 896 * KiB, 128 * KiB, memory_), std::int64_t(128 * KiB));
  for (std::size_t i = 0; i < 128 * KiB; ++i) ASSERT_EQ(memory_[i], std::byte(0)) << i;
}

TEST_P(NbdDeviceTest, OddSizesAndNoSize) {
  NbdServer odd(scratch_, "odd", {"memory", "10001"});
  const auto device = open_nbd(odd.address());
  ASSERT_NE(device, nullptr);
  EXPECT_EQ(device->info().bytes, 10001U);
  fill(10001, 2);
  ASSERT_EQ(run(*device, IoOperation::write, 0, 10001, memory_), 10001);
  expect_filled(*device, 8192, 1809, 2 + 16 + 8192 % 251);
  NbdServer none(scratch_, "none", {"memory", "0"});
  const auto empty = open_nbd(none.address());
  ASSERT_NE(empty, nullptr);
  EXPECT_EQ(empty->info().bytes, 0U);
}

TEST_P(NbdDeviceTest, TargetsThatCannotBeAreRefused) {
  NbdServer read_only(scratch_, "ro", {"-r", "memory", "1M"});
  auto device = open_nbd_device(*queue_, read_only.address(), options_);
  ASSERT_FALSE(device);
  EXPECT_EQ(device.error().code, ErrorCode::refused);
  EXPECT_NE(device.error().message().find("reading only"), std::string::npos) << device.error().message();
  options_.role = DeviceRole::source;
  EXPECT_TRUE(open_nbd_device(*queue_, read_only.address(), options_));
}

TEST_P(NbdDeviceTest, AServerThatIsNotThereIsSaidSoInTime) {
  NbdAddress address;
  address.uri = "nbd+unix:///?socket=" + scratch_.path() + "/nobody";
  const auto device = open_nbd_device(*queue_, address, options_);
  ASSERT_FALSE(device);
  EXPECT_NE(device.error().message().find("No such file"), std::string::npos) << device.error().message();
}

TEST_P(NbdDeviceTest, ReadsGoOnWhenTheServerComesBack) {
  const std::string path = scratch_.make_file("source", 4 * MiB);
  NbdServer server(scratch_, "back", {"file", path});
  const auto device = open_and_write_a_mib(server);
  ASSERT_NE(device, nullptr);
  ASSERT_EQ(run(*device, IoOperation::flush, 0, 0), 0);
  server.stop();
  server.start();
  expect_filled(*device, 0, 1 * MiB, 4);
  EXPECT_EQ(run(*device, IoOperation::flush, 0, 0), 0) << "everything was flushed before";
}

TEST_P(NbdDeviceTest, WritesThatWereNotFlushedAreReportedLost) {
  const std::string path = scratch_.make_file("target", 4 * MiB);
  NbdServer server(scratch_, "lost", {"file", path});
  const auto device = open_and_write_a_mib(server);
  ASSERT_NE(device, nullptr);
  server.stop();
  server.start();
  EXPECT_EQ(run(*device, IoOperation::flush, 0, 0), -ESTALE);
  // Each of its connections may find out by itself, and tells so once.
  std::int64_t flushed = -ESTALE;
  for (unsigned told = 1; flushed == -ESTALE && told <= options_.connections; ++told) {
    ASSERT_EQ(run(*device, IoOperation::write, 0, 1 * MiB, memory_), std::int64_t(1 * MiB));
    flushed = run(*device, IoOperation::flush, 0, 0);
  }
  EXPECT_EQ(flushed, 0) << "it is told again and again";
}

/// This process's ends of the connections to a server on a UNIX socket, in the order they were made.
std::vector<int> connections_to(const std::string& path) {
  std::vector<int> found;
  for (int fd = 0; fd < 1024; ++fd) {
    sockaddr_un name{};
    socklen_t length = sizeof name;
    if (::getpeername(fd, reinterpret_cast<sockaddr*>(&name), &length) == 0 && name.sun_family == AF_UNIX &&
        path == name.sun_path)
      found.push_back(fd);
  }
  return found;
}

TEST_P(NbdDeviceTest, AFlushKnowsOfOtherConnectionsThatBroke) {
  const std::string path = scratch_.make_file("target", 4 * MiB);
  NbdServer server(scratch_, "parts", {"file", path});
  const auto device = open_and_write_a_mib(server);
  ASSERT_NE(device, nullptr);
  const auto connections = connections_to(server.address().uri.substr(std::strlen("nbd+unix:///?socket=")));
  ASSERT_EQ(connections.size(), options_.connections);
  // All but the one that an idle device takes for its next request.
  for (std::size_t i = 1; i < connections.size(); ++i) ::shutdown(connections[i], SHUT_RDWR);
  EXPECT_EQ(run(*device, IoOperation::flush, 0, 0), -ESTALE);
  EXPECT_EQ(run(*device, IoOperation::write, 0, 1 * MiB, memory_), std::int64_t(1 * MiB));
  EXPECT_EQ(run(*device, IoOperation::flush, 0, 0), 0);
  expect_filled(*device, 0, 1 * MiB, 4);
}

TEST_P(NbdDeviceTest, WhatBrokeWhileNothingWasUnderWayIsNoDoubt) {
  const std::string path = scratch_.make_file("target", 4 * MiB);
  NbdServer server(scratch_, "quiet", {"file", path});
  const auto device = open_and_write_a_mib(server);
  ASSERT_NE(device, nullptr);
  ASSERT_EQ(run(*device, IoOperation::flush, 0, 0), 0);
  server.stop();
  server.start();
  EXPECT_EQ(run(*device, IoOperation::write, 1 * MiB, 1 * MiB, memory_), std::int64_t(1 * MiB));
  EXPECT_EQ(run(*device, IoOperation::flush, 0, 0), 0) << "nothing of it was sent to the server that went";
  EXPECT_EQ(device->doubts(), 0U);
  expect_filled(*device, 1 * MiB, 1 * MiB, 4);
}

TEST_P(NbdDeviceTest, RepliesAreReadWhileHolesAreAskedFor) {
  NbdServer server(scratch_, "late", {"--filter=delay", "memory", "4M", "delay-extents=2"});
  const auto device = open_nbd(server.address());
  ASSERT_NE(device, nullptr);
  constexpr std::uint64_t read_bytes = 512 * KiB;
  std::vector<IoRequest> reads(8);
  for (std::size_t i = 0; i < reads.size(); ++i) {
    reads[i].offset = i * read_bytes;
    reads[i].bytes = read_bytes;
    reads[i].data = memory_ + i * read_bytes;
    device->submit(reads[i]);
  }
  const auto region = device->region_at(0);
  ASSERT_TRUE(region);
  EXPECT_TRUE(region->hole);
  std::vector<IoRequest*> completed;
  queue_->wait(Nanoseconds(0), completed);
  EXPECT_EQ(completed.size(), reads.size()) << "a server may wait for its replies to be read";
  for (int i = 0; i < 100 && queue_->in_flight() > 0; ++i)
    queue_->wait(std::chrono::milliseconds(100), completed);
  for (const auto& read : reads) EXPECT_EQ(read.result, std::int64_t(read_bytes));
}

TEST_P(NbdDeviceTest, WhatWasUnderWayWhenTheConnectionBrokeIsRepeatedAndDoubtful) {
  const std::string path = scratch_.make_file("target", 4 * MiB), log = scratch_.file("log");
  NbdServer server(scratch_, "slow",
                   {"--filter=log", "--filter=delay", "file", path, "delay-write=3600", "logfile=" + log});
  const auto device = open_nbd(server.address());
  ASSERT_NE(device, nullptr);
  fill(64 * KiB, 8);
  IoRequest request;
  request.operation = IoOperation::write;
  request.offset = 128 * KiB;
  request.bytes = 64 * KiB;
  request.data = memory_;
  device->submit(request);
  EXPECT_EQ(device->doubts(), 0U);
  std::vector<IoRequest*> completed;
  for (int i = 0; i < 1000 && !has_line_with(log, " Write "); ++i)
    queue_->wait(std::chrono::milliseconds(10), completed);
  ASSERT_TRUE(has_line_with(log, " Write ")) << "the server was never asked";
  ASSERT_TRUE(completed.empty());
  server.stop();
  NbdServer again(scratch_, "slow", {"file", path});
  for (int i = 0; i < 300 && completed.empty(); ++i) queue_->wait(std::chrono::milliseconds(100), completed);
  ASSERT_EQ(completed.size(), 1U);
  EXPECT_EQ(request.result, std::int64_t(64 * KiB));
  EXPECT_EQ(device->doubts(), 1U);
  EXPECT_EQ(run(*device, IoOperation::flush, 0, 0), -ESTALE);
  expect_filled(*device, 128 * KiB, 64 * KiB, 8);
}

TEST_P(NbdDeviceTest, AServerThatDoesNotComeBackFailsItsRequests) {
  options_.reconnect_for = std::chrono::milliseconds(300);
  NbdServer server(scratch_, "gone", {"memory", "1M"});
  const auto device = open_nbd(server.address());
  ASSERT_NE(device, nullptr);
  server.stop();
  EXPECT_EQ(run(*device, IoOperation::read, 0, 4096, memory_), -ENOTCONN);
  EXPECT_EQ(run(*device, IoOperation::read, 0, 4096, memory_), -ENOTCONN);
}

TEST_P(NbdDeviceTest, AServerThatComesBackWithAnotherSizeIsNotTheSame) {
  options_.reconnect_for = std::chrono::milliseconds(300);
  NbdServer server(scratch_, "resized", {"memory", "1M"});
  const auto device = open_nbd(server.address());
  ASSERT_NE(device, nullptr);
  server.stop();
  NbdServer other(scratch_, "resized", {"memory", "2M"});
  EXPECT_EQ(run(*device, IoOperation::read, 0, 4096, memory_), -ENOTCONN);
}

TEST_P(NbdDeviceTest, ErrorsOfTheServerComeThrough) {
  NbdServer server(scratch_, "errors", {"--filter=error", "memory", "1M", "error=ENOSPC", "error-rate=100%"});
  const auto device = open_nbd(server.address());
  ASSERT_NE(device, nullptr);
  EXPECT_EQ(run(*device, IoOperation::write, 0, 4096, memory_), -ENOSPC);
}

TEST(NbdConnection, OtherMetaContextsAreRead) {
  Scratch scratch("/var/tmp");
  NbdServer server(scratch, "contexts", {"memory", "4M"});
  NbdAddress address = server.address();
  address.contexts = {"base:allocation", "qemu:dirty-bitmap:none"};
  auto connection = NbdConnection::connect(address, std::chrono::seconds(10));
  ASSERT_TRUE(connection) << connection.error().message();
  EXPECT_TRUE(connection->has_context("base:allocation"));
  EXPECT_FALSE(connection->has_context("qemu:dirty-bitmap:none"));
  const auto extents = connection->block_status("base:allocation", {0, 4 * MiB}, std::chrono::seconds(10));
  ASSERT_TRUE(extents) << extents.error().message();
  EXPECT_EQ(extents->front().bytes, 4 * MiB);
  EXPECT_EQ(extents->front().flags, 3U);
  std::byte data[512];
  EXPECT_TRUE(connection->read(data, 0, std::chrono::seconds(10)));
  EXPECT_FALSE(connection->read(data, 4 * MiB, std::chrono::seconds(10)));
}

INSTANTIATE_TEST_SUITE_P(Engines, NbdDeviceTest, ::testing::Values(IoEngine::uring, IoEngine::aio),
                         [](const auto& tested) { return engine_test_name(tested.param); });

}  // namespace
}  // namespace blockferry
