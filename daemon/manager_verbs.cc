// SPDX-License-Identifier: Apache-2.0
// What people ask of the daemon about runs there are. New ones: manager_create.cc.
#include <algorithm>

#include <nlohmann/json.hpp>

#include "daemon/manager.h"

namespace blockferry {

namespace {

using nlohmann::json;

constexpr Nanoseconds verb_patience = std::chrono::milliseconds(900);

Error conflict(const RunStatus& status, RunVerb verb, const std::string& why) {
  return make_error(ErrorCode::conflict, run_verb_name(verb), "run " + status.id, why);
}

Error over(const RunStatus& status, RunVerb verb) {
  return conflict(status, verb, std::string("the run has ended (") + run_state_name(status.state) + ")");
}

bool is_sync(RunVerb verb) {
  return verb == RunVerb::sync || verb == RunVerb::sync_unfrozen;
}

bool is_cutover(RunVerb verb) {
  return verb == RunVerb::cutover || verb == RunVerb::rehearse;
}

bool settles_swap(RunVerb verb) {
  return verb == RunVerb::rollback || verb == RunVerb::commit;
}

/// What there still is to be asked of a run whose volume lies on the target.
bool serves_swapped(RunVerb verb) {
  return settles_swap(verb) || verb == RunVerb::pause || verb == RunVerb::resume || verb == RunVerb::rehearse;
}

/// Asks it to end, and waits a moment for that, so that the answer tells of it.
void end_run(Run& run, std::function<void(RunCore&)> message) {
  const Nanoseconds give_up = system_clock().now() + 2 * verb_patience;
  run.send(std::move(message), verb_patience);
  while (!run.finished() && system_clock().now() < give_up)
    system_clock().sleep_for(std::chrono::milliseconds(1));
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

// Verbs on a run.

/// The run itself, or all that are cut over together with it where the verb concerns them all.
std::vector<std::string> Manager::concerned(const RunStatus& status, RunVerb verb) {
  const bool all = is_cutover(verb) || is_sync(verb);
  return all && !status.group.empty() ? status.group : std::vector{status.id};
}

Result<json> Manager::command(const std::string& run, RunVerb verb) {
  take_back_finished();
  std::unique_lock lock(mutex_);
  const auto at = find(run);
  if (!at) return fail(at.error());
  const RunStatus status = (*at)->second.status();
  const auto ids = concerned(status, verb);
  const bool ended = std::all_of(ids.begin(), ids.end(), [this](const auto& id) {
    const auto member = entries_.find(id);
    return member != entries_.end() && !member->second.active &&
           run_state_ended(member->second.record.status.state);
  });
  lock.unlock();
  if (ended) return command_ended_runs(ids, status.id, verb);
  for (const auto& id : ids) {
    if (auto done = command_going(id, verb); !done) return done;
  }
  return show_run(status.id);
}

/// A run that goes on, or waits for its turn.
Result<json> Manager::command_going(const std::string& run, RunVerb verb) {
  std::unique_lock lock(mutex_);
  const auto at = find(run);
  if (!at) return fail(at.error());
  Entry& entry = (*at)->second;
  if (entry.damaged) return fail(*entry.record.status.error);
  if (auto done = serves(entry, verb); !done) return fail(done.error());
  if (const auto active = entry.active) {
    lock.unlock();
    return command_active(*active, verb);
  }
  if (run_state_ended(entry.record.status.state)) return fail(over(entry.record.status, verb));
  return command_waiting(entry, verb);
}

/// Runs that have ended: checked anew, and queued again, all or none. Answers `answered`.
Result<json> Manager::command_ended_runs(const std::vector<std::string>& ids, const std::string& answered,
                                         RunVerb verb) {
  std::vector<RunRequest> requests;
  bool swapped = false;  // lies on its target: no preflight would let that pass
  {
    const std::lock_guard lock(mutex_);
    for (const auto& id : ids) {
      const auto at = entries_.find(id);
      if (at == entries_.end()) return fail(make_error(ErrorCode::not_found, run_verb_name(verb), id, ""));
      if (auto done = may_run_again(at->second, verb); !done) return fail(done.error());
      const RunStatus& status = at->second.record.status;
      if (status.swapped) swapped = true;
      requests.push_back(status.request);
      requests.back().overwrite = true;
      // A live run stays one, also when nobody uses its source at the moment.
      requests.back().mode = status.live() ? RunMode::hybrid : RunMode::automatic;
    }
  }
  std::unique_lock<std::mutex> lock;
  if (verb != RunVerb::verify && !swapped) {
    auto reports = checked(requests, {ids.begin(), ids.end()});
    if (!reports) return fail(reports.error());
    lock = std::unique_lock(mutex_, std::adopt_lock);
    for (const auto& report : *reports) {
      if (!report.refusals.empty()) return fail(refusal_error(report));
    }
  } else {
    lock = std::unique_lock(mutex_);
  }
  for (const auto& id : ids) {
    const auto again = entries_.find(id);
    if (again == entries_.end() || again->second.active ||
        !run_state_ended(again->second.record.status.state)) {
      return fail(make_error(ErrorCode::conflict, run_verb_name(verb), "run " + id,
                             "the run has been started or forgotten meanwhile"));
    }
  }
  for (const auto& id : ids) {
    if (auto done = command_ended(entries_.at(id), verb); !done) return done;
  }
  return to_json(entries_.at(answered).record.status);
}

/// With mutex_ held, of a run that has ended.
Result<void> Manager::may_run_again(const Entry& entry, RunVerb verb) {
  const RunStatus& status = entry.record.status;
  if (entry.damaged) return fail(*status.error);
  if (auto done = serves(entry, verb); !done) return done;
  if (verb == RunVerb::pause || verb == RunVerb::cancel || is_cutover(verb)) return fail(over(status, verb));
  if (verb == RunVerb::rollback) {
    return fail(status.state == RunState::completed
                    ? over(status, verb)
                    : conflict(status, verb,
                               "the run has failed: `ferryctl resume` brings the old disk into "
                               "step again"));
  }
  if (verb == RunVerb::commit && status.state == RunState::completed) return fail(over(status, verb));
  for (const auto& id : verb == RunVerb::resume ? status.group : std::vector<std::string>()) {
    const auto other = entries_.find(id);
    if (other != entries_.end() && other->second.record.status.state == RunState::completed) {
      return fail(conflict(status, verb,
                           "run " + id + " of its group is complete: `ferryctl sync " + status.id +
                               "` brings all of them up to date together"));
    }
  }
  return owns_volume(entry);
}

/// Whether the verb makes sense for this run at all.
Result<void> Manager::serves(const Entry& entry, RunVerb verb) {
  const RunStatus status = entry.status();
  if (is_cutover(verb) && !status.live())
    return fail(conflict(status, verb, "its source is not live, so there is nothing to hand over"));
  if (verb == RunVerb::sync_unfrozen && !status.live())
    return fail(conflict(status, verb, "its source is not live, so nothing is frozen: a plain sync does"));
  if (settles_swap(verb) && !status.swapped) return fail(conflict(status, verb, "its volume is not swapped"));
  if (status.swapped && !serves_swapped(verb)) {
    return fail(conflict(status, verb,
                         status.state == RunState::completed
                             ? "its volume was swapped for good, and lies on the target"
                             : "its volume is swapped: `ferryctl commit` settles that, `ferryctl rollback` "
                               "returns to the old disk"));
  }
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
    case RunVerb::cancel:
      end_run(run, [](RunCore& core) { core.cancel(); });
      break;
    case RunVerb::commit:
      end_run(run, [](RunCore& core) { core.commit_swap(); });
      break;
    case RunVerb::rollback:
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

Result<void> Manager::save(Entry& entry) {
  return save_record(state_, entry.record);
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
  if (const std::string other = overwritten_by(entry.record); !other.empty()) {
    return fail(make_error(ErrorCode::conflict, "start", "run " + status.id,
                           "run " + other + " has written to its target since: clone anew"));
  }
  return {};
}

/// A later run that copied something else onto one of its targets; empty: none.
std::string Manager::overwritten_by(const RunRecord& record) const {
  const auto hit = [&record](const TargetStatus& target) {
    const auto& own = record.status.targets;
    return std::any_of(own.begin(), own.end(), [&target](const TargetStatus& each) {
      return each.uri == target.uri || (!each.identity.empty() && each.identity == target.identity);
    });
  };
  for (const auto& [id, entry] : entries_) {
    const RunRecord& other = entry.record;
    const bool wrote = entry.active || other.bitmap_generation > 0 || other.status.restarts > 0;
    if (!wrote || other.volume_id == record.volume_id || other.status.created_at <= record.status.created_at)
      continue;
    if (std::any_of(other.status.targets.begin(), other.status.targets.end(), hit)) return id;
  }
  return "";
}

Result<json> Manager::command_ended(Entry& entry, RunVerb verb) {
  RunRecord& record = entry.record;
  RunStatus& status = record.status;
  if (auto done = owns_volume(entry); !done) return fail(done.error());
  if (verb == RunVerb::commit) {
    status.state = RunState::completed;
    status.error.reset();
    pins_->remove(record);
    if (auto done = save(entry); !done) return fail(done.error());
    return to_json(status);
  }
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
    const bool kept = status.live() && (status.request.keep || !bitmap_named_by(status.source_uri).empty());
    record.phase = kept ? RunPhase::copying : RunPhase::collecting;
    record.suspect = !kept;
    record.cut_over = false;
    status.unfrozen = verb == RunVerb::sync_unfrozen;
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
  if (change.max_downtime_ms && !entry.record.status.live()) {
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
  std::unique_lock lock(mutex_);
  const auto at = find(run);
  if (!at) return fail(at.error());
  const Entry& entry = (*at)->second;
  if (entry.active || !run_state_ended(entry.record.status.state)) {
    return fail(make_error(ErrorCode::conflict, "forget", "run " + entry.record.status.id,
                           "the run has not ended; cancel it first"));
  }
  if (const std::string other = group_goes_on(entry.record.status); !other.empty()) {
    return fail(
        make_error(ErrorCode::conflict, "forget", "run " + entry.record.status.id,
                   "run " + other + ", which is cut over together with it, has not ended; cancel it first"));
  }
  const json last = to_json(entry.record.status);
  if (auto done = state_.remove(record_file_name((*at)->first)); !done) return fail(done.error());
  const RunRecord forgotten = entry.record;
  entries_.erase(*at);
  remove_orphans();
  const bool last_of_volume = std::none_of(entries_.begin(), entries_.end(), [&](const auto& each) {
    return each.second.record.volume_id == forgotten.volume_id;
  });
  lock.unlock();
  if (forgotten.status.tracker != "qemu") return last;
  if (last_of_volume)
    qemu_.forget(forgotten);
  else
    qemu_.remove(forgotten);
  return last;
}

}  // namespace blockferry
