// SPDX-License-Identifier: Apache-2.0
// The queue that a run's devices share: requests go in through Device::submit, and come out of wait() when
// done. One thread owns a queue.
#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "blockio/base/clock.h"
#include "blockio/base/error.h"
#include "blockio/device.h"
#include "blockio/return_box.h"

namespace blockferry {

class IoQueue {
 public:
  virtual ~IoQueue() = default;

  /// Registers the one region of memory that all `data` pointers lie in. Called once, before any submit.
  virtual Result<void> register_memory(std::span<std::byte> memory) = 0;

  /// Sends what is queued, then waits until at least one request is done or the timeout passes (0: only
  /// looks). Appends the done ones to `completed`. Nothing in flight and nothing posted: returns at once.
  virtual void wait(Nanoseconds timeout, std::vector<IoRequest*>& completed) = 0;

  /// Gives a request back at the next wait() with this result, without any I/O: for wrapping and emulating
  /// devices.
  virtual void post(IoRequest& request, std::int64_t result) = 0;

  /// Requests taken and not given back yet. The queue and its memory must outlive them: a queue whose device
  /// hangs is kept until this is 0.
  virtual std::size_t in_flight() const = 0;
};

enum class IoEngine : std::uint8_t { automatic, uring, aio };

Result<IoEngine> parse_io_engine(const std::string& name);  ///< "auto", "uring", "aio"

/// A queue over the kernel's file I/O. `post` and wait() as above; devices add themselves.
class FileQueue : public IoQueue {
 public:
  /// Takes a file descriptor into the queue (registered where the kernel offers that); it must stay open
  /// until remove_file. Returns its slot.
  virtual Result<unsigned> add_file(int fd) = 0;

  /// Gives a slot up; none of its requests may be in flight. An old kernel (6.1) may hold the file, with
  /// its locks and claims, for a second more, but not beyond the queue's destruction.
  virtual void remove_file(unsigned slot) = 0;

  /// Queues a request on a slot. `bytes` is the length to ask of the kernel (already rounded to the block
  /// size).
  virtual void submit_file(unsigned slot, IoRequest& request, std::uint64_t bytes) = 0;

  // For devices whose I/O is done elsewhere: each request that is lent counts as in flight until somebody has
  // given it back. It comes out of the next wait(), which it ends.
  void lend(IoRequest& request) { returns_.lend(request); }
  /// From any thread.
  void give_back(IoRequest& request, std::int64_t result) { returns_.give_back(request, result); }
  /// On the queue's own thread.
  void give_back_here(IoRequest& request, std::int64_t result) { returns_.give_back_here(request, result); }

  /// Has wait() tell `watched` when the descriptor is ready for any of these events of poll(2); once more,
  /// with other events: changes them. Looked at only while something is in flight.
  void watch(int fd, short events, Watched& watched) { returns_.watch(fd, events, watched); }
  void unwatch(int fd) { returns_.unwatch(fd); }

  /// "io_uring" or "libaio", for people and metrics.
  virtual const char* name() const = 0;

 protected:
  ReturnBox returns_;
};

/// `automatic` takes io_uring, or libaio where kernel.io_uring_disabled, seccomp or an old kernel forbids it.
/// `depth` is the most requests in flight at once; more than that may be submitted and wait their turn.
Result<std::unique_ptr<FileQueue>> make_file_queue(IoEngine engine, unsigned depth);

}  // namespace blockferry
