// SPDX-License-Identifier: Apache-2.0
#include "blockio/nbd_device.h"

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <future>
#include <map>

#include "blockio/base/check.h"
#include "blockio/nbd_channel.h"

namespace blockferry {

namespace {

// Each piece costs both ends a few wake-ups; larger ones leave the processor's cache on their way through the
// server's buffer and ours.
constexpr std::uint64_t piece_bytes_wanted = 1 * MiB;
// A local server shares our processors and their caches: what is under way, here and in its buffers, should
// fit into them. A link wants to be full.
constexpr std::uint64_t local_io_bytes = 256 * KiB, local_in_flight_bytes = 8 * MiB;
constexpr std::uint64_t link_in_flight_bytes = 16 * MiB;
constexpr std::uint64_t zero_run_bytes_min = 32 * KiB;
constexpr std::uint64_t status_bytes_wanted = 1 * GiB;
constexpr Nanoseconds status_patience = std::chrono::seconds(10);

/// A request of the engine's, and the pieces that it went out as.
struct Transfer {
  IoRequest* request = nullptr;
  std::deque<NbdPiece> pieces;       ///< a deque: they stay in place
  std::atomic<std::size_t> left{0};  ///< pieces under way
  std::atomic<int> error{0};         ///< the first one's
  std::vector<std::byte> tail;       ///< of a range that ends within a block: the whole of it
  std::size_t tail_bytes = 0;        ///< of it are the request's
};

/// About holes: asked ahead, so that the answer is there when the run's thread needs it. It waits for a late
/// one, but not for ever, and not twice.
struct Question {
  NbdPiece piece;
  bool stale = false;  ///< asked before forget_regions()
  bool late = false;
  std::mutex mutex;
  std::condition_variable answered;
  bool done = false;
};

class NbdDevice : public Device {
 public:
  NbdDevice(FileQueue& queue, DeviceInfo info, const NbdExport& about, const NbdDeviceOptions& options);
  ~NbdDevice() override;

  void open_channels(NbdConnection first, const NbdAddress& address);

  const DeviceInfo& info() const override { return info_; }
  void submit(IoRequest& request) override;
  Result<DeviceRegion> region_at(std::uint64_t offset) override;
  void forget_regions() override;
  std::optional<std::string> change_stamp() override { return std::nullopt; }  // servers do not tell
  std::uint64_t doubts() override;

 private:
  void cut(Transfer& transfer);
  void add_piece(Transfer& transfer, NbdCommand command, ByteRange range, std::byte* data);
  void add_tail(Transfer& transfer, std::uint64_t whole);
  bool idle();
  void look_at_connections();
  bool begin_flush(IoRequest& request);
  void send(Transfer& transfer);
  NbdChannel& quietest_channel();
  void piece_done(NbdPiece& piece);
  void transfer_done(Transfer& transfer, bool here);
  int outcome_of_flush(int error);
  void connection_lost(std::span<NbdPiece* const> in_flight);
  void ask_for_status(std::uint64_t offset);
  bool answered(Question& question);
  bool learn_regions(std::uint64_t offset);
  void drop_regions_before(std::uint64_t offset);

  FileQueue& queue_;
  const DeviceInfo info_;
  const NbdExport about_;
  const NbdDeviceOptions options_;
  const std::uint64_t piece_bytes_;
  std::uint64_t regions_begin_ = 0, regions_end_ = 0;  ///< of all of:
  std::deque<NbdExtent> regions_;                      ///< as the server last told
  std::unique_ptr<Question> question_;                 ///< under way, or its answer not taken yet

  // Shared with the channels' threads.
  std::mutex mutex_;
  std::map<Transfer*, std::unique_ptr<Transfer>> transfers_;
  std::uint64_t writes_begun_ = 0, writes_under_way_ = 0;
  std::uint64_t writes_kept_ = 0;     ///< of the begun ones, so many are flushed
  std::uint64_t begun_at_flush_ = 0;  ///< what the flush under way will have kept
  bool lost_ = false;                 ///< writes that were not flushed may be gone, and nobody was told yet
  std::uint64_t doubts_ = 0;

  std::vector<std::unique_ptr<NbdChannel>> channels_;  ///< last: their threads use all of the above
};

std::uint64_t piece_bytes_of(const NbdExport& about) {
  const std::uint64_t wanted = round_up(piece_bytes_wanted, about.block_bytes_preferred);
  const std::uint64_t most = about.block_bytes_max / about.block_bytes_min * about.block_bytes_min;
  return std::min(wanted, most);
}

bool is_local(const NbdAddress& address) {
  const auto uri = parse_nbd_uri(address.uri);
  return uri && !uri->socket_path.empty();
}

/// Several share a link better than one. A local server runs on our own processors, as the run's other volume
/// may: threads beyond their number only get into each other's way.
unsigned connections_for(const NbdAddress& address) {
  constexpr unsigned most = 4;
  return is_local(address) ? std::clamp(std::thread::hardware_concurrency() / 2, 1U, most) : most;
}

NbdDevice::NbdDevice(FileQueue& queue, DeviceInfo info, const NbdExport& about,
                     const NbdDeviceOptions& options)
    : queue_(queue),
      info_(std::move(info)),
      about_(about),
      options_(options),
      piece_bytes_(piece_bytes_of(about)),
      doubts_(options.role == DeviceRole::target && options.taken_up_again ? 1 : 0) {}

NbdDevice::~NbdDevice() {
  channels_.clear();
  BLOCKFERRY_CHECK(transfers_.empty(), "an NBD device was destroyed under its requests");
}

void NbdDevice::open_channels(NbdConnection first, const NbdAddress& address) {
  NbdChannelOptions options;
  options.address = address;
  options.bytes = about_.bytes;
  options.connect_timeout = options_.connect_timeout;
  options.reconnect_for = options_.reconnect_for;
  options.done = [this](NbdPiece& piece) { piece_done(piece); };
  options.lost = [this](std::span<NbdPiece* const> in_flight) { connection_lost(in_flight); };
  FileQueue* const driver = is_local(address) && !about_.tls && !options_.always_threads ? &queue_ : nullptr;
  channels_.push_back(std::make_unique<NbdChannel>(std::move(first), options, driver));
  const unsigned wanted = options_.connections != 0 ? options_.connections : connections_for(address);
  const unsigned count = about_.can_multi_conn ? wanted : 1;
  // At once: each takes several turns of the link to be made.
  std::vector<std::future<Result<NbdConnection>>> others;
  while (others.size() + 1 < count)
    others.push_back(
        std::async(std::launch::async, NbdConnection::connect, std::cref(address), options_.connect_timeout));
  for (auto& other : others) {
    auto connection = other.get();
    if (!connection) continue;  // a server with a limit: what there is will do
    channels_.push_back(std::make_unique<NbdChannel>(std::move(*connection), options, driver));
  }
}

// Requests go out.

void NbdDevice::submit(IoRequest& request) {
  request.device = this;
  queue_.lend(request);
  if (request.operation == IoOperation::flush || idle()) look_at_connections();
  auto transfer = std::make_unique<Transfer>();
  Transfer& taken = *transfer;
  taken.request = &request;
  if (request.operation == IoOperation::flush && !begin_flush(request)) return;
  if (request.operation == IoOperation::zero && !about_.can_zero) {
    return queue_.give_back_here(request, -EOPNOTSUPP);
  }
  cut(taken);
  if (taken.pieces.empty()) return queue_.give_back_here(request, 0);
  taken.left = taken.pieces.size();
  {
    const std::lock_guard lock(mutex_);
    if (request.operation == IoOperation::write || request.operation == IoOperation::zero) {
      ++writes_begun_;
      ++writes_under_way_;
    }
    transfers_.emplace(&taken, std::move(transfer));
  }
  send(taken);
}

bool NbdDevice::idle() {
  const std::lock_guard lock(mutex_);
  return transfers_.empty();
}

/// Nobody looks at those of the queue's thread while nothing is under way. One that broke by now may have
/// taken writes with it, which a flush must not call kept; and it took none of those that come now.
void NbdDevice::look_at_connections() {
  for (const auto& channel : channels_) channel->drive(Nanoseconds(0));
}

/// Whether it has to go to the server.
bool NbdDevice::begin_flush(IoRequest& request) {
  const std::lock_guard lock(mutex_);
  if (std::exchange(lost_, false)) {
    queue_.give_back_here(request, -ESTALE);
    return false;
  }
  if (!about_.can_flush) {  // written through, or not to be had
    writes_kept_ = writes_under_way_ == 0 ? writes_begun_ : writes_kept_;
    queue_.give_back_here(request, 0);
    return false;
  }
  begun_at_flush_ = writes_under_way_ == 0 ? writes_begun_ : writes_kept_;
  return true;
}

void NbdDevice::cut(Transfer& transfer) {
  const IoRequest& request = *transfer.request;
  if (request.operation == IoOperation::flush) return add_piece(transfer, NbdCommand::flush, {0, 0}, nullptr);
  const std::uint64_t whole = request.bytes / about_.block_bytes_min * about_.block_bytes_min;
  const bool zero = request.operation == IoOperation::zero;
  const NbdCommand command = zero                                     ? NbdCommand::zero
                             : request.operation == IoOperation::read ? NbdCommand::read
                                                                      : NbdCommand::write;
  // A request of zeroes carries none: the server's limit does not hold for it.
  const std::uint64_t piece_bytes = zero ? std::max<std::uint64_t>(whole, 1) : piece_bytes_;
  for (std::uint64_t at = 0; at < whole;) {
    // Cut where the volume is, not where the request is: the server's preferred blocks stay whole.
    const std::uint64_t room = zero ? piece_bytes : piece_bytes - (request.offset + at) % piece_bytes;
    const std::uint64_t bytes = std::min(room, whole - at);
    add_piece(transfer, command, {request.offset + at, bytes}, zero ? nullptr : request.data + at);
    at += bytes;
  }
  if (whole < request.bytes) add_tail(transfer, whole);
}

/// The part of a block at the end of what is copied: the whole block is read or, with zeroes behind, written.
void NbdDevice::add_tail(Transfer& transfer, std::uint64_t whole) {
  const IoRequest& request = *transfer.request;
  const std::uint64_t offset = request.offset + whole;
  const std::uint64_t bytes = std::min(about_.block_bytes_min, info_.bytes - offset);
  transfer.tail_bytes = request.bytes - whole;
  transfer.tail.assign(bytes, std::byte{0});
  const bool reads = request.operation == IoOperation::read;
  if (request.operation == IoOperation::write)
    std::memcpy(transfer.tail.data(), request.data + whole, transfer.tail_bytes);
  add_piece(transfer, reads ? NbdCommand::read : NbdCommand::write, {offset, bytes}, transfer.tail.data());
}

void NbdDevice::add_piece(Transfer& transfer, NbdCommand command, ByteRange range, std::byte* data) {
  NbdPiece& piece = transfer.pieces.emplace_back();
  piece.command = command;
  piece.offset = range.offset;
  piece.bytes = range.bytes;
  piece.data = data;
  piece.write_through =
      !about_.can_flush && about_.can_fua && (command == NbdCommand::write || command == NbdCommand::zero);
  piece.owner = &transfer;
}

NbdChannel& NbdDevice::quietest_channel() {
  return **std::min_element(channels_.begin(), channels_.end(), [](const auto& one, const auto& other) {
    return one->bytes_outstanding() < other->bytes_outstanding();
  });
}

/// The transfer may be over before this returns.
void NbdDevice::send(Transfer& transfer) {
  std::vector<NbdPiece*> pieces;
  pieces.reserve(transfer.pieces.size());
  for (auto& piece : transfer.pieces) pieces.push_back(&piece);
  for (NbdPiece* piece : pieces) quietest_channel().submit(*piece);
}

// Answers come in, on the queue's thread or the channels' own.

void NbdDevice::piece_done(NbdPiece& piece) {
  if (piece.command == NbdCommand::block_status) {
    auto& question = *static_cast<Question*>(piece.owner);
    const std::lock_guard lock(question.mutex);
    question.done = true;
    question.answered.notify_all();
    return;
  }
  auto& transfer = *static_cast<Transfer*>(piece.owner);
  int none = 0;
  if (piece.error != 0) transfer.error.compare_exchange_strong(none, piece.error);
  if (--transfer.left == 0) transfer_done(transfer, piece.channel->driven_by_queue());
}

void NbdDevice::transfer_done(Transfer& transfer, bool here) {
  IoRequest& request = *transfer.request;
  int error = transfer.error;
  if (request.operation == IoOperation::read && error == 0 && transfer.tail_bytes > 0) {
    std::memcpy(request.data + request.bytes - transfer.tail_bytes, transfer.tail.data(),
                transfer.tail_bytes);
  }
  {
    const std::lock_guard lock(mutex_);
    if (request.operation == IoOperation::write || request.operation == IoOperation::zero)
      --writes_under_way_;
    if (request.operation == IoOperation::flush) error = outcome_of_flush(error);
    transfers_.erase(&transfer);
  }
  const bool carries = request.operation == IoOperation::read || request.operation == IoOperation::write;
  const std::int64_t result = error != 0 ? -error : carries ? std::int64_t(request.bytes) : 0;
  here ? queue_.give_back_here(request, result) : queue_.give_back(request, result);
}

/// With the mutex held. A flush that was repeated on a new connection says nothing of what the old one took.
int NbdDevice::outcome_of_flush(int error) {
  if (std::exchange(lost_, false)) return ESTALE;
  if (error == 0) writes_kept_ = begun_at_flush_;
  return error;
}

void NbdDevice::connection_lost(std::span<NbdPiece* const> in_flight) {
  const std::lock_guard lock(mutex_);
  if (writes_kept_ < writes_begun_) lost_ = true;
  const bool wrote = std::any_of(in_flight.begin(), in_flight.end(), [](const NbdPiece* piece) {
    return piece->command == NbdCommand::write || piece->command == NbdCommand::zero;
  });
  if (wrote) ++doubts_;
}

std::uint64_t NbdDevice::doubts() {
  const std::lock_guard lock(mutex_);
  return doubts_;
}

// Holes.

Result<DeviceRegion> NbdDevice::region_at(std::uint64_t offset) {
  if (!about_.tells_holes) return DeviceRegion{false, info_.bytes};
  if (offset < regions_begin_) regions_.clear();
  drop_regions_before(offset);
  if (regions_.empty() && !learn_regions(offset))
    return DeviceRegion{false, std::min(info_.bytes, offset + status_bytes_wanted)};
  const bool soon = regions_end_ - offset <= status_bytes_wanted / 2;
  if (soon && regions_end_ < info_.bytes && question_ == nullptr) ask_for_status(regions_end_);
  constexpr std::uint32_t reads_as_zeroes = 2;  // NBD_STATE_ZERO
  const auto is_hole = [](const NbdExtent& extent) { return (extent.flags & reads_as_zeroes) != 0; };
  std::uint64_t end = regions_begin_;
  for (const auto& extent : regions_) {
    if (is_hole(extent) != is_hole(regions_.front())) break;
    end += extent.bytes;
  }
  return DeviceRegion{is_hole(regions_.front()), std::min(end, info_.bytes)};
}

void NbdDevice::forget_regions() {
  regions_.clear();
  if (question_ != nullptr) question_->stale = true;
}

void NbdDevice::drop_regions_before(std::uint64_t offset) {
  while (!regions_.empty() && regions_begin_ + regions_.front().bytes <= offset) {
    regions_begin_ += regions_.front().bytes;
    regions_.pop_front();
  }
}

void NbdDevice::ask_for_status(std::uint64_t offset) {
  question_ = std::make_unique<Question>();
  NbdPiece& piece = question_->piece;
  piece.command = NbdCommand::block_status;
  piece.offset = offset;
  piece.bytes = std::min(status_bytes_wanted, info_.bytes - offset);
  piece.owner = question_.get();
  quietest_channel().submit(piece);
}

bool NbdDevice::answered(Question& question) {
  const Nanoseconds give_up = system_clock().now() + (question.late ? Nanoseconds(0) : status_patience);
  const auto left = [give_up] { return std::max(Nanoseconds(0), give_up - system_clock().now()); };
  std::unique_lock lock(question.mutex);
  while (!question.done && question.piece.channel->driven_by_queue()) {
    lock.unlock();
    question.piece.channel->drive(std::min<Nanoseconds>(left(), std::chrono::milliseconds(10)));
    look_at_connections();  // a server may have to get rid of other replies before it answers
    lock.lock();
    if (left().count() == 0) break;
  }
  question.late = !question.answered.wait_for(lock, left(), [&] { return question.done; });
  return !question.late;
}

/// By the question under way if it is about this offset, or by another one when it is answered: a server that
/// takes its time over one is not asked a second meanwhile. False: nobody knows.
bool NbdDevice::learn_regions(std::uint64_t offset) {
  for (bool asked = false; !asked;) {
    asked = question_ == nullptr;
    if (asked) ask_for_status(offset);
    if (!answered(*question_)) return false;
    const auto question = std::exchange(question_, nullptr);
    const NbdPiece& piece = question->piece;
    if (question->stale || offset < piece.offset || piece.error != 0) continue;
    regions_.assign(piece.extents.begin(), piece.extents.end());
    regions_begin_ = regions_end_ = piece.offset;
    for (const auto& extent : regions_) regions_end_ += extent.bytes;
    drop_regions_before(offset);
    if (!regions_.empty()) return true;
  }
  return false;
}

Error refused(const NbdAddress& address, const std::string& why) {
  return make_error(ErrorCode::refused, "open for writing", address.uri, why);
}

}  // namespace

DeviceInfo nbd_device_info(const NbdAddress& address, const NbdExport& about) {
  DeviceInfo info;
  info.uri = address.uri;
  if (const auto uri = parse_nbd_uri(address.uri)) info.identity = nbd_identity(*uri);
  info.kind = DeviceKind::nbd;
  info.bytes = about.bytes;
  info.logical_block_bytes = std::uint32_t(std::max<std::uint64_t>(512, about.block_bytes_min));
  info.zero_run_bytes_min = std::max(zero_run_bytes_min, about.block_bytes_min);
  info.io_bytes_best = is_local(address) ? local_io_bytes : 0;
  info.in_flight_bytes_best = is_local(address) ? local_in_flight_bytes : link_in_flight_bytes;
  return info;
}

Result<std::unique_ptr<Device>> open_nbd_device(FileQueue& queue, const NbdAddress& address,
                                                const NbdDeviceOptions& options) {
  const Nanoseconds give_up = system_clock().now() + options.patience;
  auto connection = NbdConnection::connect(address, options.connect_timeout);
  while (!connection && connection.error().code != ErrorCode::invalid_argument &&
         system_clock().now() < give_up) {
    system_clock().sleep_for(std::chrono::milliseconds(100));
    connection = NbdConnection::connect(address, options.connect_timeout);
  }
  if (!connection) return fail(connection.error());
  const NbdExport about = connection->about();
  if (options.role == DeviceRole::target) {
    if (about.read_only) return fail(refused(address, "the server gives it for reading only"));
    if (!about.can_flush && !about.can_fua && !options.unsafe)
      return fail(refused(address, "the server cannot flush: nobody can tell what it has kept"));
  }
  auto device = std::make_unique<NbdDevice>(queue, nbd_device_info(address, about), about, options);
  device->open_channels(std::move(*connection), address);
  return device;
}

}  // namespace blockferry
