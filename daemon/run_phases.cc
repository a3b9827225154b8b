// SPDX-License-Identifier: Apache-2.0
// Which phase comes next.
#include "daemon/run_core.h"

namespace blockferry {

namespace {

constexpr unsigned extra_passes_max = 3;

}  // namespace

/// What was synced by an earlier process is suspect when the source may have been written since: then the
/// recorded checksums decide what is copied again.
void RunCore::choose_first_phase() {
  if (record_.status.passes.empty()) record_.status.passes.push_back({});
  if (record_.verify_only) return resume_verifying();
  if (live()) return choose_first_live_phase();
  const auto stamp = devices_.source->change_stamp();
  const bool changed = !stamp || stamp != record_.source_stamp;
  const bool inconsistent_by_choice = record_.status.tracker == "none" && record_.status.request.force;
  if (changed && !inconsistent_by_choice) {
    record_.suspect = true;
    record_.cursor = 0;
  }
  record_.source_stamp = stamp;
  // Where every granule is dirty nothing is vouched for, so nothing needs comparing.
  if (volume_->dirty().count() == volume_->geometry().granule_count()) record_.suspect = false;
  if (record_.suspect || record_.phase == RunPhase::collecting) return enter_collecting(current_pass().kind);
  if (record_.phase == RunPhase::verifying && volume_->dirty().empty()) return resume_verifying();
  enter_copying();
}

/// The tracker vouches for what was synced, or take_up_tracker() made it suspect.
void RunCore::choose_first_live_phase() {
  if (record_.cut_over) return must_verify() ? resume_verifying() : end(Ending::completed);
  if (volume_->dirty().count() == volume_->geometry().granule_count()) record_.suspect = false;
  start_audit();
  live_.pass_began = clock_.now();
  live_.copied_before = record_.status.bytes_copied;
  const bool scanned = record_.phase == RunPhase::collecting;
  if (!scanned && !record_.suspect) return enter_copying();
  if (!scanned) begin_pass(PassKind::checksum);
  enter_collecting(PassKind::checksum);
}

/// From the last checkpoint's place where no target was written since, else from the start.
void RunCore::resume_verifying() {
  const std::uint64_t cursor = record_.cursor, verified = record_.status.granules_verified;
  const std::uint64_t mismatched = record_.status.granules_mismatched;
  const std::uint32_t target = record_.verify_target;
  bool same = target < devices_.targets.size() && !engine_->target_dropped(target);
  for (std::size_t i = 0; same && i < devices_.targets.size(); ++i) {
    const auto& stamp = record_.target_stamps[i];
    same = engine_->target_dropped(i) || (stamp && stamp == devices_.targets[i]->change_stamp());
  }
  enter_verifying();
  if (!same) return;
  record_.verify_target = target;
  record_.cursor = verify_next_ = cursor;
  record_.status.granules_verified = verified;
  record_.status.granules_mismatched = mismatched;
}

/// What was a hole may have been written since.
void RunCore::forget_regions() {
  region_ = {};
  if (devices_.source != nullptr) devices_.source->forget_regions();
  for (const auto& target : devices_.targets) {
    if (target != nullptr) target->forget_regions();
  }
}

std::uint64_t RunCore::doubts() {
  std::uint64_t sum = 0;
  for (const auto& target : devices_.targets) sum += target != nullptr ? target->doubts() : 0;
  return sum;
}

/// Also where nobody asked for it: a write that a broken connection carried may have landed late.
bool RunCore::must_verify() {
  return record_.status.request.verify || doubts() > doubts_verified_;
}

void RunCore::enter_collecting(PassKind kind) {
  forget_regions();
  record_.phase = RunPhase::collecting;
  current_pass().kind = kind;
  record_.status.verify_ran = live_.verified_ahead = false;
  record_.status.granules_verified = record_.status.granules_mismatched = 0;
  collect_committed_ = collect_marked_end_ = record_.cursor;
  scan_ = std::make_unique<ChecksumTracker>(volume_->geometry().granule_count(), volume_->checksums());
  scan_->begin_pass(volume_->dirty(), record_.cursor);
}

void RunCore::enter_copying() {
  forget_regions();
  record_.phase = RunPhase::copying;
  record_.cursor = 0;
  copy_cursor_ = 0;
}

void RunCore::enter_verifying() {
  forget_regions();
  doubts_verified_ = doubts();
  record_.phase = RunPhase::verifying;
  record_.cursor = verify_next_ = 0;
  record_.verify_target = 0;
  record_.status.verify_ran = true;
  record_.status.granules_verified = record_.status.granules_mismatched = 0;
  while (record_.verify_target < devices_.targets.size() && engine_->target_dropped(record_.verify_target)) {
    ++record_.verify_target;
  }
}

void RunCore::note_pass() {
  if (limits_.metrics != nullptr) limits_.metrics->add_pass(current_pass().kind);
}

/// Whether nothing of the run comes after this phase: then the checkpoint of the run's end serves for the
/// phase's, too.
bool RunCore::is_last_phase() {
  if (live() && !record_.cut_over) return false;
  if (record_.phase == RunPhase::verifying) {
    auto next = record_.verify_target + 1;
    while (next < devices_.targets.size() && engine_->target_dropped(next)) ++next;
    return next >= devices_.targets.size();
  }
  return record_.phase == RunPhase::copying && !must_verify() &&
         (record_.status.tracker == "none" || devices_.source->change_stamp() == record_.source_stamp);
}

/// The phase's work is done and committed: what comes next.
void RunCore::phase_finished() {
  if (record_.phase == RunPhase::copying && !record_.cut_over) note_pass();
  phase_done_ = false;
  quiet_checkpoint_ = false;
  switch (record_.phase) {
    case RunPhase::collecting:
      record_.suspect = false;
      return enter_copying();
    case RunPhase::copying: {
      if (live()) return record_.cut_over ? enter_verifying() : live_pass_finished();
      const auto stamp = devices_.source->change_stamp();
      if (stamp != record_.source_stamp && record_.status.tracker != "none") {
        if (++extra_passes_ <= extra_passes_max) {
          record_.source_stamp = stamp;
          record_.suspect = true;
          record_.cursor = 0;
          record_.status.passes.push_back({});
          pass_clock_ = clock_.now();
          return enter_collecting(PassKind::checksum);
        }
        return fail_run(make_error(ErrorCode::io, "copy", record_.status.source_uri,
                                   "the source is being written; stop its writers and resume the run"));
      }
      if (must_verify()) return enter_verifying();
      return end(Ending::completed);
    }
    case RunPhase::verifying:
      while (++record_.verify_target < devices_.targets.size()) {
        record_.cursor = verify_next_ = 0;
        if (!engine_->target_dropped(record_.verify_target)) return;
      }
      if (!live() || record_.cut_over || record_.status.granules_mismatched > 0)
        return end(Ending::completed);
      live_.verified_ahead = true;
      begin_pass(PassKind::incremental);
      return enter_copying();
  }
}

}  // namespace blockferry
