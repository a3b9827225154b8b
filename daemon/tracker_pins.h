// SPDX-License-Identifier: Apache-2.0
// Where this ferryd's trackers are pinned: /sys/fs/bpf/blockferry/STATE/VOLUME, one directory a run's volume,
// below one of the state directory's own, so that no ferryd touches another's. Beside them STATE/group-RUN of
// volumes that are cut over together.
#pragma once

#include <memory>
#include <optional>
#include <set>
#include <string>

#include "bitmap/storage.h"
#include "daemon/trackers.h"

namespace blockferry {

/// Why no source in use can be tracked on this machine; empty: it can. Looked into until it can.
std::string live_tracking_missing();

class TrackerPins : public Trackers {
 public:
  /// The state directory's name in the bpf filesystem is made on first use, and kept in the directory.
  static Result<std::unique_ptr<TrackerPins>> create(StateDirectory& state);

  Result<std::unique_ptr<LiveTracker>> attach(const RunRecord& record) override;
  Result<std::unique_ptr<LiveTracker>> adopt(const RunRecord& record) override;
  void remove(const RunRecord& record) override;
  /// What no run needs any more.
  void remove_all_but(const std::set<std::string>& names);
  /// Of maps that ferryd makes for its runs: "blockferry-STATE-RUN-old".
  std::string map_name(const std::string& run, const char* which) const;
  /// Maps that runs other than these left behind: forgotten ones, and ones that had ended when ferryd was
  /// killed.
  void remove_maps_but(const std::set<std::string>& runs) const;
  /// Where the guard marks a hand-over (guard/protocol.h): one place for all volumes that are handed over
  /// together, so that it is marked for all at once.
  Result<std::string> make_mark_directory(const RunRecord& record);
  /// Whether the guard of a cutover lives, or its ferryd, with that place locked.
  bool is_guarded(const RunRecord& record) const;
  /// Nothing: that place is gone.
  std::optional<bool> handed_over(const RunRecord& record) override;
  /// Precondition: the records of all that were handed over together say so.
  void forget_hand_over(const RunRecord& record);
  /// The directory's name that a group's marks are kept in, for remove_all_but.
  static std::string group_name(const RunRecord& record) { return "group-" + record.status.group.front(); }

 private:
  std::string directory_of(const RunRecord& record) const;
  std::string mark_directory_of(const RunRecord& record) const;

  explicit TrackerPins(std::string directory) : directory_(std::move(directory)) {}
  const std::string directory_;
};

}  // namespace blockferry
