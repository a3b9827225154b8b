// SPDX-License-Identifier: Apache-2.0
// What a run writes down about itself: everything that ferryd needs to take it up again. One file a run,
// replaced as a whole; format in run_record.cc.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "bitmap/storage.h"
#include "blockio/base/error.h"
#include "daemon/run_status.h"
#include "daemon/swap_plan.h"

namespace blockferry {

/// Where a run stands between two checkpoints. Each phase ends with a checkpoint.
enum class RunPhase : std::uint8_t {
  collecting,  ///< the tracker fills the bitmap; nothing is written
  copying,     ///< dirty granules are copied
  verifying,   ///< the targets are read back
};

struct RunRecord {
  RunStatus status;
  /// Names the volume's state files; an incremental run takes over its predecessor's.
  std::string volume_id;
  /// The generation of the bitmap that goes with this record; 0: the volume's files are not made yet.
  std::uint64_t bitmap_generation = 0;
  RunPhase phase = RunPhase::copying;
  std::uint64_t cursor = 0;         ///< collecting, verifying: granules below it are done
  std::uint32_t verify_target = 0;  ///< verifying: the target being read
  bool suspect = false;      ///< clean granules must be compared with their checksums before the run may end
  bool verify_only = false;  ///< asked for by `verify`: the source is not looked at
  /// Live: the pinned tracker vouches for all that this record and its bitmap do not call dirty or suspect. A
  /// new tracker does so only from the first commit after it came.
  bool tracked = false;
  /// LiveTracker::position(): the tracker holds, or has lost, whatever came to it from there on.
  std::optional<std::uint64_t> tracker_position;
  /// Live: a final pass was begun, which overwrites the target without saying so first. If the tracker is
  /// gone with its marks when the run is taken up again, nothing on the target is vouched for (attack F).
  bool final_pass_begun = false;
  bool cut_over = false;         ///< live: the source was released; what is left is verification
  std::optional<SwapPlan> swap;  ///< --handover dm-swap; RunStatus::swapped tells which way it goes next
  bool paused = false;           ///< by the user: not taken up by itself
  std::optional<std::string> source_stamp;                ///< Device::change_stamp when this was written
  std::vector<std::optional<std::string>> target_stamps;  ///< likewise; only of the verifying phase
  std::vector<bool> target_lags;  ///< a failed target's own bitmap lies in lag_file_name()
};

/// Ids and names of state files.
std::string record_file_name(const std::string& run_id);
std::optional<std::string> run_id_of_file(const std::string& file_name);
std::string bitmap_file_name(const std::string& volume_id);
std::string checksums_file_name(const std::string& volume_id);
std::string lag_file_name(const std::string& volume_id, std::size_t target);
/// The volume id of a bitmap, checksum or lag file.
std::optional<std::string> volume_id_of_file(const std::string& file_name);

std::vector<std::byte> encode_record(const RunRecord& record);
/// state_damaged or state_newer; never anything half read.
Result<RunRecord> decode_record(std::span<const std::byte> content, const std::string& name);

Result<void> save_record(StateDirectory& state, const RunRecord& record);
Result<RunRecord> load_record(StateDirectory& state, const std::string& run_id);

}  // namespace blockferry
