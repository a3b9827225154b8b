// SPDX-License-Identifier: Apache-2.0
#include "tests/support/memory_device.h"

#include <algorithm>
#include <cstring>

#include "blockio/base/check.h"

namespace blockferry {

namespace {

constexpr std::uint64_t page_bytes = 4096;

}  // namespace

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

bool MemoryQueue::in_registered_memory(const std::byte* data, std::uint64_t bytes) const {
  return data >= memory_.data() && data + bytes <= memory_.data() + memory_.size();
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

void MemoryDevice::check(const IoRequest& request) const {
  if (request.operation == IoOperation::flush) return;
  const std::uint64_t block = info_.logical_block_bytes;
  BLOCKFERRY_CHECK(request.bytes > 0 && request.offset % block == 0, "a request off the device's blocks");
  BLOCKFERRY_CHECK(request.offset + request.bytes <= info_.bytes, "a request beyond the device's end");
  const bool odd = request.bytes % block != 0;
  BLOCKFERRY_CHECK(!odd || request.offset + request.bytes == info_.bytes, "an odd length before the end");
  BLOCKFERRY_CHECK(!odd || request.operation != IoOperation::zero, "an odd length to be zeroed");
  if (request.operation == IoOperation::zero) return;
  BLOCKFERRY_CHECK(reinterpret_cast<std::uintptr_t>(request.data) % page_bytes == 0,
                   "a buffer off the pages");
  const std::uint64_t room = odd ? round_up(request.bytes, page_bytes) : request.bytes;
  BLOCKFERRY_CHECK(queue_.in_registered_memory(request.data, room), "a buffer that is not registered");
}

void MemoryDevice::submit(IoRequest& request) {
  check(request);
  request.device = this;
  if (request.operation == IoOperation::flush) {
    ++flushes;
    return queue_.post(request, 0);
  }
  const std::size_t end = std::min<std::size_t>(content.size(), std::size_t(request.offset + request.bytes));
  const std::size_t count = end > request.offset ? end - std::size_t(request.offset) : 0;
  auto* const place = content.data() + request.offset;
  const std::uint64_t behind =
      request.bytes % info_.logical_block_bytes != 0 ? page_bytes - request.bytes % page_bytes : 0;
  switch (request.operation) {
    case IoOperation::read:
      std::memcpy(request.data, place, count);
      std::memset(request.data + request.bytes, 0xA5, behind);  // what lies behind the end of a volume
      break;
    case IoOperation::write:
      std::memcpy(place, request.data, count);
      std::memset(request.data + request.bytes, 0, behind);
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
