// SPDX-License-Identifier: Apache-2.0
#include "blockio/nbd_channel.h"

#include <algorithm>
#include <cerrno>
#include <string_view>
#include <utility>

#include <libnbd.h>
#include <pthread.h>
#include <sys/eventfd.h>

#include "blockio/base/check.h"

namespace blockferry {

namespace {

constexpr std::size_t in_flight_max = 64;  // the server reads them one after the other anyway
constexpr unsigned fruitless_max = 20;
constexpr Nanoseconds look_up = std::chrono::seconds(1);
constexpr Nanoseconds first_pause = std::chrono::milliseconds(50), longest_pause = std::chrono::seconds(2);

/// Ours for a connection that broke, or the server's word that it is going down.
bool is_loss(int error) {
  return error == ENOTCONN || error == ESHUTDOWN;
}

}  // namespace

NbdChannel::NbdChannel(NbdConnection connection, NbdChannelOptions options, FileQueue* queue)
    : options_(std::move(options)),
      wake_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)),
      queue_(queue),
      connection_(std::move(connection)) {
  BLOCKFERRY_CHECK(wake_.valid(), "no event descriptor is to be had");
  if (queue_ == nullptr) thread_ = std::thread([this] { main(); });
}

NbdChannel::~NbdChannel() {
  if (watched_ >= 0) queue_->unwatch(watched_);
  if (!thread_.joinable()) {
    connection_.reset();  // before the pieces that its requests point to
    return;
  }
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  ::eventfd_write(wake_.get(), 1);
  thread_.join();
}

void NbdChannel::submit(NbdPiece& piece) {
  piece.channel = this;
  bytes_outstanding_ += piece.load_bytes();
  if (queue_ != nullptr) {
    waiting_.push_back(&piece);
    return step();
  }
  bool first = false;
  {
    const std::lock_guard lock(mutex_);
    first = inbox_.empty();
    inbox_.push_back(&piece);
  }
  if (first) ::eventfd_write(wake_.get(), 1);
}

// Driven by the queue's thread.

void NbdChannel::ready(short events) {
  connection_->move_on(events);
  step();
}

void NbdChannel::drive(Nanoseconds timeout) {
  // A reply at a time; more than are in flight there are not.
  for (std::size_t moved = 0; queue_ != nullptr && moved <= in_flight_max; ++moved) {
    if (!connection_->poll(-1, moved == 0 ? timeout : Nanoseconds(0))) return;
    step();
  }
}

void NbdChannel::step() {
  do {
    start_waiting();
    finish_completed();
  } while (connection_ && !waiting_.empty() && in_flight_.size() < in_flight_max);
  if (!connection_) return leave_queue();
  watched_ = connection_->fd();
  queue_->watch(watched_, connection_->events_wanted(), *this);
}

/// From here on everything is the channel's own thread's.
void NbdChannel::leave_queue() {
  if (watched_ >= 0) queue_->unwatch(std::exchange(watched_, -1));
  queue_ = nullptr;
  thread_ = std::thread([this] { main(); });
}

// Driven by a thread of its own.

void NbdChannel::main() {
  ::pthread_setname_np(::pthread_self(), "nbd");
  for (;;) {
    take_inbox();
    {
      const std::lock_guard lock(mutex_);
      if (stopping_) break;
    }
    if (given_up_) {
      fail_all(ENOTCONN);
      sleep_unless_stopped(look_up);
      continue;
    }
    if (!connection_) {
      reconnect();
      continue;
    }
    start_waiting();
    if (completed_.empty()) connection_->poll(wake_.get(), look_up);
    finish_completed();
  }
  connection_.reset();  // before the pieces that its requests point to
}

void NbdChannel::take_inbox() {
  eventfd_t ignored = 0;
  const std::lock_guard lock(mutex_);
  ::eventfd_read(wake_.get(), &ignored);
  waiting_.insert(waiting_.end(), inbox_.begin(), inbox_.end());
  inbox_.clear();
}

void NbdChannel::start_waiting() {
  while (!waiting_.empty() && in_flight_.size() < in_flight_max && connection_->alive()) {
    NbdPiece& piece = *waiting_.front();
    waiting_.pop_front();
    in_flight_.push_back(&piece);
    if (start(piece)) continue;
    // Refused before it was sent: by a handle that just died, or by libnbd's own checks.
    if (std::find(completed_.begin(), completed_.end(), &piece) != completed_.end()) continue;
    piece.error = connection_->alive() ? std::max(::nbd_get_errno(), 1) : ENOTCONN;
    completed_.push_back(&piece);
  }
}

bool NbdChannel::start(NbdPiece& piece) {
  nbd_handle* const h = connection_->handle();
  const nbd_completion_callback done = {on_completion, &piece, nullptr};
  const std::uint32_t flags = piece.write_through ? LIBNBD_CMD_FLAG_FUA : 0;
  piece.error = 0;
  piece.extents.clear();
  switch (piece.command) {
    case NbdCommand::read:
      return ::nbd_aio_pread(h, piece.data, piece.bytes, piece.offset, done, 0) >= 0;
    case NbdCommand::write:
      return ::nbd_aio_pwrite(h, piece.data, piece.bytes, piece.offset, done, flags) >= 0;
    case NbdCommand::zero:
      // Without NO_HOLE: the space may be given back. Without FAST_ZERO: a server that has to write the
      // zeroes itself still spares us sending them.
      return ::nbd_aio_zero(h, piece.bytes, piece.offset, done, flags) >= 0;
    case NbdCommand::flush:
      return ::nbd_aio_flush(h, done, 0) >= 0;
    case NbdCommand::block_status: {
      const nbd_extent_callback extents = {on_extents, &piece, nullptr};
      return ::nbd_aio_block_status(h, piece.bytes, piece.offset, extents, done, 0) >= 0;
    }
  }
  return false;
}

/// Called by libnbd, within a call of ours.
int NbdChannel::on_completion(void* user, int* error) {
  auto& piece = *static_cast<NbdPiece*>(user);
  piece.error = *error;
  piece.channel->completed_.push_back(&piece);
  return 1;  // retired
}

int NbdChannel::on_extents(void* user, const char* context, std::uint64_t, std::uint32_t* entries,
                           std::size_t count, int*) {
  auto& piece = *static_cast<NbdPiece*>(user);
  if (std::string_view(context) != allocation_context) return 0;
  for (std::size_t i = 0; i + 1 < count; i += 2) {
    if (entries[i] > 0) piece.extents.push_back({entries[i], entries[i + 1]});
  }
  return 0;
}

void NbdChannel::finish_completed() {
  bool broken = !connection_->alive();
  for (NbdPiece* piece : completed_) {
    if (is_loss(piece->error)) {
      broken = true;
    } else {
      std::erase(in_flight_, piece);
      fruitless_ = 0;
      finish(*piece);
    }
  }
  completed_.clear();
  if (broken) give_connection_up();
}

/// What was in flight is to be repeated.
void NbdChannel::give_connection_up() {
  connection_.reset();  // from here on no reply of the old one can touch a buffer
  options_.lost(in_flight_);
  waiting_.insert(waiting_.begin(), in_flight_.begin(), in_flight_.end());
  in_flight_.clear();
}

void NbdChannel::finish(NbdPiece& piece) {
  bytes_outstanding_ -= piece.load_bytes();
  options_.done(piece);
}

void NbdChannel::fail_all(int error) {
  for (NbdPiece* piece : std::exchange(waiting_, {})) {
    piece->error = error;
    finish(*piece);
  }
}

bool NbdChannel::sleep_unless_stopped(Nanoseconds duration) {
  const Nanoseconds give_up = system_clock().now() + duration;
  for (;;) {
    {
      const std::lock_guard lock(mutex_);
      if (stopping_) return false;
      if (given_up_ && !inbox_.empty()) return true;
    }
    const Nanoseconds left = give_up - system_clock().now();
    if (left.count() <= 0) return true;
    system_clock().sleep_for(std::min<Nanoseconds>(left, std::chrono::milliseconds(20)));
  }
}

void NbdChannel::reconnect() {
  const Nanoseconds give_up = system_clock().now() + options_.reconnect_for;
  Nanoseconds pause = first_pause;
  // A server that takes connections and then drops them is not hammered, and not tried for ever.
  if (++fruitless_ > 1 &&
      !sleep_unless_stopped(std::min(pause * (1 << std::min(fruitless_, 8U)), longest_pause)))
    return;
  for (; fruitless_ <= fruitless_max; pause = std::min(pause * 2, longest_pause)) {
    auto connection = NbdConnection::connect(options_.address, options_.connect_timeout);
    if (connection && connection->about().bytes == options_.bytes) {
      connection_ = std::move(*connection);
      return;
    }
    if (system_clock().now() + pause >= give_up) break;
    if (!sleep_unless_stopped(pause)) return;
  }
  given_up_ = true;
}

}  // namespace blockferry
