// SPDX-License-Identifier: Apache-2.0
// What tells, after a reboot, where the volume lies (a volume manager's metadata): it is changed while the
// volume is still and its target complete, so that a power failure at any moment leaves it true. For the same
// reason it is changed back, where the hand-over fails, before anybody writes to the old disk again.
#include "guard/hold.h"
#include "guard/shell_command.h"

namespace blockferry {

namespace {

constexpr auto undo_limit = std::chrono::seconds(60);

class RecordHold : public Hold {
 public:
  RecordHold(int lock, std::string change_cmd, std::string undo_cmd)
      : lock_(lock), change_cmd_(std::move(change_cmd)), undo_cmd_(std::move(undo_cmd)) {}

  std::optional<HoldFailure> take(std::chrono::milliseconds, const std::atomic<bool>&) override {
    return std::nullopt;
  }

  /// Half of the time is for undoing it.
  std::optional<HoldFailure> prepare_hand_over(std::chrono::milliseconds limit,
                                               const std::atomic<bool>& give_up) override {
    begun_ = true;
    const auto outcome = run_own_command(change_cmd_, limit / 2, give_up, lock_);
    if (outcome.succeeded) return std::nullopt;
    return HoldFailure{0, "`" + change_cmd_ + "` " + outcome.detail};
  }

  bool undoes_preparation() const override { return true; }

  /// Nobody knows how far a command came that was killed.
  void undo_preparation() override {
    const std::atomic<bool> never{false};
    if (begun_) run_own_command(undo_cmd_, undo_limit, never, lock_);
    begun_ = false;
  }

  void release(bool handed_over) override {
    if (!handed_over) undo_preparation();
  }

  bool released_by_command() const override { return true; }

 private:
  const int lock_;
  const std::string change_cmd_, undo_cmd_;
  bool begun_ = false;
};

}  // namespace

std::unique_ptr<Hold> make_record_hold(int lock, std::string change_cmd, std::string undo_cmd) {
  return std::make_unique<RecordHold>(lock, std::move(change_cmd), std::move(undo_cmd));
}

}  // namespace blockferry
