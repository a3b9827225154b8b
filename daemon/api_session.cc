// SPDX-License-Identifier: Apache-2.0
// The only place that knows Boost.Beast. Everything here runs on the I/O thread but the bodies of worker
// tasks.
#include "daemon/api_session.h"

#include <array>
#include <utility>
#include <vector>

#include <boost/asio/buffer.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/write.hpp>
#include <boost/beast/core/flat_buffer.hpp>
#include <boost/beast/http.hpp>
#include <poll.h>

namespace blockferry {

namespace asio = boost::asio;
namespace http = boost::beast::http;
using boost::system::error_code;
using SteadyClock = std::chrono::steady_clock;

namespace {

constexpr std::uint32_t header_bytes_max = 16 << 10;
constexpr std::size_t buffer_bytes_max = 128 << 10;
constexpr std::size_t linger_bytes_max = 4 << 20;
constexpr auto write_timeout = std::chrono::seconds(30);
constexpr auto linger_timeout = std::chrono::seconds(1);
constexpr auto refused_timeout = std::chrono::seconds(2);
// Waits are looked after more and more seldom: the answer is late by a hundredth of the wait.
constexpr auto settle_poll_min = std::chrono::microseconds(500),
               settle_poll_max = std::chrono::microseconds(10000);
constexpr int settle_poll_share = 100;

ApiResponse response_to_bad_request(const error_code& error, bool timed_out) {
  const char* operation = "read the request";
  const auto answer = [&](unsigned status, std::string hint) {
    return error_response(status, ErrorCode::invalid_argument, operation, std::move(hint));
  };
  if (timed_out) return answer(408, "it did not end in time");
  if (error == http::error::body_limit)
    return answer(413, "its body is longer than " + std::to_string(request_bytes_max) + " bytes");
  if (error == http::error::header_limit || error == http::error::buffer_overflow)
    return answer(431, "its header is longer than " + std::to_string(header_bytes_max) + " bytes");
  return answer(400, "it is not HTTP/1.1: " + error.message());
}

/// The peer closed its end for good; one that only ended its sending still reads.
bool peer_gone(int fd) {
  pollfd entry{fd, 0, 0};
  return ::poll(&entry, 1, 0) > 0 && (entry.revents & (POLLHUP | POLLERR)) != 0;
}

}  // namespace

class ApiSession : public std::enable_shared_from_this<ApiSession> {
 public:
  ApiSession(ApiShared& shared, ApiStreamSocket socket, ApiSessionKind kind,
             std::optional<ApiResponse> refusal)
      : shared_(shared),
        kind_(kind),
        refusal_(std::move(refusal)),
        socket_(std::move(socket)),
        timer_(shared.io) {
    shared_.add(this, kind_);
  }
  ~ApiSession() { shared_.remove(this); }
  ApiSession(const ApiSession&) = delete;
  ApiSession& operator=(const ApiSession&) = delete;

  void wait_for_request();
  void close();

 private:
  enum class Stage : std::uint8_t { idle, reading, answering, writing, lingering };

  void arm(Stage stage, SteadyClock::duration timeout);
  void on_timeout();
  void read_header();
  void on_header(const error_code& error);
  void read_body();
  void on_bad_request(const error_code& error);
  void route();
  bool settled();
  void poll_settled();
  void answer();
  void answer_on(WorkerPool& pool);
  void respond(ApiResponse answer);
  void on_written(const error_code& error);
  void linger(std::size_t bytes_read);

  ApiShared& shared_;
  const ApiSessionKind kind_;
  std::optional<ApiResponse> refusal_;
  ApiStreamSocket socket_;
  asio::steady_timer timer_;
  Stage stage_ = Stage::idle;
  bool timed_out_ = false;
  bool keep_alive_ = false;
  boost::beast::flat_buffer buffer_{buffer_bytes_max};
  std::optional<http::request_parser<http::string_body>> parser_;
  http::response<http::string_body> response_;
  ApiRequest request_;
  SteadyClock::time_point wait_since_;
  std::array<char, 4096> discarded_{};
};

void ApiSession::close() {
  error_code ignored;
  timer_.cancel();
  socket_.close(ignored);
}

/// Replaces the deadline before. A timeout that was about to be delivered sees the new expiry and does
/// nothing.
void ApiSession::arm(Stage stage, SteadyClock::duration timeout) {
  stage_ = stage;
  timer_.expires_after(timeout);
  timer_.async_wait([self = shared_from_this()](const error_code& error) {
    if (error || self->timer_.expiry() > SteadyClock::now()) return;
    self->on_timeout();
  });
}

void ApiSession::on_timeout() {
  if (stage_ != Stage::reading) return close();
  error_code ignored;
  timed_out_ = true;
  socket_.cancel(ignored);  // the read comes back, and is answered
}

void ApiSession::wait_for_request() {
  parser_.emplace();
  parser_->header_limit(header_bytes_max);
  parser_->body_limit(request_bytes_max);
  if (buffer_.size() > 0) return read_header();
  arm(Stage::idle, refusal_ ? refused_timeout : SteadyClock::duration(shared_.idle_timeout));
  socket_.async_wait(ApiStreamSocket::wait_read, [self = shared_from_this()](const error_code& error) {
    if (error || !self->socket_.is_open()) return self->close();
    self->read_header();
  });
}

void ApiSession::read_header() {
  arm(Stage::reading, refusal_ ? refused_timeout : SteadyClock::duration(shared_.request_timeout));
  http::async_read_header(
      socket_, buffer_, *parser_,
      [self = shared_from_this()](const error_code& error, std::size_t) { self->on_header(error); });
}

void ApiSession::on_header(const error_code& error) {
  if (error) return on_bad_request(error);
  if (refusal_) return respond(std::move(*refusal_));
  if (parser_->is_done()) return route();
  if (parser_->get()[http::field::expect] != "100-continue") return read_body();
  static constexpr std::string_view go_on = "HTTP/1.1 100 Continue\r\n\r\n";
  asio::async_write(socket_, asio::buffer(go_on),
                    [self = shared_from_this()](const error_code& write_error, std::size_t) {
                      if (write_error) return self->close();
                      self->read_body();
                    });
}

void ApiSession::read_body() {
  http::async_read(socket_, buffer_, *parser_,
                   [self = shared_from_this()](const error_code& error, std::size_t) {
                     if (error) return self->on_bad_request(error);
                     self->route();
                   });
}

void ApiSession::on_bad_request(const error_code& error) {
  keep_alive_ = false;
  if (!socket_.is_open()) return;
  // Nobody is there to read an answer, or nothing was asked.
  if (error == http::error::end_of_stream || error == asio::error::connection_reset) return close();
  respond(refusal_ ? std::move(*refusal_) : response_to_bad_request(error, timed_out_));
}

void ApiSession::route() {
  timer_.cancel();
  stage_ = Stage::answering;
  auto message = parser_->release();
  keep_alive_ = message.keep_alive() && !shared_.stopping;
  const auto method = message.method_string();
  const auto target = message.target();
  auto routed = route_request({method.data(), method.size()}, {target.data(), target.size()},
                              std::move(message.body()), kind_ == ApiSessionKind::metrics);
  if (!routed) return respond(std::move(routed.error()));
  request_ = std::move(*routed);
  if (request_.wait_ms == 0) return answer();
  wait_since_ = SteadyClock::now();
  poll_settled();
}

bool ApiSession::settled() {
  try {
    return shared_.control.run_settled(request_.run).value_or(true);
  } catch (...) {
    return true;  // the answer says what is wrong
  }
}

/// Waits without holding a thread: other requests go on meanwhile.
void ApiSession::poll_settled() {
  const SteadyClock::duration waited = SteadyClock::now() - wait_since_;
  if (settled() || waited >= std::chrono::milliseconds(request_.wait_ms) || shared_.stopping) return answer();
  timer_.expires_after(
      std::clamp<SteadyClock::duration>(waited / settle_poll_share, settle_poll_min, settle_poll_max));
  timer_.async_wait([self = shared_from_this()](const error_code& error) {
    if (error || peer_gone(self->socket_.native_handle())) return self->close();
    self->poll_settled();
  });
}

void ApiSession::answer() {
  switch (request_.pace()) {
    case ApiPace::here:
      return respond(answer_request(request_, shared_.control));
    case ApiPace::quick:
      return answer_on(shared_.quick);
    case ApiPace::slow:
      return answer_on(shared_.slow);
  }
}

void ApiSession::answer_on(WorkerPool& pool) {
  auto task = [shared = shared_.shared_from_this(), self = shared_from_this()]() mutable {
    auto answer = answer_request(self->request_, shared->control);
    // The session moves on with the answer, so that only the I/O thread touches it from here on. While it
    // lives in the I/O context it must not keep that context alive: `shared` stays behind.
    asio::post(shared->io, [session = std::move(self), answer = std::move(answer)]() mutable {
      session->respond(std::move(answer));
    });
  };
  if (pool.submit(std::move(task))) return;
  keep_alive_ = false;
  respond(error_response(503, ErrorCode::busy, "answer the request", "ferryd is stopping"));
}

void ApiSession::respond(ApiResponse answer) {
  if (!socket_.is_open()) return;
  if (shared_.stopping || refusal_) keep_alive_ = false;
  response_ = {};
  response_.version(11);
  response_.result(answer.status);
  response_.set(http::field::server, std::string("ferryd/") + blockferry_version());
  response_.set(http::field::content_type, answer.content_type);
  response_.set(http::field::cache_control, "no-store");
  if (!answer.allow.empty()) response_.set(http::field::allow, answer.allow);
  response_.keep_alive(keep_alive_);
  response_.body() = std::move(answer.body);
  response_.prepare_payload();
  arm(Stage::writing, write_timeout);
  http::async_write(socket_, response_, [self = shared_from_this()](const error_code& error, std::size_t) {
    self->on_written(error);
  });
}

void ApiSession::on_written(const error_code& error) {
  if (error || !socket_.is_open()) return close();
  response_ = {};
  if (keep_alive_) return wait_for_request();
  error_code ignored;
  socket_.shutdown(ApiStreamSocket::shutdown_send, ignored);
  arm(Stage::lingering, linger_timeout);
  linger(0);
}

/// Reads on for a moment: closing with unread input would reset the connection, and the answer be lost with
/// it.
void ApiSession::linger(std::size_t bytes_read) {
  if (bytes_read > linger_bytes_max) return close();
  socket_.async_read_some(asio::buffer(discarded_), [self = shared_from_this(), bytes_read](
                                                        const error_code& error, std::size_t bytes) {
    if (error || !self->socket_.is_open()) return self->close();
    self->linger(bytes_read + bytes);
  });
}

void ApiShared::add(ApiSession* session, ApiSessionKind kind) {
  const std::lock_guard lock(mutex_);
  sessions_.emplace(session, kind);
}

void ApiShared::remove(ApiSession* session) {
  const std::lock_guard lock(mutex_);
  sessions_.erase(session);
}

unsigned ApiShared::count(ApiSessionKind kind) const {
  const std::lock_guard lock(mutex_);
  unsigned count = 0;
  for (const auto& [session, its_kind] : sessions_) count += its_kind == kind ? 1 : 0;
  return count;
}

void ApiShared::close_all() {
  std::vector<std::shared_ptr<ApiSession>> open;
  {
    const std::lock_guard lock(mutex_);
    for (const auto& [session, kind] : sessions_)
      if (auto alive = session->weak_from_this().lock()) open.push_back(std::move(alive));
  }
  for (const auto& session : open) session->close();
}

void serve_connection(ApiShared& shared, ApiStreamSocket socket, ApiSessionKind kind,
                      std::optional<ApiResponse> refusal) {
  std::make_shared<ApiSession>(shared, std::move(socket), kind, std::move(refusal))->wait_for_request();
}

}  // namespace blockferry
