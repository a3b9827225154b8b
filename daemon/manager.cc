// SPDX-License-Identifier: Apache-2.0
// The table of runs, their queue and their threads. What people ask of it is in manager_verbs.cc.
#include "daemon/manager.h"

#include <algorithm>
#include <set>

#include <nlohmann/json.hpp>

#include "daemon/real_environment.h"

namespace blockferry {

Manager::Manager(StateDirectory& state, const ManagerOptions& options)
    : state_(state), options_(options), qemu_(options.runtime_directory) {}

Result<std::unique_ptr<Manager>> Manager::create(StateDirectory& state, const ManagerOptions& options) {
  std::unique_ptr<Manager> manager(new Manager(state, options));
  if (auto done = manager->load(); !done) return fail(done.error());
  return manager;
}

Manager::~Manager() {
  stop(std::chrono::hours(1));
}

Result<void> Manager::load() {
  auto pins = TrackerPins::create(state_);
  if (!pins) return fail(pins.error());
  pins_ = std::move(*pins);
  auto names = state_.list();
  if (!names) return fail(names.error());
  for (const auto& name : *names) {
    const auto id = run_id_of_file(name);
    if (!id) continue;
    auto record = load_record(state_, *id);
    Entry entry;
    if (record && record->status.id == *id) {
      entry.record = std::move(*record);
    } else {
      entry.damaged = true;
      entry.record.status.id = *id;
      entry.record.status.state = RunState::failed;
      entry.record.status.error =
          record ? make_error(ErrorCode::state_damaged, "read run record", name, "it holds another run's id")
                 : record.error();
    }
    entry.after_restart = true;
    // Files of a volume whose first checkpoint never came.
    entry.begun =
        entry.record.status.started_at != 0 ||
        (entry.record.bitmap_generation == 0 &&
         std::binary_search(names->begin(), names->end(), bitmap_file_name(entry.record.volume_id)));
    entries_.emplace(*id, std::move(entry));
  }
  remove_orphans();
  return {};
}

/// State files whose run was never recorded, or is forgotten. While a record cannot be read nothing is
/// removed: it might be that run's.
void Manager::remove_orphans() {
  std::set<std::string> volumes, tracked, runs;
  for (const auto& [id, entry] : entries_) {
    if (entry.damaged) return;
    volumes.insert(entry.record.volume_id);
    const RunStatus& status = entry.record.status;
    const bool over = run_state_ended(status.state) && status.state != RunState::failed;
    if (!over || entry.active) runs.insert(id);
    if (!over || (status.request.keep && status.state == RunState::completed))
      tracked.insert(entry.record.volume_id);
    if (!group_goes_on(status).empty()) tracked.insert(TrackerPins::group_name(entry.record));
  }
  pins_->remove_all_but(tracked);
  pins_->remove_maps_but(runs);
  const auto names = state_.list();
  if (!names) return;
  for (const auto& name : *names) {
    const auto volume = volume_id_of_file(name);
    // A left-over costs only space: the next start tries again.
    if (volume && !volumes.contains(*volume)) static_cast<void>(state_.remove(name));
  }
}

void Manager::start() {
  const std::lock_guard lock(mutex_);
  for (auto& [id, entry] : entries_) {
    RunStatus& status = entry.record.status;
    if (entry.damaged || run_state_ended(status.state)) continue;
    if (entry.begun) ++status.restarts;
    status.state = RunState::queued;
  }
  started_ = true;
  keeper_ = std::thread([this] { keep(); });
}

/// Of runs that an earlier process ended, and did not come to clean up after.
void Manager::clean_up_guests() {
  std::vector<RunRecord> ended;
  {
    const std::lock_guard lock(mutex_);
    for (const auto& [id, entry] : entries_) {
      const RunStatus& status = entry.record.status;
      const bool over = run_state_ended(status.state) && status.state != RunState::failed;
      const bool kept = status.request.keep && status.state == RunState::completed;
      // Of runs that follow one another on one volume only the last one has anything there.
      if (!entry.damaged && entry.record.tracked && status.tracker == "qemu" && over && !kept &&
          owns_volume(entry))
        ended.push_back(entry.record);
    }
  }
  for (auto& record : ended) {
    qemu_.remove(record);
    if (!bitmap_named_by(record.status.source_uri).empty()) continue;  // it goes on tracking
    const std::lock_guard lock(mutex_);
    const auto at = entries_.find(record.status.id);
    if (at == entries_.end() || at->second.active) continue;
    at->second.record.tracked = false;
    static_cast<void>(save(at->second));  // else the next process does it again
  }
}

void Manager::keep() {
  clean_up_guests();
  std::unique_lock lock(mutex_);
  while (!stopping_) {
    lock.unlock();
    take_back_finished();
    lock.lock();
    if (stopping_) return;
    start_due_syncs();
    start_queued();
    changed_.wait_for(lock, std::chrono::milliseconds(500));
  }
}

bool Manager::fits(const RunRecord& record) const {
  const auto bytes_of = [](const RunRecord& of) {
    return CopyEngine::memory_bytes(
        engine_options_for(of.status.request, of.status.granule_bytes, of.status.bytes_total));
  };
  unsigned running = 0;
  std::uint64_t memory = bytes_of(record);
  for (const auto& [id, entry] : entries_) {
    if (!entry.active) continue;
    ++running;
    memory += bytes_of(entry.record);
  }
  return running == 0 || (running < options_.runs_max && memory <= options_.memory_bytes_max);
}

/// --sync-every, counted from the end of the last one. A sync that fails is not tried again by itself.
void Manager::start_due_syncs() {
  const auto is_due = [this](const std::string& id) {
    const auto at = entries_.find(id);
    return at != entries_.end() && !at->second.active && sync_is_due(at->second.record.status);
  };
  std::set<std::string> due;
  for (const auto& [id, entry] : entries_) {
    const auto& group = entry.record.status.group;
    if (!entry.damaged && is_due(id) && std::all_of(group.begin(), group.end(), is_due)) due.insert(id);
  }
  for (const auto& id : due) {
    Entry& entry = entries_.at(id);
    const bool freeze = entry.record.status.request.sync_freeze;
    if (auto asked = command_ended(entry, freeze ? RunVerb::sync : RunVerb::sync_unfrozen);
        !asked && asked.error().code != ErrorCode::conflict) {
      entry.record.status.state = RunState::failed;
      entry.record.status.error = asked.error();
    }
  }
}

bool Manager::sync_is_due(const RunStatus& status) const {
  const auto every_ms = status.request.sync_every_ms;
  return every_ms != 0 && status.state == RunState::completed &&
         system_clock().wall_seconds() - status.ended_at >= double(every_ms) / 1000;
}

/// A run that is cut over together with this one and has not ended for good, this one included.
std::string Manager::group_goes_on(const RunStatus& status) const {
  for (const auto& id : status.group) {
    const auto at = entries_.find(id);
    if (at == entries_.end()) continue;
    const RunState state = at->second.record.status.state;
    if (at->second.active || !run_state_ended(state)) return id;
  }
  return "";
}

/// Null for a run that is cut over alone.
Result<std::shared_ptr<CutoverGroup>> Manager::group_of(const Entry& entry) {
  const auto& ids = entry.record.status.group;
  if (ids.empty()) return nullptr;
  auto& kept = groups_[ids.front()];
  if (auto group = kept.lock()) return group;
  std::vector<RunRecord> members;
  for (const auto& id : ids) {
    const auto at = entries_.find(id);
    if (at == entries_.end() || at->second.damaged) {
      return fail(make_error(ErrorCode::conflict, "take up", "run " + entry.record.status.id,
                             "run " + id + ", which is cut over together with it, is gone; start anew"));
    }
    members.push_back(at->second.record);
  }
  auto group = make_cutover_group(live_sources(), members);
  kept = group;
  return group;
}

/// In the order in which they were asked for: a large one at the head is not overtaken for ever.
void Manager::start_queued() {
  std::vector<Entry*> queued;
  for (auto& [id, entry] : entries_) {
    if (!entry.active && !entry.damaged && entry.record.status.state == RunState::queued)
      queued.push_back(&entry);
  }
  std::sort(queued.begin(), queued.end(),
            [](auto* a, auto* b) { return a->record.status.created_at < b->record.status.created_at; });
  for (auto* entry : queued) {
    if (!fits(entry->record)) return;
    auto group = group_of(*entry);
    if (!group) {
      entry->record.status.state = RunState::failed;
      entry->record.status.error = group.error();
      continue;
    }
    auto environment = make_real_environment(state_, buffers_, live_sources(), options_.io_engine,
                                             entry->after_restart, std::move(*group));
    RunLimits limits = options_.limits;
    limits.metrics = &metrics_;
    entry->active = std::make_shared<Run>(entry->record, std::move(environment), limits, [this] {
      const std::lock_guard lock(mutex_);
      changed_.notify_all();
    });
  }
}

/// A finished run's record comes back into the table; its thread is joined outside the mutex. One whose
/// device hangs stays until the kernel lets go.
void Manager::take_back_finished() {
  std::vector<std::shared_ptr<Run>> done;
  std::vector<RunStatus> ended;
  {
    const std::lock_guard lock(mutex_);
    for (auto& [id, entry] : entries_) {
      if (!entry.active || !entry.active->drained()) continue;
      entry.record = entry.active->record();
      entry.after_restart = false;
      ended.push_back(entry.record.status);
      done.push_back(std::move(entry.active));
    }
  }
  done.clear();
  if (!options_.on_run_ended) return;
  for (const auto& status : ended) options_.on_run_ended(status);
}

bool Manager::stop(Nanoseconds patience) {
  std::vector<std::shared_ptr<Run>> active;
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
    changed_.notify_all();
    for (auto& [id, entry] : entries_) {
      if (entry.active) active.push_back(entry.active);
    }
  }
  if (keeper_.joinable()) keeper_.join();
  for (auto& run : active) run->send([](RunCore& core) { core.stop(); }, Nanoseconds(0));
  const Nanoseconds give_up = system_clock().now() + patience;
  bool all = true;
  for (auto& run : active) {
    while (!run->drained() && system_clock().now() < give_up)
      system_clock().sleep_for(std::chrono::milliseconds(2));
    all = all && run->drained();
  }
  if (!all) return false;
  active.clear();
  take_back_finished();
  return true;
}

std::size_t Manager::run_count() {
  const std::lock_guard lock(mutex_);
  return entries_.size();
}

std::string Manager::metrics_text() {
  std::vector<RunStatus> runs;
  {
    const std::lock_guard lock(mutex_);
    for (const auto& [id, entry] : entries_) runs.push_back(entry.status());
  }
  return metrics_.text(runs, live_tracking_missing().empty());
}

}  // namespace blockferry
