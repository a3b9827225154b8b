// SPDX-License-Identifier: Apache-2.0
// A world for a run: simulated time, disks with volatile write caches, durable state that loses and tears
// what was not synced. Everything that happens is a step; a test may end the world's process before any step.
// Deterministic by seed.
//
// Two ends of a process:
//   kill   the machine goes on: what was written stays; requests in flight land as a whole or not at all
//   power  what was not flushed is lost, kept or torn by sectors, each write for itself
#pragma once

#include <cstddef>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "bitmap/storage.h"
#include "blockio/device.h"
#include "blockio/io_queue.h"
#include "daemon/run_environment.h"

namespace blockferry::sim {

/// Thrown at the step at which the process ends.
struct Crash {};

enum class CrashMode : std::uint8_t { kill, power };

/// Bytes with a volatile cache before them.
class VolatileBytes {
 public:
  explicit VolatileBytes(std::size_t size = 0) : current(size), durable_(size) {}

  void write(std::size_t offset, std::vector<std::byte> data);
  void resize(std::size_t size);
  void flush();
  void lose_power(std::mt19937_64& random);
  bool has_unsynced() const { return !unsynced_.empty(); }

  std::vector<std::byte> current;  ///< what a reader sees

 private:
  struct Change {
    std::size_t offset = 0;
    std::vector<std::byte> data;
    std::optional<std::size_t> size;
  };
  static void apply(std::vector<std::byte>& bytes, const Change& change);

  std::vector<std::byte> durable_;
  std::vector<Change> unsynced_;
};

class World {
 public:
  explicit World(std::uint64_t seed) : random(seed) {}

  std::mt19937_64 random;
  std::uint64_t steps = 0;
  std::uint64_t crash_at = 0;  ///< the step before which the process ends; 0: never
  Nanoseconds time{0};
  std::function<void()> on_step;  ///< what else happens meanwhile

  void step();
  std::uint64_t below(std::uint64_t bound) { return random() % bound; }
  bool chance(double probability) { return double(random() >> 11) * 0x1p-53 < probability; }
};

class SimClock : public Clock {
 public:
  explicit SimClock(World& world) : world_(world) {}
  Nanoseconds now() const override { return world_.time; }
  double wall_seconds() const override { return std::chrono::duration<double>(world_.time).count() + 1; }
  void sleep_for(Nanoseconds duration) override { world_.time += duration; }

 private:
  World& world_;
};

/// What outlives the process: the medium. SimDevice is a process's view of it.
struct SimDisk {
  SimDisk(std::string disk_name, std::size_t size) : name(std::move(disk_name)), bytes(size) {}
  std::string name;
  VolatileBytes bytes;
  std::vector<DeviceRegion> regions;  ///< of a sparse file, in order; empty: all data
  std::uint64_t generation = 0;       ///< grows with writes from outside
  bool writes_fail = false;           ///< EIO, until mended
  bool zero_unsupported = false;
  std::uint64_t io_bytes_best = 0, in_flight_bytes_best = 0;  ///< as its device says
  std::uint64_t failures = 0;                                 ///< how often writes_fail struck
  std::uint64_t granules_written = 0;
  /// A disk behind a connection that breaks so often, its server restarting; what was in flight is repeated.
  double break_chance = 0;
  bool late_writes = false;  ///< and the old connection's writes may be carried out later
  bool lost = false;         ///< the next flush says so
  std::uint64_t breaks = 0, losses_told = 0, doubts = 0, landed_late = 0;
  struct LateWrite {
    std::uint64_t step;
    std::size_t offset;
    std::vector<std::byte> data;
  };
  std::vector<LateWrite> late;
  std::optional<std::uint64_t> flip_at;  ///< the next write over this byte flips a bit of it

  /// A write from outside of Blockferry.
  void poke(std::size_t offset, std::vector<std::byte> data);

 private:
  void fill(std::uint64_t begin, std::uint64_t end);
};

class SimQueue : public IoQueue {
 public:
  explicit SimQueue(World& world) : world_(world) {}

  Result<void> register_memory(std::span<std::byte>) override { return {}; }
  void wait(Nanoseconds timeout, std::vector<IoRequest*>& completed) override;
  void post(IoRequest& request, std::int64_t result) override { posted_.emplace_back(&request, result); }
  std::size_t in_flight() const override { return pending_.size() + posted_.size(); }

  void submit(SimDisk& disk, IoRequest& request);
  /// The process has ended: what is in flight lands or does not.
  void abandon(CrashMode mode);

 private:
  struct Pending {
    SimDisk* disk;
    IoRequest* request;
  };
  std::int64_t perform(SimDisk& disk, const IoRequest& request);
  void break_connection(SimDisk& disk);
  void land_late_writes(SimDisk& disk);

  World& world_;
  std::vector<Pending> pending_;
  std::vector<std::pair<IoRequest*, std::int64_t>> posted_;
};

class SimStateDirectory : public StateDirectory {
 public:
  explicit SimStateDirectory(World& world) : world_(world) {}

  Result<std::unique_ptr<StateFile>> open(const std::string& name, bool create) override;
  Result<void> replace(const std::string& name, std::span<const std::byte> content) override;
  Result<std::vector<std::byte>> read_all(const std::string& name, std::uint64_t bytes_max) override;
  Result<void> remove(const std::string& name) override;
  Result<std::vector<std::string>> list() override;

  void lose_power();

 private:
  World& world_;
  std::map<std::string, std::shared_ptr<VolatileBytes>> files_;
  std::set<std::string> new_names_;  ///< not durable yet
};

/// One process's environment.
class SimEnvironment : public RunEnvironment {
 public:
  SimEnvironment(World& world, StateDirectory& state, SimDisk& source, std::vector<SimDisk*> targets)
      : world_(world), clock_(world), state_(state), source_(source), targets_(std::move(targets)) {}

  Clock& clock() override { return clock_; }
  StateDirectory& state() override { return state_; }
  BufferPool& buffers() override { return buffers_; }
  Result<RunDevices> open_devices(const RunRecord& record) override;
  std::unique_ptr<BackgroundTask> start(std::function<Result<void>()> job) override;

  // Nobody writes in this world (see sim_kernel.h for one where somebody does).
  Result<std::unique_ptr<LiveTracker>> adopt_tracker(const RunRecord&) override { return none(); }
  Result<std::unique_ptr<LiveTracker>> attach_tracker(const RunRecord&) override { return none(); }
  void remove_tracker(const RunRecord&) override {}
  std::optional<bool> handed_over(const RunRecord&) override { return false; }
  Result<std::unique_ptr<Quiescer>> make_quiescer(const RunRecord&, bool) override { return none(); }
  std::string cutover_waits_for(const RunRecord&, bool) override { return ""; }

  /// Of the last open_devices; dangling once the run has released it.
  SimQueue* queue = nullptr;

 protected:
  static tl::unexpected<Error> none() {
    return fail(make_error(ErrorCode::unsupported, "track", "/sim/source", "it cannot be tracked"));
  }
  SimDisk& source() { return source_; }

 private:
  World& world_;
  SimClock clock_;
  StateDirectory& state_;
  BufferPool buffers_;
  SimDisk& source_;
  const std::vector<SimDisk*> targets_;
};

/// How much a run reads at a time and has in flight: as its request says, or as suits its devices.
void choose_sizes(World& world, std::uint64_t granule_bytes, RunRequest& request, SimDisk& source,
                  SimDisk& target);

}  // namespace blockferry::sim
