// SPDX-License-Identifier: Apache-2.0
#include "daemon/run_core.h"

#include <algorithm>
#include <bit>

#include "blockio/base/check.h"

namespace blockferry {

namespace {

constexpr std::uint64_t in_flight_bytes_max = 16 * MiB;
constexpr unsigned depth_max = 64, small_depth = 32;
constexpr Nanoseconds status_interval = std::chrono::milliseconds(5);  // more often than anybody looks

}  // namespace

std::uint64_t granule_bytes_for(std::uint64_t bytes_total) {
  // 8 bytes of checksum for 4 KiB are 0.2 %; from 1 TiB on the granule doubles with the volume.
  return std::max<std::uint64_t>(4 * KiB, std::bit_ceil(divide_up(bytes_total, TiB)) * 4 * KiB);
}

CopyEngineOptions engine_options_for(const RunRequest& request, std::uint64_t granule_bytes,
                                     std::uint64_t bytes_total, std::uint64_t io_bytes) {
  CopyEngineOptions options;
  options.granule_bytes = granule_bytes;
  options.io_bytes = round_up(request.io_size_bytes != 0 ? request.io_size_bytes : io_bytes, granule_bytes);
  options.io_bytes =
      std::min(options.io_bytes, round_up(std::max<std::uint64_t>(bytes_total, 1), granule_bytes));
  options.depth = request.queue_depth;
  if (options.depth == 0) {
    options.depth = std::clamp(unsigned(in_flight_bytes_max / options.io_bytes), 2U, depth_max);
    options.small_depth = small_depth;
  }
  const std::uint64_t jobs = std::max<std::uint64_t>(1, divide_up(bytes_total, options.io_bytes));
  options.depth = unsigned(std::min<std::uint64_t>(options.depth, jobs));
  if (options.granule_bytes > CopyEngineOptions::small_io_bytes || jobs == 1) options.small_depth = 0;
  options.skip_unreadable = request.on_read_error == OnReadError::skip;
  return options;
}

RunCore::RunCore(RunRecord record, RunEnvironment& environment, const RunLimits& limits)
    : environment_(environment),
      clock_(environment.clock()),
      limits_(limits),
      record_(std::move(record)),
      saved_record_(record_) {
  const RunStatus& status = record_.status;
  engine_options_ = engine_options_for(status.request, status.granule_bytes, status.bytes_total);
}

RunCore::~RunCore() {
  commit_.reset();  // the job uses volume_
  abandon_cutover();
  engine_.reset();
  devices_.release();
}

// The start.

void RunCore::start() {
  pass_clock_ = checkpoint_finished_ = clock_.now();
  if (record_.status.started_at == 0) record_.status.started_at = clock_.wall_seconds();
  record_.status.error.reset();
  record_.status.ended_at = 0;
  if (swaps()) {
    if (auto done = take_up_swap(); !done) {
      fail_run(done.error());
      return finish();
    }
    if (finished_) return;
  } else if (live() && record_.final_pass_begun && hands_over()) {
    const auto handed_over = environment_.handed_over(record_);
    if (handed_over.value_or(false)) return end_handed_over();
    live_.unclear = !handed_over;
  }
  Result<void> done = open_devices();
  if (done) done = check_identity();
  if (done) done = open_state();
  if (done) {
    make_engine();
    done = take_back_targets();
  }
  if (done && live() && !record_.cut_over) done = take_up_tracker();
  if (!done) {
    fail_run(done.error());
    if (engine_ == nullptr) finish();
    return;
  }
  limiter_.set_rate(record_.status.request.rate_bytes_per_second, clock_.now());
  meter_.restart(clock_.now(), 0);
  choose_first_phase();
  update_status();
}

/// An earlier process ended between the hand-over and writing that down. The targets were flushed before, and
/// are not ours to look at any more.
void RunCore::end_handed_over() {
  record_.cut_over = true;
  ending_ = Ending::completed;
  finish();
}

Result<void> RunCore::open_devices() {
  auto devices = environment_.open_devices(record_);
  if (!devices) return fail(devices.error());
  devices_ = std::move(*devices);
  record_.status.io_engine = devices_.io_engine;
  suit_devices();
  auto buffers = environment_.buffers().take(round_up(CopyEngine::memory_bytes(engine_options_), 4096));
  if (!buffers) return fail(buffers.error());
  buffers_ = std::move(*buffers);
  return devices_.queue->register_memory(buffers_->memory());
}

/// As its devices like it best: the smallest requests that any wants, and the most in flight.
void RunCore::suit_devices() {
  std::uint64_t io_bytes = default_io_bytes;
  in_flight_bytes_best_ = 0;
  const auto consider = [&](const std::unique_ptr<Device>& device) {
    if (device == nullptr) return;
    const DeviceInfo& info = device->info();
    if (info.io_bytes_best != 0) io_bytes = std::min(io_bytes, info.io_bytes_best);
    in_flight_bytes_best_ = std::max(in_flight_bytes_best_, info.in_flight_bytes_best);
  };
  consider(devices_.source);
  for (const auto& target : devices_.targets) consider(target);
  const RunStatus& status = record_.status;
  engine_options_ = engine_options_for(status.request, status.granule_bytes, status.bytes_total, io_bytes);
}

/// A run goes on only with the volumes that it began with.
Result<void> RunCore::check_identity() {
  const auto differs = [](const std::string& uri) {
    return fail(make_error(ErrorCode::refused, "resume", uri,
                           "another volume stands there now than when the run began"));
  };
  RunStatus& status = record_.status;
  if (devices_.source != nullptr) {  // else the run only verifies
    const DeviceInfo& source = devices_.source->info();
    if (status.source_identity.empty()) status.source_identity = source.identity;
    if (source.identity != status.source_identity || source.bytes != status.source_bytes)
      return differs(source.uri);
  }
  for (std::size_t i = 0; i < devices_.targets.size(); ++i) {
    if (devices_.targets[i] == nullptr) continue;
    const DeviceInfo& target = devices_.targets[i]->info();
    if (target.bytes < status.bytes_total) {
      return fail(
          make_error(ErrorCode::refused, "open", target.uri, "the target is smaller than the source"));
    }
    if (status.targets[i].identity.empty()) status.targets[i].identity = target.identity;
    if (target.identity != status.targets[i].identity) return differs(target.uri);
    status.targets[i].bytes = target.bytes;
  }
  return {};
}

Result<void> RunCore::open_state() {
  const VolumeGeometry geometry{record_.status.bytes_total, record_.status.granule_bytes};
  auto volume =
      record_.bitmap_generation == 0
          ? VolumeState::create(environment_.state(), record_.volume_id, geometry)
          : VolumeState::open(environment_.state(), record_.volume_id, geometry, record_.bitmap_generation);
  if (!volume) return fail(volume.error());
  volume_ = std::move(*volume);
  record_.bitmap_generation = volume_->generation();
  return {};
}

void RunCore::make_engine() {
  // The engine takes devices by reference: where one is missing (a target that could not be opened, which is
  // dropped at once; the source of a run that only verifies) another stands in and is never used.
  std::vector<Device*> targets;
  Device* stand_in = devices_.source.get();
  for (const auto& target : devices_.targets) stand_in = stand_in == nullptr ? target.get() : stand_in;
  BLOCKFERRY_CHECK(stand_in != nullptr, "a run without any device");
  for (const auto& target : devices_.targets) targets.push_back(target != nullptr ? target.get() : stand_in);
  engine_ = std::make_unique<CopyEngine>(*devices_.queue, clock_, *stand_in, targets, buffers_->memory(),
                                         engine_options_);
  for (std::size_t i = 0; i < devices_.targets.size(); ++i) {
    if (devices_.targets[i] == nullptr) engine_->drop_target(i);
  }
  stats_seen_ = engine_->stats();
}

/// Targets that failed earlier and are there again get all that they lack; targets that are missing now fail.
Result<void> RunCore::take_back_targets() {
  auto& targets = record_.status.targets;
  record_.target_lags.resize(targets.size());
  record_.target_stamps.resize(targets.size());
  bool merged = false;
  for (std::size_t i = 0; i < targets.size(); ++i) {
    if (devices_.targets[i] == nullptr) {
      if (!targets[i].error || !record_.target_lags[i]) {
        targets[i].error.reset();
        target_failed(i, devices_.target_errors[i].value_or(Error{}));
      }
      continue;
    }
    targets[i].error.reset();
    if (!record_.target_lags[i]) continue;
    if (auto done = volume_->merge_lag(environment_.state(), lag_file_name(record_.volume_id, i)); !done)
      return done;
    record_.target_lags[i] = false;
    merged = true;
  }
  if (!merged) return {};
  // Durable before a granule of the returning target's is overwritten; its lag file is only then dispensable.
  volume_->begin_checkpoint();
  if (auto done = volume_->commit(volume_->pages_to_commit({})); !done) return done;
  volume_->finish_checkpoint(true);
  record_.bitmap_generation = volume_->generation();
  saved_record_ = record_;
  return save_record(environment_.state(), record_);
}

// Ends.

void RunCore::end(Ending ending) {
  if (ending_ != Ending::none) return;
  RunStatus& status = record_.status;
  if (ending == Ending::completed) {
    for (const auto& target : status.targets) {
      if (target.error) return fail_run(*target.error);
    }
    if (status.granules_mismatched > 0) {
      record_.phase = RunPhase::copying;  // from here on it is a run that copies again what differs
      record_.verify_only = record_.cut_over = false;
      return fail_run(
          make_error(ErrorCode::io, "verify", status.targets[mismatched_target_].uri,
                     std::to_string(status.granules_mismatched) +
                         " granules differ from their checksums; `ferryctl resume` copies them again"));
    }
  }
  ending_ = ending;
  phase_done_ = false;
  quiet_checkpoint_ = false;
}

void RunCore::fail_run(Error error) {
  if (ending_ == Ending::failed || finished_) return;
  if (limits_.metrics != nullptr) limits_.metrics->add_error(error.code);
  record_.status.error = std::move(error);
  ending_ = Ending::failed;
  phase_done_ = false;
  quiet_checkpoint_ = false;
}

/// No last checkpoint was made: the record alone says how it ended, with what was committed before. A failure
/// of that is the run's least trouble.
void RunCore::save_end() {
  if (commit_ != nullptr) {
    if (!commit_->wait(limits_.abandon_after)) return;  // the state directory hangs too
    commit_finished(commit_->take());
  }
  saved_record_.status = record_.status;
  saved_record_.target_lags = record_.target_lags;
  saved_record_.paused = record_.paused;
  auto saved = save_record(environment_.state(), saved_record_);
  if (!saved && !record_.status.error) record_.status.error = saved.error();
}

/// The last act: devices are released before anybody reads that the run has ended.
void RunCore::finish() {
  RunStatus& status = record_.status;
  const bool begun = engine_ != nullptr;
  const bool hung = engine_ != nullptr && (engine_->jobs_in_flight() > 0 || engine_->flush_in_flight());
  if (hung) update_status();  // else the last commit has it all
  if (!hung) {
    engine_.reset();
    devices_.release();
    environment_.devices_closed();
    buffers_.reset();
  }
  switch (ending_) {
    case Ending::completed:
      status.state = RunState::completed;
      break;
    case Ending::failed:
      status.state = RunState::failed;
      break;
    case Ending::cancelled:
      status.state = RunState::cancelled;
      break;
    case Ending::rolled_back:
      status.state = RunState::rolled_back;
      break;
    case Ending::stopped:
    case Ending::none:
      break;
  }
  if (run_state_ended(status.state)) {
    if (status.ended_at == 0) status.ended_at = clock_.wall_seconds();
    status.activity.clear();
    status.eta_seconds = 0;
    record_.paused = false;
    if (status.state == RunState::completed) status.progress = 1;
    if (limits_.metrics != nullptr) limits_.metrics->add_run_ended(status.state);
  }
  if (hung || !begun) save_end();
  // A failed run finds its tracker again when it is resumed.
  const bool over = run_state_ended(status.state) && ending_ != Ending::failed;
  if (over && !(status.request.keep && ending_ == Ending::completed)) {
    // A QEMU that hangs keeps whoever talks to it waiting; nobody shall wait for the run's end with him.
    end_tracking_when_drained_ = hung && status.tracker == "qemu";
    if (!end_tracking_when_drained_) end_tracking();
  }
  live_.tracker.reset();
  status.io_in_flight = 0;
  finished_ = true;
}

// What others ask of it.

void RunCore::pause() {
  record_.paused = true;
  quiet_checkpoint_ = false;
  update_status();
}

void RunCore::resume() {
  record_.paused = false;
  quiet_checkpoint_ = false;
  meter_.restart(clock_.now(), work_done_);
  update_status();
}

/// A run that is failing already, but waits for a device that hangs, is left all the same.
void RunCore::cancel() {
  if (!leave_at_) leave_at_ = clock_.now() + limits_.abandon_after;
  end(Ending::cancelled);
}

void RunCore::stop() {
  if (!leave_at_) leave_at_ = clock_.now() + limits_.abandon_after;
  end(Ending::stopped);
}

void RunCore::set_rate(std::uint64_t bytes_per_second) {
  record_.status.request.rate_bytes_per_second = bytes_per_second;
  limiter_.set_rate(bytes_per_second, clock_.now());
  meter_.restart(clock_.now(), work_done_);
}

bool RunCore::idle() const {
  return finished_ || (record_.paused && ending_ == Ending::none && quiet_checkpoint_ &&
                       !checkpoint_under_way() && engine_->jobs_in_flight() == 0);
}

// The step.

void RunCore::step(Nanoseconds timeout) {
  if (finished_) {
    if (engine_ == nullptr) return;
    results_.clear();
    engine_->poll(timeout, results_);
    if (engine_->jobs_in_flight() == 0 && !engine_->flush_in_flight()) {
      engine_.reset();
      devices_.release();
      if (end_tracking_when_drained_) end_tracking();
    }
    return;
  }
  start_work();
  results_.clear();
  const bool io = engine_->jobs_in_flight() > 0 || engine_->flush_in_flight();
  if (io) {
    engine_->poll(timeout, results_);
  } else if (commit_ == nullptr && !phase_done_ && ending_ == Ending::none && !idle()) {
    // Nothing to wait for but the rate's allowance, the next pass, or nothing at all left of this phase.
    constexpr Nanoseconds moment = std::chrono::milliseconds(2);
    if (resting() && cutover_.stage == CutoverStage::none) {
      clock_.sleep_for(std::min(timeout, std::max(moment, live_.rest_until - clock_.now())));
    } else if (resting() || (!limiter_.may_start(clock_.now()) && !quiesced())) {
      clock_.sleep_for(std::min(timeout, moment));
    }
  }
  for (auto& result : results_) finished_job(result);
  continue_checkpoint(timeout);
  if (cutover_.stage != CutoverStage::none) continue_cutover(timeout);
  advance();
  if (!finished_ && clock_.now() - status_updated_ >= status_interval) update_status();
}

void RunCore::advance() {
  if (quiesced()) return;  // no checkpoint and no end before the source is released
  const bool quiet = engine_->jobs_in_flight() == 0;
  if (ending_ == Ending::none && quiet && !phase_done_ && !record_.paused && !resting()) {
    const bool verified =
        record_.phase == RunPhase::verifying && (verify_next_ >= volume_->geometry().granule_count() ||
                                                 engine_->target_dropped(record_.verify_target));
    const bool collected =
        record_.phase == RunPhase::collecting && scan_->collected() >= volume_->geometry().granule_count();
    const bool copied = record_.phase == RunPhase::copying && volume_->dirty().empty();
    if (copied && live() && !record_.cut_over) {
      if (!checkpoint_under_way()) end_live_pass();
    } else if ((verified || copied) && is_last_phase()) {
      if (copied) note_pass();
      end(Ending::completed);
    } else if (verified || collected || copied) {
      phase_done_ = true;
      quiet_checkpoint_ = false;
    }
  }
  if (leave_at_ && (!quiet || flushing_) && clock_.now() >= *leave_at_) return finish();
  if (checkpoint_due()) begin_checkpoint();
  if (checkpoint_under_way() || !quiet || !quiet_checkpoint_) return;
  if (ending_ != Ending::none) return finish();
  if (phase_done_) phase_finished();
}

}  // namespace blockferry
