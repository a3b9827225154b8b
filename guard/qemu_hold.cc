// SPDX-License-Identifier: Apache-2.0
#include "guard/qemu_hold.h"

#include <algorithm>

#include "guard/guest_line.h"

namespace blockferry {

namespace {

constexpr std::chrono::milliseconds moment(2000);  // what QEMU does at once
constexpr std::chrono::milliseconds thaw_patience(5000);

/// Nothing: it did as told.
std::optional<HoldFailure> failure_of(const std::optional<std::string>& answer) {
  if (!answer) return HoldFailure{0, "QEMU did not answer in time"};
  if (GuestLine::succeeded(*answer)) return std::nullopt;
  const std::string words = GuestLine::words_of(*answer);
  return HoldFailure{0, words.empty() ? "QEMU's answer makes no sense" : words};
}

class GuestHold : public Hold {
 public:
  GuestHold(int qmp, bool stays) : line_(qmp), stays_(stays) {}

  std::optional<HoldFailure> take(std::chrono::milliseconds limit,
                                  const std::atomic<bool>& give_up) override {
    bool runs = false;
    if (auto failure = look(runs, std::min(limit, moment)); failure || !runs) return failure;
    stopped_ = true;  // whatever the answer: QEMU does one command after the other
    return failure_of(line_.ask("\"execute\":\"stop\"", limit, give_up));
  }

  /// Whoever has started it again meanwhile has let it write to the old disk.
  std::optional<HoldFailure> hand_over() override {
    bool runs = false;
    if (auto failure = look(runs)) return failure;
    if (!runs) return std::nullopt;
    return HoldFailure{0, "somebody else has started the guest again meanwhile"};
  }

  void release(bool handed_over) override {
    if (stopped_ && !(handed_over && stays_)) line_.ask("\"execute\":\"cont\"", moment);
    stopped_ = false;
  }

 private:
  std::optional<HoldFailure> look(bool& runs, std::chrono::milliseconds limit = moment) {
    const auto answer = line_.ask("\"execute\":\"query-status\"", limit);
    if (auto failure = failure_of(answer)) return failure;
    const std::string running = "\"running\":";
    const auto at = answer->find(running);
    const auto value = at == std::string::npos ? at : answer->find_first_not_of(' ', at + running.size());
    if (value == std::string::npos) return HoldFailure{0, "QEMU's answer makes no sense"};
    runs = (*answer)[value] == 't';
    return std::nullopt;
  }

  GuestLine line_;
  const bool stays_;
  bool stopped_ = false;
};

class GuestDiskHold : public Hold {
 public:
  GuestDiskHold(int qmp, std::string there, std::string back)
      : line_(qmp), there_(std::move(there)), back_(std::move(back)) {}

  std::optional<HoldFailure> take(std::chrono::milliseconds, const std::atomic<bool>&) override {
    return std::nullopt;
  }

  /// An answer that does not come leaves it open whether it will be done; what undoes it is done after it,
  /// and before the guest is started.
  std::optional<HoldFailure> hand_over() override {
    const auto answer = line_.ask(there_, moment);
    auto failure = failure_of(answer);
    if (failure && !(answer && !GuestLine::words_of(*answer).empty())) take_back();
    return failure;
  }

  void take_back() override { line_.ask(back_, moment); }
  void release(bool) override {}

 private:
  GuestLine line_;
  const std::string there_, back_;
};

class GuestAgentHold : public Hold {
 public:
  explicit GuestAgentHold(int agent) : line_(agent) {}

  std::optional<HoldFailure> take(std::chrono::milliseconds limit,
                                  const std::atomic<bool>& give_up) override {
    const auto answer = line_.ask("\"execute\":\"guest-fsfreeze-freeze\"", limit, give_up);
    auto failure = failure_of(answer);
    // Refused: somebody else may have frozen them, and will thaw them.
    frozen_ = !failure || !answer;
    if (failure && !answer) failure->detail = "the guest's agent did not answer in time";
    return failure;
  }

  void release(bool) override {
    if (frozen_) line_.ask("\"execute\":\"guest-fsfreeze-thaw\"", thaw_patience);
    frozen_ = false;
  }

 private:
  GuestLine line_;
  bool frozen_ = false;
};

}  // namespace

std::unique_ptr<Hold> make_guest_hold(int qmp, bool stays) {
  return std::make_unique<GuestHold>(qmp, stays);
}

std::unique_ptr<Hold> make_guest_disk_hold(int qmp, std::string there, std::string back) {
  return std::make_unique<GuestDiskHold>(qmp, std::move(there), std::move(back));
}

std::unique_ptr<Hold> make_guest_agent_hold(int agent) {
  return std::make_unique<GuestAgentHold>(agent);
}

}  // namespace blockferry
