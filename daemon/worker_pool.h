// SPDX-License-Identifier: Apache-2.0
// A few threads that run calls which may block. A call that never comes back does not keep stop() waiting for
// ever.
#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

namespace blockferry {

class WorkerPool {
 public:
  WorkerPool(unsigned threads, const char* thread_name);
  ~WorkerPool();  ///< stop(0 s)
  WorkerPool(const WorkerPool&) = delete;
  WorkerPool& operator=(const WorkerPool&) = delete;

  /// False when the pool is stopping: the task will never run. A task must not throw.
  bool submit(std::function<void()> task);

  /// Takes no more tasks, runs those submitted, waits at most `patience`. False when a task did not come
  /// back: its thread is left to itself, and what the task uses must live on.
  bool stop(std::chrono::milliseconds patience);

 private:
  struct Shared;
  static void work(const std::shared_ptr<Shared>& shared);
  std::shared_ptr<Shared> shared_;
  std::vector<std::thread> threads_;
};

}  // namespace blockferry
