// SPDX-License-Identifier: Apache-2.0
// One cutover's guard: see protocol.h. It touches no file while something is quiesced.
//
// Threads: this one answers, watches the limit and the socket; the worker does what may block (freezing waits
// for the filesystem's writes, commands take their time).
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "guard/hold.h"
#include "guard/protocol.h"

namespace blockferry {

class Guard {
 public:
  /// `socket` and `mark`: as descriptors 3 and 4 of the protocol.
  Guard(std::vector<std::unique_ptr<Hold>> holds, std::string cutover_cmd, int socket, int mark);
  int run();

 private:
  enum class Taken : std::uint8_t { no, under_way, yes };

  void start(void (Guard::*job)());
  bool wait_for_worker();
  void end_worker();
  void end_worker_until_deadline();
  void take_holds();
  bool take(std::size_t index);
  void hand_over();
  bool hand_holds_over();
  void undo_preparation();
  void undo_in_time();
  void release(bool by_command);
  void let_go();
  void answer(GuardAnswer::Kind kind);
  void fail(GuardAnswer::Step step, const HoldFailure& failure, std::size_t hold = 0);
  std::chrono::milliseconds time_left() const;

  const std::vector<std::unique_ptr<Hold>> holds_;
  const std::string cutover_cmd_;
  const int socket_, mark_;

  std::mutex mutex_;
  std::vector<Taken> taken_;          // by hold; guarded by mutex_
  std::atomic<bool> let_go_ = false;  // set with mutex_ held: nothing is held any more from then on
  bool committed_ = false;            // guarded by mutex_: handed over, too late to let go without it

  std::int64_t deadline_ns_ = 0;
  bool expired_ = false;
  GuardAnswer answer_{};  ///< the worker's, read when it has ended
  bool failed_ = false;
  bool handing_over_ = false;
  const int worker_done_;
  std::thread worker_;
};

}  // namespace blockferry
