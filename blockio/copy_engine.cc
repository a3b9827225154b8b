// SPDX-License-Identifier: Apache-2.0
// The data path, top to bottom as it runs. A slot is one job's buffer and bookkeeping; its states:
//
//   free ── start_copy, start_checksum            free ── start_zero ────────────┐
//                  v                                                             v
//     ┌────────> reading ──> checksum_and_find_zeroes ──> start_writes ──────> writing <──────────┐
//     │ read_next  │                  │ a checksum job                           │    write_next │
//     └────────────┤ finished_read    │                                          ├───────────────┘
//   short: the rest; failed:          v                          finished_write  v     short: the rest;
//   once more, then by granule ─> finish_job <─────────── every work has ended ──┘     failed: once more
//   and then for good                 └──> free, its JobResult among poll()'s
//
// A TargetWork is one run of data or zeroes on its way to one target; it has at most one request in flight
// and ends when its whole range is there or has failed. Everything here runs on the thread that calls poll().
#include "blockio/copy_engine.h"

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>

#include "blockio/base/check.h"
#include "blockio/base/checksum.h"
#include "blockio/request_error.h"

namespace blockferry {

namespace {

constexpr std::uint64_t page_bytes = 4096;
constexpr std::uint64_t small_io_bytes = CopyEngineOptions::small_io_bytes;
constexpr std::uint64_t zero_request_bytes_max = 256 * MiB;  // so that progress and cancel stay quick
constexpr std::uint64_t poll_bytes_max = 512 * KiB;
constexpr unsigned interruptions_max = 1000;  // EINTR and EAGAIN in a row that are put up with

bool is_gone(int errno_value) {
  return errno_value == ENODEV || errno_value == ENXIO || errno_value == ENOMEDIUM || errno_value == ENOTCONN;
}

/// What a short count leaves is asked for again from a page's start: direct I/O takes nothing else.
std::uint64_t usable_count(std::uint64_t done, std::uint64_t asked) {
  return done >= asked ? asked : done / page_bytes * page_bytes;
}

}  // namespace

/// What every request carries back to the engine.
struct CopyEngine::Request {
  enum class Kind : std::uint8_t { read, write, flush } kind = Kind::read;
  bool in_flight = false;
  std::size_t target = 0;      // write, flush
  Slot* slot = nullptr;        // read, write
  TargetWork* work = nullptr;  // write
  IoRequest io;
};

struct CopyEngine::TargetWork {
  Request request;
  ByteRange range;
  bool zero = false;
  std::uint64_t done = 0;
  unsigned failures = 0;
  unsigned interruptions = 0;
};

struct CopyEngine::Slot {
  bool busy = false;
  bool small = false;
  JobKind kind = JobKind::copy;
  ByteRange range;
  std::byte* buffer = nullptr;

  Device* read_from = nullptr;
  Request read;
  std::uint64_t read_done = 0;
  unsigned read_failures = 0;  // of the range, or of the granule in granule_mode
  unsigned interruptions = 0;
  bool granule_mode = false;  // the whole failed twice: one granule at a time

  std::vector<bool> zero_granules;
  std::deque<TargetWork> works;  // a deque: requests stay in place; kept from job to job
  std::size_t works_used = 0, works_left = 0;
  JobResult result;
};

std::uint64_t CopyEngine::memory_bytes(const CopyEngineOptions& options) {
  return options.io_bytes * (std::uint64_t(options.depth) + 1) + small_io_bytes * options.small_depth;
}

CopyEngine::CopyEngine(IoQueue& queue, Clock& clock, Device& source, std::vector<Device*> targets,
                       std::span<std::byte> memory, const CopyEngineOptions& options)
    : queue_(queue),
      clock_(clock),
      source_(source),
      targets_(std::move(targets)),
      options_(options),
      zero_checksum_(crc64_of_zeroes(options.granule_bytes)),
      zeroes_(memory.data() + options.io_bytes * options.depth),
      dropped_(targets_.size()),
      zero_unsupported_(targets_.size()),
      flush_errors_(targets_.size()) {
  BLOCKFERRY_CHECK(memory.size() >= memory_bytes(options), "too little memory for the engine");
  BLOCKFERRY_CHECK(options.granule_bytes >= page_bytes && std::has_single_bit(options.granule_bytes),
                   "an odd granule");
  BLOCKFERRY_CHECK(options.io_bytes % options.granule_bytes == 0 && options.depth > 0, "an odd I/O size");
  std::memset(zeroes_, 0, options.io_bytes);  // whatever the memory served for before
  for (unsigned i = 0; i < options.depth + options.small_depth; ++i) {
    slots_.push_back(std::make_unique<Slot>());
    Slot& slot = *slots_.back();
    slot.small = i >= options.depth;
    slot.buffer = slot.small ? zeroes_ + options.io_bytes + small_io_bytes * (i - options.depth)
                             : memory.data() + options.io_bytes * i;
    (slot.small ? free_small_slots_ : free_slots_).push_back(&slot);
  }
  for (std::size_t i = 0; i < targets_.size(); ++i) {
    flushes_.push_back(std::make_unique<Request>());
    flushes_.back()->kind = Request::Kind::flush;
    flushes_.back()->target = i;
  }
}

CopyEngine::~CopyEngine() {
  BLOCKFERRY_CHECK(queue_.in_flight() == 0, "a copy engine was destroyed under its requests");
}

// Jobs begin.

std::uint64_t CopyEngine::room() const {
  if (!free_slots_.empty()) return options_.io_bytes;
  return free_small_slots_.empty() ? 0 : std::min(options_.io_bytes, small_io_bytes);
}

CopyEngine::Slot& CopyEngine::take_slot(JobKind kind, ByteRange range, Device* read_from) {
  BLOCKFERRY_CHECK(range.bytes > 0 && range.offset % options_.granule_bytes == 0, "a job off the granules");
  BLOCKFERRY_CHECK(can_start() && (kind == JobKind::zero || range.bytes <= room()), "no slot is free for it");
  for (const auto& other : slots_) {
    const bool overlaps =
        other->busy && other->range.offset < range.end() && range.offset < other->range.end();
    BLOCKFERRY_CHECK(!overlaps, "invariant 5: two copies of one granule in flight");
  }
  const bool small = !free_small_slots_.empty() && (kind == JobKind::zero || range.bytes <= small_io_bytes);
  auto& free = small ? free_small_slots_ : free_slots_;
  Slot& slot = *free.back();
  free.pop_back();
  if (kind != JobKind::zero) bytes_in_flight_ += range.bytes;
  slot.busy = true;
  slot.kind = kind;
  slot.range = range;
  slot.read_from = read_from;
  slot.read.slot = &slot;
  slot.read_done = 0;
  slot.read_failures = slot.interruptions = 0;
  slot.granule_mode = false;
  slot.result = JobResult{};
  slot.result.kind = kind;
  slot.result.range = range;
  slot.result.target_errors.resize(targets_.size());
  return slot;
}

void CopyEngine::start_copy(ByteRange range) {
  read_next(take_slot(JobKind::copy, range, &source_));
}

void CopyEngine::start_checksum(Device& device, ByteRange range) {
  read_next(take_slot(JobKind::checksum, range, &device));
}

void CopyEngine::start_zero(ByteRange range) {
  Slot& slot = take_slot(JobKind::zero, range, nullptr);
  slot.result.bytes_zeroed = range.bytes;
  start_writes(slot);
}

void CopyEngine::submit(Request& request, IoOperation operation, Device& device, ByteRange range,
                        std::byte* data) {
  request.io = IoRequest{};
  request.io.operation = operation;
  request.io.offset = range.offset;
  request.io.bytes = range.bytes;
  request.io.data = data;
  request.io.owner = &request;
  request.io.device = &device;
  request.io.submitted_at_ns = clock_.now().count();
  request.in_flight = true;
  device.submit(request.io);
}

// Reading.

void CopyEngine::read_next(Slot& slot) {
  const std::uint64_t left = slot.range.bytes - slot.read_done;
  const std::uint64_t granule_left = options_.granule_bytes - slot.read_done % options_.granule_bytes;
  const std::uint64_t bytes = slot.granule_mode ? std::min(left, granule_left) : left;
  submit(slot.read, IoOperation::read, *slot.read_from, {slot.range.offset + slot.read_done, bytes},
         slot.buffer + slot.read_done);
}

void CopyEngine::finished_read(Slot& slot) {
  const IoRequest& io = slot.read.io;
  if (io.result < 0) return read_failed(slot, int(-io.result));
  stats_.bytes_read += std::uint64_t(io.result);
  const std::uint64_t count = usable_count(std::uint64_t(io.result), io.bytes);
  if (count == 0) {
    // Nothing at all means the end of the device; a few bytes are tried again, not for ever.
    if (io.result > 0 && ++slot.interruptions < interruptions_max) return read_next(slot);
    slot.result.read_error = ended_early(*slot.read_from, io.offset);
    ++stats_.read_errors;
    return finish_job(slot);
  }
  slot.read_done += count;
  if (slot.granule_mode) slot.read_failures = 0;
  if (slot.read_done < slot.range.bytes) return read_next(slot);
  checksum_and_find_zeroes(slot);
}

void CopyEngine::read_failed(Slot& slot, int errno_value) {
  if ((errno_value == EINTR || errno_value == EAGAIN) && ++slot.interruptions < interruptions_max) {
    return read_next(slot);
  }
  ++stats_.read_errors;
  ++slot.read_failures;
  if (!is_gone(errno_value)) {
    if (slot.read_failures == 1) {
      ++stats_.retries;
      return read_next(slot);
    }
    if (!slot.granule_mode && slot.range.bytes > options_.granule_bytes) {
      slot.granule_mode = true;
      slot.read_failures = 0;
      slot.read_done = slot.read_done / options_.granule_bytes * options_.granule_bytes;
      ++stats_.retries;
      return read_next(slot);
    }
    if (options_.skip_unreadable) return skip_granule(slot);
  }
  slot.result.read_error = request_error(errno_value, "read", *slot.read_from, slot.read.io.offset);
  finish_job(slot);
}

/// The granule that failed counts as zeroes from here on, and is listed.
void CopyEngine::skip_granule(Slot& slot) {
  const std::uint64_t start = slot.read_done / options_.granule_bytes * options_.granule_bytes;
  const std::uint64_t bytes = std::min(options_.granule_bytes, slot.range.bytes - start);
  std::memset(slot.buffer + start, 0, bytes);
  slot.result.unreadable.push_back({slot.range.offset + start, bytes});
  slot.read_failures = 0;
  slot.read_done = start + bytes;
  if (slot.read_done < slot.range.bytes) return read_next(slot);
  checksum_and_find_zeroes(slot);
}

// Between reading and writing. A granule whose checksum is not that of zeroes is not looked at again: finding
// zeroes costs nothing where there are none.

void CopyEngine::checksum_and_find_zeroes(Slot& slot) {
  const std::uint64_t count = divide_up(slot.range.bytes, options_.granule_bytes);
  slot.zero_granules.assign(count, false);
  if (options_.checksums) slot.result.checksums.resize(count);
  for (std::uint64_t i = 0; i < count; ++i) {
    const std::uint64_t start = i * options_.granule_bytes;
    const std::span<const std::byte> granule(slot.buffer + start,
                                             std::min(options_.granule_bytes, slot.range.bytes - start));
    bool maybe_zero = slot.kind == JobKind::copy;
    if (options_.checksums) {
      const std::uint64_t checksum = slot.result.checksums[i] = crc64(granule);
      maybe_zero &= granule.size() < options_.granule_bytes || checksum == zero_checksum_;
    }
    slot.zero_granules[i] = maybe_zero && is_zero(granule);
  }
  if (slot.kind == JobKind::checksum) return finish_job(slot);
  start_writes(slot);
}

// Writing: all works of all targets go out before anything is waited for.

void CopyEngine::start_writes(Slot& slot) {
  for (std::size_t target = 0; target < targets_.size(); ++target) {
    if (!dropped_[target]) cut_for_target(slot, target);
  }
  // Counted first: works may end within write_next, and the last one finishes the job.
  const std::size_t count = slot.works_left = slot.works_used;
  if (count == 0) return finish_job(slot);
  for (std::size_t i = 0; i < count; ++i) write_next(slot.works[i]);
}

/// Cuts the slot's range into runs of data and of zeroes worth a zero request on this target.
void CopyEngine::cut_for_target(Slot& slot, std::size_t target) {
  const auto add = [&](ByteRange range, bool zero) {
    if (slot.works_used > 0) {
      TargetWork& last = slot.works[slot.works_used - 1];
      if (last.request.target == target && last.zero == zero && last.range.end() == range.offset) {
        last.range.bytes += range.bytes;
        return;
      }
    }
    if (slot.works_used == slot.works.size()) slot.works.emplace_back();
    TargetWork& work = slot.works[slot.works_used++] = TargetWork{};
    work.request.kind = Request::Kind::write;
    work.request.target = target;
    work.request.slot = &slot;
    work.request.work = &work;
    work.range = range;
    work.zero = zero;
  };
  if (slot.kind == JobKind::zero) return add(slot.range, true);
  std::uint64_t zeroed = 0;
  const std::uint64_t count = slot.zero_granules.size();
  for (std::uint64_t first = 0; first < count;) {
    std::uint64_t end = first + 1;
    while (end < count && slot.zero_granules[end] == slot.zero_granules[first]) ++end;
    const std::uint64_t start = first * options_.granule_bytes;
    const std::uint64_t bytes = std::min(end * options_.granule_bytes, slot.range.bytes) - start;
    const bool zero = slot.zero_granules[first] &&
                      (bytes >= targets_[target]->info().zero_run_bytes_min || bytes == slot.range.bytes);
    add({slot.range.offset + start, bytes}, zero);
    zeroed += zero ? bytes : 0;
    first = end;
  }
  slot.result.bytes_zeroed = std::max(slot.result.bytes_zeroed, zeroed);
}

void CopyEngine::write_next(TargetWork& work) {
  const std::size_t target = work.request.target;
  Slot& slot = *work.request.slot;
  const std::uint64_t left = work.range.bytes - work.done;
  if (left == 0 || dropped_[target]) return work_done(work);
  const std::uint64_t offset = work.range.offset + work.done;
  if (!work.zero) {
    return submit(work.request, IoOperation::write, *targets_[target], {offset, left},
                  slot.buffer + (offset - slot.range.offset));
  }
  // An unaligned tail cannot be zeroed without touching what follows it: it is written.
  const std::uint64_t whole = left / page_bytes * page_bytes;
  if (!zero_unsupported_[target] && whole > 0) {
    return submit(work.request, IoOperation::zero, *targets_[target],
                  {offset, std::min(whole, zero_request_bytes_max)}, nullptr);
  }
  submit(work.request, IoOperation::write, *targets_[target], {offset, std::min(left, options_.io_bytes)},
         zeroes_);
}

void CopyEngine::finished_write(TargetWork& work) {
  const IoRequest& io = work.request.io;
  if (io.result < 0) return write_failed(work, int(-io.result));
  if (io.operation == IoOperation::zero) {
    work.done += io.bytes;
    stats_.bytes_zeroed += io.bytes;
    return write_next(work);
  }
  const std::uint64_t count = usable_count(std::uint64_t(io.result), io.bytes);
  (work.zero ? stats_.bytes_zeroed : stats_.bytes_written) += count;
  if (count == 0 && ++work.interruptions >= interruptions_max) return write_failed(work, EIO);
  work.done += count;
  write_next(work);
}

void CopyEngine::write_failed(TargetWork& work, int errno_value) {
  const std::size_t target = work.request.target;
  const IoRequest& io = work.request.io;
  if (io.operation == IoOperation::zero && (errno_value == EOPNOTSUPP || errno_value == EINVAL)) {
    zero_unsupported_[target] = true;
    return write_next(work);
  }
  if ((errno_value == EINTR || errno_value == EAGAIN) && ++work.interruptions < interruptions_max) {
    return write_next(work);
  }
  ++stats_.write_errors;
  if (errno_value == EIO && ++work.failures == 1) {
    ++stats_.retries;
    return write_next(work);
  }
  auto& error = work.request.slot->result.target_errors[target];
  if (!error) {
    error = request_error(errno_value, io.operation == IoOperation::zero ? "zero" : "write",
                          *targets_[target], io.offset);
  }
  work_done(work);
}

void CopyEngine::work_done(TargetWork& work) {
  Slot& slot = *work.request.slot;
  if (--slot.works_left == 0) finish_job(slot);
}

void CopyEngine::finish_job(Slot& slot) {
  (results_ != nullptr ? *results_ : early_results_).push_back(std::move(slot.result));
  slot.works_used = 0;
  slot.busy = false;
  if (slot.kind != JobKind::zero) bytes_in_flight_ -= slot.range.bytes;
  (slot.small ? free_small_slots_ : free_slots_).push_back(&slot);
}

// Flushing.

void CopyEngine::start_flush() {
  BLOCKFERRY_CHECK(!flush_in_flight() && !flush_finished_, "one flush at a time");
  flush_errors_.assign(targets_.size(), std::nullopt);
  for (std::size_t i = 0; i < targets_.size(); ++i) {
    if (dropped_[i]) continue;
    ++flushes_left_;
    submit(*flushes_[i], IoOperation::flush, *targets_[i], {0, 0}, nullptr);
  }
  flush_finished_ = flushes_left_ == 0;
}

/// Never tried again: after a failed flush the kernel forgets what it could not write.
void CopyEngine::finished_flush(Request& request) {
  if (request.io.result < 0) {
    ++stats_.write_errors;
    flush_errors_[request.target] =
        request_error(int(-request.io.result), "flush", *targets_[request.target], std::nullopt);
  }
  if (--flushes_left_ == 0) flush_finished_ = true;
}

std::optional<std::vector<std::optional<Error>>> CopyEngine::take_flush_result() {
  if (!flush_finished_) return std::nullopt;
  flush_finished_ = false;
  return flush_errors_;
}

// The loop.

void CopyEngine::poll(Nanoseconds timeout, std::vector<JobResult>& results) {
  for (auto& result : early_results_) results.push_back(std::move(result));
  const bool at_once = !early_results_.empty() || !completed_.empty();
  early_results_.clear();
  results_ = &results;
  queue_.wait(at_once ? Nanoseconds(0) : timeout, completed_);
  // Checksums take time: what they let start goes to the devices before the next ones are computed.
  std::size_t count = 0;
  for (std::uint64_t bytes = 0; count < completed_.size() && bytes < poll_bytes_max; ++count) {
    bytes += completed_[count]->bytes;
    dispatch(*static_cast<Request*>(completed_[count]->owner));
  }
  completed_.erase(completed_.begin(), completed_.begin() + std::ptrdiff_t(count));
  results_ = nullptr;
}

void CopyEngine::dispatch(Request& request) {
  request.in_flight = false;
  const std::int64_t latency = request.io.completed_at_ns - request.io.submitted_at_ns;
  switch (request.kind) {
    case Request::Kind::read:
      stats_.reads.add(latency);
      return finished_read(*request.slot);
    case Request::Kind::write:
      stats_.writes.add(latency);
      return finished_write(*request.work);
    case Request::Kind::flush:
      return finished_flush(request);
  }
}

// What is going on.

void CopyEngine::drop_target(std::size_t index) {
  dropped_[index] = true;
}
std::size_t CopyEngine::jobs_in_flight() const {
  return slots_.size() - free_slots_.size() - free_small_slots_.size() + early_results_.size();
}

std::vector<ByteRange> CopyEngine::ranges_in_flight(bool copies_only) const {
  std::vector<ByteRange> ranges;
  const auto counts = [copies_only](JobKind kind) { return !copies_only || kind != JobKind::checksum; };
  for (const auto& slot : slots_) {
    if (slot->busy && counts(slot->kind)) ranges.push_back(slot->range);
  }
  for (const auto& result : early_results_) {
    if (counts(result.kind)) ranges.push_back(result.range);
  }
  return ranges;
}

std::optional<CopyEngine::Oldest> CopyEngine::oldest_request() const {
  const Request* oldest = nullptr;
  const auto consider = [&](const Request& request) {
    if (!request.in_flight || (oldest && oldest->io.submitted_at_ns <= request.io.submitted_at_ns)) return;
    oldest = &request;
  };
  for (const auto& slot : slots_) {
    if (!slot->busy) continue;
    consider(slot->read);
    for (std::size_t i = 0; i < slot->works_used; ++i) consider(slot->works[i].request);
  }
  for (const auto& flush : flushes_) consider(*flush);
  if (oldest == nullptr) return std::nullopt;
  return Oldest{clock_.now() - Nanoseconds(oldest->io.submitted_at_ns), oldest->io.device,
                oldest->io.operation, oldest->io.offset};
}

}  // namespace blockferry
