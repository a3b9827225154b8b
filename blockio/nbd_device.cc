// SPDX-License-Identifier: Apache-2.0
#include "blockio/nbd_device.h"

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <map>

#include "blockio/base/check.h"
#include "blockio/nbd_channel.h"

namespace blockferry {

namespace {

// Larger ones leave the processor's cache on their way through the server's buffer and ours.
constexpr std::uint64_t piece_bytes_wanted = 256 * KiB;
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

/// An answer that the run's thread waits for, but not for ever.
struct Question {
  NbdPiece piece;
  std::mutex mutex;
  std::condition_variable answered;
  bool done = false;
};

class NbdDevice : public Device {
 public:
  NbdDevice(FileQueue& queue, DeviceInfo info, const NbdExport& about, const NbdDeviceOptions& options);
  ~NbdDevice() override;

  Result<void> open_channels(NbdConnection first, const NbdAddress& address);

  const DeviceInfo& info() const override { return info_; }
  void submit(IoRequest& request) override;
  Result<DeviceRegion> region_at(std::uint64_t offset) override;
  void forget_regions() override { regions_.clear(); }
  std::optional<std::string> change_stamp() override { return std::nullopt; }  // servers do not tell
  std::uint64_t doubts() override;

 private:
  void cut(Transfer& transfer);
  void add_piece(Transfer& transfer, NbdCommand command, ByteRange range, std::byte* data);
  void add_tail(Transfer& transfer, std::uint64_t whole);
  bool begin_flush(IoRequest& request);
  void send(Transfer& transfer);
  NbdChannel& quietest_channel();
  void piece_done(NbdPiece& piece);
  void transfer_done(Transfer& transfer);
  int outcome_of_flush(int error);
  void connection_lost(std::span<NbdPiece* const> in_flight);
  Result<std::vector<NbdExtent>> ask_for_status(ByteRange range);

  FileQueue& queue_;
  const DeviceInfo info_;
  const NbdExport about_;
  const NbdDeviceOptions options_;
  const std::uint64_t piece_bytes_;
  std::uint64_t regions_begin_ = 0;     ///< of the first of:
  std::deque<NbdExtent> regions_;       ///< as the server last told
  std::unique_ptr<Question> question_;  ///< the last one; its piece may still be with its channel

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

Result<void> NbdDevice::open_channels(NbdConnection first, const NbdAddress& address) {
  NbdChannelOptions options;
  options.address = address;
  options.bytes = about_.bytes;
  options.connect_timeout = options_.connect_timeout;
  options.reconnect_for = options_.reconnect_for;
  options.done = [this](NbdPiece& piece) { piece_done(piece); };
  options.lost = [this](std::span<NbdPiece* const> in_flight) { connection_lost(in_flight); };
  channels_.push_back(std::make_unique<NbdChannel>(std::move(first), options));
  const unsigned count = about_.can_multi_conn ? std::max(options_.connections_max, 1U) : 1;
  while (channels_.size() < count) {
    auto another = NbdConnection::connect(address, options_.connect_timeout);
    if (!another) break;  // a server with a limit: what there is will do
    channels_.push_back(std::make_unique<NbdChannel>(std::move(*another), options));
  }
  return {};
}

// Requests go out.

void NbdDevice::submit(IoRequest& request) {
  request.device = this;
  queue_.lend(request);
  auto transfer = std::make_unique<Transfer>();
  Transfer& taken = *transfer;
  taken.request = &request;
  if (request.operation == IoOperation::flush && !begin_flush(request)) return;
  if (request.operation == IoOperation::zero && !about_.can_zero) {
    return queue_.give_back(request, -EOPNOTSUPP);
  }
  cut(taken);
  if (taken.pieces.empty()) return queue_.give_back(request, 0);
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

/// Whether it has to go to the server.
bool NbdDevice::begin_flush(IoRequest& request) {
  const std::lock_guard lock(mutex_);
  if (std::exchange(lost_, false)) {
    queue_.give_back(request, -ESTALE);
    return false;
  }
  if (!about_.can_flush) {  // written through, or not to be had
    writes_kept_ = writes_under_way_ == 0 ? writes_begun_ : writes_kept_;
    queue_.give_back(request, 0);
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

// Answers come in, on the channels' threads.

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
  if (--transfer.left == 0) transfer_done(transfer);
}

void NbdDevice::transfer_done(Transfer& transfer) {
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
  queue_.give_back(request, error != 0 ? -error : carries ? std::int64_t(request.bytes) : 0);
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
  while (!regions_.empty() && regions_begin_ + regions_.front().bytes <= offset) {
    regions_begin_ += regions_.front().bytes;
    regions_.pop_front();
  }
  if (regions_.empty()) {
    auto extents = ask_for_status({offset, std::min(status_bytes_wanted, info_.bytes - offset)});
    if (!extents) return DeviceRegion{false, std::min(info_.bytes, offset + status_bytes_wanted)};
    regions_.assign(extents->begin(), extents->end());
    regions_begin_ = offset;
  }
  constexpr std::uint32_t reads_as_zeroes = 2;  // NBD_STATE_ZERO
  const auto is_hole = [](const NbdExtent& extent) { return (extent.flags & reads_as_zeroes) != 0; };
  std::uint64_t end = regions_begin_;
  for (const auto& extent : regions_) {
    if (is_hole(extent) != is_hole(regions_.front())) break;
    end += extent.bytes;
  }
  return DeviceRegion{is_hole(regions_.front()), std::min(end, info_.bytes)};
}

/// Waits for the answer. A server that takes its time over one is not asked a second question meanwhile.
Result<std::vector<NbdExtent>> NbdDevice::ask_for_status(ByteRange range) {
  const auto late = [this] { return fail(error_from_errno(ETIMEDOUT, "read the holes of", info_.uri)); };
  if (question_ != nullptr) {
    const std::lock_guard lock(question_->mutex);
    if (!question_->done) return late();
  }
  question_ = std::make_unique<Question>();
  NbdPiece& piece = question_->piece;
  piece.command = NbdCommand::block_status;
  piece.offset = range.offset;
  piece.bytes = range.bytes;
  piece.owner = question_.get();
  quietest_channel().submit(piece);
  std::unique_lock lock(question_->mutex);
  if (!question_->answered.wait_for(lock, status_patience, [&] { return question_->done; })) return late();
  if (piece.error != 0) return fail(error_from_errno(piece.error, "read the holes of", info_.uri));
  if (piece.extents.empty()) return late();
  return std::move(piece.extents);
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
  if (auto done = device->open_channels(std::move(*connection), address); !done) return fail(done.error());
  return device;
}

}  // namespace blockferry
