// SPDX-License-Identifier: Apache-2.0
#include "blockio/return_box.h"

#include <algorithm>

#include <sys/eventfd.h>

#include "blockio/base/check.h"
#include "blockio/base/clock.h"

namespace blockferry {

ReturnBox::ReturnBox() : event_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
  BLOCKFERRY_CHECK(event_.valid(), "no event descriptor is to be had");
}

void ReturnBox::lend(IoRequest& request) {
  request.submitted_at_ns = system_clock().now().count();
  ++lent_;
}

void ReturnBox::take(std::vector<IoRequest*>& completed) {
  if (lent_ == 0) return;
  const std::lock_guard lock(mutex_);
  if (returned_.empty()) return;
  eventfd_t ignored = 0;
  ::eventfd_read(event_.get(), &ignored);
  completed.insert(completed.end(), returned_.begin(), returned_.end());
  lent_ -= returned_.size();
  returned_.clear();
}

void ReturnBox::give_back(IoRequest& request, std::int64_t result) {
  request.result = std::min<std::int64_t>(result, std::int64_t(request.bytes));
  request.completed_at_ns = system_clock().now().count();
  const std::lock_guard lock(mutex_);
  returned_.push_back(&request);
  // Once for all that lie there. With the mutex held: a queue that has taken the last one may be gone.
  if (returned_.size() == 1) ::eventfd_write(event_.get(), 1);
}

}  // namespace blockferry
