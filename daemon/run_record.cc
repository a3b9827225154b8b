// SPDX-License-Identifier: Apache-2.0
// The file is text, so that an operator can read it:
//
//   blockferry-run VERSION CRC64 LENGTH\n     CRC-64 (16 hex digits) and length of what follows the line
//   break {…}                                       one JSON object
//
// Version 3 is one with a tracker's position, 2 one of a run that swaps its volume, 1 any other. A later
// version is refused (state_newer); members unknown to this version do not occur in it.
#include "daemon/run_record.h"

#include <charconv>
#include <cstdio>

#include <nlohmann/json.hpp>

#include "blockio/base/checksum.h"

namespace blockferry {

namespace {

using nlohmann::json;

constexpr unsigned format_version = 3, version_with_swap = 2, version_of_others = 1;
constexpr std::uint64_t record_bytes_max = 16 * MiB;
constexpr const char* phase_names[] = {"collecting", "copying", "verifying"};
constexpr const char* pass_names[] = {"full", "incremental", "checksum", "final"};

json optional_text(const std::optional<std::string>& text) {
  return text ? json(*text) : json(nullptr);
}

std::optional<std::string> text_or_none(const json& value) {
  if (value.is_null()) return std::nullopt;
  return value.get<std::string>();
}

json optional_error(const std::optional<Error>& error) {
  return error ? error_to_json(*error) : json(nullptr);
}

std::optional<Error> error_or_none(const json& value) {
  if (value.is_null()) return std::nullopt;
  return error_from_json(value);
}

template <std::size_t count>
std::size_t index_of(const char* const (&names)[count], const std::string& name) {
  for (std::size_t i = 0; i < count; ++i) {
    if (name == names[i]) return i;
  }
  throw std::invalid_argument("unknown name " + name);
}

json passes_to_json(const std::vector<PassStatus>& passes) {
  json list = json::array();
  for (const auto& pass : passes) {
    list.push_back({{"kind", pass_names[std::size_t(pass.kind)]},
                    {"granules", pass.granules},
                    {"bytes", pass.bytes},
                    {"seconds", pass.seconds}});
  }
  return list;
}

json targets_to_json(const RunRecord& record) {
  json list = json::array();
  for (std::size_t i = 0; i < record.status.targets.size(); ++i) {
    const auto& target = record.status.targets[i];
    list.push_back({{"uri", target.uri},
                    {"bytes", target.bytes},
                    {"identity", target.identity},
                    {"error", optional_error(target.error)},
                    {"lag", i < record.target_lags.size() && record.target_lags[i]},
                    {"stamp", i < record.target_stamps.size() ? optional_text(record.target_stamps[i])
                                                              : json(nullptr)}});
  }
  return list;
}

json pause_to_json(const RunStatus& status) {
  if (!status.pause || !status.downtime_ms) return nullptr;
  const PauseStatus& pause = *status.pause;
  return {{"total", *status.downtime_ms}, {"freeze", pause.freeze_ms},   {"drain", pause.drain_ms},
          {"copy", pause.copy_ms},        {"flush", pause.flush_ms},     {"command", pause.command_ms},
          {"release", pause.release_ms},  {"rehearsal", pause.rehearsal}};
}

void read_pause(const json& value, RunStatus& status) {
  if (value.is_null()) return;
  const auto number = [&](const char* name) { return value.at(name).get<double>(); };
  status.downtime_ms = number("total");
  status.pause = PauseStatus{number("freeze"),
                             number("drain"),
                             number("copy"),
                             number("flush"),
                             number("command"),
                             number("release"),
                             value.at("rehearsal").get<bool>()};
}

json ranges_to_json(const std::vector<ByteRange>& ranges) {
  json list = json::array();
  for (const auto& range : ranges) list.push_back({{"offset", range.offset}, {"bytes", range.bytes}});
  return list;
}

json place_to_json(const Place& place) {
  json list = json::array();
  for (const auto& stretch : place) {
    list.push_back({{"identity", stretch.identity},
                    {"number", stretch.number},
                    {"offset_sectors", stretch.offset_sectors},
                    {"sectors", stretch.sectors}});
  }
  return list;
}

Place read_place(const json& list) {
  Place place;
  for (const auto& item : list) {
    place.push_back({item.at("identity").get<std::string>(), item.at("number").get<std::string>(),
                     item.at("offset_sectors").get<std::uint64_t>(),
                     item.at("sectors").get<std::uint64_t>()});
  }
  return place;
}

json swap_to_json(const std::optional<SwapPlan>& swap) {
  if (!swap) return nullptr;
  return {{"old", place_to_json(swap->old_place)},
          {"new", place_to_json(swap->new_place)},
          {"multipath", swap->multipath},
          {"group", swap->group},
          {"volume", swap->volume},
          {"target_volume", swap->target_volume}};
}

std::optional<SwapPlan> read_swap(const json& value) {
  if (value.is_null()) return std::nullopt;
  const auto text = [&](const char* name) { return value.at(name).get<std::string>(); };
  return SwapPlan{read_place(value.at("old")),
                  read_place(value.at("new")),
                  text("multipath"),
                  text("group"),
                  text("volume"),
                  text("target_volume")};
}

unsigned version_of(const RunRecord& record) {
  if (record.tracker_position) return format_version;
  return record.swap ? version_with_swap : version_of_others;
}

json body_of(const RunRecord& record) {
  const RunStatus& status = record.status;
  json body = {
      {"id", status.id},
      {"state", run_state_name(status.state)},
      {"request", to_json(status.request)},
      {"group", status.group},
      {"mode", status.mode},
      {"tracker", status.tracker},
      {"source",
       {{"uri", status.source_uri}, {"identity", status.source_identity}, {"bytes", status.source_bytes}}},
      {"source_stamp", optional_text(record.source_stamp)},
      {"targets", targets_to_json(record)},
      {"granule_bytes", status.granule_bytes},
      {"bytes_total", status.bytes_total},
      {"bytes_copied", status.bytes_copied},
      {"bytes_zeroed", status.bytes_zeroed},
      {"bytes_read", status.bytes_read},
      {"passes", passes_to_json(status.passes)},
      {"pause_ms", pause_to_json(status)},
      {"granules_verified", status.granules_verified},
      {"granules_mismatched", status.granules_mismatched},
      {"verify_ran", status.verify_ran},
      {"audited_granules", status.audited_granules},
      {"audit_misses", status.audit_misses},
      {"unfrozen", status.unfrozen},
      {"tracker_losses",
       {status.tracker_losses.records_refused, status.tracker_losses.ranges_unknown,
        status.tracker_losses.ends_unmatched, status.tracker_losses.programs_skipped,
        status.tracker_losses.interruptions}},
      {"bad_ranges", ranges_to_json(status.bad_ranges)},
      {"restarts", status.restarts},
      {"io_engine", status.io_engine},
      {"error", optional_error(status.error)},
      {"created_at", status.created_at},
      {"started_at", status.started_at},
      {"ended_at", status.ended_at},
      {"throughput_bytes_per_second", status.throughput_bytes_per_second.value_or(0)},
      {"volume_id", record.volume_id},
      {"bitmap_generation", record.bitmap_generation},
      {"phase", phase_names[std::size_t(record.phase)]},
      {"cursor", record.cursor},
      {"verify_target", record.verify_target},
      {"suspect", record.suspect},
      {"verify_only", record.verify_only},
      {"tracked", record.tracked},
      {"final_pass_begun", record.final_pass_begun},
      {"cut_over", record.cut_over},
      {"swap", swap_to_json(record.swap)},
      {"swapped", status.swapped},
      {"paused", record.paused}};
  if (record.tracker_position) body["tracker_position"] = *record.tracker_position;
  return body;
}

void read_targets(const json& list, RunRecord& record) {
  for (const auto& item : list) {
    TargetStatus target;
    target.uri = item.at("uri").get<std::string>();
    target.bytes = item.at("bytes").get<std::uint64_t>();
    target.identity = item.at("identity").get<std::string>();
    target.error = error_or_none(item.at("error"));
    record.status.targets.push_back(std::move(target));
    record.target_lags.push_back(item.at("lag").get<bool>());
    record.target_stamps.push_back(text_or_none(item.at("stamp")));
  }
}

void read_progress(const json& body, RunStatus& status) {
  status.granule_bytes = body.at("granule_bytes").get<std::uint64_t>();
  status.bytes_total = body.at("bytes_total").get<std::uint64_t>();
  status.bytes_copied = body.at("bytes_copied").get<std::uint64_t>();
  status.bytes_zeroed = body.at("bytes_zeroed").get<std::uint64_t>();
  status.bytes_read = body.at("bytes_read").get<std::uint64_t>();
  for (const auto& item : body.at("passes")) {
    status.passes.push_back({PassKind(index_of(pass_names, item.at("kind").get<std::string>())),
                             item.at("granules").get<std::uint64_t>(), item.at("bytes").get<std::uint64_t>(),
                             item.at("seconds").get<double>()});
  }
  read_pause(body.value("pause_ms", json(nullptr)), status);
  status.granules_verified = body.at("granules_verified").get<std::uint64_t>();
  status.granules_mismatched = body.at("granules_mismatched").get<std::uint64_t>();
  status.verify_ran = body.at("verify_ran").get<bool>();
  status.audited_granules = body.value("audited_granules", std::uint64_t(0));
  status.audit_misses = body.value("audit_misses", std::uint64_t(0));
  status.unfrozen = body.value("unfrozen", false);
  auto losses = body.value("tracker_losses", std::vector<std::uint64_t>());
  losses.resize(5);  // earlier versions knew fewer kinds
  status.tracker_losses = {losses[0], losses[1], losses[2], losses[3], losses[4]};
  for (const auto& item : body.at("bad_ranges")) {
    status.bad_ranges.push_back(
        {item.at("offset").get<std::uint64_t>(), item.at("bytes").get<std::uint64_t>()});
  }
  status.restarts = body.at("restarts").get<std::uint64_t>();
  status.io_engine = body.at("io_engine").get<std::string>();
  status.created_at = body.at("created_at").get<double>();
  status.started_at = body.at("started_at").get<double>();
  status.ended_at = body.at("ended_at").get<double>();
  if (const auto rate = body.at("throughput_bytes_per_second").get<std::uint64_t>(); rate > 0) {
    status.throughput_bytes_per_second = rate;
  }
}

RunRecord record_of(const json& body) {
  RunRecord record;
  RunStatus& status = record.status;
  status.id = body.at("id").get<std::string>();
  const auto state = run_state_from_name(body.at("state").get<std::string>());
  auto request = run_request_from_json(body.at("request"));
  if (!state || !request) throw std::invalid_argument("state or request");
  status.state = *state;
  status.request = std::move(*request);
  status.group = body.value("group", std::vector<std::string>());
  status.mode = body.at("mode").get<std::string>();
  status.tracker = body.at("tracker").get<std::string>();
  status.source_uri = body.at("source").at("uri").get<std::string>();
  status.source_identity = body.at("source").at("identity").get<std::string>();
  status.source_bytes = body.at("source").at("bytes").get<std::uint64_t>();
  status.error = error_or_none(body.at("error"));
  read_targets(body.at("targets"), record);
  read_progress(body, status);
  if (run_state_ended(status.state)) status.eta_seconds = 0;
  if (status.state == RunState::completed) status.progress = 1;
  record.source_stamp = text_or_none(body.at("source_stamp"));
  record.volume_id = body.at("volume_id").get<std::string>();
  record.bitmap_generation = body.at("bitmap_generation").get<std::uint64_t>();
  record.phase = RunPhase(index_of(phase_names, body.at("phase").get<std::string>()));
  record.cursor = body.at("cursor").get<std::uint64_t>();
  record.verify_target = body.at("verify_target").get<std::uint32_t>();
  record.suspect = body.at("suspect").get<bool>();
  record.verify_only = body.at("verify_only").get<bool>();
  record.tracked = body.value("tracked", false);  // records of before there were live runs have none of these
  if (body.contains("tracker_position"))
    record.tracker_position = body.at("tracker_position").get<std::uint64_t>();
  record.final_pass_begun = body.value("final_pass_begun", false);
  record.cut_over = body.value("cut_over", false);
  record.swap = read_swap(body.value("swap", json(nullptr)));
  status.swapped = body.value("swapped", false);
  record.paused = body.at("paused").get<bool>();
  return record;
}

/// What a record claims must hang together before anything is done with it.
bool consistent(const RunRecord& record) {
  const RunStatus& status = record.status;
  if (status.id.empty() || record.volume_id.empty()) return false;
  if (record.volume_id.find_first_not_of("0123456789abcdefghijklmnopqrstuvwxyz-") != std::string::npos)
    return false;
  if (status.granule_bytes < 4096 || (status.granule_bytes & (status.granule_bytes - 1)) != 0) return false;
  if (status.bytes_total != status.source_bytes || status.bytes_total > (1ULL << 62)) return false;
  if (record.cursor > divide_up(status.bytes_total, status.granule_bytes)) return false;
  if (status.swapped && !record.swap) return false;
  return !status.targets.empty() && status.targets.size() == status.request.targets.size() &&
         record.verify_target <= status.targets.size();
}

Error damaged(const std::string& name, const std::string& how) {
  return make_error(ErrorCode::state_damaged, "read run record", name, how + "; restore it or remove it");
}

}  // namespace

std::string record_file_name(const std::string& run_id) {
  return "run-" + run_id;
}

std::optional<std::string> run_id_of_file(const std::string& file_name) {
  if (!file_name.starts_with("run-") || file_name.find('.') != std::string::npos) return std::nullopt;
  return file_name.substr(4);
}

std::string bitmap_file_name(const std::string& volume_id) {
  return "volume-" + volume_id + ".bitmap";
}
std::string checksums_file_name(const std::string& volume_id) {
  return "volume-" + volume_id + ".checksums";
}
std::string lag_file_name(const std::string& volume_id, std::size_t target) {
  return "volume-" + volume_id + ".lag" + std::to_string(target);
}

std::optional<std::string> volume_id_of_file(const std::string& file_name) {
  const auto dot = file_name.find('.');
  if (!file_name.starts_with("volume-") || dot == std::string::npos) return std::nullopt;
  return file_name.substr(7, dot - 7);
}

std::vector<std::byte> encode_record(const RunRecord& record) {
  const std::string body = body_of(record).dump(1, ' ', false, json::error_handler_t::replace);
  char line[96];
  const int length =
      std::snprintf(line, sizeof line, "blockferry-run %u %016llx %zu\n", version_of(record),
                    static_cast<unsigned long long>(crc64(std::as_bytes(std::span(body)))), body.size());
  std::vector<std::byte> content(std::size_t(length) + body.size());
  const auto head = std::as_bytes(std::span(line, std::size_t(length)));
  std::copy(head.begin(), head.end(), content.begin());
  const auto tail = std::as_bytes(std::span(body));
  std::copy(tail.begin(), tail.end(), content.begin() + length);
  return content;
}

Result<RunRecord> decode_record(std::span<const std::byte> content, const std::string& name) {
  const std::string_view text(reinterpret_cast<const char*>(content.data()), content.size());
  const auto line_end = text.substr(0, 96).find('\n');
  if (line_end == std::string_view::npos) return fail(damaged(name, "it has no first line"));
  unsigned version = 0;
  unsigned long long checksum = 0;
  std::size_t length = 0;
  const std::string line(text.substr(0, line_end));
  if (std::sscanf(line.c_str(), "blockferry-run %u %16llx %zu", &version, &checksum, &length) != 3) {
    return fail(damaged(name, "its first line is not a run record's"));
  }
  if (version > format_version) {
    return fail(
        make_error(ErrorCode::state_newer, "read run record", name, "written by a later version of ferryd"));
  }
  const std::string_view body = text.substr(line_end + 1);
  if (body.size() != length || crc64(std::as_bytes(std::span(body))) != checksum) {
    return fail(damaged(name, "it fails its checksum"));
  }
  const json value = json::parse(body, nullptr, false);
  if (value.is_discarded()) return fail(damaged(name, "it is not JSON"));
  try {
    RunRecord record = record_of(value);
    if (!consistent(record)) return fail(damaged(name, "its members contradict each other"));
    return record;
  } catch (const std::exception& exception) {
    return fail(damaged(name, exception.what()));
  }
}

Result<void> save_record(StateDirectory& state, const RunRecord& record) {
  return state.replace(record_file_name(record.status.id), encode_record(record));
}

Result<RunRecord> load_record(StateDirectory& state, const std::string& run_id) {
  const std::string name = record_file_name(run_id);
  auto content = state.read_all(name, record_bytes_max);
  if (!content) return fail(content.error());
  return decode_record(*content, name);
}

}  // namespace blockferry
