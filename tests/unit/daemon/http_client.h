// SPDX-License-Identifier: Apache-2.0
// A client of plain sockets that can also say what no honest client says.
#pragma once

#include <cerrno>
#include <cstring>
#include <optional>
#include <string>
#include <string_view>

#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "blockio/base/file_descriptor.h"

namespace blockferry {

struct HttpAnswer {
  int status = 0;  ///< 0: the connection ended without an answer
  std::string header, body;

  std::string field(const std::string& name) const {
    const auto at = header.find("\r\n" + name + ": ");
    if (at == std::string::npos) return "";
    const auto from = at + name.size() + 4;
    return header.substr(from, header.find("\r\n", from) - from);
  }
};

class HttpClient {
 public:
  static HttpClient unix_socket(const std::string& path) {
    HttpClient client(AF_UNIX);
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::strncpy(address.sun_path, path.c_str(), sizeof address.sun_path - 1);
    client.connect_to(reinterpret_cast<const sockaddr*>(&address), sizeof address);
    return client;
  }
  static HttpClient tcp(const std::string& address_and_port) {
    HttpClient client(AF_INET);
    const auto colon = address_and_port.rfind(':');
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(static_cast<std::uint16_t>(std::stoi(address_and_port.substr(colon + 1))));
    ::inet_pton(AF_INET, address_and_port.substr(0, colon).c_str(), &address.sin_addr);
    client.connect_to(reinterpret_cast<const sockaddr*>(&address), sizeof address);
    return client;
  }

  bool connected() const { return connected_; }
  int fd() const { return fd_.get(); }
  void close() { fd_.reset(); }

  bool send(std::string_view bytes) {
    while (!bytes.empty()) {
      const ssize_t sent = ::send(fd_.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL);
      if (sent <= 0) return false;
      bytes.remove_prefix(static_cast<std::size_t>(sent));
    }
    return true;
  }

  HttpAnswer ask(const std::string& method, const std::string& target, const std::string& body = "") {
    send(request_text(method, target, body));
    return receive();
  }

  static std::string request_text(const std::string& method, const std::string& target,
                                  const std::string& body = "") {
    return method + " " + target +
           " HTTP/1.1\r\nHost: localhost\r\nContent-Length: " + std::to_string(body.size()) + "\r\n\r\n" +
           body;
  }

  HttpAnswer receive() {
    HttpAnswer answer;
    std::size_t header_end;
    while ((header_end = received_.find("\r\n\r\n")) == std::string::npos)
      if (!receive_more()) return answer;
    answer.header = received_.substr(0, header_end + 2);
    answer.status = std::stoi(answer.header.substr(9, 3));
    received_.erase(0, header_end + 4);
    const auto length = answer.field("Content-Length");
    const std::size_t wanted = length.empty() ? 0 : std::stoul(length);
    while (received_.size() < wanted)
      if (!receive_more()) return {};
    answer.body = received_.substr(0, wanted);
    received_.erase(0, wanted);
    return answer;
  }

  /// The other side closed, with nothing more to say.
  bool ended() {
    while (receive_more()) continue;
    return closed_ && received_.empty();
  }

 private:
  explicit HttpClient(int domain) : fd_(::socket(domain, SOCK_STREAM | SOCK_CLOEXEC, 0)) {}
  void connect_to(const sockaddr* address, socklen_t size) {
    connected_ = ::connect(fd_.get(), address, size) == 0;
  }
  bool receive_more() {
    pollfd entry{fd_.get(), POLLIN, 0};
    if (::poll(&entry, 1, 30000) <= 0) return false;
    char buffer[65536];
    const ssize_t bytes = ::recv(fd_.get(), buffer, sizeof buffer, 0);
    closed_ = bytes == 0 || (bytes < 0 && errno == ECONNRESET);
    if (bytes <= 0) return false;
    received_.append(buffer, static_cast<std::size_t>(bytes));
    return true;
  }

  FileDescriptor fd_;
  bool connected_ = false, closed_ = false;
  std::string received_;
};

}  // namespace blockferry
