// SPDX-License-Identifier: Apache-2.0
// The part of a simulated machine that a live run leans on: an application that writes to the source, the
// tracker that sees its writes end, and the guard. It outlives processes; the tracker and the guard's mark
// end with the power.
//
// A write is queued, lands on the disk, and is seen to end: three moments, with others between them. Some
// ends are hidden (attack A), some are lost and counted.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <set>
#include <vector>

#include "tests/sim/sim_world.h"

namespace blockferry::sim {

class SimKernel {
 public:
  SimKernel(World& world, SimDisk& source, std::uint64_t granule_bytes);

  /// Something happens, or not. Called at each step of the world, too.
  void tick();
  void expect_strays();
  void note_collected();
  void process_ended();
  void power_cut();

  /// Nothing that was written is missing from what a tracker will give.
  bool covers(std::uint64_t granule) const;

  // What happens.
  double write_chance = 0.2;
  bool misses = false;       ///< writes are lost and counted, now and then
  bool silent_miss = false;  ///< the next write's end is lost and not even counted
  bool expires = false;      ///< the guard's time is over early, now and then
  /// A frozen source is written all the same, some time later, and the ends of these writes are hidden.
  bool strays = false;

  // The tracker, if there is one.
  bool attached = false;
  std::set<std::uint64_t> marks, held;
  std::map<std::uint64_t, GranuleRange> records;  ///< by the write's number
  TrackerLosses losses;

  // The source, as the guard holds it.
  bool frozen = false, expired = false, fenced = false, handed_over = false;
  Nanoseconds deadline{0}, next_stray{0};
  unsigned strays_left = 0, strays_begun = 0;
  std::optional<std::vector<std::byte>> at_collect;  ///< of strays, the later ones nobody can know of
  std::optional<std::vector<std::byte>> at_cutover;  ///< what the target must hold
  bool drained_at_cutover = false;                   ///< nothing was on its way then
  bool writes_on_their_way() const;
  bool unknown_writes() const;  ///< queued before the tracker came

 private:
  struct Write {
    std::uint64_t number = 0;
    std::size_t offset = 0;
    std::vector<std::byte> data;
    bool landed = false;
  };
  void begin();
  void stray();
  void land(Write& write);
  void end(std::size_t index);
  void mark(GranuleRange range);
  GranuleRange granules_of(const Write& write) const;

  World& world_;
  SimDisk& source_;
  const std::uint64_t granule_bytes_;
  std::vector<Write> writes_;
  std::uint64_t next_number_ = 1;
};

/// One process on that machine.
class SimLiveEnvironment : public SimEnvironment {
 public:
  SimLiveEnvironment(World& world, SimKernel& kernel, StateDirectory& state, SimDisk& source,
                     std::vector<SimDisk*> targets)
      : SimEnvironment(world, state, source, std::move(targets)), world_(world), kernel_(kernel) {}

  Result<std::unique_ptr<LiveTracker>> adopt_tracker(const RunRecord& record) override;
  Result<std::unique_ptr<LiveTracker>> attach_tracker(const RunRecord& record) override;
  void remove_tracker(const RunRecord& record) override;
  std::optional<bool> handed_over(const RunRecord&) override {
    return kernel_.attached ? std::optional(kernel_.handed_over) : std::nullopt;  // marked beside the tracker
  }
  Result<std::unique_ptr<Quiescer>> make_quiescer(const RunRecord& record, bool rehearsal) override;

  /// A dead process asks for nothing any more.
  void end() { *alive_ = false; }

 private:
  World& world_;
  SimKernel& kernel_;
  const std::shared_ptr<bool> alive_ = std::make_shared<bool>(true);
};

}  // namespace blockferry::sim
