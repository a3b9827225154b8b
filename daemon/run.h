// SPDX-License-Identifier: Apache-2.0
// A run with its thread. The thread owns the RunCore, its ring and its buffers; everybody else sends it
// messages and reads the status it publishes.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "daemon/run_core.h"
#include "daemon/run_environment.h"
#include "daemon/volume_map.h"

namespace blockferry {

class Run {
 public:
  /// `on_finished` is called once on the run's thread, when record() has become final.
  Run(RunRecord record, std::unique_ptr<RunEnvironment> environment, const RunLimits& limits,
      std::function<void()> on_finished);
  ~Run();  ///< joins; the run must have finished and drained

  /// Does `message` on the run's thread between two steps, and waits for that up to `patience`. False: not
  /// yet done.
  bool send(std::function<void(RunCore&)> message, Nanoseconds patience);

  RunStatus status() const;
  bool finished() const { return finished_; }
  /// Finished, and its devices are released: the thread is about to end, and the destructor waits for no more
  /// than that.
  bool drained() const { return drained_; }
  /// The final record. Precondition: finished().
  RunRecord record() const;

 private:
  void main(RunRecord record);
  void take_messages(RunCore& core);
  void wait_for_message();
  void publish(const RunCore& core, bool final);

  const std::unique_ptr<RunEnvironment> environment_;
  const RunLimits limits_;
  const std::function<void()> on_finished_;

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  struct Message {
    std::function<void(RunCore&)> action;
    std::shared_ptr<std::atomic<bool>> done;
  };
  std::vector<Message> messages_;  // guarded by mutex_
  RunStatus published_;            // guarded by mutex_
  RunRecord final_record_;         // guarded by mutex_
  std::atomic<bool> finished_ = false, drained_ = false;

  std::thread thread_;  // last: starts when all else stands
};

}  // namespace blockferry
