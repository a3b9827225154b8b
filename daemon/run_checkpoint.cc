// SPDX-License-Identifier: Apache-2.0
// What is durable, and when. A checkpoint, step by step, while copying goes on:
//
//   begin_checkpoint   what was copied until now is set apart; every target is asked to flush
//   flush_finished     the flush stands: the bitmap's pages as they are true from now on are gathered
//   start_commit       elsewhere, in this order: checksums synced, bitmap committed, record replaced
//   commit_finished    what was set apart is synced
//
// A crash before the bitmap's commit leaves the granules dirty; one after it, but before the record, leaves a
// bitmap that is newer than the record says: right all the same, since the record holds only counts and
// cursors that lag.
#include <cerrno>
#include <utility>

#include "daemon/run_core.h"

namespace blockferry {

namespace {

// Each takes 16 bytes. Reached by copying single granules at more than 200,000 a second.
constexpr std::size_t copied_ranges_max = 1 << 20;

constexpr unsigned losses_in_a_row_max = 10;

// The first checkpoint makes a begun run's state files durable. Runs shorter than this make one at their end
// only.
constexpr Nanoseconds first_checkpoint_after = std::chrono::milliseconds(250);

}  // namespace

bool RunCore::checkpoint_due() const {
  if (checkpoint_under_way() || quiesced() || stray_flush_) return false;
  if (phase_done_ || ending_ != Ending::none) return engine_->jobs_in_flight() == 0 && !quiet_checkpoint_;
  if (live_.resting && !record_.paused) return false;
  if (record_.paused) return engine_->jobs_in_flight() == 0 && !quiet_checkpoint_;
  if (volume_->copied_ranges() >= copied_ranges_max) return true;
  const bool first = saved_record_.status.started_at == 0;
  const Nanoseconds interval =
      first ? std::min(first_checkpoint_after, limits_.checkpoint_interval) : limits_.checkpoint_interval;
  return clock_.now() - checkpoint_finished_ >= interval;
}

void RunCore::begin_checkpoint() {
  checkpoint_started_ = clock_.now();
  quiet_checkpoint_ = engine_->jobs_in_flight() == 0;
  volume_->begin_checkpoint();
  bool any_target = false;
  for (const auto& target : record_.status.targets) any_target |= !target.error.has_value();
  if (!any_target || targets_released_) {
    // Nothing is flushed: what was copied went back to dirty when the last target failed, or has been flushed
    // before the targets were released.
    return start_commit();
  }
  flushing_ = true;
  engine_->start_flush();
}

void RunCore::flush_finished(const std::vector<std::optional<Error>>& outcome) {
  flushing_ = false;
  targets_flushed(outcome);
  start_commit();
}

void RunCore::targets_flushed(const std::vector<std::optional<Error>>& outcome) {
  for (std::size_t i = 0; i < outcome.size(); ++i) {
    const bool lost = outcome[i] && outcome[i]->errno_value == ESTALE;
    if (outcome[i] && !lost && !engine_->target_dropped(i)) target_failed(i, *outcome[i]);
  }
  const auto loss = loss_among(outcome);
  losses_in_a_row_ = loss ? losses_in_a_row_ + 1 : 0;
  if (loss) writes_lost(*loss);
}

/// Of a target that goes on, but whose connection broke under what was not flushed (device.h).
std::optional<Error> RunCore::loss_among(const std::vector<std::optional<Error>>& outcome) {
  for (std::size_t i = 0; i < outcome.size(); ++i) {
    if (outcome[i] && outcome[i]->errno_value == ESTALE && !engine_->target_dropped(i)) return outcome[i];
  }
  return std::nullopt;
}

/// All that was copied since the last good flush, or is in flight, is copied again. (Not all of it may be
/// lost, but nobody can tell.) On disk it is dirty still.
void RunCore::writes_lost(const Error& loss) {
  // Nothing is copied in another phase.
  const bool beyond_us = record_.phase != RunPhase::copying && volume_->copied_ranges() > 0;
  volume_->copied_to_dirty();
  if (beyond_us || losses_in_a_row_ > losses_in_a_row_max) {
    return fail_run(make_error(ErrorCode::io, "write to", loss.device,
                               "its connection broke again and again before what was written could be "
                               "flushed; resume the run when the server is well"));
  }
  for (const auto& range : engine_->ranges_in_flight(true)) {
    const GranuleRange granules = volume_->geometry().granules_of(range);
    volume_->dirty().clear(granules);  // until it is back: one copy in flight a granule
    tainted_.push_back(granules);
  }
  if (record_.phase != RunPhase::copying || volume_->dirty().empty()) return;
  phase_done_ = quiet_checkpoint_ = false;
  if (ending_ == Ending::completed) ending_ = Ending::none;
  if (!live() || !record_.cut_over || ending_ != Ending::none) return;
  // The source has gone on since its moment: what is missing of that one cannot be had any more.
  record_.cut_over = false;
  live_.cutover_asked = true;
  begin_pass(PassKind::incremental);
}

void RunCore::start_commit() {
  if (record_.phase == RunPhase::collecting) {
    // The scan's marks are ordered but for what is in flight; all below collected() are complete.
    volume_->note_collected(collect_committed_, collect_marked_end_);
    record_.cursor = collect_committed_ = scan_->collected();
  } else if (record_.phase == RunPhase::verifying) {
    record_.cursor = verify_next_;
    for (const auto& range : engine_->ranges_in_flight()) {
      record_.cursor = std::min(record_.cursor, volume_->geometry().granules_of(range).first);
    }
    for (std::size_t i = 0; i < devices_.targets.size(); ++i) {
      record_.target_stamps[i] =
          engine_->target_dropped(i) ? std::nullopt : devices_.targets[i]->change_stamp();
    }
  }
  commit_pages_ = volume_->pages_to_commit(engine_->ranges_in_flight());
  live_.releasing = std::exchange(live_.unreleased, false);
  update_status();
  const bool last = quiet_checkpoint_ && ending_ != Ending::none && ending_ != Ending::stopped;
  if (last) record_.status.ended_at = clock_.wall_seconds();
  // A cutover that has not come so far as to quiesce ends with the run.
  if (ending_ != Ending::none && cutover_.stage != CutoverStage::none && !quiesced())
    record_.final_pass_begun = false;
  RunRecord record = record_;
  record.bitmap_generation = volume_->generation_after(commit_pages_);
  if (live_.tracker != nullptr) record.tracker_position = live_.tracker->position();
  if (quiet_checkpoint_) {
    if (ending_ == Ending::completed) record.status.state = RunState::completed;
    if (ending_ == Ending::failed) record.status.state = RunState::failed;
    if (ending_ == Ending::cancelled) record.status.state = RunState::cancelled;
    if (ending_ == Ending::rolled_back) record.status.state = RunState::rolled_back;
  }
  record_.bitmap_generation = record.bitmap_generation;
  // A bitmap that leaves a failed target out must not be found beside a record that calls the target sound.
  std::optional<RunRecord> before;
  if (lag_unsaved_) {
    before = saved_record_;
    before->target_lags = record.target_lags;
    before->status.targets = record.status.targets;
  }
  lag_unsaved_ = false;
  committing_record_ = record;
  commit_ =
      environment_.start([this, before = std::move(before), record = std::move(record)]() -> Result<void> {
        if (before) {
          if (auto done = save_record(environment_.state(), *before); !done) return done;
        }
        if (auto done = volume_->commit(commit_pages_); !done) return done;
        return save_record(environment_.state(), record);
      });
}

void RunCore::commit_finished(const Result<void>& outcome) {
  commit_.reset();
  commit_pages_.clear();
  volume_->finish_checkpoint(outcome.has_value());
  checkpoint_finished_ = clock_.now();
  record_.bitmap_generation = volume_->generation();
  if (outcome) {
    record_.tracker_position = committing_record_.tracker_position;
    saved_record_ = std::move(committing_record_);
  }
  if (std::exchange(live_.releasing, false)) {
    if (outcome && live_.tracker != nullptr) {
      live_.tracker->release();
    } else {
      live_.unreleased = true;
    }
  }
  if (!outcome) {
    lag_unsaved_ = true;                          // perhaps it is; saying it twice does no harm
    quiet_checkpoint_ = ending_ != Ending::none;  // an ending run does not try for ever
    return fail_run(outcome.error());
  }
  if (limits_.metrics != nullptr) {
    limits_.metrics->add_checkpoint(
        std::chrono::duration<double>(checkpoint_finished_ - checkpoint_started_).count());
  }
}

/// Takes the checkpoint under way as far as it goes; waits for the commit only when there is no I/O to wait
/// for.
void RunCore::continue_checkpoint(Nanoseconds timeout) {
  if (stray_flush_) {
    if (const auto outcome = engine_->take_flush_result()) {
      stray_flush_ = false;
      targets_flushed(*outcome);
    }
  }
  if (flushing_) {
    if (const auto outcome = engine_->take_flush_result()) flush_finished(*outcome);
  }
  if (commit_ != nullptr && commit_->wait(engine_->jobs_in_flight() == 0 ? timeout : Nanoseconds(0))) {
    commit_finished(commit_->take());
  }
}

}  // namespace blockferry
