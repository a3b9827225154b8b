// SPDX-License-Identifier: Apache-2.0
// All that a run takes from the world: time, devices, durable state, background work. The daemon gives it the
// real ones; the simulator gives it simulated ones and drives the same run.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "bitmap/live_tracker.h"
#include "bitmap/storage.h"
#include "blockio/base/clock.h"
#include "blockio/copy_engine.h"
#include "blockio/device.h"
#include "blockio/io_queue.h"
#include "daemon/buffer_pool.h"
#include "daemon/quiescer.h"
#include "daemon/run_record.h"

namespace blockferry {

/// A run's devices, claimed. Declared so that devices go before their queue.
struct RunDevices {
  /// In that order: devices take their slots back from the queue. (Assigning an empty one would free the
  /// queue first.)
  void release() {
    targets.clear();
    source.reset();
    queue.reset();
  }

  std::unique_ptr<IoQueue> queue;
  std::unique_ptr<Device> source;
  std::vector<std::unique_ptr<Device>> targets;     ///< null where the target could not be opened
  std::vector<std::optional<Error>> target_errors;  ///< why
  std::string io_engine;
};

/// A job under way elsewhere.
class BackgroundTask {
 public:
  virtual ~BackgroundTask() = default;         ///< waits for the job
  virtual bool wait(Nanoseconds timeout) = 0;  ///< whether it is done
  virtual Result<void> take() = 0;             ///< its outcome; once, when done
};

class RunEnvironment {
 public:
  virtual ~RunEnvironment() = default;
  virtual Clock& clock() = 0;
  virtual StateDirectory& state() = 0;
  /// Called on the run's own thread, which also uses what it returns.
  virtual Result<RunDevices> open_devices(const RunRecord& record) = 0;
  /// All of them are: the run has ended, and whoever sees that may use them.
  virtual void devices_closed() {}
  virtual BufferPool& buffers() = 0;
  // Of runs whose source is in use. A tracker goes on while nobody is there, until it is removed.
  virtual Result<std::unique_ptr<LiveTracker>> adopt_tracker(const RunRecord& record) = 0;
  /// A new one; an earlier one of this run is removed.
  virtual Result<std::unique_ptr<LiveTracker>> attach_tracker(const RunRecord& record) = 0;
  virtual void remove_tracker(const RunRecord& record) = 0;
  /// Whether an earlier process's cutover was committed, though its record may not say so; of a swap, whether
  /// the volume lies where its next swap leads. Nothing: what would tell is gone.
  virtual std::optional<bool> handed_over(const RunRecord& record) = 0;
  /// Of a swap (swap_plan.h): the volume must lie where the record says; then a volume manager's account of
  /// it is made true, where an earlier process did not come so far.
  virtual Result<void> settle_swap(const RunRecord&) { return {}; }
  virtual Result<std::unique_ptr<Quiescer>> make_quiescer(const RunRecord& record, bool rehearsal) = 0;
  /// Of volumes that are cut over together (cutover_group.h): this one could be now, or could not. Answers
  /// the runs that it waits for; empty: none.
  virtual std::string cutover_waits_for(const RunRecord& record, bool ready) = 0;
  virtual std::unique_ptr<BackgroundTask> start(std::function<Result<void>()> job) = 0;
};

}  // namespace blockferry
