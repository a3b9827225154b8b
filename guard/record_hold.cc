// SPDX-License-Identifier: Apache-2.0
// What tells, after a reboot, where the volume lies (a volume manager's metadata): it is changed while the
// volume is still and its target complete, so that a power failure at any moment leaves it true.
#include "guard/hold.h"
#include "guard/shell_command.h"

namespace blockferry {

namespace {

constexpr auto undo_limit = std::chrono::seconds(60);

class RecordHold : public Hold {
 public:
  RecordHold(std::string change_cmd, std::string undo_cmd)
      : change_cmd_(std::move(change_cmd)), undo_cmd_(std::move(undo_cmd)) {}

  std::optional<HoldFailure> take(std::chrono::milliseconds, const std::atomic<bool>&) override {
    return std::nullopt;
  }

  std::optional<HoldFailure> prepare_hand_over(std::chrono::milliseconds limit,
                                               const std::atomic<bool>& give_up) override {
    begun_ = true;
    const auto outcome = run_own_command(change_cmd_, limit, give_up);
    if (outcome.succeeded) return std::nullopt;
    return HoldFailure{0, "`" + change_cmd_ + "` " + outcome.detail};
  }

  /// Nobody knows how far a command came that was killed.
  void release(bool handed_over) override {
    const std::atomic<bool> never{false};
    if (begun_ && !handed_over) run_own_command(undo_cmd_, undo_limit, never);
  }

  bool released_by_command() const override { return true; }

 private:
  const std::string change_cmd_, undo_cmd_;
  bool begun_ = false;
};

}  // namespace

std::unique_ptr<Hold> make_record_hold(std::string change_cmd, std::string undo_cmd) {
  return std::make_unique<RecordHold>(std::move(change_cmd), std::move(undo_cmd));
}

}  // namespace blockferry
