// SPDX-License-Identifier: Apache-2.0
// One connection of an NBD device, and whoever drives it: the thread of the run's queue, within its wait(),
// or a thread of the channel's own. The first spares each piece two changes of threads; the second serves
// where a connection has work of its own for a processor (TLS). A connection that broke is made anew by the
// channel's own thread, for that blocks, and then stays with it.
//
//   submit(piece) ─────> inbox ─────> waiting ─> in flight ─> done(piece), on the driving thread
//      └─ queue's thread ───────────────┘ ^           │
//                                         └───────────┘ the connection broke: they are repeated on a new one
//
// A reply of the old connection cannot arrive any more once its handle is closed; its requests may still be
// carried out by the server. What that means for writes is the device's business (`lost`).
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include "blockio/base/file_descriptor.h"
#include "blockio/io_queue.h"
#include "blockio/nbd_connection.h"

namespace blockferry {

enum class NbdCommand : std::uint8_t { read, write, zero, flush, block_status };

/// A request as it goes to the server. Owned by whoever submits it; stays in place until it is done.
struct NbdPiece {
  NbdCommand command = NbdCommand::read;
  std::uint64_t offset = 0;
  std::uint64_t bytes = 0;
  std::byte* data = nullptr;
  bool write_through = false;  ///< write, zero: durable when done
  int error = 0;               ///< an errno, when done
  std::vector<NbdExtent> extents;
  void* owner = nullptr;

  class NbdChannel* channel = nullptr;  ///< its own

  std::uint64_t load_bytes() const { return command == NbdCommand::block_status ? 0 : bytes; }
};

struct NbdChannelOptions {
  NbdAddress address;
  std::uint64_t bytes = 0;  ///< the export's size: a server that comes back with another one is refused
  Nanoseconds connect_timeout{0}, reconnect_for{0};
  /// Both on the driving thread. `lost`: the connection broke; told before anything is repeated.
  std::function<void(NbdPiece&)> done;
  std::function<void(std::span<NbdPiece* const> in_flight)> lost;
};

class NbdChannel : private Watched {
 public:
  /// `queue`: its thread, which is the one that submits, drives the channel; nothing: a thread of its own.
  NbdChannel(NbdConnection connection, NbdChannelOptions options, FileQueue* queue);
  /// Precondition: every piece is done, but for those of block_status, which are forgotten.
  ~NbdChannel() override;

  /// From one thread.
  void submit(NbdPiece& piece);
  /// Submitted and not done, without what asks only: for spreading the load.
  std::uint64_t bytes_outstanding() const { return bytes_outstanding_; }

  // On the queue's thread.
  bool driven_by_queue() const { return queue_ != nullptr; }
  /// Waits for the server at most so long, and moves on all that can move.
  void drive(Nanoseconds timeout);

 private:
  void ready(short events) override;
  void step();
  void leave_queue();
  void main();
  void take_inbox();
  void start_waiting();
  bool start(NbdPiece& piece);
  void finish(NbdPiece& piece);
  void finish_completed();
  void give_connection_up();
  void reconnect();
  bool sleep_unless_stopped(Nanoseconds duration);
  void fail_all(int error);

  static int on_completion(void* user, int* error);
  static int on_extents(void* user, const char* context, std::uint64_t offset, std::uint32_t* entries,
                        std::size_t count, int* error);

  const NbdChannelOptions options_;
  FileDescriptor wake_;
  std::atomic<std::uint64_t> bytes_outstanding_{0};
  std::mutex mutex_;
  std::vector<NbdPiece*> inbox_;
  bool stopping_ = false;

  // Of the driving thread.
  FileQueue* queue_;                         ///< whose thread drives it; nothing: its own
  int watched_ = -1;                         ///< the descriptor that the queue watches
  std::optional<NbdConnection> connection_;  ///< nothing: it broke
  std::deque<NbdPiece*> waiting_;
  std::vector<NbdPiece*> in_flight_, completed_;
  unsigned fruitless_ = 0;  ///< connections in a row that broke before anything was done
  bool given_up_ = false;
  std::thread thread_;
};

}  // namespace blockferry
