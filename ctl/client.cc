// SPDX-License-Identifier: Apache-2.0
#include "ctl/client.h"

#include <optional>

#include <boost/asio/io_context.hpp>
#include <boost/asio/local/stream_protocol.hpp>
#include <boost/beast/core.hpp>
#include <boost/beast/http.hpp>
#include <nlohmann/json.hpp>

#include "daemon/messages/messages.h"

namespace blockferry {

namespace {

namespace asio = boost::asio;
namespace beast = boost::beast;
namespace http = beast::http;
using Stream = beast::basic_stream<asio::local::stream_protocol>;

constexpr auto connect_timeout = std::chrono::seconds(5);
constexpr auto answer_timeout = std::chrono::seconds(120);
constexpr std::uint64_t answer_bytes_max = 256 * 1024 * 1024;  // a long list or a fine map

Error unreachable(const std::string& socket, const boost::system::error_code& why) {
  std::string hint =
      why.message() + "; is ferryd running? `systemctl start ferryd`, or name its socket with --socket";
  if (why.value() == EACCES || why.value() == EPERM) {
    hint = why.message() + "; only root and members of the group blockferry may operate ferryd";
  }
  return make_error(ErrorCode::unreachable, "reach ferryd at", socket, hint);
}

}  // namespace

struct Client::Connection {
  asio::io_context context;
  Stream stream{context};
  beast::flat_buffer buffer;

  /// Runs one asynchronous operation to its end; the stream's timeout bounds it.
  template <typename Start>
  boost::system::error_code finish(Start start) {
    boost::system::error_code outcome;
    start([&](boost::system::error_code error, auto...) { outcome = error; });
    context.restart();
    context.run();
    return outcome;
  }
};

Client::Client(std::string socket_path) : socket_path_(std::move(socket_path)) {}
Client::~Client() = default;

Result<nlohmann::json> Client::get(const std::string& path) {
  return request("GET", path, nullptr);
}

Result<nlohmann::json> Client::request(const char* method, const std::string& path,
                                       const nlohmann::json& body) {
  http::request<http::string_body> request(http::string_to_verb(method), std::string(api_prefix) + path, 11);
  request.set(http::field::host, "ferryd");
  if (!body.is_null()) {
    request.set(http::field::content_type, "application/json");
    request.body() = body.dump();
  }
  request.prepare_payload();

  boost::system::error_code error;
  if (!connection_) {
    auto connection = std::make_unique<Connection>();
    connection->stream.expires_after(connect_timeout);
    error = connection->finish([&](auto done) {
      connection->stream.async_connect(asio::local::stream_protocol::endpoint(socket_path_), done);
    });
    if (error) return fail(unreachable(socket_path_, error));
    connection_ = std::move(connection);
  }
  Connection& connection = *connection_;
  http::response_parser<http::string_body> parser;
  parser.body_limit(answer_bytes_max);
  connection.stream.expires_after(answer_timeout);
  error = connection.finish([&](auto done) { http::async_write(connection.stream, request, done); });
  // A refused caller may find the connection closed while still writing: the answer is there all the same.
  const auto read_error = connection.finish(
      [&](auto done) { http::async_read(connection.stream, connection.buffer, parser, done); });
  if (read_error) {
    connection_.reset();
    return fail(unreachable(socket_path_, error ? error : read_error));
  }
  const auto& response = parser.get();
  const unsigned status = response.result_int();
  if (!response.keep_alive()) connection_.reset();
  auto answer = nlohmann::json::parse(parser.get().body(), nullptr, false);
  if (answer.is_discarded()) {
    return fail(make_error(ErrorCode::internal, "understand", socket_path_,
                           "the answer is not JSON; is this ferryd?"));
  }
  if (status >= 200 && status < 300) return answer;
  Error failure = error_from_json(answer);
  if (status == 403) failure.code = ErrorCode::unreachable;
  return fail(failure);
}

std::string percent_encode(const std::string& text) {
  static constexpr char digits[] = "0123456789ABCDEF";
  std::string encoded;
  for (const char letter : text) {
    const auto byte = static_cast<unsigned char>(letter);
    if (std::isalnum(byte) != 0 || letter == '-' || letter == '.' || letter == '_' || letter == '~') {
      encoded += letter;
    } else {
      encoded += '%';
      encoded += digits[byte >> 4];
      encoded += digits[byte & 15];
    }
  }
  return encoded;
}

}  // namespace blockferry
