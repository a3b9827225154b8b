// SPDX-License-Identifier: Apache-2.0
// New runs: preflight, and what is written down of them before they are queued.
#include <algorithm>
#include <random>

#include <nlohmann/json.hpp>

#include "daemon/manager.h"

namespace blockferry {

namespace {

using nlohmann::json;

std::string new_id() {
  static constexpr char letters[] = "0123456789abcdefghjkmnpqrstvwxyz";
  std::random_device random;
  std::string id;
  for (int i = 0; i < 8; ++i) id += letters[random() % 32];
  return id;
}

Error refused(const RunRequest& request, const std::string& why) {
  return make_error(ErrorCode::refused, request.kind == RunKind::migrate ? "migrate" : "clone",
                    request.source, why);
}

bool same_volume(const std::string& uri, const std::string& identity, const PreflightVolume& volume) {
  return uri == volume.path || uri == volume.resolved || (!identity.empty() && identity == volume.identity);
}

/// Whether bitmaps that the user has named in QEMU hold all that was written since the base's last commit.
/// The tracker looks whether they are as they were left.
bool bitmaps_go_on(const RunRecord& base, const RunStatus& status) {
  const std::string name = bitmap_named_by(status.source_uri);
  return !name.empty() && name == bitmap_named_by(base.status.source_uri) && status.tracker == "qemu" &&
         base.tracked && !base.suspect && base.phase != RunPhase::collecting;
}

std::uint64_t memory_bytes(const RunRecord& record) {
  return CopyEngine::memory_bytes(
      engine_options_for(record.status.request, record.status.granule_bytes, record.status.bytes_total));
}

}  // namespace

std::vector<VolumeInUse> Manager::volumes_in_use(const std::set<std::string>& except) const {
  std::vector<VolumeInUse> volumes;
  for (const auto& [id, entry] : entries_) {
    if (except.contains(id) || entry.damaged) continue;
    // A run that ended but still waits for a device that hangs holds its volumes all the same.
    const RunStatus status = entry.status();
    if (run_state_ended(status.state) && (!entry.active || entry.active->drained())) continue;
    volumes.push_back({status.source_uri, id, false});
    for (const auto& target : status.targets) volumes.push_back({target.uri, id, true});
  }
  return volumes;
}

/// The last run over the same volumes, if its state can be built upon.
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
  if (base == nullptr) return nullptr;
  // It ended, or was ended, in the middle of its hand-over: what the target holds then is on no record.
  if (base->final_pass_begun) return nullptr;
  return overwritten_by(*base).empty() ? base : nullptr;
}

/// Preflight against all other runs, and of each of these against those before it. Repeated when another run
/// was created meanwhile: it may want the same target.
Result<std::vector<PreflightReport>> Manager::checked(const std::vector<RunRequest>& requests,
                                                      const std::set<std::string>& except) {
  constexpr unsigned tries = 20;
  for (unsigned i = 0; i < tries; ++i) {
    std::uint64_t seen = 0;
    std::vector<VolumeInUse> in_use;
    {
      const std::lock_guard lock(mutex_);
      seen = creations_;
      in_use = volumes_in_use(except);
    }
    std::vector<PreflightReport> reports;
    for (const auto& request : requests) {
      auto report = preflight(request, in_use);
      if (!report) return fail(report.error());
      reports.push_back(std::move(*report));
      in_use.push_back({request.source, "", false});
      for (const auto& target : request.targets) in_use.push_back({target, "", true});
    }
    mutex_.lock();
    if (seen == creations_) return reports;  // with the mutex held: the caller acts upon it
    mutex_.unlock();
  }
  return fail(make_error(ErrorCode::busy, "create run", requests.front().source,
                         "too many runs are being created; try again"));
}

/// What ferryd's configuration says where the request does not.
void Manager::fill_in(RunRequest& request) const {
  if (!request.tls_certificates.empty() || !request.tls_psk_file.empty()) return;
  request.tls_certificates = options_.tls_certificates;
  request.tls_psk_file = options_.tls_psk_file;
}

Result<json> Manager::check(const RunRequest& request) {
  RunRequest asked = request;
  fill_in(asked);
  if (request.mode == RunMode::incremental) asked.overwrite = true;  // what stands on the target is the base
  auto reports = checked({asked}, {});
  if (!reports) return fail(reports.error());
  const std::unique_lock lock(mutex_, std::adopt_lock);
  PreflightReport& report = reports->front();
  if (request.mode == RunMode::incremental) {
    report.mode = "incremental";
    if (base_of(request, report) == nullptr) {
      report.refusals.push_back({request.source,
                                 "--mode incremental: no earlier run from this source was the last to "
                                 "write to this target; copy in full first"});
    }
  }
  return to_json(report);
}

Result<json> Manager::create_run(const RunRequest& request) {
  auto runs = create_runs({request});
  if (!runs) return runs;
  return std::move((*runs)[0]);
}

/// Each must be live: what is not tracked cannot wait for the others.
Result<json> Manager::create_group(const std::vector<RunRequest>& requests) {
  std::vector<RunRequest> live = requests;
  for (auto& request : live) {
    if (request.mode == RunMode::automatic) request.mode = RunMode::hybrid;
    if (request.handover.empty() && !is_qemu_uri(request.source)) request.handover = "fs";
    if (request.handover == "dm-swap") {
      return fail(make_error(ErrorCode::invalid_argument, "cut over together", request.source,
                             "--handover dm-swap swaps one volume at a time"));
    }
    if (request.mode == RunMode::hybrid) continue;
    return fail(make_error(ErrorCode::invalid_argument, "cut over together", request.source,
                           "only --mode hybrid does that"));
  }
  return create_runs(std::move(live));
}

/// All or none of them.
Result<json> Manager::create_runs(std::vector<RunRequest> requests) {
  take_back_finished();
  for (auto& request : requests) {
    fill_in(request);
    request.overwrite = request.overwrite || request.mode == RunMode::incremental;
  }
  auto reports = checked(requests, {});
  if (!reports) return fail(reports.error());
  const std::unique_lock lock(mutex_, std::adopt_lock);
  if (stopping_) {
    return fail(make_error(ErrorCode::busy, "create run", requests.front().source, "ferryd is stopping"));
  }
  std::vector<RunRecord> records;
  for (std::size_t i = 0; i < requests.size(); ++i) {
    auto record = checked_record(requests[i], (*reports)[i]);
    if (!record) return fail(record.error());
    records.push_back(std::move(*record));
  }
  if (auto done = fits_together(records); !done) return fail(done.error());
  std::vector<std::string> ids;
  ids.reserve(records.size());
  for (const auto& record : records) ids.push_back(record.status.id);
  json answer = json::array();
  for (auto& record : records) {
    if (records.size() > 1) record.status.group = ids;
    if (auto done = save_record(state_, record); !done) {
      for (const auto& id : ids) static_cast<void>(state_.remove(record_file_name(id)));
      return fail(done.error());
    }
    answer.push_back(to_json(record.status));
  }
  for (auto& record : records) {
    Entry entry;
    entry.record = std::move(record);
    entries_.emplace(entry.record.status.id, std::move(entry));
  }
  ++creations_;
  changed_.notify_all();
  return answer;
}

/// With mutex_ held.
Result<RunRecord> Manager::checked_record(const RunRequest& request, const PreflightReport& report) {
  if (!report.refusals.empty()) return fail(refusal_error(report));
  const bool incremental = request.mode == RunMode::incremental;
  const RunRecord* base = incremental ? base_of(request, report) : nullptr;
  if (incremental && base == nullptr) {
    return fail(refused(request,
                        "--mode incremental: no earlier run from this source was the last to write to this "
                        "target; copy in full first"));
  }
  for (const auto& [id, entry] : entries_) {
    if (!request.name.empty() && entry.record.status.request.name == request.name &&
        !run_state_ended(entry.status().state)) {
      return fail(refused(request, "run " + id + " has the name " + request.name + " already"));
    }
  }
  return new_record(request, report, base);
}

Result<void> Manager::fits_together(const std::vector<RunRecord>& records) const {
  std::uint64_t bytes = 0;
  for (const auto& record : records) bytes += memory_bytes(record);
  const RunRequest& first = records.front().status.request;
  if (bytes > options_.memory_bytes_max) {
    return fail(refused(first, "its buffers (" + format_size(bytes) + ") exceed ferryd's memory-budget (" +
                                   format_size(options_.memory_bytes_max) +
                                   "); choose a smaller --queue-depth or --io-size"));
  }
  if (records.size() > options_.runs_max) {
    return fail(refused(first, "ferryd does no more than " + std::to_string(options_.runs_max) +
                                   " runs at once, and these need to go on together"));
  }
  return {};
}

RunRecord Manager::new_record(const RunRequest& request, const PreflightReport& report,
                              const RunRecord* base) {
  RunRecord record;
  RunStatus& status = record.status;
  do status.id = new_id();
  while (entries_.contains(status.id));
  status.request = request;
  record.swap = report.swap;
  if (report.swap) status.request.handover = report.handover;
  status.mode = base != nullptr ? "incremental" : report.mode;
  status.tracker = report.tracker;
  status.source_uri = report.source.path;
  status.source_identity = report.source.identity;
  status.source_bytes = status.bytes_total = report.source.bytes;
  status.granule_bytes =
      request.granule_bytes != 0 ? request.granule_bytes : granule_bytes_for(status.bytes_total);
  status.granule_bytes = std::max(status.granule_bytes, report.source.granule_bytes_min);
  for (const auto& volume : report.targets) {
    status.granule_bytes = std::max(status.granule_bytes, volume.granule_bytes_min);
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
    record.tracker_position = base->tracker_position;
    record.tracked = bitmaps_go_on(*base, status);
    record.suspect = !record.tracked;
    record.phase = record.tracked ? RunPhase::copying : RunPhase::collecting;
    if (record.tracked) status.passes.front().kind = PassKind::incremental;
    pins_->forget_hand_over(record);
  }
  return record;
}

}  // namespace blockferry
