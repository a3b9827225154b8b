// SPDX-License-Identifier: Apache-2.0
#include "blockio/uring_queue.h"

#include <algorithm>
#include <cerrno>
#include <deque>

#include <fcntl.h>
#include <liburing.h>
#include <linux/falloc.h>
#include <poll.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "blockio/base/check.h"

namespace blockferry {

namespace {

constexpr unsigned file_slots = 32;
constexpr std::size_t registration_bytes_max = 1 << 30;  // the kernel's limit a buffer
constexpr std::uint64_t returns_mark = UINT64_MAX;       // the user data of what watches the returns
constexpr int punch = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
constexpr int zero_range = FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE;

class UringQueue : public FileQueue {
 public:
  explicit UringQueue(unsigned depth) : depth_(std::max(depth, 1U)) {}
  ~UringQueue() override;

  Result<void> open();

  Result<void> register_memory(std::span<std::byte> memory) override;
  Result<unsigned> add_file(int fd) override;
  void remove_file(unsigned slot) override;
  void submit_file(unsigned slot, IoRequest& request, std::uint64_t bytes) override;
  void post(IoRequest& request, std::int64_t result) override;
  void wait(Nanoseconds timeout, std::vector<IoRequest*>& completed) override;
  std::size_t in_flight() const override {
    return waiting_.size() + posted_.size() + in_kernel_ + returns_.lent();
  }
  const char* name() const override { return "io_uring"; }

 private:
  struct Pending {
    unsigned slot;
    IoRequest* request;
    std::uint64_t bytes;
    bool zero_by_range = false;  ///< the second way to zero, where the first is not supported
  };
  struct File {
    int fd = -1;                 ///< -1: a free slot
    bool zero_by_range = false;  ///< it has refused the first way
  };

  Result<void> check_features();
  void take_posted(std::vector<IoRequest*>& completed);
  void enable();
  void watch_returns();
  void prepare_waiting();
  void prepare(io_uring_sqe& entry, const Pending& pending) const;
  bool in_registered_memory(const IoRequest& request, std::uint64_t bytes) const;
  void reap(std::vector<IoRequest*>& completed);
  static std::int64_t now_ns() { return system_clock().now().count(); }

  const unsigned depth_;
  io_uring ring_{};
  bool open_ = false;
  bool enabled_ = false;
  bool files_registered_ = false;
  std::vector<File> files_;  ///< by slot
  std::span<std::byte> memory_;
  bool memory_registered_ = false;
  std::deque<Pending> waiting_;  ///< not in the ring yet
  std::vector<Pending> slots_;   ///< in the kernel, by user data
  std::vector<unsigned> free_;   ///< of slots_
  std::vector<std::pair<IoRequest*, std::int64_t>> posted_;
  std::size_t in_kernel_ = 0;
  bool watching_returns_ = false;  ///< the kernel will say when something has come back
};

UringQueue::~UringQueue() {
  if (!open_) return;
  BLOCKFERRY_CHECK(in_kernel_ == 0, "an I/O queue was destroyed under its requests");
  // Before the ring: the kernel takes a ring apart later, and would hold the devices claimed until then.
  if (files_registered_) ::io_uring_unregister_files(&ring_);
  if (memory_registered_) ::io_uring_unregister_buffers(&ring_);
  ::io_uring_queue_exit(&ring_);
}

bool forbidden(int error) {
  return error == -EPERM || error == -EACCES || error == -ENOSYS || error == -ENOMEM;
}

/// The fastest set-up that this kernel has: completions on our own thread only when we ask for them. The ring
/// belongs to the thread that first waits: until then (R_DISABLED) any thread may register with it.
Result<void> UringQueue::open() {
  constexpr unsigned always = IORING_SETUP_CLAMP | IORING_SETUP_R_DISABLED;
  constexpr unsigned tries[] = {always | IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN,
                                always | IORING_SETUP_COOP_TASKRUN, always};
  int error = 0;
  for (const unsigned flags : tries) {
    error = ::io_uring_queue_init(std::max(depth_, 4U), &ring_, flags);
    if (error != -EINVAL) break;
  }
  if (error < 0) {
    Error failure = error_from_errno(-error, "set up io_uring", "");
    if (forbidden(error)) {
      failure.code = ErrorCode::unsupported;
      failure.hint =
          "it is forbidden here (kernel.io_uring_disabled, seccomp) or missing; --io-engine aio does without "
          "it";
    }
    return fail(failure);
  }
  open_ = true;
  if (auto done = check_features(); !done) return done;
  slots_.resize(depth_);
  for (unsigned i = depth_; i > 0; --i) free_.push_back(i - 1);
  files_.resize(file_slots);
  files_registered_ = ::io_uring_register_files_sparse(&ring_, file_slots) == 0;
  return {};
}

/// Waiting with a time limit in one system call, and every operation used here.
Result<void> UringQueue::check_features() {
  constexpr int operations[] = {IORING_OP_READ,  IORING_OP_READ_FIXED,  IORING_OP_WRITE,
                                IORING_OP_FSYNC, IORING_OP_WRITE_FIXED, IORING_OP_FALLOCATE};
  io_uring_probe* const probe = ::io_uring_get_probe_ring(&ring_);
  bool all = probe != nullptr && (ring_.features & IORING_FEAT_EXT_ARG) != 0;
  for (const int operation : operations) all = all && ::io_uring_opcode_supported(probe, operation) != 0;
  if (probe != nullptr) ::io_uring_free_probe(probe);
  if (all) return {};
  return fail(make_error(ErrorCode::unsupported, "set up io_uring", "",
                         "this kernel's io_uring is too old; --io-engine aio does without it"));
}

/// Locked memory is limited for those who lack CAP_IPC_LOCK. Whether it is worth another try.
bool raise_locked_memory_limit() {
  rlimit limit{};
  if (::getrlimit(RLIMIT_MEMLOCK, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY) return false;
  const rlimit unlimited{RLIM_INFINITY, RLIM_INFINITY};
  if (::setrlimit(RLIMIT_MEMLOCK, &unlimited) == 0) return true;
  if (limit.rlim_cur == limit.rlim_max) return false;
  limit.rlim_cur = limit.rlim_max;
  return ::setrlimit(RLIMIT_MEMLOCK, &limit) == 0;
}

Result<void> UringQueue::register_memory(std::span<std::byte> memory) {
  memory_ = memory;
  std::vector<iovec> pieces;
  for (std::size_t at = 0; at < memory.size(); at += registration_bytes_max) {
    pieces.push_back({memory.data() + at, std::min(registration_bytes_max, memory.size() - at)});
  }
  int error = ::io_uring_register_buffers(&ring_, pieces.data(), unsigned(pieces.size()));
  if (error == -ENOMEM && raise_locked_memory_limit()) {
    error = ::io_uring_register_buffers(&ring_, pieces.data(), unsigned(pieces.size()));
  }
  // Where the memory may not be locked, plain reads and writes do the same, a little slower.
  memory_registered_ = error == 0;
  return {};
}

Result<unsigned> UringQueue::add_file(int fd) {
  const auto free = std::find_if(files_.begin(), files_.end(), [](const File& file) { return file.fd < 0; });
  if (free == files_.end())
    return fail(make_error(ErrorCode::internal, "register file", "", "too many files"));
  const auto slot = unsigned(free - files_.begin());
  if (files_registered_) {
    const int done = ::io_uring_register_files_update(&ring_, slot, &fd, 1);
    if (done < 0) return fail(error_from_errno(-done, "register file", ""));
  }
  *free = {fd, false};
  return slot;
}

void UringQueue::remove_file(unsigned slot) {
  files_[slot] = {};
  const int none = -1;
  // May fail on a thread that is not the ring's; then the ring's end lets go of the file.
  if (files_registered_) ::io_uring_register_files_update(&ring_, slot, &none, 1);
}

void UringQueue::submit_file(unsigned slot, IoRequest& request, std::uint64_t bytes) {
  request.submitted_at_ns = now_ns();
  waiting_.push_back({slot, &request, bytes, files_[slot].zero_by_range});
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
  const int file = files_registered_ ? int(pending.slot) : files_[pending.slot].fd;
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

void UringQueue::watch_returns() {
  if (returns_.lent() == 0 || watching_returns_) return;
  io_uring_sqe* entry = ::io_uring_get_sqe(&ring_);
  if (entry == nullptr) return;  // the ring is full: something is about to end anyway
  ::io_uring_prep_poll_add(entry, returns_.event_fd(), POLLIN);
  ::io_uring_sqe_set_data64(entry, returns_mark);
  watching_returns_ = true;
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
    if (cqe->user_data == returns_mark) {
      watching_returns_ = false;
      ::io_uring_cqe_seen(&ring_, cqe);
      continue;
    }
    const auto index = unsigned(cqe->user_data);
    const int result = cqe->res;
    ::io_uring_cqe_seen(&ring_, cqe);
    Pending pending = slots_[index];
    free_.push_back(index);
    --in_kernel_;
    if (result == -EOPNOTSUPP && pending.request->operation == IoOperation::zero && !pending.zero_by_range) {
      pending.zero_by_range = files_[pending.slot].zero_by_range = true;
      waiting_.push_front(pending);
      continue;
    }
    pending.request->result = std::min<std::int64_t>(result, std::int64_t(pending.request->bytes));
    pending.request->completed_at_ns = now_ns();
    completed.push_back(pending.request);
  }
}

void UringQueue::take_posted(std::vector<IoRequest*>& completed) {
  for (auto& [request, result] : posted_) {
    request->result = result;
    request->completed_at_ns = now_ns();
    completed.push_back(request);
  }
  posted_.clear();
}

/// From now on the ring is this thread's.
void UringQueue::enable() {
  if (enabled_) return;
  // liburing 2.3 declares io_uring_enable_rings and leaves it out of its shared library.
  enabled_ = ::syscall(SYS_io_uring_register, ring_.ring_fd, IORING_REGISTER_ENABLE_RINGS, nullptr, 0) == 0;
  BLOCKFERRY_CHECK(enabled_, "a fresh ring cannot be enabled");
}

void UringQueue::wait(Nanoseconds timeout, std::vector<IoRequest*>& completed) {
  enable();
  const std::size_t before = completed.size();
  take_posted(completed);
  const std::int64_t give_up = now_ns() + timeout.count();
  for (;;) {
    returns_.take(completed);
    const std::int64_t left = std::max<std::int64_t>(0, give_up - now_ns());
    if (in_kernel_ == 0 && waiting_.empty()) {  // nothing for the ring
      if (returns_.lent() == 0 || completed.size() > before || left == 0) return;
      returns_.wait(Nanoseconds(left));
      continue;
    }
    watch_returns();
    prepare_waiting();
    if (completed.size() > before || left == 0) {
      const int done = ::io_uring_submit_and_get_events(&ring_);
      BLOCKFERRY_CHECK(done != -EEXIST, "an I/O queue was used by two threads");
      reap(completed);
      return;
    }
    __kernel_timespec limit{left / 1'000'000'000, left % 1'000'000'000};
    io_uring_cqe* cqe = nullptr;
    const int done = ::io_uring_submit_and_wait_timeout(&ring_, &cqe, 1, &limit, nullptr);
    BLOCKFERRY_CHECK(done != -EEXIST, "an I/O queue was used by two threads");
    reap(completed);
    returns_.take(completed);
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
