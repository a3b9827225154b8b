// SPDX-License-Identifier: Apache-2.0
#include "daemon/run.h"

#include <pthread.h>

namespace blockferry {

namespace {

constexpr Nanoseconds step_max = std::chrono::milliseconds(50);  // how long a message may wait for I/O
constexpr Nanoseconds publish_every = std::chrono::milliseconds(20);

}  // namespace

Run::Run(RunRecord record, std::unique_ptr<RunEnvironment> environment, const RunLimits& limits,
         std::function<void()> on_finished)
    : environment_(std::move(environment)),
      limits_(limits),
      on_finished_(std::move(on_finished)),
      published_(record.status),
      thread_([this, record = std::move(record)]() mutable { main(std::move(record)); }) {}

Run::~Run() {
  thread_.join();
}

void Run::main(RunRecord record) {
  ::pthread_setname_np(::pthread_self(), ("run-" + record.status.id).substr(0, 15).c_str());
  RunCore core(std::move(record), *environment_, limits_);
  core.start();
  publish(core, core.finished());
  Nanoseconds published_at = environment_->clock().now();
  while (!core.finished()) {
    take_messages(core);
    if (core.idle()) {
      publish(core, false);
      wait_for_message();
      continue;
    }
    core.step(step_max);
    const Nanoseconds now = environment_->clock().now();
    if (now - published_at >= publish_every || core.finished()) {
      publish(core, core.finished());
      published_at = now;
    }
  }
  on_finished_();
  while (core.draining()) {
    take_messages(core);
    core.step(step_max);
  }
  drained_ = true;
}

void Run::publish(const RunCore& core, bool final) {
  const std::lock_guard lock(mutex_);
  published_ = core.status();
  if (!final) return;
  final_record_ = core.record();
  // A finished run that is not draining has released its devices: whoever sees that it finished may rely on
  // it.
  drained_ = !core.draining();
  finished_ = true;
  changed_.notify_all();
}

void Run::take_messages(RunCore& core) {
  std::vector<Message> messages;
  {
    const std::lock_guard lock(mutex_);
    messages.swap(messages_);
  }
  if (messages.empty()) return;
  for (auto& message : messages) message.action(core);
  publish(core, core.finished());
  const std::lock_guard lock(mutex_);
  for (auto& message : messages) *message.done = true;
  changed_.notify_all();
}

void Run::wait_for_message() {
  std::unique_lock lock(mutex_);
  changed_.wait_for(lock, std::chrono::seconds(1), [this] { return !messages_.empty(); });
}

bool Run::send(std::function<void(RunCore&)> message, Nanoseconds patience) {
  const auto done = std::make_shared<std::atomic<bool>>(false);
  std::unique_lock lock(mutex_);
  if (finished_) return false;
  messages_.push_back({std::move(message), done});
  changed_.notify_all();
  changed_.wait_for(lock, patience, [&] { return done->load() || finished_; });
  return *done;
}

RunStatus Run::status() const {
  const std::lock_guard lock(mutex_);
  return published_;
}

RunRecord Run::record() const {
  const std::lock_guard lock(mutex_);
  return final_record_;
}

}  // namespace blockferry
