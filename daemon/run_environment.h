// SPDX-License-Identifier: Apache-2.0
// All that a run takes from the world: time, devices, durable state, background work. The daemon gives it the
// real ones; the simulator gives it simulated ones and drives the same run.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "bitmap/storage.h"
#include "blockio/base/clock.h"
#include "blockio/copy_engine.h"
#include "blockio/device.h"
#include "blockio/io_queue.h"
#include "daemon/buffer_pool.h"
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
  virtual BufferPool& buffers() = 0;
  virtual std::unique_ptr<BackgroundTask> start(std::function<Result<void>()> job) = 0;
};

}  // namespace blockferry
