// SPDX-License-Identifier: Apache-2.0
// A device-mapper device that is suspended, and resumed with its own table or with another one. By ioctls of
// its own: libdevmapper allocates, opens nodes and waits for udev, all of which may need what is suspended.
//
// The new table is loaded while the device is suspended, not before: a table that waits in the inactive slot
// would be taken into use by whoever else resumes the device.
#include <cerrno>
#include <charconv>
#include <cstring>
#include <sstream>
#include <thread>
#include <vector>

#include <linux/dm-ioctl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/ioctl.h>

#include "guard/hold.h"

namespace blockferry {

namespace {

constexpr auto interrupting_pause = std::chrono::milliseconds(5);

dm_ioctl command_for(std::uint64_t device) {
  dm_ioctl command{};
  command.version[0] = DM_VERSION_MAJOR;
  command.data_size = sizeof command;
  command.data_start = sizeof command;
  command.dev = device;
  return command;
}

/// While a suspension takes longer than it may, interrupts it again and again: the kernel undoes it then. (It
/// cannot be interrupted while a filesystem is being frozen.)
class Interrupter {
 public:
  Interrupter(std::chrono::milliseconds limit, const std::atomic<bool>& give_up)
      : thread_([this, limit, &give_up, whom = ::pthread_self()] {
          const auto deadline = std::chrono::steady_clock::now() + limit;
          while (!done_) {
            if (give_up || std::chrono::steady_clock::now() >= deadline) ::pthread_kill(whom, SIGALRM);
            std::this_thread::sleep_for(interrupting_pause);
          }
        }) {}
  ~Interrupter() {
    done_ = true;
    thread_.join();
  }
  Interrupter(const Interrupter&) = delete;
  Interrupter& operator=(const Interrupter&) = delete;

 private:
  std::atomic<bool> done_ = false;
  std::thread thread_;
};

/// The request that loads a table: each target's head, its parameters, a NUL, and room up to a multiple of 8.
std::vector<char> load_request(std::uint64_t device, const std::string& table) {
  dm_ioctl command = command_for(device);
  std::vector<char> buffer(sizeof command);
  std::istringstream lines(table);
  for (std::string line; std::getline(lines, line); ++command.target_count) {
    std::istringstream words(line);
    dm_target_spec target{};
    std::string type, parameters;
    words >> target.sector_start >> target.length >> type >> std::ws;
    std::getline(words, parameters);
    type.copy(target.target_type, sizeof target.target_type - 1);
    const std::size_t room = (sizeof target + parameters.size() + 1 + 7) / 8 * 8;
    target.next = std::uint32_t(room);
    const std::size_t at = buffer.size();
    buffer.resize(at + room);
    std::memcpy(buffer.data() + at, &target, sizeof target);
    std::memcpy(buffer.data() + at + sizeof target, parameters.data(), parameters.size());
  }
  command.data_size = std::uint32_t(buffer.size());
  std::memcpy(buffer.data(), &command, sizeof command);
  return buffer;
}

class MapHold : public Hold {
 public:
  MapHold(int control, std::uint64_t device, const std::string& table)
      : control_(control), device_(device), load_(load_request(device, table)) {
    struct sigaction action {};
    action.sa_handler = [](int) {};
    ::sigaction(SIGALRM, &action, nullptr);  // without SA_RESTART
  }

  std::optional<HoldFailure> take(std::chrono::milliseconds limit,
                                  const std::atomic<bool>& give_up) override {
    dm_ioctl command = command_for(device_);
    command.flags = DM_SUSPEND_FLAG;
    const Interrupter interrupter(limit, give_up);
    if (::ioctl(control_, DM_DEV_SUSPEND, &command) != 0) return HoldFailure{errno, ""};
    suspended_ = true;
    return std::nullopt;
  }

  std::optional<HoldFailure> prepare_hand_over(std::chrono::milliseconds, const std::atomic<bool>&) override {
    if (::ioctl(control_, DM_TABLE_LOAD, load_.data()) != 0) return HoldFailure{errno, ""};
    return std::nullopt;
  }

  /// With the table that was loaded, where it is handed over. One that the kernel does not take then is gone,
  /// and the device still suspended: so once more, with the old one.
  void release(bool handed_over) override {
    if (!suspended_) return;
    suspended_ = false;
    if (handed_over && resume() == 0) return;
    dm_ioctl command = command_for(device_);
    ::ioctl(control_, DM_TABLE_CLEAR, &command);
    resume();
  }

 private:
  int resume() const {
    dm_ioctl command = command_for(device_);
    return ::ioctl(control_, DM_DEV_SUSPEND, &command);
  }

  const int control_;
  const std::uint64_t device_;
  std::vector<char> load_;
  bool suspended_ = false;
};

}  // namespace

std::unique_ptr<Hold> make_map_hold(int control, std::uint64_t device, const std::string& table) {
  return std::make_unique<MapHold>(control, device, table);
}

}  // namespace blockferry
