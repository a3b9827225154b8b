// SPDX-License-Identifier: Apache-2.0
// Wraps any device and lets it fail by rules. Each rule counts how often it struck: a test whose fault never
// happened must fail.
#pragma once

#include <optional>
#include <vector>

#include "blockio/device.h"
#include "tests/support/memory_device.h"

namespace blockferry {

struct FaultRule {
  enum class Effect : std::uint8_t {
    error,     ///< comes back with -errno, nothing done
    shorten,   ///< only the first `bytes` are asked of the device
    flip_bit,  ///< of the first byte, on its way, of a write or a read
    hang,      ///< is not given back before MemoryQueue::release()
  };
  IoOperation operation = IoOperation::read;
  ByteRange range{0, UINT64_MAX};  ///< strikes requests that overlap it; flushes always
  Effect effect = Effect::error;
  int errno_value = 5;
  std::uint64_t bytes = 0;
  unsigned skip = 0;            ///< lets so many pass first
  unsigned count = UINT32_MAX;  ///< strikes so often at most
  unsigned struck = 0;
};

class FaultDevice : public Device {
 public:
  FaultDevice(Device& inner, MemoryQueue& queue) : inner_(inner), queue_(queue) {}

  const DeviceInfo& info() const override { return inner_.info(); }
  void submit(IoRequest& request) override;
  Result<DeviceRegion> region_at(std::uint64_t offset) override { return inner_.region_at(offset); }
  std::optional<std::string> change_stamp() override { return inner_.change_stamp(); }

  std::vector<FaultRule> rules;

 private:
  FaultRule* rule_for(const IoRequest& request);

  Device& inner_;
  MemoryQueue& queue_;
};

}  // namespace blockferry
