// SPDX-License-Identifier: Apache-2.0
#include "daemon/run_status.h"

#include <algorithm>
#include <cmath>

#include <nlohmann/json.hpp>

namespace blockferry {
namespace {

using nlohmann::json;

constexpr const char* state_names[] = {"queued",    "copying",   "tracking", "paused",    "cutting-over",
                                       "verifying", "completed", "failed",   "cancelled", "rolled-back"};
constexpr const char* pass_names[] = {"full", "incremental", "checksum", "final"};

json text_or_null(const std::string& text) {
  return text.empty() ? json(nullptr) : json(text);
}

json error_or_null(const std::optional<Error>& error) {
  return error ? std::move(error_to_json(*error)["error"]) : json(nullptr);
}

template <typename T>
json value_or_null(const std::optional<T>& value) {
  return value ? json(*value) : json(nullptr);
}

/// A number of a measurement: what cannot be said in JSON is not known.
json measure_or_null(const std::optional<double>& value) {
  return value && std::isfinite(*value) ? json(std::max(*value, 0.0)) : json(nullptr);
}

json pause_to_json(const std::optional<PauseStatus>& pause) {
  if (!pause) return nullptr;
  return {{"freeze_ms", pause->freeze_ms},   {"drain_ms", pause->drain_ms},
          {"copy_ms", pause->copy_ms},       {"flush_ms", pause->flush_ms},
          {"command_ms", pause->command_ms}, {"release_ms", pause->release_ms},
          {"rehearsal", pause->rehearsal}};
}

json losses_to_json(const TrackerLosses& losses) {
  return {{"records_refused", losses.records_refused},
          {"ranges_unknown", losses.ranges_unknown},
          {"ends_unmatched", losses.ends_unmatched},
          {"programs_skipped", losses.programs_skipped},
          {"interruptions", losses.interruptions}};
}

json moment_or_null(double wall_seconds) {
  return wall_seconds > 0 ? json(wall_seconds) : json(nullptr);
}

json passes_to_json(const RunStatus& status) {
  json passes = json::array();
  for (const auto& pass : status.passes)
    passes.push_back({{"kind", pass_kind_name(pass.kind)},
                      {"granules", pass.granules},
                      {"bytes", pass.bytes},
                      {"seconds", pass.seconds}});
  return passes;
}

/// Before the volumes were opened only their names are known.
json targets_to_json(const RunStatus& status, bool opened) {
  json targets = json::array();
  for (const auto& target : status.targets) {
    const bool known = opened && (target.bytes != 0 || status.source_bytes == 0);
    targets.push_back({{"uri", target.uri},
                       {"bytes", known ? json(target.bytes) : json(nullptr)},
                       {"identity", text_or_null(target.identity)},
                       {"error", error_or_null(target.error)}});
  }
  if (!targets.empty()) return targets;
  for (const auto& uri : status.request.targets)
    targets.push_back({{"uri", uri}, {"bytes", nullptr}, {"identity", nullptr}, {"error", nullptr}});
  return targets;
}

json source_to_json(const RunStatus& status, bool opened) {
  return {{"uri", status.source_uri.empty() ? status.request.source : status.source_uri},
          {"bytes", opened ? json(status.source_bytes) : json(nullptr)},
          {"identity", text_or_null(status.source_identity)}};
}

json verify_to_json(const RunStatus& status) {
  const bool known = status.verify_ran || status.granules_verified != 0 || status.granules_mismatched != 0;
  return {{"granules", known ? json(status.granules_verified) : json(nullptr)},
          {"mismatches", known ? json(status.granules_mismatched) : json(nullptr)}};
}

json bad_ranges_to_json(const RunStatus& status) {
  json ranges = json::array();
  for (const auto& range : status.bad_ranges)
    ranges.push_back({{"offset", range.offset}, {"bytes", range.bytes}});
  return ranges;
}

}  // namespace

const char* run_state_name(RunState state) {
  return state_names[static_cast<std::size_t>(state)];
}

std::optional<RunState> run_state_from_name(const std::string& name) {
  for (std::size_t i = 0; i < std::size(state_names); ++i)
    if (name == state_names[i]) return static_cast<RunState>(i);
  return std::nullopt;
}

bool run_state_ended(RunState state) {
  return state == RunState::completed || state == RunState::failed || state == RunState::cancelled ||
         state == RunState::rolled_back;
}

const char* pass_kind_name(PassKind kind) {
  return pass_names[static_cast<std::size_t>(kind)];
}

json to_json(const RunStatus& status) {
  const bool opened = status.granule_bytes != 0;
  const double progress = std::isfinite(status.progress) ? std::clamp(status.progress, 0.0, 1.0) : 0.0;
  const auto& request = status.request;
  return {{"id", status.id},
          {"name", request.name},
          {"kind", request.kind == RunKind::clone ? "clone" : "migrate"},
          {"state", run_state_name(status.state)},
          {"group", status.group.empty() ? json(nullptr) : json(status.group)},
          {"mode", status.mode},
          {"tracker", status.tracker},
          {"source", source_to_json(status, opened)},
          {"targets", targets_to_json(status, opened)},
          {"granule_bytes", opened ? json(status.granule_bytes) : json(nullptr)},
          {"bytes_total", opened ? json(status.bytes_total) : json(nullptr)},
          {"bytes_copied", status.bytes_copied},
          {"bytes_zeroed", status.bytes_zeroed},
          {"bytes_read", status.bytes_read},
          {"passes", passes_to_json(status)},
          {"handover", text_or_null(request.handover)},
          {"swapped", status.swapped},
          {"downtime_ms", measure_or_null(status.downtime_ms)},
          {"pause", pause_to_json(status.pause)},
          {"cutover_error", error_or_null(status.cutover_error)},
          {"predicted_downtime_ms", measure_or_null(status.predicted_downtime_ms)},
          {"max_downtime_ms", request.max_downtime_ms},
          {"dirty_bytes_per_second", value_or_null(status.dirty_bytes_per_second)},
          {"throughput_bytes_per_second", value_or_null(status.throughput_bytes_per_second)},
          {"eta_seconds", measure_or_null(status.eta_seconds)},
          {"progress", progress},
          {"activity", text_or_null(status.activity)},
          {"verify", verify_to_json(status)},
          {"unfrozen", status.unfrozen},
          {"tracker_losses", losses_to_json(status.tracker_losses)},
          {"audit", {{"granules", status.audited_granules}, {"misses", status.audit_misses}}},
          {"granules_dirty", opened ? json(status.granules_dirty) : json(nullptr)},
          {"bad_ranges", bad_ranges_to_json(status)},
          {"restarts", status.restarts},
          {"error", error_or_null(status.error)},
          {"warning", text_or_null(status.warning)},
          {"io_in_flight", status.io_in_flight},
          {"io_engine", text_or_null(status.io_engine)},
          {"rate_bytes_per_second", request.rate_bytes_per_second},
          {"keep", request.keep},
          {"created_at", moment_or_null(status.created_at)},
          {"started_at", moment_or_null(status.started_at)},
          {"ended_at", moment_or_null(status.ended_at)}};
}

}  // namespace blockferry
