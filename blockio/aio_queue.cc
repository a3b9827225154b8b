// SPDX-License-Identifier: Apache-2.0
#include "blockio/aio_queue.h"

#include <algorithm>
#include <cerrno>
#include <deque>

#include <fcntl.h>
#include <libaio.h>
#include <linux/falloc.h>
#include <unistd.h>

#include "blockio/base/check.h"

namespace blockferry {

namespace {

class AioQueue : public FileQueue {
 public:
  explicit AioQueue(unsigned depth) : depth_(std::max(depth, 1U)) {}
  ~AioQueue() override;

  Result<void> open();

  Result<void> register_memory(std::span<std::byte>) override { return {}; }  // nothing to register here
  Result<unsigned> add_file(int fd) override;
  void submit_file(unsigned slot, IoRequest& request, std::uint64_t bytes) override;
  void post(IoRequest& request, std::int64_t result) override { posted_.emplace_back(&request, result); }
  void wait(Nanoseconds timeout, std::vector<IoRequest*>& completed) override;
  std::size_t in_flight() const override { return waiting_.size() + posted_.size() + in_kernel_; }
  const char* name() const override { return "libaio"; }

 private:
  struct Pending {
    unsigned slot;
    IoRequest* request;
    std::uint64_t bytes;
  };

  void submit_waiting();
  bool do_at_once(const Pending& pending);
  void fill(iocb& control, const Pending& pending) const;
  void take_posted(std::vector<IoRequest*>& completed);
  static std::int64_t now_ns() { return system_clock().now().count(); }

  const unsigned depth_;
  io_context_t context_ = nullptr;
  std::vector<int> files_;
  std::deque<Pending> waiting_;
  std::vector<iocb> controls_;
  std::vector<unsigned> free_;  ///< of controls_
  std::vector<std::pair<IoRequest*, std::int64_t>> posted_;
  std::vector<io_event> events_;
  bool flush_blocks_ = false;  ///< the kernel refused an asynchronous flush
  std::size_t in_kernel_ = 0;
};

AioQueue::~AioQueue() {
  if (context_ == nullptr) return;
  BLOCKFERRY_CHECK(in_kernel_ == 0, "an I/O queue was destroyed under its requests");
  ::io_destroy(context_);
}

Result<void> AioQueue::open() {
  if (const int error = ::io_setup(int(depth_), &context_); error < 0) {
    return fail(error_from_errno(-error, "set up asynchronous I/O", ""));
  }
  controls_.resize(depth_);
  events_.resize(depth_);
  for (unsigned i = depth_; i > 0; --i) free_.push_back(i - 1);
  return {};
}

Result<unsigned> AioQueue::add_file(int fd) {
  files_.push_back(fd);
  return unsigned(files_.size() - 1);
}

void AioQueue::submit_file(unsigned slot, IoRequest& request, std::uint64_t bytes) {
  request.submitted_at_ns = now_ns();
  waiting_.push_back({slot, &request, bytes});
}

/// What has no asynchronous form.
bool AioQueue::do_at_once(const Pending& pending) {
  const int fd = files_[pending.slot];
  const IoRequest& request = *pending.request;
  int done = 0;
  if (request.operation == IoOperation::flush && flush_blocks_) {
    done = ::fdatasync(fd);
  } else if (request.operation == IoOperation::zero) {
    const auto offset = off_t(request.offset), length = off_t(pending.bytes);
    done = ::fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length);
    if (done != 0 && errno == EOPNOTSUPP) {
      done = ::fallocate(fd, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, offset, length);
    }
  } else {
    return false;
  }
  post(*pending.request, done == 0 ? 0 : -errno);
  return true;
}

void AioQueue::fill(iocb& control, const Pending& pending) const {
  const int fd = files_[pending.slot];
  const IoRequest& request = *pending.request;
  switch (request.operation) {
    case IoOperation::read:
      ::io_prep_pread(&control, fd, request.data, pending.bytes, static_cast<long long>(request.offset));
      break;
    case IoOperation::write:
      ::io_prep_pwrite(&control, fd, request.data, pending.bytes, static_cast<long long>(request.offset));
      break;
    case IoOperation::zero:
    case IoOperation::flush:
      ::io_prep_fdsync(&control, fd);
      break;
  }
  control.data = pending.request;
}

void AioQueue::submit_waiting() {
  while (!waiting_.empty()) {
    const Pending pending = waiting_.front();
    if (do_at_once(pending)) {
      waiting_.pop_front();
      continue;
    }
    if (free_.empty()) return;
    const unsigned index = free_.back();
    iocb* control = &controls_[index];
    fill(*control, pending);
    const int done = ::io_submit(context_, 1, &control);
    if (done == 1) {
      free_.pop_back();
      waiting_.pop_front();
      ++in_kernel_;
    } else if (done == -EINVAL && pending.request->operation == IoOperation::flush) {
      flush_blocks_ = true;
    } else if (done == -EAGAIN && in_kernel_ > 0) {
      return;  // when some have come back there is room again
    } else {
      waiting_.pop_front();
      post(*pending.request, done == 0 ? -EAGAIN : done);
    }
  }
}

void AioQueue::take_posted(std::vector<IoRequest*>& completed) {
  for (auto& [request, result] : posted_) {
    request->result = result;
    request->completed_at_ns = now_ns();
    completed.push_back(request);
  }
  posted_.clear();
}

void AioQueue::wait(Nanoseconds timeout, std::vector<IoRequest*>& completed) {
  const std::size_t before = completed.size();
  const std::int64_t give_up = now_ns() + timeout.count();
  for (;;) {
    submit_waiting();
    take_posted(completed);
    if (in_kernel_ == 0) return;
    const bool some = completed.size() > before;
    const std::int64_t left = some ? 0 : std::max<std::int64_t>(0, give_up - now_ns());
    timespec limit{left / 1'000'000'000, left % 1'000'000'000};
    const int count =
        ::io_getevents(context_, left > 0 ? 1 : 0, long(events_.size()), events_.data(), &limit);
    for (int i = 0; i < count; ++i) {
      auto* request = static_cast<IoRequest*>(events_[std::size_t(i)].data);
      free_.push_back(unsigned(events_[std::size_t(i)].obj - controls_.data()));
      --in_kernel_;
      request->result =
          std::min<std::int64_t>(std::int64_t(events_[std::size_t(i)].res), std::int64_t(request->bytes));
      request->completed_at_ns = now_ns();
      completed.push_back(request);
    }
    if (completed.size() > before || left == 0) return;
  }
}

}  // namespace

Result<std::unique_ptr<FileQueue>> make_aio_queue(unsigned depth) {
  auto queue = std::make_unique<AioQueue>(depth);
  if (auto done = queue->open(); !done) return fail(done.error());
  return queue;
}

}  // namespace blockferry
