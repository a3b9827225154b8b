// SPDX-License-Identifier: Apache-2.0
#include "ctl/follow.h"

#include <algorithm>
#include <cstdio>

#include <nlohmann/json.hpp>
#include <unistd.h>

#include "blockio/base/percent_encoding.h"
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

  void show(const std::vector<json>& runs) {
    if (output_ == FollowOutput::lines) return print_changes(runs);
    if (output_ == FollowOutput::silent) return;
    std::vector<std::string> lines, texts;
    bool paused = false;
    etas_.resize(runs.size());
    for (std::size_t i = 0; i < runs.size(); ++i) {
      const json& run = runs[i];
      if (run_ended(run)) continue;
      paused = paused || text_of(run, "state") == "paused";
      const auto eta = etas_[i].update(
          system_clock().now(),
          has_number(run, "eta_seconds") ? std::optional(number_of(run, "eta_seconds")) : std::nullopt);
      if (runs.size() > 1) lines.push_back(shortened(source_of(run), style().columns, unicode_));
      for (auto& line : progress_lines(run, eta, style())) lines.push_back(std::move(line));
      texts.push_back((runs.size() > 1 ? source_of(run) + ": " : "") + progress_text(run, eta));
    }
    if (terminal_) draw(lines);
    // A pause needs the user, and is told of at once.
    if (!terminal_) note(texts, paused && !paused_);
    paused_ = paused;
  }

  void show_lost(const std::string& id) {
    const std::string text = "run " + id + ": ferryd does not answer; waiting for it to come back";
    if (terminal_) draw({shortened(text, style().columns, unicode_)});
    if (output_ == FollowOutput::progress && !terminal_) note({text}, !lost_);
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

  void note(const std::vector<std::string>& texts, bool at_once) {
    const Nanoseconds now = system_clock().now();
    if (!at_once && now < next_line_) return;
    for (const auto& text : texts) std::fprintf(stderr, "%s\n", text.c_str());
    next_line_ = now + next_line_after_;
  }

  void print_changes(const std::vector<json>& runs) {
    printed_.resize(runs.size());
    for (std::size_t i = 0; i < runs.size(); ++i) {
      std::string line = runs[i].dump();
      if (line == printed_[i]) continue;
      std::puts(line.c_str());
      std::fflush(stdout);
      printed_[i] = std::move(line);
    }
  }

  static std::string source_of(const json& run) { return text_of(object_of(run, "source"), "uri"); }

  const FollowOutput output_;
  const bool terminal_, unicode_;
  const Nanoseconds next_line_after_;
  Nanoseconds next_line_;
  std::size_t lines_drawn_ = 0;
  bool paused_ = false, lost_ = false;
  std::vector<SteadyEta> etas_;
  std::vector<std::string> printed_;
};

}  // namespace

bool run_ended(const json& run) {
  const std::string state = text_of(run, "state");
  return state == "completed" || state == "failed" || state == "cancelled" || state == "rolled-back";
}

namespace {

bool come_to(const json& run, FollowUntil until) {
  return run_ended(run) || (until == FollowUntil::swapped && run.value("swapped", false));
}

/// Asks for one run after the other; at the first that goes on ferryd takes its time, so that all are asked
/// for about as often. True: none goes on.
Result<bool> look_again(Client& client, std::vector<json>& runs, int patience_ms, FollowUntil until) {
  bool all_ended = true;
  for (auto& run : runs) {
    if (come_to(run, until)) continue;
    auto next = client.get("/runs/" + percent_encoded(text_of(run, "id")) +
                           "?wait_ms=" + std::to_string(all_ended ? patience_ms : 0));
    if (!next) return fail(next.error());
    run = std::move(*next);
    all_ended = all_ended && come_to(run, until);
  }
  return all_ended;
}

}  // namespace

Result<FollowEnd> follow_runs(Client& client, std::vector<json>& runs, FollowOutput output,
                              const FollowPatience& patience, FollowUntil until) {
  const std::string id = text_of(runs.front(), "id");
  Display display(output, patience);
  display.show(runs);
  bool lost = false;
  Nanoseconds lost_since{0};
  int wait = first_wait_ms;
  const auto come = [until](const json& run) { return come_to(run, until); };
  while (!std::all_of(runs.begin(), runs.end(), come)) {
    if (interrupted()) return FollowEnd::detached;
    auto ended = look_again(client, runs, wait, until);
    if (ended) {
      lost = false;
      display.found_again();
      wait = wait_ms;
      display.show(runs);
      if (!*ended && std::any_of(runs.begin(), runs.end(),
                                 [](const json& run) { return text_of(run, "state") == "paused"; }))
        wait_for(-1, 0, paused_pause);
      continue;
    }
    if (interrupted()) return FollowEnd::detached;
    // busy: ferryd is stopping, or has too many connections for the moment.
    Error error = ended.error();
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
