// SPDX-License-Identifier: Apache-2.0
#include "daemon/worker_pool.h"

#include <condition_variable>
#include <deque>
#include <mutex>
#include <utility>

#include <pthread.h>

namespace blockferry {

/// Shared with the threads, so that one left to itself finds it when it comes back.
struct WorkerPool::Shared {
  std::mutex mutex;
  std::condition_variable work_or_stop, thread_ended;
  std::deque<std::function<void()>> tasks;
  unsigned threads_alive = 0;
  bool stopping = false;
};

WorkerPool::WorkerPool(unsigned threads, const char* thread_name) : shared_(std::make_shared<Shared>()) {
  shared_->threads_alive = threads;
  for (unsigned i = 0; i < threads; ++i) {
    threads_.emplace_back([shared = shared_] { work(shared); });
    pthread_setname_np(threads_.back().native_handle(), thread_name);
  }
}

WorkerPool::~WorkerPool() {
  stop(std::chrono::milliseconds(0));
}

void WorkerPool::work(const std::shared_ptr<Shared>& shared) {
  std::unique_lock lock(shared->mutex);
  for (;;) {
    shared->work_or_stop.wait(lock, [&] { return shared->stopping || !shared->tasks.empty(); });
    if (shared->tasks.empty()) break;
    auto task = std::move(shared->tasks.front());
    shared->tasks.pop_front();
    lock.unlock();
    task();
    task = nullptr;  // what it holds goes before the lock is taken
    lock.lock();
  }
  --shared->threads_alive;
  shared->thread_ended.notify_all();
}

bool WorkerPool::submit(std::function<void()> task) {
  const std::lock_guard lock(shared_->mutex);
  if (shared_->stopping) return false;
  shared_->tasks.push_back(std::move(task));
  shared_->work_or_stop.notify_one();
  return true;
}

bool WorkerPool::stop(std::chrono::milliseconds patience) {
  std::deque<std::function<void()>> never_run;
  bool all_back = true;
  {
    std::unique_lock lock(shared_->mutex);
    shared_->stopping = true;
    shared_->work_or_stop.notify_all();
    all_back = shared_->thread_ended.wait_for(lock, patience, [&] { return shared_->threads_alive == 0; });
    never_run.swap(shared_->tasks);
  }
  for (auto& thread : threads_) {
    if (all_back)
      thread.join();
    else
      thread.detach();
  }
  threads_.clear();
  return all_back;
}

}  // namespace blockferry
