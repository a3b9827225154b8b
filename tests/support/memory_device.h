// SPDX-License-Identifier: Apache-2.0
// A device in memory behind the real interface, for tests of the engine: completions come back in a random
// order.
#pragma once

#include <random>
#include <string>
#include <vector>

#include "blockio/device.h"
#include "blockio/io_queue.h"

namespace blockferry {

/// Time that passes only when somebody waits.
class ManualClock : public Clock {
 public:
  Nanoseconds now() const override { return time_; }
  double wall_seconds() const override { return 1; }
  void sleep_for(Nanoseconds duration) override { time_ += duration; }

 private:
  Nanoseconds time_{0};
};

/// Gives requests back in a random order, a few at a time.
class MemoryQueue : public IoQueue {
 public:
  MemoryQueue(std::uint64_t seed, ManualClock& clock) : random_(seed), clock_(clock) {}
  Result<void> register_memory(std::span<std::byte> memory) override {
    memory_ = memory;
    return {};
  }
  void wait(Nanoseconds timeout, std::vector<IoRequest*>& completed) override;
  void post(IoRequest& request, std::int64_t result) override;
  std::size_t in_flight() const override { return posted_.size() + held_.size(); }
  bool in_registered_memory(const std::byte* data, std::uint64_t bytes) const;

  /// Taken, and not given back before release(): a device that hangs.
  void hold(IoRequest& request) { held_.push_back(&request); }
  void release(std::int64_t result);
  bool holds_any() const { return !held_.empty(); }

 private:
  struct Posted {
    IoRequest* request;
    std::int64_t result;
  };
  std::mt19937_64 random_;
  ManualClock& clock_;
  std::span<std::byte> memory_;
  std::vector<Posted> posted_;
  std::vector<IoRequest*> held_;
};

/// As strict as the contract in device.h lets a device be: what is not aligned, or has no room for what the
/// device may put behind an odd end, is a broken invariant.
class MemoryDevice : public Device {
 public:
  MemoryDevice(MemoryQueue& queue, std::string name, std::size_t bytes);

  const DeviceInfo& info() const override { return info_; }
  void submit(IoRequest& request) override;
  Result<DeviceRegion> region_at(std::uint64_t) override { return DeviceRegion{false, info_.bytes}; }
  std::optional<std::string> change_stamp() override { return "same"; }

  std::vector<std::byte> content;
  std::uint64_t flushes = 0;
  std::uint64_t bytes_written = 0, bytes_zeroed = 0;

 private:
  void check(const IoRequest& request) const;

  MemoryQueue& queue_;
  DeviceInfo info_;
};

}  // namespace blockferry
