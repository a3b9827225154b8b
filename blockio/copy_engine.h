// SPDX-License-Identifier: Apache-2.0
// The data path: read, checksum and find zeroes, write to every target. One thread owns an engine; nothing
// blocks but poll(). The engine knows granules only as the unit of checksums and of retries.
//
//   start_copy(range) ─ read ─> checksums + zero runs ─ write/zero each target ─> JobResult from poll()
//   start_checksum(device, range) ─ read ─> checksums ─────────────────────────> JobResult from poll()
//   start_zero(range) ─ zero each target (by writing, where the device cannot) ─> JobResult from poll()
//
// A job occupies one buffer slot (io_bytes of memory; zero jobs borrow a shared page of zeroes) until its
// result is taken.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "blockio/base/clock.h"
#include "blockio/base/error.h"
#include "blockio/device.h"
#include "blockio/io_queue.h"
#include "blockio/latencies.h"

namespace blockferry {

struct CopyEngineOptions {
  std::uint64_t granule_bytes = 4 * KiB;  ///< a power of two, at least 4096
  std::uint64_t io_bytes = 1 * MiB;       ///< the largest read; a multiple of granule_bytes
  unsigned depth = 16;                    ///< jobs of that size in flight
  /// As many more jobs, of up to small_io_bytes each: scattered granules need a deep queue, not much memory.
  unsigned small_depth = 0;
  static constexpr std::uint64_t small_io_bytes = 64 * KiB;
  bool checksums = true;  ///< false: checksums are not computed (results hold none), zeroes still are found
  bool skip_unreadable = false;  ///< unreadable granules become zeroes on the targets and are listed
};

enum class JobKind : std::uint8_t { copy, checksum, zero };

/// What became of a job.
struct JobResult {
  JobKind kind = JobKind::copy;
  ByteRange range;
  /// One per granule of the range, in order; empty for zero jobs and without checksums.
  std::vector<std::uint64_t> checksums;
  std::uint64_t bytes_zeroed = 0;  ///< of a copy or zero job: bytes that went out as zeroes, not as data
  /// Granules that could not be read and were skipped (skip_unreadable), each granule-aligned.
  std::vector<ByteRange> unreadable;
  /// The read failed for good: nothing was written, or, of a checksum job, nothing is known.
  std::optional<Error> read_error;
  /// Indexed by target: set where a write, zero or flush of this job failed on that target.
  std::vector<std::optional<Error>> target_errors;
};

/// Monotonic totals since the engine was made.
struct CopyEngineStats {
  std::uint64_t bytes_read = 0;
  std::uint64_t bytes_written = 0;
  std::uint64_t bytes_zeroed = 0;
  std::uint64_t read_errors = 0;
  std::uint64_t write_errors = 0;
  std::uint64_t retries = 0;
  Latencies reads, writes;
};

class CopyEngine {
 public:
  /// `memory` is aligned to 4096, at least memory_bytes(options) long, and registered with the queue by the
  /// caller's make(); queue, devices and memory outlive the engine.
  static std::uint64_t memory_bytes(const CopyEngineOptions& options);
  CopyEngine(IoQueue& queue, Clock& clock, Device& source, std::vector<Device*> targets,
             std::span<std::byte> memory, const CopyEngineOptions& options);
  ~CopyEngine();
  CopyEngine(const CopyEngine&) = delete;
  CopyEngine& operator=(const CopyEngine&) = delete;

  /// The largest copy or checksum job for which a slot is free: io_bytes, small_io_bytes or 0. Zero jobs take
  /// a slot too, of either size.
  std::uint64_t room() const;
  bool can_start() const { return room() > 0; }
  /// Precondition: room() for it; range granule-aligned but for the end of the source; no job in flight
  /// overlaps it (invariant 5, asserted).
  void start_copy(ByteRange range);
  void start_checksum(Device& device, ByteRange range);
  void start_zero(ByteRange range);

  /// Moves everything on that can move; waits for I/O at most `timeout`. Appends finished jobs to `results`.
  void poll(Nanoseconds timeout, std::vector<JobResult>& results);

  /// Flushes every target that is not failed. Asked for once at a time; flush_done() tells when, with one
  /// entry a target.
  void start_flush();
  bool flush_in_flight() const { return flushes_left_ > 0; }
  /// The finished flush's outcome, once; nothing while none has finished.
  std::optional<std::vector<std::optional<Error>>> take_flush_result();

  /// Leaves a target out from now on (it failed); its requests in flight still come back.
  void drop_target(std::size_t index);
  bool target_dropped(std::size_t index) const { return dropped_[index]; }

  std::size_t jobs_in_flight() const;
  std::uint64_t bytes_in_flight() const { return bytes_in_flight_; }  ///< of copy and checksum jobs
  /// Ranges of the jobs in flight (for checkpoints: they are neither dirty nor copied); or without those that
  /// only read.
  std::vector<ByteRange> ranges_in_flight(bool copies_only = false) const;
  /// Age of the oldest request that the kernel has not given back, and its device: to report devices that
  /// hang.
  struct Oldest {
    Nanoseconds age;
    const Device* device;
    IoOperation operation;
    std::uint64_t offset;
  };
  std::optional<Oldest> oldest_request() const;

  const CopyEngineStats& stats() const { return stats_; }

 private:
  struct Slot;
  struct Request;
  struct TargetWork;

  Slot& take_slot(JobKind kind, ByteRange range, Device* read_from);
  void submit(Request& request, IoOperation operation, Device& device, ByteRange range, std::byte* data);
  void dispatch(Request& request);

  // The data path, in the order it runs.
  void read_next(Slot& slot);
  void finished_read(Slot& slot);
  void read_failed(Slot& slot, int errno_value);
  void skip_granule(Slot& slot);
  void checksum_and_find_zeroes(Slot& slot);
  void start_writes(Slot& slot);
  void cut_for_target(Slot& slot, std::size_t target);
  void write_next(TargetWork& work);
  void finished_write(TargetWork& work);
  void write_failed(TargetWork& work, int errno_value);
  void work_done(TargetWork& work);
  void finish_job(Slot& slot);
  void finished_flush(Request& request);

  IoQueue& queue_;
  Clock& clock_;
  Device& source_;
  const std::vector<Device*> targets_;
  const CopyEngineOptions options_;
  const std::uint64_t zero_checksum_;  ///< of a whole granule of zeroes
  std::byte* const zeroes_;            ///< io_bytes of zeroes, in the registered memory

  std::vector<std::unique_ptr<Slot>> slots_;
  std::vector<Slot*> free_slots_, free_small_slots_;
  std::uint64_t bytes_in_flight_ = 0;
  std::vector<bool> dropped_;                      ///< by target
  std::vector<bool> zero_unsupported_;             ///< by target: found out by trying
  std::vector<std::unique_ptr<Request>> flushes_;  ///< by target
  std::vector<std::optional<Error>> flush_errors_;
  std::size_t flushes_left_ = 0;
  bool flush_finished_ = false;
  std::vector<IoRequest*> completed_;
  std::vector<JobResult>* results_ = nullptr;  ///< of the poll under way
  std::vector<JobResult> early_results_;       ///< of jobs that ended outside of a poll
  CopyEngineStats stats_;
};

}  // namespace blockferry
