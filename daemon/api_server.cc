// SPDX-License-Identifier: Apache-2.0
#include "daemon/api_server.h"

#include <algorithm>
#include <chrono>
#include <optional>
#include <thread>
#include <utility>

#include <boost/asio/basic_socket_acceptor.hpp>
#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/steady_timer.hpp>
#include <pthread.h>

#include "daemon/api_session.h"
#include "daemon/api_socket.h"

namespace blockferry {

namespace asio = boost::asio;
using boost::system::error_code;

namespace {

using Acceptor = asio::basic_socket_acceptor<asio::generic::stream_protocol>;

constexpr unsigned metrics_connections_max = 64;
/// Connections that are only being told no.
constexpr unsigned refused_connections_max = 32;
constexpr auto accept_retry_interval = std::chrono::milliseconds(100);

ApiResponse not_permitted(const std::string& group) {
  return error_response(403, ErrorCode::unreachable, "use the control socket",
                        "only root or members of group " + group + " may");
}

ApiResponse too_many(unsigned limit) {
  return error_response(503, ErrorCode::busy, "accept the connection",
                        "there are " + std::to_string(limit) + " already; close some and try again");
}

}  // namespace

struct ApiServer::Parts : ApiShared {
  using ApiShared::ApiShared;

  /// One listening socket and its endless accepting.
  struct Listener {
    Listener(Parts& owner, int fd, int domain, ApiSessionKind session_kind)
        : parts(owner),
          acceptor(owner.io, asio::generic::stream_protocol(domain, 0), fd),
          retry(owner.io),
          kind(session_kind) {}
    Parts& parts;
    Acceptor acceptor;
    asio::steady_timer retry;
    const ApiSessionKind kind;

    void accept();
    void on_connection(ApiStreamSocket socket);
    void close();
  };

  ApiServerOptions options;
  std::optional<gid_t> group;
  ListeningSocket control_socket;  ///< its file; the descriptor is the listener's
  std::string metrics_address;
  std::optional<Listener> control_listener, metrics_listener;
  std::optional<asio::executor_work_guard<asio::io_context::executor_type>> work;
  std::thread io_thread;
  bool stopped = false, all_came_back = true;

  Result<void> open();
  void run_io();
};

void ApiServer::Parts::Listener::accept() {
  acceptor.async_accept([this](const error_code& error, ApiStreamSocket socket) {
    if (!acceptor.is_open()) return;
    if (!error) {
      on_connection(std::move(socket));
      return accept();
    }
    // Out of descriptors, mostly: trying again at once would only burn time.
    retry.expires_after(accept_retry_interval);
    retry.async_wait([this](const error_code& cancelled) {
      if (!cancelled && acceptor.is_open()) accept();
    });
  });
}

void ApiServer::Parts::Listener::on_connection(ApiStreamSocket socket) {
  const unsigned limit = kind == ApiSessionKind::metrics
                             ? std::min(metrics_connections_max, parts.options.connections_max)
                             : parts.options.connections_max;
  std::optional<ApiResponse> refusal;
  if (kind == ApiSessionKind::control && !peer_may_operate(socket.native_handle(), parts.group))
    refusal = not_permitted(parts.options.group);
  else if (parts.count(kind) >= limit)
    refusal = too_many(limit);
  if (!refusal) return serve_connection(parts, std::move(socket), kind, std::nullopt);
  if (parts.count(ApiSessionKind::refused) >= refused_connections_max) return;
  serve_connection(parts, std::move(socket), ApiSessionKind::refused, std::move(refusal));
}

void ApiServer::Parts::Listener::close() {
  error_code ignored;
  acceptor.close(ignored);
  retry.cancel();
}

Result<void> ApiServer::Parts::open() {
  idle_timeout = std::chrono::seconds(options.idle_timeout_seconds);
  request_timeout = std::chrono::seconds(options.request_timeout_seconds);
  group = group_id(options.group);
  auto made = options.socket_fd >= 0 ? take_over_socket(options.socket_fd)
                                     : listen_on_path(options.socket_path, group);
  if (!made) return fail(std::move(made.error()));
  control_socket = std::move(*made);
  if (options.metrics_listen != "none" && !options.metrics_listen.empty()) {
    auto metrics = listen_on_address(options.metrics_listen);
    if (!metrics) {
      control_socket.remove_file();
      return fail(std::move(metrics.error()));
    }
    metrics_address = bound_address(metrics->get());
    const int domain = metrics_address.front() == '[' ? AF_INET6 : AF_INET;
    metrics_listener.emplace(*this, metrics->release(), domain, ApiSessionKind::metrics);
  }
  control_listener.emplace(*this, control_socket.release(), AF_UNIX, ApiSessionKind::control);
  return {};
}

/// A handler that throws (memory ran out) loses its connection, no more.
void ApiServer::Parts::run_io() {
  for (;;) {
    try {
      io.run();
      return;
    } catch (...) {
      continue;
    }
  }
}

ApiServer::ApiServer(std::shared_ptr<Parts> parts) : parts_(std::move(parts)) {}

ApiServer::~ApiServer() {
  stop();
}

Result<std::unique_ptr<ApiServer>> ApiServer::create(const ApiServerOptions& options, Control& control) {
  auto parts = std::make_shared<Parts>(control);
  parts->options = options;
  if (auto opened = parts->open(); !opened) return fail(std::move(opened.error()));
  return std::unique_ptr<ApiServer>(new ApiServer(std::move(parts)));
}

void ApiServer::start() {
  Parts& parts = *parts_;
  parts.work.emplace(asio::make_work_guard(parts.io));
  parts.control_listener->accept();
  if (parts.metrics_listener) parts.metrics_listener->accept();
  parts.io_thread = std::thread([&parts] { parts.run_io(); });
  pthread_setname_np(parts.io_thread.native_handle(), "api-io");
}

bool ApiServer::stop() {
  Parts& parts = *parts_;
  if (parts.stopped) return parts.all_came_back;
  parts.stopped = true;
  const bool serving = parts.io_thread.joinable();
  const auto close_listeners = [&parts] {
    parts.stopping = true;
    parts.control_listener->close();
    if (parts.metrics_listener) parts.metrics_listener->close();
  };
  if (serving)
    asio::post(parts.io, close_listeners);
  else
    close_listeners();
  parts.control_socket.remove_file();

  // The I/O thread still runs: what the workers finish now is still answered.
  const auto deadline =
      std::chrono::steady_clock::now() + std::chrono::seconds(parts.options.stop_timeout_seconds);
  const auto left = [&] {
    return std::max(std::chrono::milliseconds(0), std::chrono::duration_cast<std::chrono::milliseconds>(
                                                      deadline - std::chrono::steady_clock::now()));
  };
  const bool quick_back = parts.quick.stop(left()), slow_back = parts.slow.stop(left());
  parts.all_came_back = quick_back && slow_back;
  if (serving) {
    asio::post(parts.io, [&parts] { parts.close_all(); });
    parts.work.reset();
    parts.io_thread.join();
  }
  return parts.all_came_back;
}

std::string ApiServer::metrics_address() const {
  return parts_->metrics_address;
}

}  // namespace blockferry
