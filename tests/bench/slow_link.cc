// SPDX-License-Identifier: Apache-2.0
// A long link between this network namespace and another: two TUN devices, and this process between them,
// which holds each packet back for as long as a wire of that rate and length would. Kernels without netem
// have it, too.
//
//   slow_link NAMESPACE-FILE MILLISECONDS MEGABITS     makes "ferry0" here and "ferry0" there; ends with its
//   stdin
//
// Packets are taken as large as TCP makes them (TSO), with what says how to cut them; the wire's time is
// counted as if they were cut.
#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <vector>

#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <poll.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <unistd.h>

namespace {

using SteadyClock = std::chrono::steady_clock;
using TimePoint = SteadyClock::time_point;

/// virtio_net_hdr, whose own header is no C++: how the packet behind it is to be cut.
struct OffloadHeader {
  std::uint8_t flags, gso_type;
  std::uint16_t header_bytes, gso_size, checksum_start, checksum_offset;
};
static_assert(sizeof(OffloadHeader) == 10);
constexpr std::uint8_t not_cut = 0;

constexpr std::size_t packet_bytes_max = 65536 + sizeof(OffloadHeader) + 256;
constexpr std::size_t queue_packets_max = 100'000;  // as long as nobody's window is: nothing is dropped
constexpr std::size_t header_bytes = 14 + 20 + 32;  // of each cut piece: Ethernet, IP, TCP with time stamps

[[noreturn]] void give_up(const char* what) {
  std::perror(what);
  std::exit(1);
}

int open_tun() {
  const int fd = ::open("/dev/net/tun", O_RDWR | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) give_up("/dev/net/tun");
  ifreq request{};
  std::strncpy(request.ifr_name, "ferry0", IFNAMSIZ - 1);
  request.ifr_flags = IFF_TUN | IFF_NO_PI | IFF_VNET_HDR;
  if (::ioctl(fd, TUNSETIFF, &request) != 0) give_up("TUNSETIFF");
  if (::ioctl(fd, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4) != 0) give_up("TUNSETOFFLOAD");
  return fd;
}

/// One way along the link.
struct Direction {
  struct Packet {
    TimePoint due;
    std::vector<char> bytes;
  };
  int from, to;
  std::deque<Packet> on_the_way;
  TimePoint wire_free{};

  void take(std::chrono::nanoseconds delay, double bits_per_second) {
    char buffer[packet_bytes_max];
    for (;;) {
      const auto count = ::read(from, buffer, sizeof buffer);
      if (count <= 0) return;
      if (on_the_way.size() >= queue_packets_max) continue;
      OffloadHeader header;
      std::memcpy(&header, buffer, sizeof header);
      std::size_t bytes = std::size_t(count) - sizeof header + 14;
      if (header.gso_type != not_cut && header.gso_size > 0)
        bytes += (bytes / header.gso_size) * header_bytes;
      wire_free = std::max(wire_free, SteadyClock::now()) +
                  std::chrono::nanoseconds(std::int64_t(double(bytes) * 8e9 / bits_per_second));
      on_the_way.push_back({wire_free + delay, {buffer, buffer + count}});
    }
  }

  void deliver() {
    while (!on_the_way.empty() && on_the_way.front().due <= SteadyClock::now()) {
      const auto& bytes = on_the_way.front().bytes;
      if (::write(to, bytes.data(), bytes.size()) < 0 && errno == EAGAIN) return;
      on_the_way.pop_front();
    }
  }
};

timespec until_due(const Direction& one, const Direction& other) {
  auto due = SteadyClock::now() + std::chrono::seconds(1);
  for (const Direction* each : {&one, &other})
    if (!each->on_the_way.empty()) due = std::min(due, each->on_the_way.front().due);
  const auto left = std::max<std::int64_t>(0, std::chrono::nanoseconds(due - SteadyClock::now()).count());
  return {left / 1'000'000'000, left % 1'000'000'000};
}

}  // namespace

int main(int count, char** words) {
  if (count != 4) return 2;
  const auto delay = std::chrono::nanoseconds(std::int64_t(std::atof(words[2]) * 1e6));
  const double bits_per_second = std::atof(words[3]) * 1e6;
  const int space = ::open(words[1], O_RDONLY | O_CLOEXEC);
  if (space < 0) give_up(words[1]);
  const int here = open_tun();
  if (::setns(space, CLONE_NEWNET) != 0) give_up("setns");
  const int there = open_tun();
  Direction out{here, there, {}, {}}, back{there, here, {}, {}};
  std::puts("ready");
  std::fflush(stdout);
  for (;;) {
    pollfd descriptors[] = {{here, POLLIN, 0}, {there, POLLIN, 0}, {STDIN_FILENO, POLLIN, 0}};
    const timespec left = until_due(out, back);
    ::ppoll(descriptors, 3, &left, nullptr);
    if (descriptors[2].revents != 0) return 0;
    out.take(delay, bits_per_second);
    back.take(delay, bits_per_second);
    out.deliver();
    back.deliver();
  }
}
