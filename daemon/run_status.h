// SPDX-License-Identifier: Apache-2.0
// What a run publishes of itself: read by the API, the metrics and the durable record. A plain value.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include <nlohmann/json_fwd.hpp>

#include "bitmap/live_tracker.h"
#include "blockio/base/error.h"
#include "blockio/base/units.h"
#include "daemon/messages/messages.h"

namespace blockferry {

enum class RunState : std::uint8_t {
  queued,
  copying,
  tracking,
  paused,
  cutting_over,
  verifying,
  completed,
  failed,
  cancelled,
  rolled_back
};
const char* run_state_name(RunState state);  ///< as in the contract: "cutting-over"
std::optional<RunState> run_state_from_name(const std::string& name);
bool run_state_ended(RunState state);  ///< completed, failed, cancelled, rolled-back

enum class PassKind : std::uint8_t { full, incremental, checksum, final };
const char* pass_kind_name(PassKind kind);

struct PassStatus {
  PassKind kind = PassKind::full;
  std::uint64_t granules = 0;  ///< copied in this pass
  std::uint64_t bytes = 0;
  double seconds = 0;
};

/// The last cutover's or rehearsal's, phase by phase.
struct PauseStatus {
  double freeze_ms = 0;   ///< until every filesystem was frozen and its device flushed
  double drain_ms = 0;    ///< until all that was known to be dirty was copied, and no write was on its way
  double copy_ms = 0;     ///< of what was written last
  double flush_ms = 0;    ///< of the targets, before handing over
  double command_ms = 0;  ///< --cutover-cmd
  double release_ms = 0;
  bool rehearsal = false;
};

struct TargetStatus {
  std::string uri;
  std::uint64_t bytes = 0;
  std::string identity;
  std::optional<Error> error;  ///< set: this target failed and is left out
};

struct RunStatus {
  std::string id;
  RunState state = RunState::queued;
  RunRequest request;              ///< name, kind, options
  std::vector<std::string> group;  ///< the runs that are cut over together, this one among them; mostly empty
  std::string mode = "full";
  std::string tracker = "none";
  /// Its source is in use: tracked while it is copied, and cut over.
  bool live() const { return tracker == "ebpf" || tracker == "qemu"; }
  /// Handed over, its guest writes to the target at once.
  bool moves_guest() const {
    return tracker == "qemu" && request.kind == RunKind::migrate && request.handover != "cmd";
  }
  std::string source_uri, source_identity;
  std::uint64_t source_bytes = 0;
  std::vector<TargetStatus> targets;
  std::uint64_t granule_bytes = 0;
  std::uint64_t bytes_total = 0;
  std::uint64_t bytes_copied = 0;  ///< data and zeroes that reached the targets, over all passes and restarts
  std::uint64_t bytes_zeroed = 0;  ///< of those, what went out as zeroes
  std::uint64_t bytes_read = 0;
  std::vector<PassStatus> passes;
  bool swapped = false;  ///< the source's map lies on the target, and the old disk is kept in step
  std::optional<double> downtime_ms;
  std::optional<PauseStatus> pause;
  std::optional<double> predicted_downtime_ms;          ///< of a cutover at the end of the last pass
  std::optional<std::uint64_t> dirty_bytes_per_second;  ///< as the source was written between the last passes
  std::optional<std::uint64_t> throughput_bytes_per_second;
  std::optional<double> eta_seconds;
  double progress = 0;  ///< 0 … 1 of the work known now, verification included
  std::string
      activity;  ///< "copying", "comparing", "verifying", "flushing", "waiting for …": for progress lines
  std::uint64_t granules_verified = 0;
  std::uint64_t granules_mismatched = 0;
  bool verify_ran = false;
  std::optional<Error> cutover_error;  ///< why the last cutover or rehearsal came to nothing; the run goes on
  std::uint64_t granules_dirty = 0;
  bool unfrozen = false;               ///< live: this sync copies without a freeze, and is not of one moment
  TrackerLosses tracker_losses;        ///< over all the run; each time everything was compared
  std::uint64_t audited_granules = 0;  ///< of a live source: read again between passes
  std::uint64_t audit_misses = 0;      ///< of those, written without the tracker's knowing
  std::vector<ByteRange> bad_ranges;
  std::uint64_t restarts = 0;  ///< how often the run was taken up again by a new process
  std::optional<Error> error;
  std::string warning;  ///< "no answer from /dev/sdb for 30 s"; empty when there is none
  unsigned io_in_flight = 0;
  std::string io_engine;                                ///< "io_uring" or "libaio"
  double created_at = 0, started_at = 0, ended_at = 0;  ///< wall clock, 0: not yet
};

/// The object of the contract, whole: members not known yet are null, never absent.
nlohmann::json to_json(const RunStatus& status);

}  // namespace blockferry
