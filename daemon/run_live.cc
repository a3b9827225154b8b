// SPDX-License-Identifier: Apache-2.0
// A source in use: passes over what a tracker saw written, until what is left is copied in the pause that the
// user allows. A pass ends with gather(): the tracker's marks go into the bitmap, the checkpoint commits
// them, and only then are they copied (and the tracker releases them):
//
//   copy ─ gather ─ checkpoint ─ live_pass_finished ─┬─> copy: the next pass
//                                                    ├─> rest, and copy: the user decides when
//                                                    ├─> a checksum pass: the tracker may have missed
//                                                    something └─> begin_cutover (run_cutover.cc), or the
//                                                                  same as soon as all volumes that are cut
//                                                                  over together have come so far
#include <algorithm>

#include "blockio/base/check.h"
#include "daemon/run_core.h"

namespace blockferry {

namespace {

constexpr std::size_t passes_kept_max = 64;  // of a run that goes on for months
constexpr Nanoseconds rest_between_passes = std::chrono::seconds(1);
constexpr Nanoseconds rest_while_others_catch_up = std::chrono::milliseconds(200);
constexpr unsigned losses_in_a_row_max = 5;
constexpr double speed_unknown = 200e6;  // bytes a second, until a pass was measured
constexpr std::uint64_t measured_bytes_min = 4 * MiB;

double seconds(Nanoseconds duration) {
  return std::chrono::duration<double>(duration).count();
}

}  // namespace

Result<void> RunCore::take_up_tracker() {
  if (record_.tracked && !live_.unclear) {
    auto adopted = environment_.adopt_tracker(record_);
    if (adopted) record_.status.tracker_losses.add((*adopted)->losses());
    if (adopted && !(*adopted)->losses().any()) {
      live_.tracker = std::move(*adopted);
      live_.gathered_at = clock_.now();
      return {};
    }
    // Until the first pass is over.
    if (!adopted) live_.note = "everything is compared: " + adopted.error().message();
  }
  if (auto done = renew_tracker(); !done || !live_.unclear) return done;
  // The guard's mark would have told, but it ended with the machine.
  return fail(
      make_error(ErrorCode::conflict, "take up", record_.status.source_uri,
                 "the machine went down in the middle of the hand-over, and the targets may be in use "
                 "already: `ferryctl forget` leaves them as they are, `ferryctl resume` copies all "
                 "again"));
}

/// What was written before it came is not known: the recorded checksums decide, or, where a final pass was
/// cut off, nothing does.
Result<void> RunCore::renew_tracker() {
  live_.tracker.reset();
  record_.tracked = false;
  if (saved_record_.tracked) {
    // Said first: whoever finds the new tracker after a crash must not take it for the old one.
    saved_record_.tracked = false;
    if (auto done = save_record(environment_.state(), saved_record_); !done) return done;
  }
  auto attached = environment_.attach_tracker(record_);
  if (!attached) return fail(attached.error());
  live_.tracker = std::move(*attached);
  live_.gathered_at = clock_.now();
  audit_.suspects.clear();
  if (record_.final_pass_begun) {
    volume_->dirty().set_all();
    volume_->note_collected(0, volume_->geometry().granule_count());
    record_.final_pass_begun = false;
  }
  record_.tracked = true;
  record_.suspect = true;
  record_.cursor = 0;
  return {};
}

void RunCore::begin_pass(PassKind kind) {
  auto& passes = record_.status.passes;
  pass_clock_ = clock_.now();
  live_.pass_began = clock_.now();
  live_.copied_before = record_.status.bytes_copied;
  // Of very many passes the last ones are counted together.
  if (passes.size() >= passes_kept_max && passes.back().kind == kind) return;
  passes.push_back({kind, 0, 0, 0});
}

/// Precondition: nothing is in flight, for no granule may become dirty that is being copied (invariant 5).
/// Whether anything was new.
bool RunCore::gather() {
  BLOCKFERRY_CHECK(engine_->jobs_in_flight() == 0, "marks were gathered while copies were under way");
  BLOCKFERRY_CHECK(commit_ == nullptr, "marks were gathered that the commit under way would release");
  ChangeBitmap& dirty = volume_->dirty();
  const std::uint64_t before = dirty.count();
  if (auto done = live_.tracker->collect(dirty); !done) {
    fail_run(done.error());
    return false;
  }
  judge_suspects();
  forget_regions();
  volume_->note_collected(0, volume_->geometry().granule_count());
  live_.unreleased = true;
  live_.lost = live_.tracker->losses();
  const Nanoseconds now = clock_.now();
  const double passed = seconds(now - live_.gathered_at);
  const double bytes = double((dirty.count() - before) * volume_->geometry().granule_bytes);
  if (passed > 0.001) record_.status.dirty_bytes_per_second = std::uint64_t(bytes / passed);
  live_.gathered_at = now;
  return dirty.count() > before;
}

/// The copying of a live pass has come to its end. A source that nobody wrote to costs no checkpoint.
void RunCore::end_live_pass() {
  measure_pass();
  const bool found = gather();
  if (ending_ != Ending::none) return;
  if (!found && volume_->copied_ranges() == 0 && !live_.lost.any() && !live_.missed &&
      saved_record_.final_pass_begun == record_.final_pass_begun && saved_record_.bitmap_generation > 0)
    return live_pass_finished();
  phase_done_ = true;
  quiet_checkpoint_ = false;
}

void RunCore::measure_pass() {
  const double passed = seconds(clock_.now() - live_.pass_began);
  const std::uint64_t bytes = record_.status.bytes_copied - live_.copied_before;
  if (bytes >= measured_bytes_min && passed > 0) live_.copy_speed = double(bytes) / passed;
}

double RunCore::predicted_pause_seconds() const {
  const double bytes = double(volume_->dirty().count() * volume_->geometry().granule_bytes);
  const double speed = live_.copy_speed > 0 ? live_.copy_speed : speed_unknown;
  return live_.freeze_seconds + bytes / speed +
         (hands_over() ? live_.flush_seconds + live_.command_seconds : 0);
}

bool RunCore::converged() const {
  return predicted_pause_seconds() * 1000 <= double(record_.status.request.max_downtime_ms);
}

/// The moment of the cutover is the user's to choose.
bool RunCore::waits_for_user() const {
  const RunRequest& request = record_.status.request;
  if (request.cutover == CutoverChoice::manual || live_.cutover_refused || swapped()) return true;
  return request.max_passes != 0 && live_.passes >= request.max_passes && !converged();
}

/// A cutover command, a guest or a swap puts the target to use, which nobody can compare with its checksums
/// then: so before. Before any hand-over, too, where a write that a broken connection carried may have landed
/// late.
bool RunCore::must_verify_ahead() {
  const RunRequest& request = record_.status.request;
  if (hands_over() && doubts() > doubts_verified_) return true;
  const bool used = target_is_used_at_once() || (swaps() && !swapped());
  return request.verify && used && !live_.verified_ahead && (live_.cutover_asked || !live_.rehearsal_asked);
}

/// Its gathered marks are durable. What comes next.
void RunCore::live_pass_finished() {
  phase_done_ = false;
  quiet_checkpoint_ = false;
  if (live_.lost.any() || live_.missed) return after_losses();
  live_.losses_in_a_row = 0;
  ++live_.passes;
  const std::uint64_t dirty = volume_->dirty().count();
  record_.status.predicted_downtime_ms = predicted_pause_seconds() * 1000;
  note_convergence(dirty);
  const std::uint64_t dirty_before = live_.dirty_before;
  live_.dirty_before = dirty;
  if (cutover_.stage != CutoverStage::none) return go_on_with_cutover(dirty, dirty_before);
  // The first one only gathers what was written since the last sync.
  const bool unfrozen = record_.status.unfrozen;
  if (unfrozen && (dirty == 0 || (live_.passes > 1 && converged()))) return end(Ending::completed);
  const bool asked = live_.cutover_asked || live_.rehearsal_asked;
  const bool wanted = asked || (!unfrozen && !waits_for_user() && converged());
  const bool ready = wanted && !must_verify_ahead();
  const std::string others = environment_.cutover_waits_for(record_, ready);
  live_.waits_for = ready ? others : "";
  if (wanted && !ready) return enter_verifying();
  if (ready && live_.waits_for.empty()) return begin_cutover();
  if (ready || waits_for_user() || dirty == 0) {
    live_.rest_until = clock_.now() + (ready ? rest_while_others_catch_up : rest_between_passes);
    live_.resting = true;
  }
  begin_pass(PassKind::incremental);
}

void RunCore::after_losses() {
  record_.status.tracker_losses.add(live_.lost);
  if (limits_.metrics != nullptr) limits_.metrics->add_tracker_losses(live_.lost.count());
  if (++live_.losses_in_a_row > losses_in_a_row_max) {
    return fail_run(
        make_error(ErrorCode::io, "track writes to", record_.status.source_uri,
                   "the kernel's programs missed writes again and again; resume the run when there "
                   "is less load"));
  }
  abandon_cutover();
  live_.missed = false;
  if (auto done = renew_tracker(); !done) return fail_run(done.error());
  begin_pass(PassKind::checksum);
  enter_collecting(PassKind::checksum);
}

/// A run that does not converge says so, with figures.
void RunCore::note_convergence(std::uint64_t dirty) {
  live_.note.clear();
  if (live_.cutover_refused) {
    live_.note = "no cutover: " + live_.cutover_refused->message() + "; `ferryctl cutover " +
                 record_.status.id + "` tries again";
    return;
  }
  if (record_.status.audit_misses > 0) {
    live_.note = "the audit found " + std::to_string(record_.status.audit_misses) +
                 " granules that were written without the tracker's knowing; everything was compared again";
  }
  if (const std::uint64_t lost = record_.status.tracker_losses.count(); lost > 0) {
    live_.note = "the tracker could not see " + std::to_string(lost) +
                 " writes; everything was compared again (tracker_losses)";
  }
  if (swapped() || converged() || live_.passes < 3 || double(dirty) < 0.9 * double(live_.dirty_before))
    return;
  const RunStatus& status = record_.status;
  const std::string commands =
      live_.command_seconds > 0
          ? " (LVM's command takes " + format_duration(live_.command_seconds) + " of it)"
          : "";
  live_.note = "it does not converge: " + format_size(status.dirty_bytes_per_second.value_or(0)) +
               "/s are written, " + format_size(std::uint64_t(live_.copy_speed)) +
               "/s copied, and a cutover now would pause for about " +
               format_duration(predicted_pause_seconds()) + commands + ": wait, `ferryctl set " + status.id +
               " --max-downtime`, `ferryctl cutover " + status.id + "`, or cancel";
}

bool RunCore::resting() {
  const bool asked = (live_.cutover_asked || live_.rehearsal_asked) && live_.waits_for.empty();
  if (live_.resting && (clock_.now() >= live_.rest_until || asked)) {
    live_.resting = false;
    live_.pass_began = clock_.now();
  }
  return live_.resting;
}

/// The tracker is of no use any more; nothing is tracked from now on.
void RunCore::end_tracking() {
  if (!record_.status.live()) return;
  live_.tracker.reset();
  live_.unreleased = live_.releasing = false;
  environment_.remove_tracker(record_);
}

void RunCore::ask_for_cutover(bool rehearsal) {
  (rehearsal ? live_.rehearsal_asked : live_.cutover_asked) = true;
  live_.cutover_refused.reset();
  record_.status.cutover_error.reset();
}

void RunCore::set_max_downtime(std::uint64_t milliseconds) {
  record_.status.request.max_downtime_ms = milliseconds;
}

}  // namespace blockferry
