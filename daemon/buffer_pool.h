// SPDX-License-Identifier: Apache-2.0
// Memory for the engine's buffers. Clearing 16 MiB of fresh memory takes as long as copying a small volume:
// one run's worth is kept for the next run.
#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "blockio/base/error.h"

namespace blockferry {

class BufferPool;

/// Goes back to its pool. What an earlier run read may still be in it.
class Buffers {
 public:
  ~Buffers();
  Buffers(const Buffers&) = delete;
  Buffers& operator=(const Buffers&) = delete;

  /// As many bytes as asked for, aligned for any device.
  std::span<std::byte> memory() const { return memory_; }

 private:
  friend BufferPool;
  struct Mapping {
    std::byte* address = nullptr;
    std::size_t length = 0;
  };
  Buffers(BufferPool& pool, Mapping mapping, std::size_t bytes);

  BufferPool& pool_;
  const Mapping mapping_;
  const std::span<std::byte> memory_;
};

/// Outlives the buffers taken from it. Thread-safe.
class BufferPool {
 public:
  BufferPool() = default;
  ~BufferPool();
  BufferPool(const BufferPool&) = delete;
  BufferPool& operator=(const BufferPool&) = delete;

  Result<std::unique_ptr<Buffers>> take(std::size_t bytes);

 private:
  friend Buffers;
  void give_back(const Buffers::Mapping& mapping);

  std::mutex mutex_;
  std::vector<Buffers::Mapping> idle_;  // guarded by mutex_
};

}  // namespace blockferry
