// SPDX-License-Identifier: Apache-2.0
#include "daemon/cutover_group.h"

#include <algorithm>
#include <optional>

namespace blockferry {

namespace {

/// From the first to join until all have caught up. Nothing is quiesced before.
constexpr Nanoseconds gathering_patience = std::chrono::seconds(15);

}  // namespace

/// One try, shared by the members that joined it. Two mutexes: what may block holds operation_mutex_ alone,
/// so that a run's own thread can ask where the others are meanwhile.
class CutoverGroup::Attempt {
 public:
  Attempt(std::shared_ptr<CutoverGroup> group, std::unique_ptr<Quiescer> quiescer)
      : group_(std::move(group)), quiescer_(std::move(quiescer)), begun_(group_->clock_.now()) {}

  /// False: it is over, or this member has been in it.
  bool join(const std::string& member, bool rehearsal);
  Result<bool> all_at(const std::string& member, CutoverStep step);
  bool rehearsal() const;
  Result<void> sync_ahead();
  Result<void> quiesce(Nanoseconds limit);
  Result<bool> release(const std::string& member);
  Result<bool> hand_over();
  bool handed_over() const;
  const Quiescer& quiescer() const { return *quiescer_; }

 private:
  bool all_have(CutoverStep step) const;
  void give_up(const std::string& why);
  std::optional<Error> broken() const;
  void note_finished(bool handed_over);

  const std::shared_ptr<CutoverGroup> group_;
  const std::unique_ptr<Quiescer> quiescer_;
  const Nanoseconds begun_;

  mutable std::mutex mutex_;
  std::map<std::string, CutoverStep> at_;                        // guarded by mutex_
  std::optional<Error> broken_;                                  // guarded by mutex_
  bool rehearsal_ = false, over_ = false, handed_over_ = false;  // guarded by mutex_

  std::mutex operation_mutex_;
  std::optional<Result<void>> synced_, quiesced_;  // guarded by operation_mutex_
  std::optional<Result<bool>> finished_;           // guarded by operation_mutex_
};

bool CutoverGroup::Attempt::join(const std::string& member, bool rehearsal) {
  const std::lock_guard lock(mutex_);
  if (over_ || broken_ || at_.contains(member)) return false;
  at_.emplace(member, CutoverStep::joined);
  rehearsal_ = rehearsal_ || rehearsal;
  return true;
}

bool CutoverGroup::Attempt::all_have(CutoverStep step) const {
  return at_.size() == group_->members_.size() &&
         std::all_of(at_.begin(), at_.end(), [step](const auto& each) { return each.second >= step; });
}

Result<bool> CutoverGroup::Attempt::all_at(const std::string& member, CutoverStep step) {
  const std::lock_guard lock(mutex_);
  CutoverStep& at = at_.at(member);
  at = std::max(at, step);
  const bool all = all_have(step);
  if (!all && step == CutoverStep::caught_up && group_->clock_.now() - begun_ > gathering_patience)
    give_up("not all volumes of its group were ready in time");
  if (broken_) return fail(*broken_);
  return all;
}

/// With mutex_ held. The first reason stands.
void CutoverGroup::Attempt::give_up(const std::string& why) {
  if (!broken_ && !over_) broken_ = make_error(ErrorCode::busy, "cut over", "the group", why);
}

std::optional<Error> CutoverGroup::Attempt::broken() const {
  const std::lock_guard lock(mutex_);
  return broken_;
}

bool CutoverGroup::Attempt::rehearsal() const {
  const std::lock_guard lock(mutex_);
  return rehearsal_;
}

bool CutoverGroup::Attempt::handed_over() const {
  const std::lock_guard lock(mutex_);
  return handed_over_;
}

Result<void> CutoverGroup::Attempt::sync_ahead() {
  const std::lock_guard lock(operation_mutex_);
  if (!synced_) synced_ = quiescer_->sync_ahead();
  return *synced_;
}

Result<void> CutoverGroup::Attempt::quiesce(Nanoseconds limit) {
  const std::lock_guard lock(operation_mutex_);
  if (auto why = broken(); why && !quiesced_) return fail(*why);
  if (!quiesced_) quiesced_ = quiescer_->quiesce(limit);
  return *quiesced_;
}

/// Of a member that gives up, too: unless all had come to the end, that is the end for all.
Result<bool> CutoverGroup::Attempt::release(const std::string& member) {
  const std::lock_guard lock(operation_mutex_);
  {
    const std::lock_guard state_lock(mutex_);
    if (!all_have(CutoverStep::targets_closed)) give_up("run " + member + " of its group gave it up");
  }
  if (finished_) return *finished_;
  if (!quiesced_ || !*quiesced_) return false;  // nothing to release: whatever failed is undone
  finished_ = quiescer_->release();
  note_finished(false);
  return *finished_;
}

/// Not where another has released everything meanwhile.
Result<bool> CutoverGroup::Attempt::hand_over() {
  const std::lock_guard lock(operation_mutex_);
  if (!finished_ && !broken()) {
    finished_ = quiescer_->hand_over();
    note_finished(finished_->value_or(false));
  }
  if (finished_ && !*finished_) return *finished_;
  return handed_over();
}

/// Whoever is to be cut over again says so anew.
void CutoverGroup::Attempt::note_finished(bool handed_over) {
  {
    const std::lock_guard lock(mutex_);
    over_ = true;
    handed_over_ = handed_over;
  }
  const std::lock_guard lock(group_->mutex_);
  group_->ready_.clear();
}

/// What a run sees of it.
class CutoverGroup::Member : public Quiescer {
 public:
  Member(std::shared_ptr<Attempt> attempt, std::string name)
      : attempt_(std::move(attempt)), name_(std::move(name)) {}
  ~Member() override { static_cast<void>(attempt_->release(name_)); }

  Result<void> sync_ahead() override { return attempt_->sync_ahead(); }
  Result<void> quiesce(Nanoseconds limit) override { return attempt_->quiesce(limit); }
  Result<bool> release() override { return attempt_->release(name_); }
  Result<bool> hand_over() override { return attempt_->hand_over(); }
  Result<bool> all_at(CutoverStep step) override { return attempt_->all_at(name_, step); }
  bool rehearses(bool) const override { return attempt_->rehearsal(); }
  bool handed_over() const override { return attempt_->handed_over(); }
  Nanoseconds quiesced_at() const override { return attempt_->quiescer().quiesced_at(); }
  Nanoseconds released_at() const override { return attempt_->quiescer().released_at(); }
  Nanoseconds command_time() const override { return attempt_->quiescer().command_time(); }
  Nanoseconds expected_command_time() const override { return attempt_->quiescer().expected_command_time(); }

 private:
  const std::shared_ptr<Attempt> attempt_;
  const std::string name_;
};

CutoverGroup::CutoverGroup(std::vector<std::string> members, Clock& clock, MakeQuiescer make)
    : members_(std::move(members)), clock_(clock), make_(std::move(make)) {}

std::string CutoverGroup::waits_for(const std::string& member, bool ready) {
  const std::lock_guard lock(mutex_);
  ready_[member] = ready;
  std::string others;
  for (const auto& each : members_) {
    if (!ready_[each]) others += (others.empty() ? "" : ", ") + each;
  }
  return others;
}

Result<std::unique_ptr<Quiescer>> CutoverGroup::join(const std::string& member, bool rehearsal) {
  const std::lock_guard lock(mutex_);
  auto attempt = attempt_.lock();
  if (attempt == nullptr || !attempt->join(member, rehearsal)) {
    auto quiescer = make_();
    if (!quiescer) return fail(quiescer.error());
    attempt = std::make_shared<Attempt>(shared_from_this(), std::move(*quiescer));
    attempt->join(member, rehearsal);
    attempt_ = attempt;
  }
  return std::make_unique<Member>(std::move(attempt), member);
}

void CutoverGroup::leave(const std::string& member) {
  const std::lock_guard lock(mutex_);
  ready_[member] = false;
}

}  // namespace blockferry
