// SPDX-License-Identifier: Apache-2.0
#include "tests/support/memory_device.h"

#include <algorithm>
#include <cstring>

namespace blockferry {

void MemoryQueue::wait(Nanoseconds timeout, std::vector<IoRequest*>& completed) {
  if (posted_.empty()) {
    clock_.sleep_for(timeout);
    return;
  }
  const std::size_t count = 1 + random_() % posted_.size();
  for (std::size_t i = 0; i < count; ++i) {
    const std::size_t at = random_() % posted_.size();
    const Posted posted = posted_[at];
    posted_.erase(posted_.begin() + std::ptrdiff_t(at));
    clock_.sleep_for(std::chrono::microseconds(20));
    posted.request->result = posted.result;
    posted.request->completed_at_ns = clock_.now().count();
    completed.push_back(posted.request);
  }
}

void MemoryQueue::post(IoRequest& request, std::int64_t result) {
  posted_.push_back({&request, result});
}

void MemoryQueue::release(std::int64_t result) {
  for (auto* request : held_) post(*request, result);
  held_.clear();
}

MemoryDevice::MemoryDevice(MemoryQueue& queue, std::string name, std::size_t bytes)
    : content(bytes), queue_(queue) {
  info_.uri = std::move(name);
  info_.kind = DeviceKind::simulated;
  info_.bytes = bytes;
  info_.zero_run_bytes_min = 16384;
}

void MemoryDevice::submit(IoRequest& request) {
  request.device = this;
  if (request.operation == IoOperation::flush) {
    ++flushes;
    return queue_.post(request, 0);
  }
  const std::size_t end = std::min<std::size_t>(content.size(), std::size_t(request.offset + request.bytes));
  const std::size_t count = end > request.offset ? end - std::size_t(request.offset) : 0;
  auto* const place = content.data() + request.offset;
  switch (request.operation) {
    case IoOperation::read:
      std::memcpy(request.data, place, count);
      break;
    case IoOperation::write:
      std::memcpy(place, request.data, count);
      bytes_written += count;
      break;
    case IoOperation::zero:
      std::memset(place, 0, count);
      bytes_zeroed += count;
      return queue_.post(request, 0);
    case IoOperation::flush:
      break;
  }
  queue_.post(request, std::int64_t(count));
}

}  // namespace blockferry
