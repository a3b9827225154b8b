// SPDX-License-Identifier: Apache-2.0
// A block node of QEMU's that is given up for another one, by a job of QEMU's that mirrors nothing: all is
// copied already. When it is told to complete, whoever uses the node uses the other one from then on, in one
// moment.
//
// QEMU keeps a job that has ended until it is dismissed, so that how it ended can be asked at any time.
#include <algorithm>
#include <thread>

#include "guard/guest_line.h"
#include "guard/qemu_hold.h"

namespace blockferry {

namespace {

constexpr std::chrono::milliseconds moment(2000);              // what QEMU does at once
constexpr std::chrono::milliseconds completion_patience(500);  // nobody writes, so nothing is under way
constexpr std::chrono::milliseconds look_again(20);            // each answer stays in the connection's queue

class NodeHold : public Hold {
 public:
  NodeHold(int qmp, std::string there, std::string back, std::string job)
      : line_(qmp), there_(std::move(there)), back_(std::move(back)), job_(std::move(job)) {}

  std::optional<HoldFailure> take(std::chrono::milliseconds, const std::atomic<bool>&) override {
    return std::nullopt;
  }

  /// Nobody has been moved yet. From the mirror's beginning until its end both nodes get what is written.
  std::optional<HoldFailure> prepare_hand_over(std::chrono::milliseconds limit,
                                               const std::atomic<bool>& give_up) override {
    return begin(there_, std::min(limit, moment), give_up);
  }

  std::optional<HoldFailure> hand_over() override { return complete(); }

  void take_back() override {
    const std::atomic<bool> never{false};
    if (!begin(back_, moment, never)) complete();
  }

  void release(bool) override {
    if (begun_) cancel();
  }

 private:
  enum class Stage : std::uint8_t { unknown, under_way, ready, moved, failed };

  std::optional<HoldFailure> begin(const std::string& mirror, std::chrono::milliseconds limit,
                                   const std::atomic<bool>& give_up) {
    const auto answer = line_.ask(mirror, limit, give_up);
    const std::string words = answer ? GuestLine::words_of(*answer) : "";
    begun_ = words.empty();  // whatever else was answered: perhaps
    if (!begun_) return HoldFailure{0, words};
    if (wait_for(Stage::ready, limit) == Stage::ready) return std::nullopt;
    return HoldFailure{0, "QEMU does not get ready for it in time"};
  }

  /// Whatever was answered, the job says how it ended.
  std::optional<HoldFailure> complete() {
    line_.ask("\"execute\":\"job-complete\"," + about_job(), moment);
    Stage stage = wait_for(Stage::moved, completion_patience);
    if (stage != Stage::moved && stage != Stage::failed) {
      line_.ask("\"execute\":\"job-cancel\"," + about_job(), moment);
      stage = wait_for(Stage::moved, moment);
    }
    if (stage == Stage::unknown) return HoldFailure{0, "QEMU did not answer in time"};
    dismiss();
    if (stage == Stage::moved) return std::nullopt;
    return HoldFailure{0, words_.empty() ? "QEMU did not do it in time" : words_};
  }

  void cancel() {
    const auto answer = line_.ask("\"execute\":\"job-cancel\"," + about_job(), moment);
    if (answer && GuestLine::succeeded(*answer)) wait_for(Stage::failed, moment);
    dismiss();
  }

  void dismiss() {
    line_.ask("\"execute\":\"job-dismiss\"," + about_job(), moment);
    begun_ = false;
  }

  /// Or until it has ended.
  Stage wait_for(Stage wanted, std::chrono::milliseconds limit) {
    const auto deadline = std::chrono::steady_clock::now() + limit;
    for (;;) {
      const Stage stage = look();
      if (stage == wanted || stage == Stage::moved || stage == Stage::failed ||
          std::chrono::steady_clock::now() >= deadline)
        return stage;
      std::this_thread::sleep_for(look_again);
    }
  }

  /// Of the list of jobs, the object that is ours: none holds another one.
  Stage look() {
    const auto answer = line_.ask("\"execute\":\"query-jobs\"", moment);
    const auto id = answer ? answer->find("\"" + job_ + "\"") : std::string::npos;
    if (!answer || id == std::string::npos) return Stage::unknown;
    const auto begin = answer->rfind('{', id), end = answer->find('}', id);
    if (begin == std::string::npos || end == std::string::npos) return Stage::unknown;
    const std::string own = answer->substr(begin, end - begin);
    if (own.find("\"concluded\"") == std::string::npos)
      return own.find("\"ready\"") != std::string::npos ? Stage::ready : Stage::under_way;
    const std::string error = "\"error\":";
    const auto at = own.find(error);
    if (at == std::string::npos) return Stage::moved;
    const auto quote = own.find('"', at + error.size());
    if (quote != std::string::npos) words_ = own.substr(quote + 1, own.find('"', quote + 1) - quote - 1);
    return Stage::failed;
  }

  std::string about_job() const { return R"("arguments":{"id":")" + job_ + "\"}"; }

  GuestLine line_;
  const std::string there_, back_, job_;
  std::string words_;  ///< of a job that failed
  bool begun_ = false;
};

}  // namespace

std::unique_ptr<Hold> make_node_hold(int qmp, std::string there, std::string back, std::string job) {
  return std::make_unique<NodeHold>(qmp, std::move(there), std::move(back), std::move(job));
}

}  // namespace blockferry
