// SPDX-License-Identifier: Apache-2.0
#include "blockio/aio_queue.h"

#include <algorithm>
#include <cerrno>
#include <deque>

#include <fcntl.h>
#include <libaio.h>
#include <linux/falloc.h>
#include <poll.h>
#include <unistd.h>

#include "blockio/base/check.h"

namespace blockferry {

namespace {

constexpr Nanoseconds blocking_max = std::chrono::milliseconds(100);

class AioQueue : public FileQueue {
 public:
  explicit AioQueue(unsigned depth) : depth_(std::max(depth, 1U)) {}
  ~AioQueue() override;

  Result<void> open();

  Result<void> register_memory(std::span<std::byte>) override { return {}; }  // nothing to register here
  Result<unsigned> add_file(int fd) override;
  void remove_file(unsigned slot) override { files_[slot] = {}; }
  void submit_file(unsigned slot, IoRequest& request, std::uint64_t bytes) override;
  void post(IoRequest& request, std::int64_t result) override { posted_.emplace_back(&request, result); }
  void wait(Nanoseconds timeout, std::vector<IoRequest*>& completed) override;
  std::size_t in_flight() const override {
    return waiting_.size() + posted_.size() + in_kernel_ + returns_.lent();
  }
  const char* name() const override { return "libaio"; }

 private:
  struct Pending {
    unsigned slot;
    IoRequest* request;
    std::uint64_t bytes;
  };
  struct File {
    int fd = -1;                 ///< -1: a free slot
    bool zero_by_range = false;  ///< it has refused the first way to zero
  };

  void submit_waiting();
  bool submit_batch();
  bool blocks(const Pending& pending) const;
  void do_at_once(const Pending& pending);
  int zero(File& file, const Pending& pending) const;
  void fill(iocb& control, const Pending& pending) const;
  void take_posted(std::vector<IoRequest*>& completed);
  void watch_returns();
  void reap(std::int64_t left_ns, std::vector<IoRequest*>& completed);
  static std::int64_t now_ns() { return system_clock().now().count(); }

  const unsigned depth_;
  io_context_t context_ = nullptr;
  std::vector<File> files_;  ///< by slot
  std::deque<Pending> waiting_;
  std::vector<iocb> controls_;
  std::vector<unsigned> free_;  ///< of controls_
  std::vector<iocb*> batch_;    ///< of one system call
  std::vector<std::pair<IoRequest*, std::int64_t>> posted_;
  std::vector<io_event> events_;
  bool flush_blocks_ = false;  ///< the kernel refused an asynchronous flush
  std::size_t in_kernel_ = 0;
  iocb returns_control_{};         ///< waits for something to come back
  bool watching_returns_ = false;  ///< it is in the kernel
};

AioQueue::~AioQueue() {
  if (context_ == nullptr) return;
  BLOCKFERRY_CHECK(in_kernel_ == 0, "an I/O queue was destroyed under its requests");
  ::io_destroy(context_);
}

Result<void> AioQueue::open() {
  if (const int error = ::io_setup(int(depth_) + 1, &context_); error < 0) {
    Error failure = error_from_errno(-error, "set up asynchronous I/O", "");
    if (error == -EAGAIN) failure.hint = "the system's limit is reached; raise the sysctl fs.aio-max-nr";
    if (error == -ENOSYS || error == -EPERM) failure.code = ErrorCode::unsupported;
    return fail(failure);
  }
  controls_.resize(depth_);
  events_.resize(depth_ + 1);
  for (unsigned i = depth_; i > 0; --i) free_.push_back(i - 1);
  return {};
}

Result<unsigned> AioQueue::add_file(int fd) {
  auto free = std::find_if(files_.begin(), files_.end(), [](const File& file) { return file.fd < 0; });
  if (free == files_.end()) free = files_.insert(files_.end(), File{});
  *free = {fd, false};
  return unsigned(free - files_.begin());
}

void AioQueue::submit_file(unsigned slot, IoRequest& request, std::uint64_t bytes) {
  request.submitted_at_ns = now_ns();
  waiting_.push_back({slot, &request, bytes});
}

/// What has no asynchronous form.
bool AioQueue::blocks(const Pending& pending) const {
  const IoOperation operation = pending.request->operation;
  return operation == IoOperation::zero || (operation == IoOperation::flush && flush_blocks_);
}

void AioQueue::do_at_once(const Pending& pending) {
  File& file = files_[pending.slot];
  const bool flush = pending.request->operation == IoOperation::flush;
  const int done = flush ? ::fdatasync(file.fd) : zero(file, pending);
  post(*pending.request, done == 0 ? 0 : -errno);
}

int AioQueue::zero(File& file, const Pending& pending) const {
  const auto offset = off_t(pending.request->offset), length = off_t(pending.bytes);
  if (!file.zero_by_range) {
    if (::fallocate(file.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length) == 0) return 0;
    if (errno != EOPNOTSUPP) return -1;
    file.zero_by_range = true;
  }
  return ::fallocate(file.fd, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, offset, length);
}

void AioQueue::fill(iocb& control, const Pending& pending) const {
  const int fd = files_[pending.slot].fd;
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

/// In the order they came. Blocking ones go out only for a while: the run's thread has to look up now and
/// then.
void AioQueue::submit_waiting() {
  const std::int64_t give_up = now_ns() + blocking_max.count();
  while (!waiting_.empty()) {
    if (!blocks(waiting_.front())) {
      if (!submit_batch()) return;
    } else if (now_ns() < give_up) {
      do_at_once(waiting_.front());
      waiting_.pop_front();
    } else {
      return;
    }
  }
}

/// As many as there is room for, in one system call. False when the kernel takes no more for the moment.
bool AioQueue::submit_batch() {
  batch_.clear();
  for (const Pending& pending : waiting_) {
    if (batch_.size() == free_.size() || blocks(pending)) break;
    batch_.push_back(&controls_[free_[free_.size() - 1 - batch_.size()]]);
    fill(*batch_.back(), pending);
  }
  if (batch_.empty()) return false;
  const int done = ::io_submit(context_, long(batch_.size()), batch_.data());
  if (done > 0) {
    waiting_.erase(waiting_.begin(), waiting_.begin() + done);
    free_.resize(free_.size() - std::size_t(done));
    in_kernel_ += std::size_t(done);
    return true;
  }
  // The complaint is about the first one only.
  const Pending pending = waiting_.front();
  if (done == -EINVAL && pending.request->operation == IoOperation::flush) {
    flush_blocks_ = true;
  } else if (done == -EINTR || (done == -EAGAIN && in_kernel_ > 0)) {
    return false;  // when some have come back there is room again
  } else {
    waiting_.pop_front();
    post(*pending.request, done == 0 ? -EAGAIN : done);
  }
  return true;
}

void AioQueue::take_posted(std::vector<IoRequest*>& completed) {
  for (auto& [request, result] : posted_) {
    request->result = result;
    request->completed_at_ns = now_ns();
    completed.push_back(request);
  }
  posted_.clear();
}

void AioQueue::watch_returns() {
  if (returns_.lent() == 0 || watching_returns_) return;
  ::io_prep_poll(&returns_control_, returns_.event_fd(), POLLIN);
  iocb* list[] = {&returns_control_};
  watching_returns_ = ::io_submit(context_, 1, list) == 1;
}

void AioQueue::reap(std::int64_t left_ns, std::vector<IoRequest*>& completed) {
  timespec limit{left_ns / 1'000'000'000, left_ns % 1'000'000'000};
  const int count =
      ::io_getevents(context_, left_ns > 0 ? 1 : 0, long(events_.size()), events_.data(), &limit);
  for (int i = 0; i < count; ++i) {
    const io_event& event = events_[std::size_t(i)];
    if (event.obj == &returns_control_) {
      watching_returns_ = false;
      continue;
    }
    auto* request = static_cast<IoRequest*>(event.data);
    free_.push_back(unsigned(event.obj - controls_.data()));
    --in_kernel_;
    request->result = std::min<std::int64_t>(std::int64_t(event.res), std::int64_t(request->bytes));
    request->completed_at_ns = now_ns();
    completed.push_back(request);
  }
}

void AioQueue::wait(Nanoseconds timeout, std::vector<IoRequest*>& completed) {
  const std::size_t before = completed.size();
  const std::int64_t give_up = now_ns() + timeout.count();
  for (;;) {
    submit_waiting();
    take_posted(completed);
    returns_.take(completed);
    const std::int64_t left = completed.size() > before ? 0 : std::max<std::int64_t>(0, give_up - now_ns());
    if (in_kernel_ == 0 && waiting_.empty()) {  // nothing for the kernel
      if (returns_.lent() == 0 || left == 0) return;
      returns_.wait(Nanoseconds(left));
      continue;
    }
    watch_returns();
    // A kernel that cannot watch (before 4.18) is asked again and again.
    constexpr std::int64_t moment_ns = 1'000'000;
    const bool blind = returns_.lent() > 0 && !watching_returns_;
    reap(blind ? std::min(left, moment_ns) : left, completed);
    returns_.take(completed);
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
