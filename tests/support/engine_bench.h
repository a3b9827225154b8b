// SPDX-License-Identifier: Apache-2.0
// An engine with devices in memory, driven to the end of its jobs.
#pragma once

#include <algorithm>
#include <memory>
#include <span>
#include <vector>

#include "blockio/copy_engine.h"
#include "tests/support/fault_device.h"

namespace blockferry {

class EngineBench {
 public:
  struct alignas(4096) Page {
    std::byte bytes[4096];
  };

  EngineBench(std::uint64_t seed, std::size_t bytes, std::size_t target_count,
              const CopyEngineOptions& engine_options)
      : options(engine_options),
        queue(seed, clock),
        source(queue, "source", bytes),
        source_faults(source, queue) {
    for (std::size_t i = 0; i < target_count; ++i) {
      targets.push_back(std::make_unique<MemoryDevice>(queue, "target" + std::to_string(i), bytes));
      for (auto& byte : targets.back()->content) byte = std::byte(0xEE);
      target_faults.push_back(std::make_unique<FaultDevice>(*targets.back(), queue));
    }
    std::vector<Device*> pointers;
    for (auto& target : target_faults) pointers.push_back(target.get());
    memory.resize(CopyEngine::memory_bytes(options) / sizeof(Page));
    const std::span usable = std::as_writable_bytes(std::span(memory));
    // Dirty, as memory is that served before: nobody promises the engine zeroes.
    std::fill(usable.begin(), usable.end(), std::byte(0x5A));
    static_cast<void>(queue.register_memory(usable));
    engine = std::make_unique<CopyEngine>(queue, clock, source_faults, pointers, usable, options);
  }

  /// Copies the whole source, in order, at depth; bounded.
  std::vector<JobResult> copy_all() {
    std::vector<JobResult> results;
    std::uint64_t next = 0;
    const std::uint64_t bytes = source.info().bytes;
    for (unsigned i = 0; i < 1000000 && (next < bytes || engine->jobs_in_flight() > 0); ++i) {
      while (next < bytes && engine->can_start()) {
        const std::uint64_t count = std::min(engine->room(), bytes - next);
        engine->start_copy({next, count});
        next += count;
      }
      engine->poll(std::chrono::milliseconds(1), results);
    }
    return results;
  }

  /// Drives what was started to its end; bounded.
  std::vector<JobResult> drain() {
    std::vector<JobResult> results;
    for (unsigned i = 0; i < 100000 && (engine->jobs_in_flight() > 0 || engine->flush_in_flight()); ++i) {
      engine->poll(std::chrono::milliseconds(1), results);
    }
    return results;
  }

  const CopyEngineOptions options;
  ManualClock clock;
  MemoryQueue queue;
  MemoryDevice source;
  FaultDevice source_faults;
  std::vector<std::unique_ptr<MemoryDevice>> targets;
  std::vector<std::unique_ptr<FaultDevice>> target_faults;
  std::vector<Page> memory;
  std::unique_ptr<CopyEngine> engine;
};

}  // namespace blockferry
