// SPDX-License-Identifier: Apache-2.0
#include "daemon/api_socket.h"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include <fcntl.h>
#include <grp.h>
#include <netdb.h>
#include <netinet/in.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

namespace blockferry {
namespace {

constexpr int backlog = 128;
constexpr int socket_flags = SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK;

Error socket_error(const char* operation, const std::string& where) {
  return error_from_errno(errno, operation, where);
}

Result<sockaddr_un> unix_address(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.empty() || path.size() >= sizeof address.sun_path)
    return fail(
        make_error(ErrorCode::invalid_argument, "listen on", path,
                   "a socket's path has 1 to " + std::to_string(sizeof address.sun_path - 1) + " bytes"));
  std::memcpy(address.sun_path, path.data(), path.size());
  return address;
}

std::string directory_of(const std::string& path) {
  const auto slash = path.rfind('/');
  if (slash == std::string::npos) return ".";
  return slash == 0 ? "/" : path.substr(0, slash);
}

/// Two daemons that start at once on one path must not each take the other's fresh socket for a stale one:
/// the directory is locked from the look until listen(). The lock is held for moments, hence the bounded
/// wait.
Result<FileDescriptor> lock_directory(const std::string& path) {
  const auto directory = directory_of(path);
  FileDescriptor fd(::open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!fd.valid()) {
    if (errno == ENOENT)
      return fail(make_error(ErrorCode::not_found, "listen on", path,
                             "create the directory " + directory + " first"));
    return fail(socket_error("open the socket's directory", directory));
  }
  for (int attempt = 0; attempt < 200; ++attempt) {
    if (::flock(fd.get(), LOCK_EX | LOCK_NB) == 0) return fd;
    if (errno != EWOULDBLOCK && errno != EINTR) return fail(socket_error("lock", directory));
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  return fail(make_error(ErrorCode::busy, "lock", directory, "another program keeps it locked"));
}

/// Removes a socket file that nobody listens on any more.
Result<void> remove_stale(const std::string& path, const sockaddr_un& address) {
  struct stat info {};
  if (::lstat(path.c_str(), &info) != 0) {
    if (errno == ENOENT) return {};
    return fail(socket_error("look at", path));
  }
  if (!S_ISSOCK(info.st_mode))
    return fail(make_error(ErrorCode::invalid_argument, "listen on", path,
                           "a file that is no socket stands there; choose another path or remove it"));
  const FileDescriptor probe(::socket(AF_UNIX, socket_flags, 0));
  if (!probe.valid()) return fail(socket_error("make a socket for", path));
  const bool answered =
      ::connect(probe.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0;
  if (answered || errno == EAGAIN)
    return fail(make_error(ErrorCode::busy, "listen on", path,
                           "another ferryd answers there; stop it or choose another socket"));
  if (errno != ECONNREFUSED && errno != ENOENT) return fail(socket_error("try to connect to", path));
  if (::unlink(path.c_str()) != 0 && errno != ENOENT)
    return fail(socket_error("remove the stale socket", path));
  return {};
}

Result<void> open_to_group(const std::string& path, gid_t group) {
  if (::chown(path.c_str(), static_cast<uid_t>(-1), group) != 0)
    return fail(socket_error("give to the group", path));
  if (::chmod(path.c_str(), 0660) != 0) return fail(socket_error("set the mode of", path));
  return {};
}

struct HostAndPort {
  std::string host, port;
};

std::optional<HostAndPort> split_address(const std::string& address) {
  const auto colon = address.rfind(':');
  if (colon == std::string::npos || colon == 0 || colon + 1 == address.size()) return std::nullopt;
  HostAndPort parts{address.substr(0, colon), address.substr(colon + 1)};
  const bool bracketed = parts.host.front() == '[' && parts.host.back() == ']' && parts.host.size() > 2;
  if (bracketed)
    parts.host = parts.host.substr(1, parts.host.size() - 2);
  else if (parts.host.find(':') != std::string::npos)
    return std::nullopt;
  return parts;
}

}  // namespace

void ListeningSocket::remove_file() {
  struct stat info {};
  if (path_.empty() || ::lstat(path_.c_str(), &info) != 0) return;
  if (info.st_dev == device_ && info.st_ino == inode_) ::unlink(path_.c_str());
  path_.clear();
}

Result<ListeningSocket> listen_on_path(const std::string& path, std::optional<gid_t> group) {
  const auto address = unix_address(path);
  if (!address) return fail(address.error());
  const auto lock = lock_directory(path);
  if (!lock) return fail(lock.error());
  if (auto removed = remove_stale(path, *address); !removed) return fail(removed.error());

  FileDescriptor fd(::socket(AF_UNIX, socket_flags, 0));
  if (!fd.valid()) return fail(socket_error("make a socket for", path));
  // The file takes the mode that the socket has when bound: it is never open to others, not even for a
  // moment.
  if (::fchmod(fd.get(), 0600) != 0) return fail(socket_error("set the mode of", path));
  if (::bind(fd.get(), reinterpret_cast<const sockaddr*>(&*address), sizeof *address) != 0)
    return fail(socket_error("bind", path));
  struct stat info {};
  if (::lstat(path.c_str(), &info) != 0) return fail(socket_error("look at", path));
  ListeningSocket made(std::move(fd), path, info.st_dev, info.st_ino);
  const auto opened = group ? open_to_group(path, *group) : Result<void>();
  if (opened && ::listen(made.get(), backlog) == 0) return made;
  Error error = opened ? socket_error("listen on", path) : opened.error();
  made.remove_file();
  return fail(std::move(error));
}

Result<ListeningSocket> take_over_socket(int fd) {
  ListeningSocket taken(FileDescriptor(fd), "", 0, 0);
  int domain = 0, listening = 0;
  socklen_t size = sizeof(int);
  const std::string where = "descriptor " + std::to_string(fd);
  if (::getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &size) != 0 ||
      ::getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &listening, &size) != 0)
    return fail(socket_error("take over the passed socket", where));
  if (domain != AF_UNIX || listening == 0)
    return fail(make_error(ErrorCode::invalid_argument, "take over the passed socket", where,
                           "it must be a listening UNIX stream socket"));
  const int flags = ::fcntl(fd, F_GETFL);
  if (flags < 0 || ::fcntl(fd, F_SETFL, flags | O_NONBLOCK) != 0 || ::fcntl(fd, F_SETFD, FD_CLOEXEC) != 0)
    return fail(socket_error("take over the passed socket", where));
  return taken;
}

Result<ListeningSocket> listen_on_address(const std::string& address) {
  const auto parts = split_address(address);
  const auto wrong = [&](const char* why) {
    return fail(make_error(ErrorCode::invalid_argument, "listen on", address, why));
  };
  if (!parts) return wrong("ADDR:PORT or [ADDR]:PORT is expected");
  // getaddrinfo() would take 65536 for 0.
  const auto& port = parts->port;
  if (port.size() > 5 || port.find_first_not_of("0123456789") != std::string::npos ||
      std::stoul(port) > 65535)
    return wrong("the port must be a number up to 65535");
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  // Numbers only: a resolver may block, and a name may lead elsewhere tomorrow.
  hints.ai_flags = AI_NUMERICHOST | AI_NUMERICSERV | AI_PASSIVE;
  addrinfo* found = nullptr;
  const std::string host = parts->host == "localhost" ? "127.0.0.1" : parts->host;
  if (::getaddrinfo(host.c_str(), port.c_str(), &hints, &found) != 0)
    return wrong("the address must be a number, as in 127.0.0.1:9753");
  const std::unique_ptr<addrinfo, decltype(&::freeaddrinfo)> keeper(found, ::freeaddrinfo);
  FileDescriptor fd(::socket(found->ai_family, socket_flags, 0));
  if (!fd.valid()) return fail(socket_error("make a socket for", address));
  const int on = 1;
  ::setsockopt(fd.get(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
  if (::bind(fd.get(), found->ai_addr, found->ai_addrlen) != 0 || ::listen(fd.get(), backlog) != 0) {
    if (errno == EADDRINUSE)
      return fail(make_error(ErrorCode::busy, "listen on", address,
                             "another program listens there; choose another --metrics-listen, or none"));
    return fail(socket_error("listen on", address));
  }
  return ListeningSocket(std::move(fd), "", 0, 0);
}

std::string bound_address(int fd) {
  sockaddr_storage storage{};
  socklen_t size = sizeof storage;
  char host[NI_MAXHOST], port[NI_MAXSERV];
  if (::getsockname(fd, reinterpret_cast<sockaddr*>(&storage), &size) != 0 ||
      ::getnameinfo(reinterpret_cast<sockaddr*>(&storage), size, host, sizeof host, port, sizeof port,
                    NI_NUMERICHOST | NI_NUMERICSERV) != 0)
    return "";
  const std::string shown = storage.ss_family == AF_INET6 ? "[" + std::string(host) + "]" : std::string(host);
  return shown + ":" + port;
}

std::optional<gid_t> group_id(const std::string& name) {
  std::vector<char> buffer(64 << 10);
  group entry{};
  group* found = nullptr;
  if (name.empty() || ::getgrnam_r(name.c_str(), &entry, buffer.data(), buffer.size(), &found) != 0 ||
      found == nullptr)
    return std::nullopt;
  return entry.gr_gid;
}

bool peer_may_operate(int fd, std::optional<gid_t> group) {
  ucred credentials{};
  socklen_t size = sizeof credentials;
  if (::getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &credentials, &size) != 0) return false;
  if (credentials.uid == 0 || credentials.uid == ::geteuid()) return true;
  if (!group) return false;
  if (credentials.gid == *group) return true;
  // The kernel's record and not getgrouplist(), which may wait for a directory server.
  std::vector<gid_t> groups(65536 / sizeof(gid_t));
  size = static_cast<socklen_t>(groups.size() * sizeof(gid_t));
  if (::getsockopt(fd, SOL_SOCKET, SO_PEERGROUPS, groups.data(), &size) != 0) return false;
  groups.resize(size / sizeof(gid_t));
  return std::find(groups.begin(), groups.end(), *group) != groups.end();
}

}  // namespace blockferry
