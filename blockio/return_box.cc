// SPDX-License-Identifier: Apache-2.0
#include "blockio/return_box.h"

#include <algorithm>
#include <array>
#include <utility>

#include <poll.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>

#include "blockio/base/check.h"

namespace blockferry {

// epoll's events have the values of poll's.
static_assert(EPOLLIN == POLLIN && EPOLLOUT == POLLOUT && EPOLLERR == POLLERR && EPOLLHUP == POLLHUP);

ReturnBox::ReturnBox()
    : event_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)), epoll_(::epoll_create1(EPOLL_CLOEXEC)) {
  BLOCKFERRY_CHECK(event_.valid() && epoll_.valid(), "no event descriptor is to be had");
  epoll_event event{EPOLLIN, {.fd = event_.get()}};
  BLOCKFERRY_CHECK(::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, event_.get(), &event) == 0,
                   "an event descriptor cannot be watched");
}

void ReturnBox::lend(IoRequest& request) {
  request.submitted_at_ns = system_clock().now().count();
  ++lent_;
}

void ReturnBox::watch(int fd, short events, Watched& watched) {
  const auto [at, fresh] = watches_.try_emplace(fd, Watch{&watched, events});
  if (!fresh && at->second.events == events) return;
  at->second.events = events;
  epoll_event event{std::uint32_t(events), {.fd = fd}};
  BLOCKFERRY_CHECK(::epoll_ctl(epoll_.get(), fresh ? EPOLL_CTL_ADD : EPOLL_CTL_MOD, fd, &event) == 0,
                   "a socket cannot be watched");
}

void ReturnBox::unwatch(int fd) {
  if (watches_.erase(fd) > 0) ::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, fd, nullptr);
}

void ReturnBox::serve() {
  if (watches_.empty()) return;
  std::array<epoll_event, 16> events{};
  const int count = ::epoll_wait(epoll_.get(), events.data(), int(events.size()), 0);
  for (int i = 0; i < count; ++i) {
    const auto& event = events[std::size_t(i)];
    const auto at = watches_.find(event.data.fd);  // one before it may have ended it
    if (at != watches_.end()) at->second.watched->ready(short(event.events));
  }
}

void ReturnBox::take(std::vector<IoRequest*>& completed) {
  if (lent_ == 0) return;
  serve();
  const std::lock_guard lock(mutex_);
  if (returned_.empty()) return;
  eventfd_t ignored = 0;
  if (std::exchange(rung_, false)) ::eventfd_read(event_.get(), &ignored);
  completed.insert(completed.end(), returned_.begin(), returned_.end());
  lent_ -= returned_.size();
  returned_.clear();
}

void ReturnBox::wait(Nanoseconds timeout) const {
  pollfd descriptor{epoll_.get(), POLLIN, 0};
  const timespec limit{timeout.count() / 1'000'000'000, timeout.count() % 1'000'000'000};
  ::ppoll(&descriptor, 1, &limit, nullptr);
}

void ReturnBox::put(IoRequest& request, std::int64_t result, bool ring) {
  request.result = std::min<std::int64_t>(result, std::int64_t(request.bytes));
  request.completed_at_ns = system_clock().now().count();
  const std::lock_guard lock(mutex_);
  returned_.push_back(&request);
  // Once for all that lie there. With the mutex held: a queue that has taken the last one may be gone.
  if (ring && !std::exchange(rung_, true)) ::eventfd_write(event_.get(), 1);
}

void ReturnBox::give_back(IoRequest& request, std::int64_t result) {
  put(request, result, true);
}

/// Without ringing: whoever would be woken is here, and looks before it waits.
void ReturnBox::give_back_here(IoRequest& request, std::int64_t result) {
  put(request, result, false);
}

}  // namespace blockferry
