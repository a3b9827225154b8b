// SPDX-License-Identifier: Apache-2.0
#include "ctl/follow.h"

#include <cstdio>

#include <nlohmann/json.hpp>
#include <unistd.h>

#include "ctl/interrupt.h"
#include "ctl/progress.h"
#include "ctl/terminal.h"
#include "ctl/text.h"

namespace blockferry {

namespace {

using nlohmann::json;
using namespace std::chrono_literals;

// ferryd answers the moment the run ends; these only pace the picture. Short at first, for short runs' sake.
constexpr int first_wait_ms = 100, wait_ms = 400;
constexpr Nanoseconds paused_pause = 250ms;  // a paused run is answered at once
constexpr Nanoseconds retry_pause = 200ms;

class Display {
 public:
  Display(FollowOutput output, const FollowPatience& patience)
      : output_(output),
        terminal_(output == FollowOutput::progress && is_terminal(STDERR_FILENO)),
        unicode_(speaks_utf8()),
        next_line_after_(patience.next_line),
        next_line_(system_clock().now() + patience.first_line) {}
  ~Display() { clear(); }
  Display(const Display&) = delete;
  Display& operator=(const Display&) = delete;

  void show(const json& run) {
    if (output_ == FollowOutput::lines) return print_change(run);
    if (output_ == FollowOutput::silent || run_ended(run)) return;
    const bool paused = text_of(run, "state") == "paused";
    const auto eta = eta_.update(system_clock().now(), has_number(run, "eta_seconds")
                                                           ? std::optional(number_of(run, "eta_seconds"))
                                                           : std::nullopt);
    if (terminal_) {
      draw(progress_lines(run, eta, style()));
    } else {
      // A pause needs the user, and is told of at once.
      note(progress_text(run, eta), paused && !paused_);
    }
    paused_ = paused;
  }

  void show_lost(const std::string& id) {
    const std::string text = "run " + id + ": ferryd does not answer; waiting for it to come back";
    if (terminal_) draw({shortened(text, style().columns, unicode_)});
    if (output_ == FollowOutput::progress && !terminal_) note(text, !lost_);
    lost_ = true;
  }
  void found_again() { lost_ = false; }

  void clear() {
    if (lines_drawn_ > 0) std::fputs((to_first_line() + "\033[J").c_str(), stderr);
    lines_drawn_ = 0;
  }

 private:
  ProgressStyle style() const {
    // One column is left free: a terminal may wrap when its last one is filled.
    return {terminal_columns(STDERR_FILENO) - 1, unicode_};
  }

  std::string to_first_line() const {
    return lines_drawn_ > 1 ? "\r\033[" + std::to_string(lines_drawn_ - 1) + "A" : "\r";
  }

  /// Over what was drawn last, in one write: nothing flickers.
  void draw(const std::vector<std::string>& lines) {
    std::string text = to_first_line();
    for (std::size_t i = 0; i < lines.size(); ++i) text += (i > 0 ? "\n" : "") + lines[i] + "\033[K";
    std::fputs((text + "\033[J").c_str(), stderr);
    lines_drawn_ = lines.size();
  }

  void note(const std::string& text, bool at_once) {
    const Nanoseconds now = system_clock().now();
    if (!at_once && now < next_line_) return;
    std::fprintf(stderr, "%s\n", text.c_str());
    next_line_ = now + next_line_after_;
  }

  void print_change(const json& run) {
    std::string line = run.dump();
    if (line == printed_) return;
    std::puts(line.c_str());
    std::fflush(stdout);
    printed_ = std::move(line);
  }

  const FollowOutput output_;
  const bool terminal_, unicode_;
  const Nanoseconds next_line_after_;
  Nanoseconds next_line_;
  std::size_t lines_drawn_ = 0;
  bool paused_ = false, lost_ = false;
  SteadyEta eta_;
  std::string printed_;
};

}  // namespace

bool run_ended(const json& run) {
  const std::string state = text_of(run, "state");
  return state == "completed" || state == "failed" || state == "cancelled" || state == "rolled-back";
}

Result<FollowEnd> follow_run(Client& client, json& run, FollowOutput output, const FollowPatience& patience) {
  const std::string id = text_of(run, "id");
  Display display(output, patience);
  display.show(run);
  bool lost = false;
  Nanoseconds lost_since{0};
  int wait = first_wait_ms;
  while (!run_ended(run)) {
    if (interrupted()) return FollowEnd::detached;
    auto next = client.get("/runs/" + percent_encode(id) + "?wait_ms=" + std::to_string(wait));
    if (next) {
      lost = false;
      display.found_again();
      wait = wait_ms;
      run = std::move(*next);
      display.show(run);
      if (text_of(run, "state") == "paused") wait_for(-1, 0, paused_pause);
      continue;
    }
    if (interrupted()) return FollowEnd::detached;
    // busy: ferryd is stopping, or has too many connections for the moment.
    Error error = next.error();
    if (error.code != ErrorCode::unreachable && error.code != ErrorCode::busy) return fail(error);
    const Nanoseconds now = system_clock().now();
    if (!lost) lost_since = now;
    lost = true;
    if (now - lost_since >= patience.reconnect) {
      error.code = ErrorCode::unreachable;
      error.hint =
          "ferryd went away; the run goes on from its last checkpoint when it is back: `ferryctl watch " +
          id + "`";
      return fail(error);
    }
    display.show_lost(id);
    wait_for(-1, 0, retry_pause);
  }
  return FollowEnd::ended;
}

}  // namespace blockferry
