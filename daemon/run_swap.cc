// SPDX-License-Identifier: Apache-2.0
// A device-mapper volume that changes its disk while it is in use (--handover dm-swap): the cutover is the
// one of run_cutover.cc, and what is handed over is the volume's map. Then the run turns around: what is
// written to the new disk is copied to the old one, until the user decides.
//
//   old disk: volume, read     new disk: target ──swap──> new disk: volume, read    old disk: target
//   rollback: swapped back, the same way ── commit: the run ends, and the old disk stays as it is then
//
// The tracker is the volume's, and goes on over the swap: what it marks is what was written to the volume,
// whatever disk that lies on. On which it lies only the kernel knows for certain
// (RunEnvironment::handed_over).
#include "daemon/run_core.h"

namespace blockferry {

/// An earlier process may have ended in the middle of a swap.
Result<void> RunCore::take_up_swap() {
  if (record_.final_pass_begun) {
    const auto over = environment_.handed_over(record_);
    if (!over) {
      return fail(make_error(ErrorCode::conflict, "take up", record_.status.source_uri,
                             "it lies neither on its old disk nor on the new one any more; look at its table "
                             "(dmsetup table)"));
    }
    if (*over) record_.status.swapped = !swapped();
    if (*over && !swapped()) {
      if (auto done = environment_.settle_swap(record_); !done) return done;
      ending_ = Ending::rolled_back;
      finish();
      return {};
    }
  }
  return environment_.settle_swap(record_);
}

/// The guard has answered, or is gone. The kernel knows what came of it.
void RunCore::swap_released() {
  const bool over = environment_.handed_over(record_).value_or(false);
  if (!over) {
    if (!cutover_.error) {
      cutover_.error = cutover_.kept ? make_error(ErrorCode::internal, "swap", record_.status.source_uri,
                                                  "the kernel did not take the new table")
                                     : make_error(ErrorCode::busy, "swap", record_.status.source_uri,
                                                  "it took longer than --max-freeze allows");
    }
    return let_go_done();
  }
  note_pause();
  cutover_ = {};
  if (auto done = volume_->defer_records(false); !done) fail_run(done.error());
  if (ending_ == Ending::cancelled) {  // too late
    ending_ = Ending::none;
    leave_at_.reset();
  }
  note_pass();
  record_.final_pass_begun = false;
  if (!swapped()) return turn_around();
  record_.status.swapped = false;
  if (auto done = environment_.settle_swap(record_); !done) record_.status.error = done.error();
  ending_ = Ending::none;
  end(Ending::rolled_back);
}

/// The volume lies on the new disk. What is written there from now on goes to the old one, too.
void RunCore::turn_around() {
  record_.status.swapped = true;
  engine_.reset();
  devices_.release();
  buffers_.reset();
  Result<void> done = environment_.settle_swap(record_);
  if (done) done = open_devices();
  if (done) done = check_identity();
  if (!done) {
    fail_run(done.error());
    return finish();
  }
  make_engine();
  if (ending_ != Ending::none) return;
  begin_pass(PassKind::incremental);
  enter_copying();
}

void RunCore::commit_swap() {
  if (ending_ != Ending::none) return;
  if (!leave_at_) leave_at_ = clock_.now() + limits_.abandon_after;
  ending_ = Ending::completed;  // whatever became of the old disk
  phase_done_ = false;
  quiet_checkpoint_ = false;
}

}  // namespace blockferry
