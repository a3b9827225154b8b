// SPDX-License-Identifier: Apache-2.0
// The production run, engine, bitmap and durable state in a simulated world (sim_world.h).
//
// After every end of a process the oracle looks at what is left: wherever the committed bitmap calls a
// granule clean, each target that has not failed must hold what the granule's recorded checksum says
// (invariants 3 and 4). After the run's end, and a power cut right then, every target must equal the source.
//
// A failure prints the seed and the step; BLOCKFERRY_SEED=N runs one seed alone, BLOCKFERRY_SIM_SEEDS=N that
// many.
#include <cstdlib>

#include <gtest/gtest.h>

#include "blockio/base/checksum.h"
#include "daemon/run_core.h"
#include "tests/sim/sim_world.h"

namespace blockferry::sim {
namespace {

constexpr std::uint64_t granule = 4096;
constexpr unsigned lives_max = 64;
constexpr unsigned steps_max = 200000;

std::uint64_t number_from(const char* variable, std::uint64_t otherwise) {
  const char* text = std::getenv(variable);
  return text != nullptr ? std::strtoull(text, nullptr, 10) : otherwise;
}

/// A volume, its targets and a run over them, through as many processes as it takes.
class Journey {
 public:
  Journey(std::uint64_t seed, std::uint64_t granules, std::size_t target_count)
      : seed_(seed), world_(seed), state_(world_), source_("/sim/source", size_of(granules)) {
    fill_source();
    for (std::size_t i = 0; i < target_count; ++i) {
      auto& target = targets_.emplace_back(
          std::make_unique<SimDisk>("/sim/target" + std::to_string(i), source_.bytes.current.size()));
      for (auto& byte : target->bytes.current) byte = std::byte(0xEE);  // an old life's content
      target->bytes.write(0, target->bytes.current);
      target->bytes.flush();
      target->zero_unsupported = world_.chance(0.3);
    }
    make_record();
  }

  World& world() { return world_; }
  SimDisk& source() { return source_; }
  SimDisk& target(std::size_t index) { return *targets_[index]; }
  const RunRecord& record() const { return record_; }
  RunRecord& record() { return record_; }

  /// One process: until the run ends or the world's crash_at. True: it ended by itself.
  bool live(CrashMode mode) {
    SimEnvironment environment(world_, state_, source_, target_pointers());
    auto core = std::make_unique<RunCore>(record_, environment, limits_);
    try {
      core->start();
      for (unsigned i = 0; !core->finished(); ++i) {
        EXPECT_LT(i, steps_max) << "the run does not end; seed " << seed_;
        if (i >= steps_max) return true;
        if (pauses_ && world_.chance(0.02)) core->pause();
        if (core->idle() || (pauses_ && world_.chance(0.1))) core->resume();
        // Later, when all is copied, nobody looks at the source any more.
        if (poke_holes_ && core->record().phase == RunPhase::copying && !core->volume()->dirty().empty() &&
            world_.chance(0.2)) {
          poke_holes_ = false;
          change_source(12);
        }
        // After it was read back nothing can be proven any more.
        if (core->record().phase == RunPhase::verifying) {
          for (auto& target : targets_) target->late.clear();
        }
        core->step(std::chrono::milliseconds(1));
      }
      record_ = core->record();
      return true;
    } catch (const Crash&) {
      world_.crash_at = 0;
      if (environment.queue != nullptr && core->volume() != nullptr) environment.queue->abandon(mode);
      core.reset();
      crash(mode);
      return false;
    }
  }

  /// Lives on without crashes to its end.
  void finish() {
    for (unsigned lives = 0; lives < lives_max; ++lives) {
      if (live(CrashMode::kill)) return;
    }
    FAIL() << "too many lives; seed " << seed_;
  }

  void expect_targets_equal_source(const std::string& when) {
    ASSERT_EQ(record_.status.state, RunState::completed)
        << when << ", seed " << seed_ << ": "
        << (record_.status.error ? record_.status.error->message() : "");
    EXPECT_EQ(record_.status.granules_mismatched, 0u) << when << ", seed " << seed_;
    for (auto& target : targets_) {
      target->bytes.lose_power(world_.random);  // completed means durable
      ASSERT_EQ(target->bytes.current, source_.bytes.current)
          << target->name << " " << when << ", seed " << seed_;
    }
  }

  /// As the daemon asks for them.
  void sync_again() {
    record_.phase = RunPhase::collecting;
    record_.suspect = true;
    record_.cursor = 0;
    record_.status.passes.push_back({PassKind::checksum, 0, 0, 0});
    record_.status.state = RunState::queued;
    static_cast<void>(save_record(state_, record_));
  }

  void change_source(unsigned pokes) {
    for (unsigned i = 0; i < pokes; ++i) {
      const std::size_t at = std::size_t(world_.below(source_.bytes.current.size()));
      source_.regions.clear();  // it is data now
      std::vector<std::byte> data(
          std::min<std::size_t>(source_.bytes.current.size() - at, 1 + world_.below(6000)));
      if (world_.chance(0.7)) {
        for (auto& byte : data) byte = std::byte(world_.random());
      }
      source_.poke(at, std::move(data));
    }
  }

  void poke_holes_while_it_runs() { poke_holes_ = true; }
  bool holes_were_poked() const { return !poke_holes_; }
  void let_it_pause() { pauses_ = true; }

  /// Invariants 3 and 4, as the disks and the state are left.
  void check_what_is_left(const std::string& when) {
    auto record = load_record(state_, "simrun");
    ASSERT_TRUE(record) << when << ", seed " << seed_ << ": " << record.error().message();
    record_ = std::move(*record);
    if (record_.bitmap_generation == 0) return;
    const VolumeGeometry geometry{source_.bytes.current.size(), granule};
    auto volume = VolumeState::open(state_, record_.volume_id, geometry, record_.bitmap_generation);
    ASSERT_TRUE(volume) << when << ", seed " << seed_ << ": " << volume.error().message();
    for (std::uint64_t at = 0; at < geometry.granule_count(); ++at) {
      if ((*volume)->dirty().test(at)) continue;
      std::uint64_t recorded = 0;
      ASSERT_TRUE((*volume)->checksums().read(at, std::span(&recorded, 1)));
      const ByteRange bytes = geometry.bytes_of({at, 1});
      for (std::size_t i = 0; i < targets_.size(); ++i) {
        if (record_.target_lags[i]) continue;
        const auto content = std::span(targets_[i]->bytes.current).subspan(bytes.offset, bytes.bytes);
        ASSERT_EQ(crc64(content), recorded)
            << "granule " << at << " of " << targets_[i]->name << " is called synced, but is not; " << when
            << ", seed " << seed_;
      }
    }
  }

 private:
  std::size_t size_of(std::uint64_t granules) {
    return std::size_t(granules * granule - (world_.chance(0.5) ? world_.below(granule - 1) : 0));
  }

  void fill_source() {
    auto& bytes = source_.bytes.current;
    std::size_t at = 0;
    bool hole = false;
    while (at < bytes.size()) {
      const std::size_t end = std::min(bytes.size(), at + std::size_t((1 + world_.below(6)) * granule));
      hole = !hole && world_.chance(0.3);
      const bool zero = hole || world_.chance(0.3);
      for (; !zero && at < end; ++at) bytes[at] = std::byte(world_.random());
      at = end;
      source_.regions.push_back({hole, end});
    }
    source_.bytes.write(0, bytes);
    source_.bytes.flush();
  }

  void make_record() {
    RunStatus& status = record_.status;
    status.id = "simrun";
    status.request.source = source_.name;
    status.source_uri = source_.name;
    status.source_bytes = status.bytes_total = source_.bytes.current.size();
    status.granule_bytes = granule;
    status.tracker = "checksum";
    choose_sizes(world_, granule, status.request, source_, *targets_.front());
    for (const auto& target : targets_) {
      status.request.targets.push_back(target->name);
      status.targets.push_back({target->name, 0, "", std::nullopt});
    }
    record_.target_lags.resize(targets_.size());
    record_.target_stamps.resize(targets_.size());
    record_.volume_id = "simvolume";
    limits_.checkpoint_interval = std::chrono::microseconds(500 + world_.below(3000));
    static_cast<void>(save_record(state_, record_));
  }

  void crash(CrashMode mode) {
    if (mode == CrashMode::power) {
      state_.lose_power();
      for (auto& target : targets_) target->bytes.lose_power(world_.random);
    }
    check_what_is_left(mode == CrashMode::power ? "after a power cut" : "after a kill");
    ++record_.status.restarts;
  }

  std::vector<SimDisk*> target_pointers() {
    std::vector<SimDisk*> pointers;
    for (auto& target : targets_) pointers.push_back(target.get());
    return pointers;
  }

  const std::uint64_t seed_;
  World world_;
  SimStateDirectory state_;
  SimDisk source_;
  std::vector<std::unique_ptr<SimDisk>> targets_;
  RunRecord record_;
  RunLimits limits_;
  bool pauses_ = false, poke_holes_ = false;
};

/// Ends the process before each step in turn, in both ways; the run must come to its end all the same.
template <typename Prepare>
void enumerate_crash_points(std::uint64_t seed, std::uint64_t granules, std::size_t targets,
                            Prepare prepare) {
  Journey whole(seed, granules, targets);
  prepare(whole);
  const std::uint64_t first = whole.world().steps;
  whole.finish();
  whole.expect_targets_equal_source("without a crash");
  const std::uint64_t steps = whole.world().steps;
  ASSERT_GT(steps, first + 20) << "hardly anything happened";
  for (std::uint64_t at = first + 1; at <= steps; ++at) {
    for (const CrashMode mode : {CrashMode::kill, CrashMode::power}) {
      SCOPED_TRACE("crash before step " + std::to_string(at) +
                   (mode == CrashMode::power ? ", power" : ", kill"));
      Journey journey(seed, granules, targets);
      prepare(journey);
      journey.world().crash_at = at;
      journey.live(mode);
      if (::testing::Test::HasFatalFailure()) return;
      journey.finish();
      journey.expect_targets_equal_source("after the crash");
      if (::testing::Test::HasFatalFailure()) return;
    }
  }
}

TEST(RunSimulation, EveryCrashPointOfAFullCopy) {
  for (const std::uint64_t seed : {1, 2, 3}) {
    enumerate_crash_points(seed, 24, 1, [](Journey&) {});
    if (HasFatalFailure()) return;
  }
}

TEST(RunSimulation, EveryCrashPointOfAFullCopyToTwoTargets) {
  enumerate_crash_points(4, 16, 2, [](Journey&) {});
}

TEST(RunSimulation, EveryCrashPointOfAnIncrementalPass) {
  for (const std::uint64_t seed : {5, 6, 7}) {
    enumerate_crash_points(seed, 24, 1, [](Journey& journey) {
      journey.finish();
      journey.change_source(5);
      journey.sync_again();
    });
    if (HasFatalFailure()) return;
  }
}

/// Checksum ABA: the source goes from one content to another and back again, with a crash between.
TEST(RunSimulation, EveryCrashPointWhileTheSourceGoesBackToWhatItWas) {
  for (std::uint64_t at = 1; at < 400; at += 3) {
    for (const CrashMode mode : {CrashMode::kill, CrashMode::power}) {
      SCOPED_TRACE("crash " + std::to_string(at) + " steps into the second pass");
      Journey journey(11, 16, 1);
      journey.finish();
      const auto before = journey.source().bytes.current;
      journey.change_source(6);
      journey.sync_again();
      journey.world().crash_at = journey.world().steps + at;
      const bool ended = journey.live(mode);
      journey.world().crash_at = 0;
      journey.source().poke(0, before);
      if (ended) journey.sync_again();
      journey.finish();
      journey.expect_targets_equal_source("after going back");
      if (HasFatalFailure()) return;
    }
  }
}

TEST(RunSimulation, RandomJourneys) {
  const std::uint64_t only = number_from("BLOCKFERRY_SEED", 0);
  const std::uint64_t seeds = only != 0 ? 1 : number_from("BLOCKFERRY_SIM_SEEDS", 400);
  for (std::uint64_t i = 0; i < seeds; ++i) {
    const std::uint64_t seed = only != 0 ? only : 1000 + i;
    SCOPED_TRACE("to see it again: BLOCKFERRY_SEED=" + std::to_string(seed) +
                 " run_simulation_test --gtest_filter=RunSimulation.RandomJourneys");
    std::mt19937_64 plan(seed);
    Journey journey(seed, 8 + plan() % 80, 1 + plan() % 2);
    journey.let_it_pause();
    for (unsigned pass = 0; pass < 3; ++pass) {
      for (unsigned crashes = 0; crashes < 6; ++crashes) {
        journey.world().crash_at = journey.world().steps + 1 + plan() % 250;
        if (journey.live(plan() % 2 == 0 ? CrashMode::kill : CrashMode::power)) break;
        if (HasFatalFailure()) return;
        // The record may have been replaced just before the end: then the run is over, and what comes later
        // is later.
        if (run_state_ended(journey.record().status.state)) break;
        if (plan() % 3 == 0) journey.change_source(1 + unsigned(plan() % 3));
      }
      journey.world().crash_at = 0;
      if (!run_state_ended(journey.record().status.state)) journey.finish();
      journey.expect_targets_equal_source("at the end of pass " + std::to_string(pass));
      if (HasFatalFailure()) return;
      journey.change_source(1 + unsigned(plan() % 8));
      journey.sync_again();
    }
  }
}

/// One of two targets fails at some moment: the other one is finished, and `resume` brings the first up to
/// date.
TEST(RunSimulation, AFailedTargetIsBroughtUpToDateLater) {
  unsigned struck = 0;
  for (std::uint64_t seed = 1; seed <= 60; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    Journey journey(seed, 40, 2);
    journey.world().crash_at = journey.world().steps + 10 + seed * 3;
    const bool ended = journey.live(CrashMode::kill);
    if (HasFatalFailure()) return;
    if (ended) continue;
    journey.target(1).writes_fail = true;
    journey.finish();
    if (journey.target(1).failures > 0) {
      ++struck;
      ASSERT_EQ(journey.record().status.state, RunState::failed);
      ASSERT_TRUE(journey.record().status.targets[1].error);
      ASSERT_FALSE(journey.record().status.targets[0].error);
      EXPECT_EQ(journey.target(0).bytes.current, journey.source().bytes.current)
          << "the other target did not finish";
    }
    journey.target(1).writes_fail = false;
    journey.change_source(2);
    journey.record().status.state = RunState::queued;
    journey.finish();
    journey.expect_targets_equal_source("after its return");
    if (HasFatalFailure()) return;
  }
  EXPECT_GT(struck, 10u) << "the fault hardly ever happened";
}

/// The process ends at any step while a target is failing.
TEST(RunSimulation, EveryCrashPointAroundATargetsFailure) {
  unsigned struck = 0;
  for (std::uint64_t seed = 1; seed <= 8; ++seed) {
    for (std::uint64_t at = 1; at <= 160; ++at) {
      SCOPED_TRACE("seed " + std::to_string(seed) + ", crash " + std::to_string(at) +
                   " steps after the failure");
      Journey journey(seed, 16, 2);
      journey.world().crash_at = journey.world().steps + 12 + seed * 5;
      if (journey.live(CrashMode::kill)) break;
      journey.target(1).writes_fail = true;
      journey.world().crash_at = journey.world().steps + at;
      journey.live(at % 2 == 0 ? CrashMode::kill : CrashMode::power);
      if (HasFatalFailure()) return;
      struck += journey.target(1).failures > 0 ? 1 : 0;
      journey.world().crash_at = 0;
      journey.target(1).writes_fail = false;
      journey.record().status.state = RunState::queued;
      journey.finish();
      journey.expect_targets_equal_source("after its return");
      if (HasFatalFailure()) return;
    }
  }
  EXPECT_GT(struck, 100u) << "the fault hardly ever happened";
}

/// A hole of the source that is written after it was looked at is no hole any more.
TEST(RunSimulation, AHoleWrittenDuringTheRunIsCopied) {
  unsigned written = 0;
  for (std::uint64_t seed = 1; seed <= 40; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    Journey journey(seed, 40, 1);
    journey.poke_holes_while_it_runs();
    journey.finish();
    journey.expect_targets_equal_source("after a hole was written");
    if (HasFatalFailure()) return;
    written += journey.holes_were_poked() ? 1 : 0;
  }
  EXPECT_GT(written, 30u) << "the source hardly ever changed in time";
}

/// A bit that flips on its way to the target is found by verification, and mended by resuming.
TEST(RunSimulation, AFlippedBitIsCaughtAndMended) {
  unsigned caught = 0;
  for (std::uint64_t seed = 1; seed <= 30; ++seed) {
    Journey journey(seed, 20, 1);
    journey.target(0).flip_at = journey.world().below(journey.source().bytes.current.size());
    journey.finish();
    ASSERT_FALSE(journey.target(0).flip_at) << "the fault never happened";
    ASSERT_EQ(journey.record().status.state, RunState::failed) << "seed " << seed;
    EXPECT_EQ(journey.record().status.granules_mismatched, 1u) << "seed " << seed;
    caught += journey.record().status.state == RunState::failed ? 1 : 0;
    journey.record().status.state = RunState::queued;
    journey.finish();
    journey.expect_targets_equal_source("after resuming");
    if (HasFatalFailure()) return;
  }
  EXPECT_EQ(caught, 30u);
}

/// A target's server is restarted now and then, and loses what was not flushed: nothing is missing in the
/// end, nor after a crash, and nothing is called synced that is not there.
TEST(RunSimulation, ConnectionsThatBreakLoseNothing) {
  std::uint64_t breaks = 0, told = 0;
  const std::uint64_t only = number_from("BLOCKFERRY_SEED", 0);
  const std::uint64_t seeds = only != 0 ? 1 : number_from("BLOCKFERRY_SIM_SEEDS", 300);
  for (std::uint64_t i = 0; i < seeds; ++i) {
    const std::uint64_t seed = only != 0 ? only : 5000 + i;
    SCOPED_TRACE("BLOCKFERRY_SEED=" + std::to_string(seed));
    std::mt19937_64 plan(seed);
    Journey journey(seed, 8 + plan() % 80, 1 + plan() % 2);
    journey.let_it_pause();
    journey.target(0).break_chance = plan() % 2 == 0 ? 0.02 : 0.08;
    journey.record().status.request.verify = plan() % 2 == 0;
    for (unsigned crashes = 0; crashes < 3; ++crashes) {
      journey.world().crash_at = journey.world().steps + 1 + plan() % 250;
      if (journey.live(plan() % 2 == 0 ? CrashMode::kill : CrashMode::power)) break;
      if (HasFatalFailure()) return;
      if (run_state_ended(journey.record().status.state)) break;
    }
    journey.world().crash_at = 0;
    if (!run_state_ended(journey.record().status.state)) journey.finish();
    // One that breaks again and again is given up: `resume`, with a server that is well.
    breaks += journey.target(0).breaks;
    told += journey.target(0).losses_told;
    if (journey.record().status.state == RunState::failed) {
      journey.target(0).break_chance = 0;
      journey.record().status.state = RunState::queued;
      journey.finish();
    }
    journey.expect_targets_equal_source("after connections that broke");
    if (HasFatalFailure()) return;
  }
  EXPECT_GT(breaks, seeds / 2) << "hardly any connection ever broke";
  EXPECT_GT(told, seeds / 4) << "hardly anything was ever lost";
}

/// A write of a connection that broke is carried out when the run has long gone on: read back, it is found,
/// or it did no harm; also where nobody asked for verification.
TEST(RunSimulation, WritesThatLandLateAreFound) {
  std::uint64_t landed = 0, found = 0;
  for (std::uint64_t seed = 1; seed <= 300; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    Journey journey(seed, 24, 1);
    journey.target(0).break_chance = 0.03;
    journey.target(0).late_writes = true;
    journey.record().status.request.verify = seed % 2 == 0;
    journey.poke_holes_while_it_runs();
    journey.finish();
    landed += journey.target(0).landed_late;
    if (journey.record().status.state == RunState::failed) {
      ++found;
      journey.target(0).break_chance = 0;
      journey.record().status.state = RunState::queued;
      journey.finish();
    }
    journey.expect_targets_equal_source("after late writes");
    if (HasFatalFailure()) return;
  }
  EXPECT_GT(landed, 50U) << "hardly anything ever landed late";
}

/// A source that somebody writes while it is copied is noticed at the end of the pass, and compared again.
TEST(RunSimulation, AWriteBehindOurBackIsNoticed) {
  Journey journey(21, 60, 1);
  journey.world().crash_at = journey.world().steps + 60;
  ASSERT_FALSE(journey.live(CrashMode::kill));
  journey.change_source(10);
  journey.finish();
  journey.expect_targets_equal_source("after a write between two processes");
}

}  // namespace
}  // namespace blockferry::sim
