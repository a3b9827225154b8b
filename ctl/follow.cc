// SPDX-License-Identifier: Apache-2.0
#include "ctl/follow.h"

#include <chrono>
#include <cstdio>
#include <thread>

#include <nlohmann/json.hpp>
#include <signal.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "blockio/base/clock.h"
#include "ctl/progress.h"

namespace blockferry {

namespace {

using nlohmann::json;
using namespace std::chrono_literals;

constexpr auto first_wait_ms = 100;
constexpr auto wait_ms = 400;
constexpr Nanoseconds paused_pause = 250ms;                          // a paused run answers at once
constexpr Nanoseconds reconnect_patience = 30s;                      // ferryd may be restarting
constexpr Nanoseconds first_line_after = 5s, next_line_after = 10s;  // where there is no terminal

volatile sig_atomic_t interrupted = 0;

/// Ctrl-C is taken while a run is followed, and given back after.
class InterruptGuard {
 public:
  InterruptGuard() {
    struct sigaction action {};
    action.sa_handler = [](int) { interrupted = 1; };
    interrupted = 0;
    ::sigaction(SIGINT, &action, &before_);
  }
  ~InterruptGuard() { ::sigaction(SIGINT, &before_, nullptr); }
  InterruptGuard(const InterruptGuard&) = delete;
  InterruptGuard& operator=(const InterruptGuard&) = delete;

 private:
  struct sigaction before_ {};
};

class Display {
 public:
  explicit Display(FollowOutput output) : output_(output), terminal_(::isatty(STDERR_FILENO) == 1) {}
  ~Display() { clear(); }
  Display(const Display&) = delete;
  Display& operator=(const Display&) = delete;

  void show(const json& run) {
    if (output_ == FollowOutput::lines) {
      std::puts(run.dump().c_str());
      std::fflush(stdout);
    } else if (output_ == FollowOutput::progress && terminal_) {
      // One column is left free: a terminal wraps when its last one is filled.
      std::fprintf(stderr, "\r%s\033[K", progress_line(run, terminal_columns(STDERR_FILENO) - 1).c_str());
      drawn_ = true;
    } else if (output_ == FollowOutput::progress && system_clock().now() >= next_line_) {
      if (started_) std::fprintf(stderr, "%s\n", progress_line(run, 200).c_str());
      next_line_ = system_clock().now() + (started_ ? next_line_after : first_line_after);
      started_ = true;
    }
  }

  void clear() {
    if (drawn_) std::fputs("\r\033[K", stderr);
    drawn_ = false;
  }

 private:
  const FollowOutput output_;
  const bool terminal_;
  bool drawn_ = false, started_ = false;
  Nanoseconds next_line_{0};
};

}  // namespace

bool run_ended(const json& run) {
  const std::string state = text_of(run, "state");
  return state == "completed" || state == "failed" || state == "cancelled" || state == "rolled-back";
}

std::size_t terminal_columns(int fd) {
  winsize size{};
  if (::ioctl(fd, TIOCGWINSZ, &size) == 0 && size.ws_col >= 20) return size.ws_col;
  return 80;
}

Result<FollowEnd> follow_run(Client& client, const std::string& id, FollowOutput output) {
  const InterruptGuard guard;
  Display display(output);
  FollowEnd end;
  Nanoseconds lost_since{0};
  int wait = first_wait_ms;
  while (interrupted == 0) {
    auto run = client.get("/runs/" + percent_encode(id) + "?wait_ms=" + std::to_string(wait));
    if (!run) {
      if (run.error().code != ErrorCode::unreachable) return fail(run.error());
      if (interrupted != 0) break;
      if (lost_since.count() == 0) lost_since = system_clock().now();
      if (system_clock().now() - lost_since > reconnect_patience) {
        Error error = run.error();
        error.hint =
            "ferryd went away; the run goes on from its last checkpoint when it is back: ferryctl watch " +
            id;
        return fail(error);
      }
      std::this_thread::sleep_for(200ms);
      continue;
    }
    lost_since = Nanoseconds(0);
    wait = wait_ms;
    end.run = std::move(*run);
    if (output == FollowOutput::lines || !run_ended(end.run)) display.show(end.run);
    if (run_ended(end.run)) return end;
    if (text_of(end.run, "state") == "paused") std::this_thread::sleep_for(paused_pause);
  }
  end.detached = true;
  return end;
}

}  // namespace blockferry
