// SPDX-License-Identifier: Apache-2.0
#include "blockio/nbd_connection.h"

#include <algorithm>
#include <bit>
#include <cerrno>

#include <libnbd.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

namespace blockferry {

namespace {

/// libnbd's words without the names of its functions before them.
std::string words_of_libnbd() {
  const char* const text = ::nbd_get_error();
  std::string words = text != nullptr ? text : "";
  while (words.starts_with("nbd_") && words.find(": ") != std::string::npos)
    words.erase(0, words.find(": ") + 2);
  return words;
}

Error error_of_libnbd(const char* operation, const std::string& uri) {
  Error error = make_error(ErrorCode::io, operation, uri, words_of_libnbd());
  if (::nbd_get_errno() == ENOTSUP) error.code = ErrorCode::unsupported;
  return error;
}

int poll_for(pollfd* descriptors, nfds_t count, Nanoseconds timeout) {
  const auto ns = std::max<std::int64_t>(0, timeout.count());
  const timespec limit{ns / 1'000'000'000, ns % 1'000'000'000};
  return ::ppoll(descriptors, count, &limit, nullptr);
}

/// A peer that has gone without a word (its power, a cable) is noticed within a minute. Does nothing to
/// UNIX sockets, which end with their server.
void watch_for_silence(int fd) {
  const int on = 1, idle_s = 15, interval_s = 5, probes = 6, unsent_ms = 45000;
  ::setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on);
  ::setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle_s, sizeof idle_s);
  ::setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &interval_s, sizeof interval_s);
  ::setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &probes, sizeof probes);
  ::setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &unsent_ms, sizeof unsent_ms);
}

/// Local servers: with the usual 208 KiB the two ends wake each other up several times a piece. The kernel
/// takes what net.core.wmem_max allows. TCP finds its own size, unless it is told one.
void widen_local_socket(int fd) {
  int domain = 0;
  socklen_t length = sizeof domain;
  const int bytes = 1 * MiB;
  if (::getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &length) == 0 && domain == AF_UNIX)
    ::setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof bytes);
}

constexpr std::uint64_t status_bytes_max = 2 * GiB;  // the protocol counts in 32 bits

/// libnbd encrypts also where it cannot tell who the other end is: without certificates of its own, over a
/// UNIX socket, which has no name to compare, and where the directory holds none. That is no protection.
Result<void> check_tls(const std::string& uri, const NbdUri& parsed, const std::string& certificates,
                       const std::string& psk_file) {
  const auto refused = [&uri](const std::string& why) {
    return fail(make_error(ErrorCode::refused, "connect to", uri, why));
  };
  if (!parsed.tls || !psk_file.empty()) return {};
  if (certificates.empty()) {
    return refused(
        "TLS needs --tls-certificates, with the authority's ca-cert.pem, or --tls-psk-file: without them "
        "nobody "
        "can tell who answers");
  }
  if (!parsed.socket_path.empty())
    return refused(
        "over a UNIX socket a server's certificate proves nothing; use --tls-psk-file, or nbd+unix");
  if (::access((certificates + "/ca-cert.pem").c_str(), R_OK) != 0)
    return refused("TLS: there is no ca-cert.pem in " + certificates);
  return {};
}

/// Of a synchronous request.
struct Outcome {
  bool done = false;
  int error = 0;
  std::vector<NbdExtent> extents;
  const char* context = nullptr;
};

int on_completion(void* user, int* error) {
  auto& outcome = *static_cast<Outcome*>(user);
  outcome.done = true;
  outcome.error = *error;
  return 1;  // retired
}

int on_extents(void* user, const char* context, std::uint64_t, std::uint32_t* entries, std::size_t count,
               int*) {
  auto& outcome = *static_cast<Outcome*>(user);
  if (std::string_view(context) != outcome.context) return 0;
  for (std::size_t i = 0; i + 1 < count; i += 2) {
    if (entries[i] > 0) outcome.extents.push_back({entries[i], entries[i + 1]});
  }
  return 0;
}

}  // namespace

void NbdConnection::Closer::operator()(nbd_handle* handle) const {
  ::nbd_close(handle);
}

Result<NbdConnection> NbdConnection::connect(const NbdAddress& address, Nanoseconds timeout) {
  const auto uri = parse_nbd_uri(address.uri);
  if (!uri) return fail(uri.error());
  std::unique_ptr<nbd_handle, Closer> handle(::nbd_create());
  if (!handle) return fail(error_of_libnbd("connect to", address.uri));
  nbd_handle* const h = handle.get();
  const std::string& certificates =
      uri->tls_certificates.empty() ? address.tls_certificates : uri->tls_certificates;
  const std::string& psk_file = uri->tls_psk_file.empty() ? address.tls_psk_file : uri->tls_psk_file;
  if (auto done = check_tls(address.uri, *uri, certificates, psk_file); !done) return fail(done.error());
  // The files are named by whoever may read and write every volume anyway.
  bool well = ::nbd_set_uri_allow_local_file(h, true) == 0 && ::nbd_set_pread_initialize(h, false) == 0 &&
              // A volume's end need not be aligned; the server may judge that.
              ::nbd_set_strict_mode(h, LIBNBD_STRICT_MASK & ~LIBNBD_STRICT_ALIGN) == 0;
  if (uri->tls && !psk_file.empty()) {
    well = well && ::nbd_set_tls_psk_file(h, psk_file.c_str()) == 0;
  } else if (uri->tls && !certificates.empty()) {
    well = well && ::nbd_set_tls_certificates(h, certificates.c_str()) == 0;
  }
  for (const auto& context : address.contexts) well = well && ::nbd_add_meta_context(h, context.c_str()) == 0;
  NbdConnection connection(std::move(handle), address.uri);
  if (!well || ::nbd_aio_connect_uri(h, address.uri.c_str()) != 0)
    return fail(error_of_libnbd("connect to", address.uri));
  if (auto done = connection.connect_within(timeout); !done) return fail(done.error());
  connection.learn();
  if (uri->tls && !connection.about_.tls)
    return fail(make_error(ErrorCode::io, "connect to", address.uri, "the connection is not encrypted"));
  return connection;
}

Result<void> NbdConnection::connect_within(Nanoseconds timeout) {
  nbd_handle* const h = handle_.get();
  const Nanoseconds give_up = system_clock().now() + timeout;
  while (::nbd_aio_is_ready(h) == 0) {
    if (!alive()) return fail(error_of_libnbd("connect to", uri_));
    const Nanoseconds left = give_up - system_clock().now();
    if (left.count() <= 0) {
      return fail(make_error(ErrorCode::io, "connect to", uri_,
                             "no answer within " + format_duration(double(timeout.count()) * 1e-9)));
    }
    poll(-1, left);
  }
  watch_for_silence(::nbd_aio_get_fd(h));
  widen_local_socket(::nbd_aio_get_fd(h));
  return {};
}

bool NbdConnection::alive() const {
  return handle_ != nullptr && ::nbd_aio_is_dead(handle_.get()) == 0 &&
         ::nbd_aio_is_closed(handle_.get()) == 0;
}

bool NbdConnection::poll(int wake_fd, Nanoseconds timeout) {
  pollfd descriptors[2] = {{fd(), events_wanted(), 0}, {wake_fd, POLLIN, 0}};
  if (poll_for(descriptors, wake_fd >= 0 ? 2 : 1, timeout) <= 0) return false;
  move_on(descriptors[0].revents);
  return true;
}

int NbdConnection::fd() const {
  return ::nbd_aio_get_fd(handle_.get());
}

short NbdConnection::events_wanted() const {
  const unsigned direction = ::nbd_aio_get_direction(handle_.get());
  return short(((direction & LIBNBD_AIO_DIRECTION_READ) != 0 ? POLLIN : 0) |
               ((direction & LIBNBD_AIO_DIRECTION_WRITE) != 0 ? POLLOUT : 0));
}

void NbdConnection::move_on(short happened) {
  nbd_handle* const h = handle_.get();
  const unsigned direction = ::nbd_aio_get_direction(h);
  // Errors and hang-ups show to whoever reads, or else writes. A failure leaves the handle dead.
  const bool trouble = (happened & (POLLERR | POLLHUP | POLLNVAL)) != 0;
  if ((direction & LIBNBD_AIO_DIRECTION_READ) != 0 && ((happened & POLLIN) != 0 || trouble)) {
    ::nbd_aio_notify_read(h);
  } else if ((direction & LIBNBD_AIO_DIRECTION_WRITE) != 0 && ((happened & POLLOUT) != 0 || trouble)) {
    ::nbd_aio_notify_write(h);
  }
}

bool NbdConnection::has_context(const std::string& context) const {
  return ::nbd_can_meta_context(handle_.get(), context.c_str()) == 1;
}

void NbdConnection::learn() {
  nbd_handle* const h = handle_.get();
  const auto size = ::nbd_get_size(h);
  about_.bytes = size > 0 ? std::uint64_t(size) : 0;
  about_.read_only = ::nbd_is_read_only(h) == 1;
  about_.can_flush = ::nbd_can_flush(h) == 1;
  about_.can_fua = ::nbd_can_fua(h) == 1;
  about_.can_zero = ::nbd_can_zero(h) == 1;
  about_.can_fast_zero = ::nbd_can_fast_zero(h) == 1;
  about_.can_trim = ::nbd_can_trim(h) == 1;
  about_.can_multi_conn = ::nbd_can_multi_conn(h) == 1;
  about_.tells_holes = has_context(allocation_context);
  about_.tls = ::nbd_get_tls_negotiated(h) == 1;
  const auto block_size = [h](int kind, std::uint64_t otherwise) {
    const auto bytes = ::nbd_get_block_size(h, kind);
    return bytes > 0 ? std::uint64_t(bytes) : otherwise;
  };
  about_.block_bytes_min = std::bit_ceil(block_size(LIBNBD_SIZE_MINIMUM, about_.block_bytes_min));
  about_.block_bytes_preferred = std::max(
      about_.block_bytes_min, std::bit_ceil(block_size(LIBNBD_SIZE_PREFERRED, about_.block_bytes_preferred)));
  about_.block_bytes_max =
      std::max(about_.block_bytes_min,
               std::min(block_size(LIBNBD_SIZE_MAXIMUM, about_.block_bytes_max), about_.block_bytes_max));
}

// One request at a time.

namespace {

/// Drives the handle until the request is done.
Result<void> finish(NbdConnection& connection, std::int64_t cookie, const Outcome& outcome,
                    const char* operation, const std::string& uri, std::uint64_t offset,
                    Nanoseconds timeout) {
  if (cookie < 0) return fail(error_of_libnbd(operation, uri));
  const Nanoseconds give_up = system_clock().now() + timeout;
  while (!outcome.done) {
    const Nanoseconds left = give_up - system_clock().now();
    if (left.count() <= 0 || !connection.alive()) break;
    connection.poll(-1, left);
  }
  if (outcome.done && outcome.error == 0) return {};
  return fail(error_from_errno(outcome.done ? outcome.error : ETIMEDOUT, operation, uri, offset));
}

}  // namespace

Result<void> NbdConnection::read(std::span<std::byte> data, std::uint64_t offset, Nanoseconds timeout) {
  if (!alive()) return fail(error_from_errno(ENOTCONN, "read", uri_, offset));
  Outcome outcome;
  const nbd_completion_callback completion = {on_completion, &outcome, nullptr};
  const auto cookie = ::nbd_aio_pread(handle_.get(), data.data(), data.size(), offset, completion, 0);
  auto done = finish(*this, cookie, outcome, "read", uri_, offset, timeout);
  if (!outcome.done) handle_.reset();  // the request must not outlive its memory
  return done;
}

Result<std::vector<NbdExtent>> NbdConnection::block_status(const std::string& context, ByteRange range,
                                                           Nanoseconds timeout) {
  constexpr const char* operation = "read the block status of";
  if (!alive()) return fail(error_from_errno(ENOTCONN, operation, uri_, range.offset));
  Outcome outcome;
  outcome.context = context.c_str();
  const nbd_extent_callback extents = {on_extents, &outcome, nullptr};
  const nbd_completion_callback completion = {on_completion, &outcome, nullptr};
  const auto bytes = std::min(range.bytes, status_bytes_max);
  const auto cookie = ::nbd_aio_block_status(handle_.get(), bytes, range.offset, extents, completion, 0);
  auto done = finish(*this, cookie, outcome, operation, uri_, range.offset, timeout);
  if (!outcome.done) handle_.reset();
  if (!done) return fail(done.error());
  if (outcome.extents.empty())
    return fail(make_error(ErrorCode::unsupported, operation, uri_, "the server says nothing of " + context));
  return std::move(outcome.extents);
}

}  // namespace blockferry
