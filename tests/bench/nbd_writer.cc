// SPDX-License-Identifier: Apache-2.0
// nbd_writer URI: writes a whole NBD volume from memory, a MiB at a time and eight of them in flight, and
// flushes. Nothing is read and nothing computed: what the server takes by itself, and no copy can be faster
// than that.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include <libnbd.h>
#include <sys/socket.h>

namespace {

constexpr std::uint64_t piece_bytes = 1 << 20;
constexpr unsigned in_flight_max = 8;
constexpr int socket_bytes = 1 << 20;

void require(bool well) {
  if (well) return;
  std::fprintf(stderr, "nbd_writer: %s\n", ::nbd_get_error());
  std::exit(1);
}

struct Progress {
  unsigned in_flight = 0;
  bool failed = false;
};

int written(void* user, int* error) {
  auto& progress = *static_cast<Progress*>(user);
  --progress.in_flight;
  progress.failed |= *error != 0;
  return 1;  // retired
}

}  // namespace

int main(int count, char** words) {
  if (count != 2) {
    std::fprintf(stderr, "usage: nbd_writer URI\n");
    return 2;
  }
  nbd_handle* const h = ::nbd_create();
  require(h != nullptr && ::nbd_connect_uri(h, words[1]) == 0);
  ::setsockopt(::nbd_aio_get_fd(h), SOL_SOCKET, SO_SNDBUF, &socket_bytes, sizeof socket_bytes);
  std::vector<std::uint64_t> data(piece_bytes / sizeof(std::uint64_t));
  for (std::mt19937_64 random(1); auto& word : data) word = random();
  const auto size = std::uint64_t(::nbd_get_size(h));
  Progress progress;
  for (std::uint64_t at = 0; at < size || progress.in_flight > 0;) {
    while (at < size && progress.in_flight < in_flight_max) {
      const std::uint64_t bytes = std::min(piece_bytes, size - at);
      const nbd_completion_callback done = {written, &progress, nullptr};
      require(::nbd_aio_pwrite(h, data.data(), bytes, at, done, 0) >= 0);
      ++progress.in_flight;
      at += bytes;
    }
    require(::nbd_poll(h, -1) >= 0 && !progress.failed);
  }
  require(::nbd_flush(h, 0) == 0 && ::nbd_shutdown(h, 0) == 0);
  ::nbd_close(h);
}
