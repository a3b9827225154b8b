// SPDX-License-Identifier: Apache-2.0
#include "blockio/uring_queue.h"

#include <algorithm>
#include <cerrno>
#include <deque>

#include <fcntl.h>
#include <liburing.h>
#include <linux/falloc.h>

#include "blockio/base/check.h"

namespace blockferry {

namespace {

constexpr unsigned file_slots = 32;
constexpr std::size_t registration_bytes_max = 1 << 30;  // the kernel's limit a buffer
constexpr int punch = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
constexpr int zero_range = FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE;

class UringQueue : public FileQueue {
 public:
  explicit UringQueue(unsigned depth) : depth_(depth) {}
  ~UringQueue() override;

  Result<void> open();

  Result<void> register_memory(std::span<std::byte> memory) override;
  Result<unsigned> add_file(int fd) override;
  void submit_file(unsigned slot, IoRequest& request, std::uint64_t bytes) override;
  void post(IoRequest& request, std::int64_t result) override;
  void wait(Nanoseconds timeout, std::vector<IoRequest*>& completed) override;
  std::size_t in_flight() const override { return waiting_.size() + posted_.size() + in_kernel_; }
  const char* name() const override { return "io_uring"; }

 private:
  struct Pending {
    unsigned slot;
    IoRequest* request;
    std::uint64_t bytes;
    bool zero_by_range = false;  ///< the second way to zero, where the first is not supported
  };

  void prepare_waiting();
  void prepare(io_uring_sqe& entry, const Pending& pending) const;
  bool in_registered_memory(const IoRequest& request, std::uint64_t bytes) const;
  void reap(std::vector<IoRequest*>& completed);
  static std::int64_t now_ns() { return system_clock().now().count(); }

  const unsigned depth_;
  io_uring ring_{};
  bool open_ = false;
  bool files_registered_ = false;
  std::vector<int> files_;
  std::span<std::byte> memory_;
  bool memory_registered_ = false;
  std::deque<Pending> waiting_;  ///< not in the ring yet
  std::vector<Pending> slots_;   ///< in the kernel, by user data
  std::vector<unsigned> free_;   ///< of slots_
  std::vector<std::pair<IoRequest*, std::int64_t>> posted_;
  std::size_t in_kernel_ = 0;
};

UringQueue::~UringQueue() {
  if (!open_) return;
  BLOCKFERRY_CHECK(in_kernel_ == 0, "an I/O queue was destroyed under its requests");
  // Before the ring: the kernel takes a ring apart later, and would hold the devices claimed until then.
  if (files_registered_) ::io_uring_unregister_files(&ring_);
  if (memory_registered_) ::io_uring_unregister_buffers(&ring_);
  ::io_uring_queue_exit(&ring_);
}

/// The fastest set-up that this kernel has: completions on our own thread only when we ask for them.
Result<void> UringQueue::open() {
  constexpr unsigned tries[] = {IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN,
                                IORING_SETUP_COOP_TASKRUN, 0};
  int error = 0;
  for (const unsigned flags : tries) {
    error = ::io_uring_queue_init(std::max(depth_, 4U), &ring_, flags);
    if (error != -EINVAL) break;
  }
  if (error < 0) {
    Error failure = error_from_errno(-error, "set up io_uring", "");
    if (error == -EPERM || error == -ENOSYS || error == -ENOMEM) failure.code = ErrorCode::unsupported;
    failure.hint = "io_uring is forbidden or missing here; --io-engine aio does without it";
    return fail(failure);
  }
  open_ = true;
  slots_.resize(depth_);
  for (unsigned i = depth_; i > 0; --i) free_.push_back(i - 1);
  files_registered_ = ::io_uring_register_files_sparse(&ring_, file_slots) == 0;
  return {};
}

Result<void> UringQueue::register_memory(std::span<std::byte> memory) {
  memory_ = memory;
  std::vector<iovec> pieces;
  for (std::size_t at = 0; at < memory.size(); at += registration_bytes_max) {
    pieces.push_back({memory.data() + at, std::min(registration_bytes_max, memory.size() - at)});
  }
  // Where the memory may not be locked, plain reads and writes do the same, a little slower.
  memory_registered_ = ::io_uring_register_buffers(&ring_, pieces.data(), unsigned(pieces.size())) == 0;
  return {};
}

Result<unsigned> UringQueue::add_file(int fd) {
  const unsigned slot = unsigned(files_.size());
  if (slot == file_slots) return fail(make_error(ErrorCode::internal, "register file", "", "too many files"));
  files_.push_back(fd);
  if (files_registered_) {
    const int done = ::io_uring_register_files_update(&ring_, slot, &fd, 1);
    if (done < 0) return fail(error_from_errno(-done, "register file", ""));
  }
  return slot;
}

void UringQueue::submit_file(unsigned slot, IoRequest& request, std::uint64_t bytes) {
  request.submitted_at_ns = now_ns();
  waiting_.push_back({slot, &request, bytes});
}

void UringQueue::post(IoRequest& request, std::int64_t result) {
  posted_.emplace_back(&request, result);
}

bool UringQueue::in_registered_memory(const IoRequest& request, std::uint64_t bytes) const {
  if (!memory_registered_ || request.data < memory_.data()) return false;
  const auto at = std::size_t(request.data - memory_.data());
  // A request across two registrations goes the plain way.
  return at + bytes <= memory_.size() &&
         at / registration_bytes_max == (at + bytes - 1) / registration_bytes_max;
}

void UringQueue::prepare(io_uring_sqe& entry, const Pending& pending) const {
  const IoRequest& request = *pending.request;
  const int file = files_registered_ ? int(pending.slot) : files_[pending.slot];
  const auto length = unsigned(pending.bytes);
  const bool fixed = in_registered_memory(request, pending.bytes);
  const int buffer = fixed ? int(std::size_t(request.data - memory_.data()) / registration_bytes_max) : 0;
  switch (request.operation) {
    case IoOperation::read:
      if (fixed) {
        ::io_uring_prep_read_fixed(&entry, file, request.data, length, request.offset, buffer);
      } else {
        ::io_uring_prep_read(&entry, file, request.data, length, request.offset);
      }
      break;
    case IoOperation::write:
      if (fixed) {
        ::io_uring_prep_write_fixed(&entry, file, request.data, length, request.offset, buffer);
      } else {
        ::io_uring_prep_write(&entry, file, request.data, length, request.offset);
      }
      break;
    case IoOperation::zero:
      ::io_uring_prep_fallocate(&entry, file, pending.zero_by_range ? zero_range : punch,
                                off_t(request.offset), off_t(pending.bytes));
      break;
    case IoOperation::flush:
      ::io_uring_prep_fsync(&entry, file, IORING_FSYNC_DATASYNC);
      break;
  }
  if (files_registered_) entry.flags |= IOSQE_FIXED_FILE;
}

void UringQueue::prepare_waiting() {
  while (!waiting_.empty() && !free_.empty()) {
    io_uring_sqe* entry = ::io_uring_get_sqe(&ring_);
    if (entry == nullptr) return;
    const unsigned index = free_.back();
    free_.pop_back();
    slots_[index] = waiting_.front();
    waiting_.pop_front();
    prepare(*entry, slots_[index]);
    ::io_uring_sqe_set_data64(entry, index);
    ++in_kernel_;
  }
}

void UringQueue::reap(std::vector<IoRequest*>& completed) {
  io_uring_cqe* cqe = nullptr;
  while (::io_uring_peek_cqe(&ring_, &cqe) == 0 && cqe != nullptr) {
    const auto index = unsigned(cqe->user_data);
    const int result = cqe->res;
    ::io_uring_cqe_seen(&ring_, cqe);
    Pending pending = slots_[index];
    free_.push_back(index);
    --in_kernel_;
    if (result == -EOPNOTSUPP && pending.request->operation == IoOperation::zero && !pending.zero_by_range) {
      pending.zero_by_range = true;
      waiting_.push_front(pending);
      continue;
    }
    pending.request->result = std::min<std::int64_t>(result, std::int64_t(pending.request->bytes));
    pending.request->completed_at_ns = now_ns();
    completed.push_back(pending.request);
  }
}

void UringQueue::wait(Nanoseconds timeout, std::vector<IoRequest*>& completed) {
  const std::size_t before = completed.size();
  for (auto& [request, result] : posted_) {
    request->result = result;
    request->completed_at_ns = now_ns();
    completed.push_back(request);
  }
  posted_.clear();
  const std::int64_t give_up = now_ns() + timeout.count();
  for (;;) {
    prepare_waiting();
    const std::int64_t left = std::max<std::int64_t>(0, give_up - now_ns());
    if (in_kernel_ == 0 && ::io_uring_sq_ready(&ring_) == 0) return;
    if (completed.size() > before || left == 0) {
      ::io_uring_submit_and_get_events(&ring_);
      reap(completed);
      return;
    }
    __kernel_timespec limit{left / 1'000'000'000, left % 1'000'000'000};
    io_uring_cqe* cqe = nullptr;
    ::io_uring_submit_and_wait_timeout(&ring_, &cqe, 1, &limit, nullptr);
    reap(completed);
    // An interrupted wait, or only a zero request that goes the second way: once more.
    if (completed.size() > before && waiting_.empty()) return;
  }
}

}  // namespace

Result<std::unique_ptr<FileQueue>> make_uring_queue(unsigned depth) {
  auto queue = std::make_unique<UringQueue>(depth);
  if (auto done = queue->open(); !done) return fail(done.error());
  return queue;
}

}  // namespace blockferry
