// SPDX-License-Identifier: Apache-2.0
// The API's messages: what ferryctl asks and ferryd understands. The only part of the daemon that ctl knows.
//
// Requests and answers are JSON over HTTP on the control socket; daemon/openapi.json describes them. Parsing
// is strict: an unknown member, a wrong type or a value out of range is invalid_argument, with the member's
// name.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include <nlohmann/json_fwd.hpp>

#include "blockio/base/error.h"

namespace blockferry {

constexpr const char* default_socket_path = "/run/blockferry/control.sock";
constexpr const char* api_prefix = "/v1";
constexpr std::size_t request_bytes_max = 1 << 20;
constexpr std::size_t json_bytes_max = 64 << 20;  ///< of an answer: a map of many cells, a long list
constexpr std::size_t targets_max = 8;

const char* blockferry_version();  ///< "0.1.0"
std::string_view openapi_text();   ///< daemon/openapi.json, compiled in

enum class RunKind : std::uint8_t { clone, migrate };
enum class RunMode : std::uint8_t { automatic, full, incremental, hybrid };
enum class TrackerChoice : std::uint8_t { automatic, ebpf, qemu, checksum, none };
enum class OnReadError : std::uint8_t { fail, skip };
enum class CutoverChoice : std::uint8_t { automatic, manual };

/// What `clone` and `migrate` ask for; the body of POST /v1/runs and POST /v1/check, and part of the durable
/// record. JSON members have the names below, sizes in bytes, times in milliseconds; absent or null means the
/// default.
struct RunRequest {
  RunKind kind = RunKind::clone;      // "kind": "clone" | "migrate"
  std::string source;                 // absolute path or URI
  std::vector<std::string> targets;   // 1 to targets_max
  std::string name;                   // [A-Za-z0-9._-]{0,64}; empty: none
  RunMode mode = RunMode::automatic;  // "mode": "auto" | "full" | "incremental" | "hybrid"
  TrackerChoice tracker = TrackerChoice::automatic;
  std::uint64_t rate_bytes_per_second = 0;  // 0: as fast as it goes
  std::uint32_t queue_depth = 0;            // 0: chosen
  std::uint64_t io_size_bytes = 0;          // 0: chosen
  std::uint64_t granule_bytes = 0;          // 0: chosen by volume size
  bool verify = true;
  bool overwrite = false;
  bool force = false;
  bool keep = false;
  OnReadError on_read_error = OnReadError::fail;
  std::string io_engine = "auto";  // "auto" | "uring" | "aio"
  // Of nbds:// and nbds+unix:// volumes, where their URIs do not say; paths, and never what the files hold.
  std::string tls_certificates;  // a directory
  std::string tls_psk_file;
  // Only for live sources.
  std::uint64_t max_downtime_ms = 300;
  std::uint32_t max_passes = 0;  // 0: no limit
  CutoverChoice cutover = CutoverChoice::automatic;
  std::string quiesce_cmd, resume_cmd, cutover_cmd;
  std::string handover;  // "", "fs", "dm-swap", "qemu", "cmd"
  std::uint64_t max_freeze_ms = 10000;
  std::uint64_t sync_every_ms = 0;
  bool sync_freeze = true;  // the last pass of each of these is frozen
};

/// A name or id as it may stand in a request's path: [A-Za-z0-9._-]{1,64}, but "." and "..".
bool is_run_name(std::string_view name);

nlohmann::json to_json(const RunRequest& request);
Result<RunRequest> run_request_from_json(const nlohmann::json& object);

/// POST /v1/groups: volumes that are cut over together. A RunRequest's object with, in place of "source" and
/// "targets", "volumes": [{"source", "targets"}, …], two to volumes_max; what else it says holds for each. A
/// name becomes "name-1", "name-2", ….
constexpr std::size_t volumes_max = 16;
Result<std::vector<RunRequest>> group_request_from_json(const nlohmann::json& object);

/// PATCH /v1/runs/{id}: what `set` changes. At least one member.
struct RunChange {
  std::optional<std::uint64_t> rate_bytes_per_second;
  std::optional<std::uint64_t> max_downtime_ms;
};
nlohmann::json to_json(const RunChange& change);
Result<RunChange> run_change_from_json(const nlohmann::json& object);

/// POST /v1/runs/{id}/{verb}, without a body.
enum class RunVerb : std::uint8_t {
  pause,
  resume,
  cancel,
  sync,
  sync_unfrozen,  ///< "sync-unfrozen": without the pause, and so not of one moment while the source is
                  ///< written
  verify,
  cutover,
  rehearse,
  rollback,
  commit
};
const char* run_verb_name(RunVerb verb);
std::optional<RunVerb> run_verb_from_name(const std::string& name);

/// {"error": {"code", "message", "operation", "device", "offset", "errno", "hint"}}: every answer that is not
/// a success, and what ferryctl prints with --json. `message` is Error::message().
nlohmann::json error_to_json(const Error& error);
/// The reverse, also of the inner object as in a run's "error"; an object of another shape becomes
/// ErrorCode::internal.
Error error_from_json(const nlohmann::json& object);
/// The HTTP status that carries a code (400 invalid_argument, 404 not_found, 409 conflict, 412 refused, 500
/// …).
int http_status_of(ErrorCode code);

/// Parses text, bounded in size and nesting depth (64): invalid_argument where it is not one JSON value.
Result<nlohmann::json> parse_json(std::string_view text);

}  // namespace blockferry
