// SPDX-License-Identifier: Apache-2.0
// One connection of an NBD device, and the thread that drives it.
//
//   submit(piece) ─> inbox ─> waiting ─> in flight ─> done(piece), on the channel's thread
//                                ^           │
//                                └───────────┘ the connection broke: a new one is made, and they are repeated
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
  /// Both on the channel's thread. `lost`: the connection broke; told before anything is repeated.
  std::function<void(NbdPiece&)> done;
  std::function<void(std::span<NbdPiece* const> in_flight)> lost;
};

class NbdChannel {
 public:
  NbdChannel(NbdConnection connection, NbdChannelOptions options);
  /// Precondition: every piece is done, but for those of block_status, which are forgotten.
  ~NbdChannel();

  /// From one thread.
  void submit(NbdPiece& piece);
  /// Submitted and not done, without what asks only: for spreading the load.
  std::uint64_t bytes_outstanding() const { return bytes_outstanding_; }

 private:
  void main();
  void take_inbox();
  void start_waiting();
  bool start(NbdPiece& piece);
  void finish(NbdPiece& piece);
  void finish_completed();
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

  // The thread's own.
  std::optional<NbdConnection> connection_;  ///< nothing: it broke
  std::deque<NbdPiece*> waiting_;
  std::vector<NbdPiece*> in_flight_, completed_;
  unsigned fruitless_ = 0;  ///< connections in a row that broke before anything was done
  bool given_up_ = false;
  std::thread thread_;
};

}  // namespace blockferry
