// SPDX-License-Identifier: Apache-2.0
#include "guard/hold.h"
#include "guard/shell_command.h"

namespace blockferry {

namespace {

constexpr auto resume_limit = std::chrono::seconds(30);

/// A quiesce command that failed may have done half of its work: the other one is run all the same.
class CommandHold : public Hold {
 public:
  CommandHold(std::string quiesce_cmd, std::string resume_cmd, bool goes_on)
      : quiesce_cmd_(std::move(quiesce_cmd)), resume_cmd_(std::move(resume_cmd)), goes_on_(goes_on) {}

  std::optional<HoldFailure> take(std::chrono::milliseconds limit,
                                  const std::atomic<bool>& give_up) override {
    const auto outcome = run_shell_command(quiesce_cmd_, limit, give_up);
    if (outcome.succeeded) return std::nullopt;
    return HoldFailure{0, "the --quiesce-cmd " + outcome.detail};
  }

  /// A volume that was given up stays quiesced.
  void release(bool handed_over) override {
    const std::atomic<bool> never{false};
    if ((!handed_over || goes_on_) && !resume_cmd_.empty())
      run_shell_command(resume_cmd_, resume_limit, never);
  }

  bool released_by_command() const override { return true; }

 private:
  const std::string quiesce_cmd_, resume_cmd_;
  const bool goes_on_;
};

}  // namespace

std::unique_ptr<Hold> make_command_hold(std::string quiesce_cmd, std::string resume_cmd, bool goes_on) {
  return std::make_unique<CommandHold>(std::move(quiesce_cmd), std::move(resume_cmd), goes_on);
}

}  // namespace blockferry
