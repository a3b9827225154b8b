// SPDX-License-Identifier: Apache-2.0
// Both I/O queues under everything but a device: more than their depth, posting, threads, limits, refusals.
#include "blockio/io_queue.h"

#include <cstring>
#include <deque>
#include <functional>
#include <thread>

#include <grp.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>

#include "tests/unit/blockio/volumes.h"

namespace blockferry {
namespace {

void fill(IoRequest& request, IoOperation operation, std::uint64_t offset, std::uint64_t bytes,
          std::byte* data) {
  request.operation = operation;
  request.offset = offset;
  request.bytes = bytes;
  request.data = data;
}

/// Until nothing is in flight; bounded.
std::vector<IoRequest*> drain(IoQueue& queue) {
  std::vector<IoRequest*> completed;
  for (int i = 0; i < 5000 && queue.in_flight() > 0; ++i)
    queue.wait(std::chrono::milliseconds(10), completed);
  EXPECT_EQ(queue.in_flight(), 0u);
  return completed;
}

class IoQueueTest : public VolumeTest, public ::testing::WithParamInterface<IoEngine> {
 protected:
  void SetUp() override { set_up_queue(GetParam()); }
};

/// What libaio cannot be tested for: it knows no file that can be made to wait.
class UringQueueTest : public VolumeTest {
 protected:
  void SetUp() override { set_up_queue(IoEngine::uring); }
};

TEST_P(IoQueueTest, ManyMoreRequestsThanDepthAllComeBack) {
  const auto device = open(scratch_.file("many"), DeviceRole::target, true, 2 * MiB);
  ASSERT_NE(device, nullptr);
  std::vector<IoRequest> requests(512);
  for (std::size_t i = 0; i < requests.size(); ++i) {
    fill(requests[i], IoOperation::write, i * 4096, 4096, memory_ + i * 4096);
    std::memset(requests[i].data, int(i % 251), 4096);
    device->submit(requests[i]);
  }
  EXPECT_EQ(queue_->in_flight(), requests.size());
  EXPECT_EQ(drain(*queue_).size(), requests.size());
  for (const auto& request : requests) ASSERT_EQ(request.result, 4096);
  std::byte* back = memory_ + 2 * MiB;
  ASSERT_EQ(run(*device, IoOperation::read, 0, 2 * MiB, back), std::int64_t(2 * MiB));
  EXPECT_EQ(std::memcmp(back, memory_, 2 * MiB), 0);
}

TEST_P(IoQueueTest, OperationsOfAllKindsMix) {
  const auto device = open(scratch_.file("mixed"), DeviceRole::target, true, 1 * MiB);
  ASSERT_NE(device, nullptr);
  std::memset(memory_, 1, 1 * MiB);
  std::vector<IoRequest> requests(200);
  for (std::size_t i = 0; i < requests.size(); ++i) {
    const auto operation = IoOperation(i % 4);
    const bool flush = operation == IoOperation::flush;
    fill(requests[i], operation, flush ? 0 : i * 4096, flush ? 0 : 4096, memory_ + i * 4096);
    device->submit(requests[i]);
  }
  EXPECT_EQ(drain(*queue_).size(), requests.size());
  for (const auto& request : requests) {
    const bool counts = request.operation == IoOperation::read || request.operation == IoOperation::write;
    ASSERT_EQ(request.result, counts ? 4096 : 0);
  }
}

TEST_P(IoQueueTest, PostedRequestsComeBackAtTheNextWaitWithoutIo) {
  std::vector<IoRequest*> completed;
  queue_->wait(std::chrono::hours(1), completed);
  EXPECT_TRUE(completed.empty()) << "nothing to wait for";
  IoRequest first, second;
  queue_->post(first, -EIO);
  queue_->post(second, 4096);
  EXPECT_EQ(queue_->in_flight(), 2u);
  queue_->wait(std::chrono::hours(1), completed);
  EXPECT_EQ(completed, (std::vector<IoRequest*>{&first, &second}));
  EXPECT_EQ(first.result, -EIO);
  EXPECT_EQ(second.result, 4096);
  EXPECT_EQ(queue_->in_flight(), 0u);
}

TEST_F(UringQueueTest, AWaitWithoutTimeOnlyLooks) {
  int ends[2];
  ASSERT_EQ(::pipe2(ends, O_CLOEXEC), 0);
  const FileDescriptor reader(ends[0]), writer(ends[1]);
  const auto slot = queue_->add_file(reader.get());
  ASSERT_TRUE(slot);
  IoRequest request;
  fill(request, IoOperation::read, std::uint64_t(-1), 4, memory_);  // a pipe has no offsets
  queue_->submit_file(*slot, request, 4);
  std::vector<IoRequest*> completed;
  queue_->wait(Nanoseconds(0), completed);
  EXPECT_TRUE(completed.empty());
  const Nanoseconds start = system_clock().now();
  queue_->wait(std::chrono::milliseconds(30), completed);
  EXPECT_TRUE(completed.empty());
  EXPECT_GE(system_clock().now() - start, std::chrono::milliseconds(30));
  IoRequest posted;
  queue_->post(posted, 0);
  queue_->wait(std::chrono::hours(1), completed);
  EXPECT_EQ(completed, std::vector<IoRequest*>{&posted}) << "waited for the kernel though one was done";
  ASSERT_EQ(::write(writer.get(), "abcd", 4), 4);
  queue_->wait(std::chrono::seconds(60), completed);
  EXPECT_EQ(completed.size(), 2u);
  EXPECT_EQ(request.result, 4);
  queue_->remove_file(*slot);
}

/// A pipe whose reading end the queue watches: each byte gives one lent request back.
class WatchedPipe : public Watched {
 public:
  explicit WatchedPipe(FileQueue& queue) : queue_(queue) {
    int ends[2] = {-1, -1};
    EXPECT_EQ(::pipe2(ends, O_CLOEXEC | O_NONBLOCK), 0);
    reader_ = FileDescriptor(ends[0]);
    writer_ = FileDescriptor(ends[1]);
    queue_.watch(reader_.get(), POLLIN, *this);
  }
  ~WatchedPipe() override { queue_.unwatch(reader_.get()); }
  void lend(IoRequest& request) {
    queue_.lend(request);
    lent_.push_back(&request);
  }
  void send() { ASSERT_EQ(::write(writer_.get(), "x", 1), 1); }
  void ready(short events) override {
    EXPECT_EQ(events, POLLIN);
    char byte = 0;
    ASSERT_EQ(::read(reader_.get(), &byte, 1), 1);
    queue_.give_back_here(*lent_.front(), 0);
    lent_.pop_front();
    if (when_ready) when_ready();
  }
  int fd() const { return reader_.get(); }

  std::function<void()> when_ready;

 private:
  FileQueue& queue_;
  FileDescriptor reader_, writer_;
  std::deque<IoRequest*> lent_;
};

TEST_P(IoQueueTest, AWatchedDescriptorEndsTheWait) {
  WatchedPipe pipe(*queue_);
  IoRequest first, second;
  pipe.lend(first);
  pipe.lend(second);
  std::vector<IoRequest*> completed;
  queue_->wait(Nanoseconds(0), completed);
  EXPECT_TRUE(completed.empty());
  std::thread elsewhere([&pipe] { pipe.send(); });
  queue_->wait(std::chrono::seconds(60), completed);
  elsewhere.join();
  EXPECT_EQ(completed, std::vector<IoRequest*>{&first});
  EXPECT_EQ(queue_->in_flight(), 1u);
  pipe.send();
  queue_->wait(std::chrono::seconds(60), completed);
  EXPECT_EQ(completed, (std::vector<IoRequest*>{&first, &second}));
  EXPECT_EQ(queue_->in_flight(), 0u);
}

TEST_P(IoQueueTest, WatchedDescriptorsAndOtherThreadsAndFilesMix) {
  const auto device = open(scratch_.file("beside"), DeviceRole::target, true, 1 * MiB);
  ASSERT_NE(device, nullptr);
  WatchedPipe pipe(*queue_);
  std::vector<IoRequest> piped(64), written(64), elsewhere(64);
  std::vector<IoRequest*> completed;
  for (auto& request : elsewhere) queue_->lend(request);
  std::thread other([&] {
    for (auto& request : elsewhere) queue_->give_back(request, 0);
  });
  for (std::size_t i = 0; i < piped.size(); ++i) {
    pipe.lend(piped[i]);
    pipe.send();
    fill(written[i], IoOperation::write, i * 4096, 4096, memory_);
    device->submit(written[i]);
    queue_->wait(std::chrono::milliseconds(i % 3), completed);
  }
  const auto rest = drain(*queue_);
  other.join();
  EXPECT_EQ(completed.size() + rest.size(), piped.size() + written.size() + elsewhere.size());
}

TEST_F(UringQueueTest, AWatchedDescriptorEndsAWaitForTheKernel) {
  int ends[2];
  ASSERT_EQ(::pipe2(ends, O_CLOEXEC), 0);
  const FileDescriptor reader(ends[0]), writer(ends[1]);
  const auto slot = queue_->add_file(reader.get());
  ASSERT_TRUE(slot);
  IoRequest slow, watched;
  fill(slow, IoOperation::read, std::uint64_t(-1), 4, memory_);
  queue_->submit_file(*slot, slow, 4);
  WatchedPipe pipe(*queue_);
  pipe.lend(watched);
  std::vector<IoRequest*> completed;
  std::thread elsewhere([&pipe] { pipe.send(); });
  queue_->wait(std::chrono::seconds(60), completed);
  elsewhere.join();
  EXPECT_EQ(completed, std::vector<IoRequest*>{&watched});
  ASSERT_EQ(::write(writer.get(), "abcd", 4), 4);
  queue_->wait(std::chrono::seconds(60), completed);
  EXPECT_EQ(completed, (std::vector<IoRequest*>{&watched, &slow}));
  queue_->remove_file(*slot);
}

TEST_P(IoQueueTest, WhatIsNotWatchedAnyMoreIsNotTold) {
  WatchedPipe first(*queue_), second(*queue_);
  IoRequest one, other;
  first.lend(one);
  second.lend(other);
  // Both are ready at once; whichever comes first ends the other one's watch.
  first.when_ready = [&] { queue_->unwatch(second.fd()); };
  second.when_ready = [&] { queue_->unwatch(first.fd()); };
  first.send();
  second.send();
  std::vector<IoRequest*> completed;
  queue_->wait(std::chrono::seconds(60), completed);
  queue_->wait(Nanoseconds(0), completed);
  EXPECT_EQ(completed.size(), 1u);
  EXPECT_EQ(queue_->in_flight(), 1u);
  queue_->give_back_here(completed.front() == &one ? other : one, 0);
  EXPECT_EQ(drain(*queue_).size(), 1u);
}

TEST_P(IoQueueTest, MemoryThatIsNotRegisteredServesToo) {
  const auto device = open(scratch_.file("plain"), DeviceRole::target, true, 1 * MiB);
  ASSERT_NE(device, nullptr);
  alignas(4096) static std::byte outside[8192];
  std::memset(outside, 0x42, sizeof outside);
  ASSERT_EQ(run(*device, IoOperation::write, 4096, 8192, outside), 8192);
  ASSERT_EQ(run(*device, IoOperation::read, 4096, 8192, memory_), 8192);
  EXPECT_EQ(std::memcmp(memory_, outside, 8192), 0);
}

TEST_P(IoQueueTest, BelongsToTheThreadThatFirstWaits) {
  const std::string path = scratch_.make_file("volume", 1 * MiB);
  auto device = open(path, DeviceRole::source);
  ASSERT_NE(device, nullptr);
  std::int64_t result = 0;
  std::thread([&] {
    result = run(*device, IoOperation::read, 0, 4096, memory_);
    device.reset();
    queue_.reset();
  }).join();
  EXPECT_EQ(result, 4096);
}

TEST_P(IoQueueTest, SlotsAreUsedAgain) {
  const std::string path = scratch_.make_file("volume", 8192);
  for (int i = 0; i < 200; ++i) {
    const auto device = open(path, DeviceRole::source);
    ASSERT_NE(device, nullptr);
    ASSERT_EQ(run(*device, IoOperation::read, 4096, 4096, memory_), 4096);
  }
}

TEST_P(IoQueueTest, ManyQueuesLiveAndDieSideBySide) {
  std::vector<std::unique_ptr<FileQueue>> queues;
  for (int i = 0; i < 32; ++i) {
    auto queue = make_file_queue(GetParam(), 16);
    ASSERT_TRUE(queue) << queue.error().message();
    queues.push_back(std::move(*queue));
  }
  IoRequest request;
  queues[7]->post(request, 5);
  EXPECT_EQ(drain(*queues[7]).size(), 1u);
}

TEST_P(IoQueueTest, AFailureIsTheRequestsResult) {
  const std::string path = scratch_.make_file("read-only", 8192);
  const FileDescriptor fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  const auto slot = queue_->add_file(fd.get());
  ASSERT_TRUE(slot);
  for (const IoOperation operation : {IoOperation::write, IoOperation::zero}) {
    IoRequest request;
    fill(request, operation, 0, 4096, memory_);
    queue_->submit_file(*slot, request, 4096);
    EXPECT_EQ(drain(*queue_).size(), 1u);
    EXPECT_EQ(request.result, -EBADF);
  }
  queue_->remove_file(*slot);
}

TEST_F(UringQueueTest, DestroyedUnderItsRequestsIsABrokenInvariant) {
  EXPECT_DEATH(
      {
        int ends[2];
        const bool made = ::pipe2(ends, O_CLOEXEC) == 0;
        auto queue = make_file_queue(IoEngine::uring, 4);
        const auto slot = (*queue)->add_file(made ? ends[0] : -1);
        IoRequest request;
        fill(request, IoOperation::read, std::uint64_t(-1), 4, memory_);
        (*queue)->submit_file(*slot, request, 4);
        std::vector<IoRequest*> completed;
        (*queue)->wait(Nanoseconds(0), completed);
        queue->reset();
      },
      "destroyed under its requests");
}

INSTANTIATE_TEST_SUITE_P(Engines, IoQueueTest, ::testing::Values(IoEngine::uring, IoEngine::aio),
                         [](const auto& param) { return engine_test_name(param.param); });

// What is forbidden. Each in a process of its own, which ends with what it saw.

/// Answers one system call with an errno from now on, as a container's filter does.
bool forbid(unsigned number, unsigned errno_value) {
  sock_filter program[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, number, 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | errno_value),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  const sock_fprog filter{std::size(program), program};
  return ::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 &&
         ::prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter) == 0;
}

[[noreturn]] void end_with(const char* text) {
  std::fputs(text, stderr);
  ::_exit(std::strcmp(text, "as it should be") == 0 ? 0 : 1);
}

void try_without_uring(unsigned errno_value) {
  if (!forbid(SYS_io_uring_setup, errno_value)) end_with("cannot filter");
  const auto automatic = make_file_queue(IoEngine::automatic, 8);
  if (!automatic || std::strcmp((*automatic)->name(), "libaio") != 0) end_with("auto did not take libaio");
  const auto uring = make_file_queue(IoEngine::uring, 8);
  if (uring || uring.error().code != ErrorCode::unsupported) end_with("uring was not refused as unsupported");
  if (uring.error().message().find("--io-engine aio") == std::string::npos) end_with("no way out is named");
  end_with("as it should be");
}

TEST(IoEngineDeathTest, AutoTakesLibaioWhereUringIsForbidden) {
  EXPECT_EXIT(try_without_uring(EPERM), ::testing::ExitedWithCode(0), "as it should be");
  EXPECT_EXIT(try_without_uring(ENOSYS), ::testing::ExitedWithCode(0), "as it should be");
}

void try_without_registered_memory(int fd, std::byte* memory, std::size_t bytes) {
  const rlimit limit{65536, 65536};
  if (::setrlimit(RLIMIT_MEMLOCK, &limit) != 0 || ::setuid(65534) != 0) end_with("cannot drop privileges");
  auto queue = make_file_queue(IoEngine::uring, 8);
  if (!queue) end_with(queue.error().message().c_str());
  if (!(*queue)->register_memory({memory, bytes})) end_with("memory was refused");
  const auto slot = (*queue)->add_file(fd);
  IoRequest request;
  request.bytes = 4096;
  request.data = memory;
  (*queue)->submit_file(*slot, request, 4096);
  std::vector<IoRequest*> completed;
  (*queue)->wait(std::chrono::seconds(60), completed);
  end_with(request.result == 4096 ? "as it should be" : "no data came");
}

TEST(IoEngineDeathTest, MemoryThatMayNotBeLockedIsUsedUnregistered) {
  if (::geteuid() != 0) GTEST_SKIP() << "dropping privileges needs root";
  if (!make_file_queue(IoEngine::uring, 8)) GTEST_SKIP() << "no io_uring here";
  Scratch scratch("/var/tmp");
  const FileDescriptor fd(::open(scratch.make_file("volume", 8192).c_str(), O_RDWR | O_CLOEXEC));
  std::vector<std::byte> memory(4 * MiB);
  EXPECT_EXIT(try_without_registered_memory(fd.get(), memory.data(), memory.size()),
              ::testing::ExitedWithCode(0), "as it should be");
}

TEST(IoEngines, HaveNames) {
  EXPECT_EQ(parse_io_engine("auto"), IoEngine::automatic);
  EXPECT_EQ(parse_io_engine("uring"), IoEngine::uring);
  EXPECT_EQ(parse_io_engine("aio"), IoEngine::aio);
  for (const char* name : {"", "io_uring", "URING", "auto "}) {
    const auto engine = parse_io_engine(name);
    ASSERT_FALSE(engine) << name;
    EXPECT_EQ(engine.error().code, ErrorCode::invalid_argument);
  }
}

}  // namespace
}  // namespace blockferry
