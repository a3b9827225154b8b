// SPDX-License-Identifier: Apache-2.0
// A run: one volume's journey from its source to its targets. Single-threaded and driven by step(), so that
// the daemon's run thread and the simulator drive the very same code.
//
//   start() ─ collecting ──> copying ──> verifying ──> completed
//               │   ^           │            │
//               │   └───────────┘ the source was written meanwhile: compare again
//               └── each arrow is a checkpoint: drained, flushed, committed (run_checkpoint.cc)
//
// A live run, whose source is in use, copies in passes and cuts over between copying and verifying.
//
// Files: run_core.cc (start and end), run_phases.cc, run_data_path.cc (what is read and written, top to
// bottom), run_live.cc (passes), run_cutover.cc, run_swap.cc, run_audit.cc, run_checkpoint.cc (what is
// durable, and when), run_progress.cc (what is published).
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "bitmap/checksum_tracker.h"
#include "bitmap/live_tracker.h"
#include "blockio/copy_engine.h"
#include "daemon/metrics.h"
#include "daemon/progress_meter.h"
#include "daemon/quiescer.h"
#include "daemon/run_environment.h"
#include "daemon/run_record.h"
#include "daemon/volume_state.h"

namespace blockferry {

struct RunLimits {
  Nanoseconds checkpoint_interval = std::chrono::seconds(5);
  Nanoseconds stall_warning = std::chrono::seconds(10);  ///< a request older than this is reported
  Nanoseconds abandon_after = std::chrono::seconds(1);   ///< cancel and stop wait this long for hung I/O
  Metrics* metrics = nullptr;                            ///< may be absent
};

constexpr std::uint64_t default_io_bytes = 2 * MiB;

/// How a run cuts its I/O: chosen by volume size and request; `io_bytes` where the request does not say.
CopyEngineOptions engine_options_for(const RunRequest& request, std::uint64_t granule_bytes,
                                     std::uint64_t bytes_total, std::uint64_t io_bytes = default_io_bytes);
/// The smallest granule that keeps state under 0.3 % and a bitmap of one volume within 32 MiB.
std::uint64_t granule_bytes_for(std::uint64_t bytes_total);

class RunCore {
 public:
  RunCore(RunRecord record, RunEnvironment& environment, const RunLimits& limits);
  ~RunCore();

  /// Opens state and devices and decides the first phase. On failure the run has ended as failed.
  void start();
  /// Moves on as far as it can; waits at most `timeout` for I/O. Precondition: start() was called.
  void step(Nanoseconds timeout);

  // What others ask of it, between steps.
  void pause();
  void resume();
  void cancel();
  /// For the daemon's own end: a checkpoint, and the record says that the run goes on.
  void stop();
  void set_rate(std::uint64_t bytes_per_second);
  void set_max_downtime(std::uint64_t milliseconds);
  void ask_for_cutover(bool rehearsal);
  /// Of a swapped volume: it stays on its new disk, and the old one is not kept in step any more.
  void commit_swap();

  /// Nothing to do until it is asked: paused and quiet.
  bool idle() const;
  bool live() const { return record_.status.live() && !record_.verify_only; }
  /// It has ended or stopped; status() is final and, unless draining(), the devices are released.
  bool finished() const { return finished_; }
  /// Finished, but the kernel still holds requests of a device that hangs: step() until false.
  bool draining() const { return finished_ && engine_ != nullptr; }

  const RunStatus& status() const { return record_.status; }
  const RunRecord& record() const { return record_; }
  /// Nothing before start() has opened the volume.
  VolumeState* volume() { return volume_.get(); }

 private:
  enum class Ending : std::uint8_t { none, completed, failed, cancelled, rolled_back, stopped };

  // run_core.cc: life and phases
  Result<void> open_state();
  Result<void> open_devices();
  void suit_devices();
  void end_handed_over();
  Result<void> check_identity();
  void make_engine();
  Result<void> take_back_targets();
  void save_end();
  void finish();
  void advance();

  // run_phases.cc
  void choose_first_phase();
  void choose_first_live_phase();
  void resume_verifying();
  void enter_collecting(PassKind kind);
  void enter_copying();
  void enter_verifying();
  bool is_last_phase();
  void phase_finished();
  void note_pass();
  void forget_regions();
  std::uint64_t doubts();
  bool must_verify();
  void end(Ending ending);
  void fail_run(Error error);
  bool winding_down() const { return ending_ != Ending::none || record_.paused; }
  PassStatus& current_pass() { return record_.status.passes.back(); }

  // run_data_path.cc: what is read and written
  void start_work();
  bool may_start(std::uint64_t bytes);
  void collect_more();
  void copy_more();
  void verify_more();
  bool collect_hole(GranuleRange range);
  bool verify_hole();
  struct Claim {
    GranuleRange range;
    bool hole = false;
  };
  std::optional<Claim> next_claim();
  std::uint64_t hole_granules(Device& device, std::uint64_t granule);
  std::uint64_t data_granules(std::uint64_t granule) const;
  void finished_job(JobResult& result);
  void finished_collecting(const JobResult& result, GranuleRange range);
  void finished_copying(const JobResult& result, GranuleRange range);
  void finished_verifying(const JobResult& result, GranuleRange range);
  void compare_with_records(GranuleRange range, std::span<const std::uint64_t> checksums);
  void add_bad_ranges(const std::vector<ByteRange>& unreadable);
  void forget_bad_range(ByteRange copied);
  void target_failed(std::size_t index, const Error& error);

  // run_live.cc: passes over a source in use
  Result<void> take_up_tracker();
  Result<void> renew_tracker();
  void begin_pass(PassKind kind);
  bool gather();
  void end_live_pass();
  void measure_pass();
  double predicted_pause_seconds() const;
  bool converged() const;
  bool waits_for_user() const;
  bool must_verify_ahead();
  void live_pass_finished();
  void after_losses();
  void note_convergence(std::uint64_t dirty);
  bool resting();
  void end_tracking();

  // run_audit.cc
  void start_audit();
  void audit_more();
  void finished_audit(const JobResult& result);
  void judge_suspects();

  // run_cutover.cc
  bool hands_over() const;
  bool target_is_used_at_once() const;
  bool quiesced() const;
  void begin_cutover();
  void go_on_with_cutover(std::uint64_t dirty, std::uint64_t dirty_before);
  void abandon_cutover();
  void continue_cutover(Nanoseconds timeout);
  void cutover_step_done(const Result<void>& outcome);
  bool drained();
  void drain();
  void copy_last();
  void flush_targets();
  void quiesce_source();
  bool all_at(CutoverStep step);
  void release_source();
  void release_targets();
  void let_go(std::optional<Error> error);
  void let_go_done();
  void note_pause();
  void released();

  // run_swap.cc: a device-mapper volume that changes its disk
  bool swaps() const { return record_.swap.has_value(); }
  bool swapped() const { return record_.status.swapped; }
  Result<void> take_up_swap();
  void swap_released();
  void turn_around();

  // run_progress.cc: what is published
  void update_status();
  void update_estimate();
  void adapt_depth(const CopyEngineStats& stats);
  void watch_for_stalls();
  std::uint64_t work_left() const;

  // run_checkpoint.cc: what is durable, and when
  bool checkpoint_under_way() const { return flushing_ || commit_ != nullptr; }
  bool checkpoint_due() const;
  void begin_checkpoint();
  std::optional<Error> loss_among(const std::vector<std::optional<Error>>& outcome);
  void targets_flushed(const std::vector<std::optional<Error>>& outcome);
  void writes_lost(const Error& loss);
  void flush_finished(const std::vector<std::optional<Error>>& outcome);
  void start_commit();
  void commit_finished(const Result<void>& outcome);
  void continue_checkpoint(Nanoseconds timeout);

  // Constant after construction.
  RunEnvironment& environment_;
  Clock& clock_;
  const RunLimits limits_;

  RunRecord record_;  ///< the next record to be committed, but for what only a checkpoint settles
  /// As last made durable: what may be said of the run when there is no checkpoint to go with it.
  RunRecord saved_record_, committing_record_;
  bool lag_unsaved_ = false;  ///< a target failed since: that must be durable before the next bitmap is
  std::unique_ptr<VolumeState> volume_;
  std::unique_ptr<ChecksumTracker> scan_;
  RunDevices devices_;
  std::unique_ptr<Buffers> buffers_;
  std::unique_ptr<CopyEngine> engine_;
  CopyEngineOptions engine_options_;
  std::uint64_t in_flight_bytes_best_ = 0;  ///< for its devices; 0: they do not say
  std::uint64_t in_flight_bytes_max_ = 0;

  Ending ending_ = Ending::none;
  std::optional<Nanoseconds> leave_at_;  ///< asked to cancel or stop: hung I/O is waited for until then
  bool phase_done_ = false;  ///< the phase's work is done; its checkpoint is asked for or under way
  bool finished_ = false;
  bool end_tracking_when_drained_ = false;
  std::uint32_t mismatched_target_ = 0;  ///< the last one that verification found to differ
  unsigned extra_passes_ = 0;            ///< made because the source was written meanwhile

  std::uint64_t copy_cursor_ = 0;
  struct {
    const Device* device = nullptr;
    std::uint64_t begin = 0;
    DeviceRegion region;
  } region_;  ///< the last answer of region_at: one look a region, not one a claim
  /// In flight when a target's connection broke: they are copied once more whatever becomes of them.
  std::vector<GranuleRange> tainted_;
  unsigned losses_in_a_row_ = 0;         ///< flushes that found a connection broken
  std::uint64_t doubts_verified_ = 0;    ///< the targets' doubts when they were last read back
  std::uint64_t verify_next_ = 0;        ///< the next granule to be asked for
  std::uint64_t collect_committed_ = 0;  ///< tracker marks below this granule are committed
  std::uint64_t collect_marked_end_ = 0;

  bool flushing_ = false;
  bool stray_flush_ = false;       ///< of a cutover that was given up
  bool quiet_checkpoint_ = false;  ///< nothing was in flight when it began, and nothing was started since
  std::unique_ptr<BackgroundTask> commit_;
  std::vector<BitmapPage> commit_pages_;
  Nanoseconds checkpoint_started_{0}, checkpoint_finished_{0};

  /// Of a source in use (run_live.cc).
  struct {
    std::unique_ptr<LiveTracker> tracker;
    TrackerLosses lost;       ///< as last gathered
    bool unreleased = false;  ///< marks were gathered since the last commit began
    bool releasing = false;   ///< the commit under way holds them
    bool missed = false;      ///< the audit found a write that the tracker does not know of
    bool unclear = false;     ///< an earlier process may have handed over, and nothing is left to tell
    bool resting = false;     ///< between two passes, while the user decides
    bool cutover_asked = false, rehearsal_asked = false, verified_ahead = false;
    unsigned passes = 0, losses_in_a_row = 0, expiries = 0;
    Nanoseconds gathered_at{0}, pass_began{0}, rest_until{0};
    std::uint64_t copied_before = 0;  ///< bytes, when the pass began
    std::uint64_t dirty_before = 0;   ///< granules, when the last pass ended
    double copy_speed = 0;            ///< bytes a second, of the last pass that was long enough to tell
    double freeze_seconds = 0.05, flush_seconds = 0.01;  ///< as last measured; at first as usual
    double command_seconds = 0;  ///< what ferryd's own commands take in the pause of a hand-over
    std::string waits_for;       ///< runs that are cut over together with this one, which is ready
    std::optional<Error> cutover_refused;
    std::string note;  ///< for the user: why nothing comes to an end
  } live_;

  /// run_audit.cc
  struct {
    std::uint64_t next = 0;               ///< the granule to be looked at
    std::vector<std::uint64_t> suspects;  ///< differ from their records; the next gathering tells why
    RateLimiter limiter;
  } audit_;

  /// run_cutover.cc. From `freezing` on the source is quiesced, or may be.
  enum class CutoverStage : std::uint8_t {
    none,
    syncing,
    catching_up,
    freezing,
    draining,
    copying,
    flushing,
    awaiting,
    releasing,
    letting_go
  };
  struct Cutover {
    std::unique_ptr<Quiescer> quiescer;
    std::unique_ptr<BackgroundTask> task;  ///< uses the quiescer
    CutoverStage stage = CutoverStage::none;
    bool asked = false, rehearsal = false;
    bool kept = false;  ///< released: it had been quiesced until then
    unsigned rounds = 0;
    Nanoseconds deadline{0}, frozen{0}, drained{0}, copied{0}, flushed{0}, standing_since{0};
    std::vector<GranuleRange> standing;                   ///< writes that were queued and not seen to end
    std::vector<GranuleRange> standing_copied;            ///< as they stood when they were copied last
    bool flush_asked = false;                             ///< and its result not taken
    std::vector<std::pair<std::size_t, Error>> failures;  ///< targets; dealt with after the release
    std::optional<Error> error;
  };
  Cutover cutover_;
  bool targets_released_ = false;  ///< final and flushed, for the cutover command to use

  std::vector<JobResult> results_;
  CopyEngineStats stats_seen_;  ///< up to here they are in the status and the metrics
  ProgressMeter meter_;
  RateLimiter limiter_;
  Nanoseconds pass_clock_{0}, status_updated_{0};
  std::uint64_t work_done_ = 0;  ///< bytes of any phase's work, of this process; for rate and progress
};

}  // namespace blockferry
