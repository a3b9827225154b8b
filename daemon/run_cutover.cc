// SPDX-License-Identifier: Apache-2.0
// The cutover, stage by stage. While the source is quiesced, this thread writes to no file and no log: it may
// be the state directory's filesystem that is frozen (invariant 7).
//
//   syncing      filesystems write out what they hold back, while passes go on
//   catching_up  passes over that, as long as each leaves less than the one before
//   freezing     the quiescer is asked; what is dirty is copied meanwhile
//   draining     all that was dirty is copied, and no write is on its way
//   copying      the last marks are gathered and copied, until there are none
//   flushing     hand-over only: the targets are flushed, and given up for the cutover command
//   awaiting     the volumes that are cut over together with this one have come as far (cutover_group.h)
//   releasing    the quiescer releases the source, or hands over
//   letting_go   something failed: the source is released, and only then is anything said or written
#include <algorithm>

#include "blockio/base/check.h"
#include "daemon/run_core.h"

namespace blockferry {

namespace {

constexpr unsigned catch_up_rounds_max = 6;
constexpr unsigned expiries_max = 3;
constexpr Nanoseconds rest_while_syncing = std::chrono::milliseconds(20);
constexpr Nanoseconds drain_pause = std::chrono::microseconds(100);
// A record that still stands when the device has been idle for so long is of a write whose end the kernel hid
// (attack A).
constexpr Nanoseconds standing_believed = std::chrono::milliseconds(50);

double milliseconds(Nanoseconds duration) {
  return std::chrono::duration<double, std::milli>(duration).count();
}

}  // namespace

bool RunCore::hands_over() const {
  return record_.status.request.kind == RunKind::migrate || !record_.status.request.cutover_cmd.empty();
}

/// Somebody uses the target from the hand-over on: nobody can compare it with its checksums then.
bool RunCore::target_is_used_at_once() const {
  return !record_.status.request.cutover_cmd.empty() || record_.status.moves_guest();
}

bool RunCore::quiesced() const {
  return cutover_.stage >= CutoverStage::freezing;
}

void RunCore::begin_cutover() {
  cutover_ = {};
  cutover_.rehearsal = live_.rehearsal_asked && !live_.cutover_asked;
  cutover_.asked = live_.cutover_asked || live_.rehearsal_asked;
  live_.cutover_asked = live_.rehearsal_asked = false;
  auto quiescer = environment_.make_quiescer(record_, cutover_.rehearsal);
  if (!quiescer) {
    live_.cutover_refused = quiescer.error();
  } else {
    cutover_.quiescer = std::move(*quiescer);
    live_.command_seconds = milliseconds(cutover_.quiescer->expected_command_time()) / 1000;
    cutover_.stage = CutoverStage::syncing;
    record_.final_pass_begun = true;  // with the next checkpoint
    Quiescer& ahead = *cutover_.quiescer;
    cutover_.task = environment_.start([&ahead] { return ahead.sync_ahead(); });
  }
  begin_pass(PassKind::incremental);
}

/// A pass has ended before the source was quiesced: another one, or now.
void RunCore::go_on_with_cutover(std::uint64_t dirty, std::uint64_t dirty_before) {
  if (cutover_.stage == CutoverStage::syncing) {
    // It may take its time: no use in a pass for every few writes.
    live_.rest_until = clock_.now() + rest_while_syncing;
    live_.resting = true;
    return;
  }
  ++cutover_.rounds;
  const bool shrinks = cutover_.rounds == 1 || double(dirty) < 0.7 * double(dirty_before);
  if (!saved_record_.final_pass_begun || (shrinks && dirty > 0 && cutover_.rounds < catch_up_rounds_max))
    return begin_pass(PassKind::incremental);
  if (!cutover_.asked && !converged()) {
    abandon_cutover();
    return begin_pass(PassKind::incremental);
  }
  const auto all = cutover_.quiescer->all_at(CutoverStep::caught_up);
  if (!all) {
    abandon_cutover();
    return begin_pass(PassKind::incremental);
  }
  if (!*all) {  // the pass goes on
    live_.rest_until = clock_.now() + rest_while_syncing;
    live_.resting = true;
    return;
  }
  begin_pass(PassKind::final);
  static_cast<void>(volume_->defer_records(true));
  cutover_.stage = CutoverStage::freezing;
  cutover_.deadline = clock_.now() + std::chrono::milliseconds(record_.status.request.max_freeze_ms);
  quiesce_source();
}

/// While the source is quiesced, or is about to be. False also where it let go, for another has.
bool RunCore::all_at(CutoverStep step) {
  const auto all = cutover_.quiescer->all_at(step);
  if (all && !*all) clock_.sleep_for(drain_pause);
  if (!all) let_go(all.error());
  return all && *all;
}

void RunCore::quiesce_source() {
  if (!all_at(CutoverStep::still)) return;
  Quiescer& quiescer = *cutover_.quiescer;
  cutover_.rehearsal = quiescer.rehearses(cutover_.rehearsal);
  const Nanoseconds limit = std::chrono::milliseconds(record_.status.request.max_freeze_ms);
  cutover_.task = environment_.start([&quiescer, limit] { return quiescer.quiesce(limit); });
}

/// Precondition: nothing is quiesced. What was asked for is tried again.
void RunCore::abandon_cutover() {
  if (cutover_.task != nullptr) {
    while (!cutover_.task->wait(std::chrono::seconds(1))) {
    }
  }
  if (cutover_.asked) (cutover_.rehearsal ? live_.rehearsal_asked : live_.cutover_asked) = true;
  record_.final_pass_begun = false;
  cutover_ = {};
}

void RunCore::continue_cutover(Nanoseconds timeout) {
  const bool waits = engine_ == nullptr || engine_->jobs_in_flight() == 0;
  const bool task_done =
      cutover_.task != nullptr && cutover_.task->wait(waits && quiesced() ? timeout : Nanoseconds(0));
  if (task_done) {
    auto outcome = cutover_.task->take();
    cutover_.task.reset();
    return cutover_step_done(outcome);
  }
  if (cutover_.task != nullptr || !quiesced()) return;
  if (ending_ != Ending::none || record_.paused || !cutover_.failures.empty()) return let_go({});
  if (clock_.now() >= cutover_.deadline) {
    return let_go(make_error(ErrorCode::busy, "cut over", record_.status.source_uri,
                             "it took longer than --max-freeze allows"));
  }
  switch (cutover_.stage) {
    case CutoverStage::freezing:
      return quiesce_source();
    case CutoverStage::draining:
      return drain();
    case CutoverStage::copying:
      return copy_last();
    case CutoverStage::flushing:
      return flush_targets();
    case CutoverStage::awaiting:
      return release_source();
    default:
      return;
  }
}

void RunCore::cutover_step_done(const Result<void>& outcome) {
  switch (cutover_.stage) {
    case CutoverStage::syncing:
      cutover_.stage = CutoverStage::catching_up;
      if (outcome) return;
      live_.cutover_refused = outcome.error();
      cutover_.asked = false;
      return abandon_cutover();
    case CutoverStage::freezing:
      cutover_.frozen = cutover_.standing_since = clock_.now();
      if (outcome) {
        cutover_.deadline = cutover_.quiescer->quiesced_at() +
                            std::chrono::milliseconds(record_.status.request.max_freeze_ms);
        cutover_.stage = CutoverStage::draining;
        return;
      }
      cutover_.error = outcome.error();
      return let_go_done();
    case CutoverStage::releasing:
      if (!outcome) cutover_.error = outcome.error();
      return released();
    case CutoverStage::letting_go:
      // It came too late: the volume was handed over together with others.
      if (cutover_.quiescer->handed_over()) {
        cutover_.error.reset();
        cutover_.kept = true;
        return released();
      }
      return let_go_done();
    default:
      BLOCKFERRY_CHECK(false, "a task of no stage");
  }
}

/// Nothing is on its way: each write that was queued has been seen to end. Or its record stands though the
/// device has long been idle; then its range is gathered once more.
bool RunCore::drained() {
  if (swaps()) return true;  // a suspended map has no write under way; what is queued for it waits there
  const auto queued = live_.tracker->queued();
  const bool idle = live_.tracker->device_idle();
  if (queued != cutover_.standing || !(idle || queued.empty())) cutover_.standing_since = clock_.now();
  cutover_.standing = queued;
  return (idle && queued.empty()) || clock_.now() - cutover_.standing_since >= standing_believed;
}

void RunCore::drain() {
  if (engine_->jobs_in_flight() > 0 || !volume_->dirty().empty()) return;
  if (!drained()) return clock_.sleep_for(drain_pause);
  cutover_.drained = clock_.now();
  cutover_.stage = CutoverStage::copying;
  gather();
}

/// Whatever was gathered is copied. Once more, until there is nothing but what stands and has been copied
/// since.
void RunCore::copy_last() {
  if (stray_flush_ || engine_->jobs_in_flight() > 0 || !volume_->dirty().empty()) return;
  if (!drained()) return clock_.sleep_for(drain_pause);
  gather();
  if (ending_ != Ending::none) return;
  if (live_.lost.any() || live_.missed) {
    return let_go(make_error(ErrorCode::busy, "cut over", record_.status.source_uri,
                             "writes were missed; everything is compared first"));
  }
  const auto& standing = cutover_.standing;
  for (const auto& range : standing) volume_->dirty().clear(range);
  if (!volume_->dirty().empty() || cutover_.standing_copied != standing) {
    for (const auto& range : standing) volume_->dirty().set(range);
    cutover_.standing_copied = standing;
    return;
  }
  cutover_.copied = cutover_.flushed = clock_.now();
  if (!hands_over() || cutover_.rehearsal) return release_source();
  cutover_.stage = CutoverStage::flushing;
  cutover_.flush_asked = true;
  engine_->start_flush();
}

void RunCore::flush_targets() {
  const auto outcome = engine_->take_flush_result();
  if (!outcome) return;
  cutover_.flush_asked = false;
  if (const auto loss = loss_among(*outcome)) {
    volume_->copied_to_dirty();
    return let_go(make_error(ErrorCode::busy, "cut over", loss->device,
                             "the target's connection broke: what it may have lost is copied again first"));
  }
  for (std::size_t i = 0; i < outcome->size(); ++i) {
    if ((*outcome)[i]) cutover_.failures.emplace_back(i, *(*outcome)[i]);
  }
  if (!cutover_.failures.empty()) return;  // upon which it lets go
  cutover_.flushed = clock_.now();
  live_.flush_seconds = milliseconds(cutover_.flushed - cutover_.copied) / 1000;
  release_source();
}

void RunCore::release_source() {
  cutover_.stage = CutoverStage::awaiting;
  const bool handing_over = hands_over() && !cutover_.rehearsal;
  if (!all_at(CutoverStep::copied)) return;
  if (handing_over && target_is_used_at_once()) release_targets();
  if (!all_at(CutoverStep::targets_closed)) return;
  cutover_.stage = CutoverStage::releasing;
  Quiescer& quiescer = *cutover_.quiescer;
  bool& kept = cutover_.kept;
  cutover_.task = environment_.start([&quiescer, &kept, handing_over]() -> Result<void> {
    const auto answer = handing_over ? quiescer.hand_over() : quiescer.release();
    if (!answer) return fail(answer.error());
    kept = *answer;
    return {};
  });
}

/// The command, or the guest, wants to use the targets: nothing of them may be held.
void RunCore::release_targets() {
  if (targets_released_) return;
  for (std::size_t i = 0; i < devices_.targets.size(); ++i) engine_->drop_target(i);
  for (auto& target : devices_.targets) target.reset();
  targets_released_ = true;
}

void RunCore::let_go(std::optional<Error> error) {
  cutover_.error = std::move(error);
  cutover_.stage = CutoverStage::letting_go;
  Quiescer& quiescer = *cutover_.quiescer;
  cutover_.task = environment_.start([&quiescer]() -> Result<void> {
    const auto answer = quiescer.release();
    return answer ? Result<void>() : fail(answer.error());
  });
}

/// The source is released, and nothing was cut over. Its writes are tracked, and what was copied counts.
void RunCore::let_go_done() {
  Cutover ended = std::move(cutover_);
  cutover_ = {};
  stray_flush_ = stray_flush_ || ended.flush_asked;
  if (auto done = volume_->defer_records(false); !done) fail_run(done.error());
  record_.final_pass_begun = false;  // as soon as what was copied is on record
  if (targets_released_ && ending_ == Ending::none) {
    record_.status.error = ended.error;
    return end(Ending::rolled_back);
  }
  for (auto& [index, error] : ended.failures) target_failed(index, error);
  if (ended.error && ending_ == Ending::none) {
    if (ended.error->code != ErrorCode::busy || ++live_.expiries >= expiries_max) {
      live_.cutover_refused = ended.error;
    } else {  // it is tried again, whoever wanted it
      live_.rehearsal_asked = live_.rehearsal_asked || (ended.asked && ended.rehearsal);
      live_.cutover_asked = live_.cutover_asked || (ended.asked && !ended.rehearsal);
    }
  }
  if (ending_ == Ending::none && !record_.paused) begin_pass(PassKind::incremental);
}

void RunCore::note_pause() {
  const Quiescer& quiescer = *cutover_.quiescer;
  PauseStatus pause;
  pause.freeze_ms = milliseconds(cutover_.frozen - quiescer.quiesced_at());
  pause.drain_ms = milliseconds(cutover_.drained - cutover_.frozen);
  pause.copy_ms = milliseconds(cutover_.copied - cutover_.drained);
  pause.flush_ms = milliseconds(cutover_.flushed - cutover_.copied);
  pause.command_ms = milliseconds(quiescer.command_time());
  pause.release_ms = milliseconds(quiescer.released_at() - cutover_.flushed) - pause.command_ms;
  pause.rehearsal = cutover_.rehearsal;
  record_.status.pause = pause;
  record_.status.downtime_ms = milliseconds(quiescer.released_at() - quiescer.quiesced_at());
  live_.freeze_seconds = (pause.freeze_ms + pause.drain_ms + pause.release_ms) / 1000;
}

/// The quiescer has answered.
void RunCore::released() {
  const bool handing_over = hands_over() && !cutover_.rehearsal;
  if (handing_over && swaps()) return swap_released();
  if (!cutover_.kept && !(handing_over && cutover_.error)) {
    // It had been released before: the copy may be of two moments.
    if (!cutover_.error) {
      cutover_.error = make_error(ErrorCode::busy, handing_over ? "hand over" : "cut over",
                                  record_.status.source_uri, "it took longer than --max-freeze allows");
    }
    if (!handing_over) return let_go_done();
  }
  note_pause();
  const Cutover ended = std::move(cutover_);
  cutover_ = {};
  if (auto done = volume_->defer_records(false); !done) return fail_run(done.error());
  if (ended.error) {
    record_.status.error = ended.error;
    return end(Ending::rolled_back);
  }
  record_.final_pass_begun = false;
  if (ended.rehearsal) return begin_pass(PassKind::incremental);
  record_.cut_over = true;
  if (handing_over && ending_ == Ending::cancelled) {  // too late
    ending_ = Ending::none;
    leave_at_.reset();
  }
  note_pass();
  if (targets_released_ || !must_verify()) return end(Ending::completed);
  phase_done_ = true;
  quiet_checkpoint_ = false;
}

}  // namespace blockferry
