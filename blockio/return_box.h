// SPDX-License-Identifier: Apache-2.0
// Where other threads leave finished requests for the thread that owns a queue: a list, and an eventfd for
// the queue's wait to watch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

#include "blockio/base/file_descriptor.h"
#include "blockio/device.h"

namespace blockferry {

class ReturnBox {
 public:
  ReturnBox();

  // Of the queue's thread.
  void lend(IoRequest& request);
  /// Appends what has come back. The event is taken with it: one that comes later shows anew.
  void take(std::vector<IoRequest*>& completed);
  std::size_t lent() const { return lent_; }
  int event_fd() const { return event_.get(); }  ///< readable when something came back

  /// From any thread.
  void give_back(IoRequest& request, std::int64_t result);

 private:
  FileDescriptor event_;
  std::size_t lent_ = 0;
  std::mutex mutex_;
  std::vector<IoRequest*> returned_;
};

}  // namespace blockferry
