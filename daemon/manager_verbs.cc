// SPDX-License-Identifier: Apache-2.0
// What people ask of the daemon: preflight, new runs, and the verbs on a run.
#include <algorithm>
#include <random>

#include <nlohmann/json.hpp>

#include "daemon/manager.h"

namespace blockferry {

namespace {

using nlohmann::json;

constexpr Nanoseconds verb_patience = std::chrono::milliseconds(900);

std::string new_id() {
  static constexpr char letters[] = "0123456789abcdefghjkmnpqrstvwxyz";
  std::random_device random;
  std::string id;
  for (int i = 0; i < 8; ++i) id += letters[random() % 32];
  return id;
}

Error conflict(const RunStatus& status, RunVerb verb, const std::string& why) {
  return make_error(ErrorCode::conflict, run_verb_name(verb), "run " + status.id, why);
}

Error refused(const std::string& operation, const std::string& device, const std::string& why) {
  return make_error(ErrorCode::refused, operation, device, why);
}

bool is_cutover(RunVerb verb) {
  return verb == RunVerb::cutover || verb == RunVerb::rehearse;
}

bool same_volume(const std::string& uri, const std::string& identity, const PreflightVolume& volume) {
  return uri == volume.path || uri == volume.resolved || (!identity.empty() && identity == volume.identity);
}

}  // namespace

// Looking.

Result<Manager::Entries::iterator> Manager::find(const std::string& run) {
  if (const auto at = entries_.find(run); at != entries_.end()) return at;
  auto newest = entries_.end();
  for (auto at = entries_.begin(); at != entries_.end(); ++at) {
    const RunStatus& status = at->second.record.status;
    if (status.request.name != run || run.empty()) continue;
    if (newest == entries_.end() || status.created_at > newest->second.record.status.created_at) newest = at;
  }
  if (newest != entries_.end()) return newest;
  return fail(
      make_error(ErrorCode::not_found, "find run", run, "no run has this id or name; see `ferryctl list`"));
}

json Manager::list_runs() {
  std::vector<RunStatus> runs;
  {
    const std::lock_guard lock(mutex_);
    for (const auto& [id, entry] : entries_) runs.push_back(entry.status());
  }
  std::sort(runs.begin(), runs.end(),
            [](const auto& a, const auto& b) { return a.created_at < b.created_at; });
  json list = json::array();
  for (const auto& status : runs) list.push_back(to_json(status));
  return list;
}

Result<json> Manager::show_run(const std::string& run) {
  const std::lock_guard lock(mutex_);
  const auto at = find(run);
  if (!at) return fail(at.error());
  return to_json((*at)->second.status());
}

Result<bool> Manager::run_settled(const std::string& run) {
  const std::lock_guard lock(mutex_);
  const auto at = find(run);
  if (!at) return fail(at.error());
  const RunState state = (*at)->second.status().state;
  return run_state_ended(state) || state == RunState::paused;
}

Result<json> Manager::list_devices() {
  return blockferry::list_devices();
}

Result<json> Manager::map_run(const std::string& run, std::uint32_t cells) {
  std::shared_ptr<Run> active;
  RunRecord record;
  {
    const std::lock_guard lock(mutex_);
    const auto at = find(run);
    if (!at) return fail(at.error());
    active = (*at)->second.active;
    record = (*at)->second.record;
  }
  const auto map = std::make_shared<std::vector<VolumeMapCell>>();
  if (active) {
    active->send(
        [map, cells](RunCore& core) {
          if (core.volume() != nullptr) *map = map_volume(*core.volume(), core.status().bad_ranges, cells);
        },
        std::chrono::seconds(10));
  } else if (record.bitmap_generation > 0) {
    auto volume =
        VolumeState::open(state_, record.volume_id, {record.status.bytes_total, record.status.granule_bytes},
                          record.bitmap_generation);
    if (!volume) return fail(volume.error());
    *map = map_volume(**volume, record.status.bad_ranges, cells);
  }
  json list = json::array();
  for (const auto& cell : *map) {
    list.push_back({{"synced", cell.synced}, {"dirty", cell.dirty}, {"zero", cell.zero}, {"bad", cell.bad}});
  }
  return json{{"id", record.status.id},
              {"bytes_total", record.status.bytes_total},
              {"granule_bytes", record.status.granule_bytes},
              {"cells", std::move(list)}};
}

// New runs.

std::vector<VolumeInUse> Manager::volumes_in_use(const std::string& except_id) const {
  std::vector<VolumeInUse> volumes;
  for (const auto& [id, entry] : entries_) {
    if (id == except_id || entry.damaged) continue;
    // A run that ended but still waits for a device that hangs holds its volumes all the same.
    const RunStatus status = entry.status();
    if (run_state_ended(status.state) && (!entry.active || entry.active->drained())) continue;
    volumes.push_back({status.source_uri, id, false});
    for (const auto& target : status.targets) volumes.push_back({target.uri, id, true});
  }
  return volumes;
}

/// The last run over the same volumes whose state can be built upon.
const RunRecord* Manager::base_of(const RunRequest& request, const PreflightReport& report) const {
  const RunRecord* base = nullptr;
  for (const auto& [id, entry] : entries_) {
    const RunStatus& status = entry.record.status;
    if (entry.active || entry.damaged || !run_state_ended(status.state) ||
        entry.record.bitmap_generation == 0)
      continue;
    if (status.targets.size() != request.targets.size() || status.bytes_total != report.source.bytes)
      continue;
    if (!same_volume(status.source_uri, status.source_identity, report.source)) continue;
    bool same = true;
    for (std::size_t i = 0; same && i < status.targets.size(); ++i) {
      same = same_volume(status.targets[i].uri, status.targets[i].identity, report.targets[i]) &&
             (status.targets[i].identity.empty() || status.targets[i].identity == report.targets[i].identity);
    }
    if (same && (base == nullptr || status.created_at > base->status.created_at)) base = &entry.record;
  }
  return base;
}

/// Preflight against all other runs. Repeated when another run was created meanwhile: it may want the same
/// target.
Result<PreflightReport> Manager::checked(const RunRequest& request, const std::string& except_id) {
  constexpr unsigned tries = 20;
  for (unsigned i = 0; i < tries; ++i) {
    std::uint64_t seen = 0;
    std::vector<VolumeInUse> in_use;
    {
      const std::lock_guard lock(mutex_);
      seen = creations_;
      in_use = volumes_in_use(except_id);
    }
    auto report = preflight(request, in_use);
    if (!report) return report;
    mutex_.lock();
    if (seen == creations_) return report;  // with the mutex held: the caller acts upon it
    mutex_.unlock();
  }
  return fail(make_error(ErrorCode::busy, "create run", request.source,
                         "too many runs are being created; try again"));
}

Result<json> Manager::check(const RunRequest& request) {
  RunRequest asked = request;
  if (request.mode == RunMode::incremental) asked.overwrite = true;  // what stands on the target is the base
  auto report = checked(asked, "");
  if (!report) return fail(report.error());
  const std::unique_lock lock(mutex_, std::adopt_lock);
  if (request.mode == RunMode::incremental) {
    report->mode = "incremental";
    if (base_of(request, *report) == nullptr) {
      report->refusals.push_back({request.source,
                                  "--mode incremental: no earlier run has this source and target; copy "
                                  "in full first"});
    }
  }
  return to_json(*report);
}

Result<json> Manager::create_run(const RunRequest& request) {
  take_back_finished();
  const bool incremental = request.mode == RunMode::incremental;
  RunRequest asked = request;
  if (incremental) asked.overwrite = true;
  auto report = checked(asked, "");
  if (!report) return fail(report.error());
  const std::unique_lock lock(mutex_, std::adopt_lock);
  if (!report->refusals.empty()) return fail(refusal_error(*report));
  if (stopping_) return fail(make_error(ErrorCode::busy, "create run", request.source, "ferryd is stopping"));
  const RunRecord* base = incremental ? base_of(request, *report) : nullptr;
  if (incremental && base == nullptr) {
    return fail(refused("clone", request.source,
                        "--mode incremental: no earlier run has this source and target; copy in full first"));
  }
  if (!request.name.empty()) {
    for (const auto& [id, entry] : entries_) {
      if (entry.record.status.request.name == request.name && !run_state_ended(entry.status().state)) {
        return fail(
            refused("clone", request.source, "run " + id + " has the name " + request.name + " already"));
      }
    }
  }
  RunRecord record = new_record(asked, *report, base);
  if (const auto bytes = CopyEngine::memory_bytes(
          engine_options_for(request, record.status.granule_bytes, record.status.bytes_total));
      bytes > options_.memory_bytes_max) {
    return fail(refused("clone", request.source,
                        "its buffers (" + format_size(bytes) + ") exceed ferryd's memory-budget (" +
                            format_size(options_.memory_bytes_max) +
                            "); choose a smaller --queue-depth or --io-size"));
  }
  Entry entry;
  entry.record = std::move(record);
  if (auto done = save(entry); !done) return fail(done.error());
  ++creations_;
  const auto at = entries_.emplace(entry.record.status.id, std::move(entry)).first;
  changed_.notify_all();
  return to_json(at->second.record.status);
}

RunRecord Manager::new_record(const RunRequest& request, const PreflightReport& report,
                              const RunRecord* base) {
  RunRecord record;
  RunStatus& status = record.status;
  do status.id = new_id();
  while (entries_.contains(status.id));
  status.request = request;
  status.mode = base != nullptr ? "incremental" : report.mode;
  status.tracker = report.tracker;
  status.source_uri = report.source.path;
  status.source_identity = report.source.identity;
  status.source_bytes = status.bytes_total = report.source.bytes;
  status.granule_bytes =
      request.granule_bytes != 0 ? request.granule_bytes : granule_bytes_for(status.bytes_total);
  for (const auto& volume : report.targets) {
    status.targets.push_back({volume.path, volume.bytes, volume.identity, std::nullopt});
  }
  status.created_at = system_clock().wall_seconds();
  record.volume_id = status.id;
  record.target_lags.resize(status.targets.size());
  record.target_stamps.resize(status.targets.size());
  status.passes.push_back({base != nullptr ? PassKind::checksum : PassKind::full, 0, 0, 0});
  if (base != nullptr) {
    record.volume_id = base->volume_id;
    record.bitmap_generation = base->bitmap_generation;
    record.target_lags = base->target_lags;
    status.granule_bytes = base->status.granule_bytes;
    record.phase = RunPhase::collecting;
    record.suspect = true;
  }
  return record;
}

Result<void> Manager::save(Entry& entry) {
  return save_record(state_, entry.record);
}

// Verbs on a run.

Result<json> Manager::command(const std::string& run, RunVerb verb) {
  take_back_finished();
  std::unique_lock lock(mutex_);
  const auto at = find(run);
  if (!at) return fail(at.error());
  Entry& entry = (*at)->second;
  if (entry.damaged) return fail(*entry.record.status.error);
  if (auto done = serves(entry, verb); !done) return fail(done.error());
  if (entry.active) {
    const auto active = entry.active;
    lock.unlock();
    return command_active(*active, verb);
  }
  if (!run_state_ended(entry.record.status.state)) return command_waiting(entry, verb);
  if (verb == RunVerb::pause || verb == RunVerb::cancel || is_cutover(verb)) {
    return fail(
        conflict(entry.record.status, verb,
                 std::string("the run has ended (") + run_state_name(entry.record.status.state) + ")"));
  }
  const std::string id = (*at)->first;
  const RunRecord record = entry.record;
  if (auto done = owns_volume(entry); !done) return fail(done.error());
  lock.unlock();
  if (verb != RunVerb::verify) {
    RunRequest request = record.status.request;
    request.overwrite = true;
    // A live run stays one, also when nobody uses its source at the moment.
    request.mode = record.status.tracker == "ebpf" ? RunMode::hybrid : RunMode::automatic;
    auto report = checked(request, id);
    if (!report) return fail(report.error());
    lock = std::unique_lock(mutex_, std::adopt_lock);
    if (!report->refusals.empty()) return fail(refusal_error(*report));
  } else {
    lock.lock();
  }
  const auto again = entries_.find(id);
  if (again == entries_.end() || again->second.active ||
      !run_state_ended(again->second.record.status.state)) {
    return fail(conflict(record.status, verb, "the run has been started or forgotten meanwhile"));
  }
  return command_ended(again->second, verb);
}

/// Whether the verb makes sense for this run at all.
Result<void> Manager::serves(const Entry& entry, RunVerb verb) {
  const RunStatus& status = entry.record.status;
  if (is_cutover(verb) && status.tracker != "ebpf")
    return fail(conflict(status, verb, "its source is not live, so there is nothing to hand over"));
  if (verb == RunVerb::rollback || verb == RunVerb::commit)
    return fail(conflict(status, verb, "it did not swap a volume"));
  return {};
}

Result<json> Manager::command_active(Run& run, RunVerb verb) {
  const RunStatus status = run.status();
  if (run.finished())
    return fail(conflict(status, verb, "the run has ended, but still waits for a device that hangs"));
  switch (verb) {
    case RunVerb::pause:
      run.send([](RunCore& core) { core.pause(); }, verb_patience);
      break;
    case RunVerb::resume:
      if (status.state != RunState::paused) return fail(conflict(status, verb, "the run is not paused"));
      run.send([](RunCore& core) { core.resume(); }, verb_patience);
      break;
    case RunVerb::cancel: {
      const Nanoseconds give_up = system_clock().now() + 2 * verb_patience;
      run.send([](RunCore& core) { core.cancel(); }, verb_patience);
      while (!run.finished() && system_clock().now() < give_up)
        system_clock().sleep_for(std::chrono::milliseconds(1));
      break;
    }
    case RunVerb::cutover:
    case RunVerb::rehearse:
      if (status.state == RunState::paused || status.state == RunState::verifying)
        return fail(conflict(status, verb, std::string("the run is ") + run_state_name(status.state)));
      run.send([verb](RunCore& core) { core.ask_for_cutover(verb == RunVerb::rehearse); }, verb_patience);
      break;
    default:
      return fail(conflict(status, verb, std::string("the run is still ") + run_state_name(status.state)));
  }
  return to_json(run.status());
}

Result<json> Manager::command_waiting(Entry& entry, RunVerb verb) {
  RunStatus& status = entry.record.status;
  if (verb == RunVerb::cancel) {
    status.state = RunState::cancelled;
    status.ended_at = system_clock().wall_seconds();
    metrics_.add_run_ended(status.state);
  } else if (verb == RunVerb::pause && status.state == RunState::queued) {
    status.state = RunState::paused;
    entry.record.paused = true;
  } else if (verb == RunVerb::resume && status.state == RunState::paused) {
    status.state = RunState::queued;
    entry.record.paused = false;
  } else {
    return fail(conflict(status, verb, std::string("the run is ") + run_state_name(status.state)));
  }
  if (auto done = save(entry); !done) return fail(done.error());
  changed_.notify_all();
  return to_json(status);
}

/// A later run may have taken over the volume's state: then this run's knowledge of the target is out of
/// date.
Result<void> Manager::owns_volume(const Entry& entry) const {
  const RunStatus& status = entry.record.status;
  for (const auto& [id, other] : entries_) {
    if (other.damaged || id == status.id || other.record.volume_id != entry.record.volume_id) continue;
    if (other.record.status.created_at > status.created_at) {
      return fail(make_error(ErrorCode::conflict, "start", "run " + status.id,
                             "run " + id + " was built on it and goes on with its volume; use that one"));
    }
  }
  return {};
}

Result<json> Manager::command_ended(Entry& entry, RunVerb verb) {
  RunRecord& record = entry.record;
  RunStatus& status = record.status;
  if (auto done = owns_volume(entry); !done) return fail(done.error());
  const bool never_started = record.bitmap_generation == 0;
  if (verb == RunVerb::resume) {
    if (status.state == RunState::completed)
      return fail(conflict(status, verb, "the run is completed; see `ferryctl sync`"));
    status.granules_mismatched = 0;
  } else if (never_started) {
    return fail(conflict(status, verb, "the run never copied anything"));
  } else if (verb == RunVerb::verify) {
    if (status.state != RunState::completed)
      return fail(conflict(status, verb, "the run is not complete; resume it first"));
    if (record.final_pass_begun) {
      return fail(
          conflict(status, verb,
                   "ferryd ended in the middle of its hand-over, before the last checksums were recorded"));
    }
    record.verify_only = true;
    record.phase = RunPhase::verifying;
    record.cursor = record.verify_target = 0;
    record.target_stamps.assign(status.targets.size(), std::nullopt);
  } else {
    // A tracker that was kept knows what changed; where it is gone, the run compares by itself.
    const bool kept = status.tracker == "ebpf" && status.request.keep;
    record.phase = kept ? RunPhase::copying : RunPhase::collecting;
    record.suspect = !kept;
    record.cut_over = false;
    pins_->forget_hand_over(record);
    record.cursor = 0;
    status.bad_ranges.clear();
    status.passes.push_back({kept ? PassKind::incremental : PassKind::checksum, 0, 0, 0});
  }
  return enqueue(entry);
}

Result<json> Manager::enqueue(Entry& entry) {
  RunStatus& status = entry.record.status;
  status.state = RunState::queued;
  status.error.reset();
  status.ended_at = 0;
  status.progress = 0;
  status.eta_seconds.reset();
  entry.record.paused = false;
  if (auto done = save(entry); !done) return fail(done.error());
  ++creations_;
  changed_.notify_all();
  return to_json(status);
}

Result<json> Manager::change_run(const std::string& run, const RunChange& change) {
  std::unique_lock lock(mutex_);
  const auto at = find(run);
  if (!at) return fail(at.error());
  Entry& entry = (*at)->second;
  if (entry.damaged) return fail(*entry.record.status.error);
  if (change.max_downtime_ms && entry.record.status.tracker != "ebpf") {
    return fail(make_error(ErrorCode::conflict, "set", "run " + entry.record.status.id,
                           "--max-downtime needs a live source, and this run's is not"));
  }
  if (const auto active = entry.active) {
    lock.unlock();
    active->send(
        [change](RunCore& core) {
          if (change.rate_bytes_per_second) core.set_rate(*change.rate_bytes_per_second);
          if (change.max_downtime_ms) core.set_max_downtime(*change.max_downtime_ms);
        },
        verb_patience);
    return to_json(active->status());
  }
  RunRequest& request = entry.record.status.request;
  request.rate_bytes_per_second = change.rate_bytes_per_second.value_or(request.rate_bytes_per_second);
  request.max_downtime_ms = change.max_downtime_ms.value_or(request.max_downtime_ms);
  if (auto done = save(entry); !done) return fail(done.error());
  return to_json(entry.record.status);
}

Result<json> Manager::forget_run(const std::string& run) {
  take_back_finished();
  const std::lock_guard lock(mutex_);
  const auto at = find(run);
  if (!at) return fail(at.error());
  const Entry& entry = (*at)->second;
  if (entry.active || !run_state_ended(entry.record.status.state)) {
    return fail(make_error(ErrorCode::conflict, "forget", "run " + entry.record.status.id,
                           "the run has not ended; cancel it first"));
  }
  const json last = to_json(entry.record.status);
  if (auto done = state_.remove(record_file_name((*at)->first)); !done) return fail(done.error());
  entries_.erase(*at);
  remove_orphans();
  return last;
}

}  // namespace blockferry
