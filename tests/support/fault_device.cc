// SPDX-License-Identifier: Apache-2.0
#include "tests/support/fault_device.h"

#include <algorithm>

namespace blockferry {

FaultRule* FaultDevice::rule_for(const IoRequest& request) {
  for (auto& rule : rules) {
    const bool overlaps =
        request.operation == IoOperation::flush ||
        (request.offset < rule.range.offset + std::min(rule.range.bytes, UINT64_MAX - rule.range.offset) &&
         rule.range.offset < request.offset + request.bytes);
    if (rule.operation != request.operation || !overlaps || rule.count == 0) continue;
    if (rule.skip > 0) {
      --rule.skip;
      continue;
    }
    --rule.count;
    ++rule.struck;
    return &rule;
  }
  return nullptr;
}

void FaultDevice::submit(IoRequest& request) {
  FaultRule* rule = rule_for(request);
  if (rule == nullptr) return inner_.submit(request);
  request.device = this;
  switch (rule->effect) {
    case FaultRule::Effect::error:
      return queue_.post(request, -rule->errno_value);
    case FaultRule::Effect::hang:
      return queue_.hold(request);
    case FaultRule::Effect::flip_bit: {
      // The inner device copies at once, so a write's buffer may be restored: other targets are fed from it.
      if (request.operation == IoOperation::write) request.data[0] ^= std::byte(1);
      inner_.submit(request);
      request.data[0] ^= std::byte(1);
      return;
    }
    case FaultRule::Effect::shorten: {
      const std::uint64_t asked = request.bytes;
      request.bytes = std::min(asked, rule->bytes);
      inner_.submit(request);  // this device answers at once, so the request may be restored
      request.bytes = asked;
      return;
    }
  }
}

}  // namespace blockferry
