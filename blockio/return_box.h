// SPDX-License-Identifier: Apache-2.0
// What a queue has under way besides the kernel's file I/O. Other threads leave finished requests here: a
// list, and an eventfd that rings. And descriptors that the queue's thread serves itself. One epoll watches
// them all.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <vector>

#include "blockio/base/clock.h"
#include "blockio/base/file_descriptor.h"
#include "blockio/device.h"

namespace blockferry {

/// A descriptor whose I/O is done on the queue's own thread, within wait().
class Watched {
 public:
  virtual ~Watched() = default;
  /// `events`: of poll(2), what it is ready for. May watch, unwatch and give requests back.
  virtual void ready(short events) = 0;
};

class ReturnBox {
 public:
  ReturnBox();

  // Of the queue's thread.
  void lend(IoRequest& request);
  void give_back_here(IoRequest& request, std::int64_t result);
  void watch(int fd, short events, Watched& watched);
  void unwatch(int fd);
  /// Serves the descriptors that are ready, and appends what has come back.
  void take(std::vector<IoRequest*>& completed);
  /// Until there is something to take, or the time is over.
  void wait(Nanoseconds timeout) const;
  std::size_t lent() const { return lent_; }
  int event_fd() const { return epoll_.get(); }  ///< readable while there is something to take

  /// From any thread.
  void give_back(IoRequest& request, std::int64_t result);

 private:
  struct Watch {
    Watched* watched;
    short events;
  };
  void serve();
  void put(IoRequest& request, std::int64_t result, bool ring);

  FileDescriptor event_, epoll_;
  std::map<int, Watch> watches_;  ///< by descriptor
  std::size_t lent_ = 0;
  std::mutex mutex_;
  std::vector<IoRequest*> returned_;
  bool rung_ = false;  ///< since take() last looked
};

}  // namespace blockferry
