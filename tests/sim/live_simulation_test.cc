// SPDX-License-Identifier: Apache-2.0
// Live runs of the production code on a simulated machine (sim_kernel.h), whose application writes all the
// while.
//
// Oracles. At the cutover: nothing is on its way. In the end: each target holds what the source held at that
// moment. After every end of a process: a granule that durable state calls clean holds what its record says,
// or the tracker that outlived the process still covers it.
//
// A failure prints the seed; BLOCKFERRY_SEED=N runs one seed alone, BLOCKFERRY_SIM_SEEDS=N that many.
#include <cstdlib>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "blockio/base/check.h"
#include "blockio/base/checksum.h"
#include "daemon/run_core.h"
#include "tests/sim/sim_kernel.h"

namespace blockferry::sim {
namespace {

constexpr std::uint64_t granule = 4096;
constexpr unsigned steps_max = 300000, lives_max = 200;

std::uint64_t number_from(const char* variable, std::uint64_t otherwise) {
  const char* text = std::getenv(variable);
  return text != nullptr ? std::strtoull(text, nullptr, 10) : otherwise;
}

class LiveJourney {
 public:
  LiveJourney(std::uint64_t seed, std::uint64_t granules, std::size_t target_count)
      : seed_(seed),
        world_(seed),
        state_(world_),
        source_("/sim/source", std::size_t(granules * granule)),
        kernel_(world_, source_, granule) {
    for (auto& byte : source_.bytes.current) byte = std::byte(world_.random());
    source_.bytes.write(0, source_.bytes.current);
    source_.bytes.flush();
    for (std::size_t i = 0; i < target_count; ++i) {
      targets_.push_back(
          std::make_unique<SimDisk>("/sim/target" + std::to_string(i), source_.bytes.current.size()));
    }
    make_record();
    world_.on_step = [this] { kernel_.tick(); };
  }

  World& world() { return world_; }
  SimKernel& kernel() { return kernel_; }
  RunRecord& record() { return record_; }
  SimDisk& target(std::size_t index) { return *targets_[index]; }
  RunRequest& request() { return record_.status.request; }
  void save() { static_cast<void>(save_record(state_, record_)); }

  /// One process: until the run ends or the world's crash_at. True: it ended by itself.
  bool live(CrashMode mode) {
    std::vector<SimDisk*> targets;
    for (auto& target : targets_) targets.push_back(target.get());
    SimLiveEnvironment environment(world_, kernel_, state_, source_, targets);
    auto core = std::make_unique<RunCore>(record_, environment, limits_);
    try {
      core->start();
      for (unsigned i = 0; !core->finished(); ++i) {
        BLOCKFERRY_CHECK(i < steps_max, to_json(core->status()).dump().c_str());  // the run does not end
        if (i > steps_max / 10) kernel_.write_chance = 0.001;  // whoever writes so much falls quiet some day
        interfere(*core);
        core->step(std::chrono::milliseconds(1));
      }
      record_ = core->record();
      return true;
    } catch (const Crash&) {
      world_.crash_at = 0;
      environment.end();
      if (environment.queue != nullptr && core->volume() != nullptr) environment.queue->abandon(mode);
      core.reset();
      crash(mode);
      return false;
    }
  }

  /// A hand-over was cut off, and all that could tell whether it was done is gone: then the user says.
  bool unclear() const {
    const RunStatus& status = record_.status;
    return status.state == RunState::failed && status.error && status.error->code == ErrorCode::conflict;
  }

  void finish() {
    for (unsigned lives = 0; lives < lives_max; ++lives) {
      if (unclear()) record_.status.state = RunState::queued;  // `resume`
      if (live(CrashMode::kill) && !unclear()) return;
    }
    FAIL() << "too many lives; seed " << seed_;
  }

  void expect_targets_as_at_cutover(const std::string& when) {
    ASSERT_EQ(record_.status.state, RunState::completed)
        << when << ", seed " << seed_ << ": " << to_json(record_.status).dump();
    ASSERT_TRUE(kernel_.at_cutover) << when << ", seed " << seed_ << ": it completed without a cutover";
    EXPECT_TRUE(kernel_.drained_at_cutover) << when << ", seed " << seed_ << ": writes were on their way";
    EXPECT_EQ(record_.status.granules_mismatched, 0u) << when << ", seed " << seed_;
    for (auto& target : targets_) {
      target->bytes.lose_power(world_.random);  // completed means durable
      ASSERT_EQ(target->bytes.current, *kernel_.at_cutover)
          << target->name << " " << when << ", seed " << seed_;
    }
  }

  /// The source is sparse: data and holes in turn.
  void make_holes(std::uint64_t granules) {
    auto& bytes = source_.bytes.current;
    bool hole = false;
    for (std::uint64_t at = 0; at < bytes.size(); at += granules * granule, hole = !hole) {
      const std::uint64_t end = std::min<std::uint64_t>(bytes.size(), at + granules * granule);
      source_.regions.push_back({hole, end});
      if (hole) std::fill_n(bytes.begin() + std::ptrdiff_t(at), end - at, std::byte(0));
    }
    source_.bytes.write(0, bytes);
    source_.bytes.flush();
  }

  /// As the daemon asks for it, of a run that keeps tracking.
  void sync_again() {
    record_.phase = RunPhase::copying;
    record_.suspect = record_.cut_over = false;
    record_.cursor = 0;
    record_.status.passes.push_back({PassKind::incremental, 0, 0, 0});
    record_.status.state = RunState::queued;
    kernel_.at_cutover.reset();
    kernel_.handed_over = false;
    save();
  }

  bool miss_silently = false;  ///< once, while the run waits; then nothing is written, and the audit has time
  bool people = false;         ///< pause, resume and rehearse
  bool lose_pins = false;      ///< now and then a kill takes the tracker along

 private:
  void make_record() {
    RunStatus& status = record_.status;
    status.id = "simrun";
    status.mode = "hybrid";
    status.tracker = "ebpf";
    status.request.source = status.source_uri = source_.name;
    status.source_bytes = status.bytes_total = source_.bytes.current.size();
    status.granule_bytes = granule;
    choose_sizes(world_, granule, status.request, source_, *targets_.front());
    for (const auto& target : targets_) {
      status.request.targets.push_back(target->name);
      status.targets.push_back({target->name, 0, "", std::nullopt});
    }
    status.passes.push_back({PassKind::full, 0, 0, 0});
    record_.target_lags.resize(targets_.size());
    record_.target_stamps.resize(targets_.size());
    record_.volume_id = "simvolume";
    limits_.checkpoint_interval = std::chrono::microseconds(500 + world_.below(3000));
    save();
  }

  void interfere(RunCore& core) {
    if (people && world_.chance(0.01)) core.pause();
    if (core.idle() || (people && world_.chance(0.1))) core.resume();
    if (people && world_.chance(0.005)) core.ask_for_cutover(true);
    const bool waits = core.status().state == RunState::tracking;
    if (miss_silently) return wait_for_audit(core, waits);
    if (waits && world_.chance(0.1)) core.ask_for_cutover(false);
  }

  void wait_for_audit(RunCore& core, bool waits) {
    if (waits && !missed_ && !kernel_.silent_miss) {
      kernel_.silent_miss = true;
      missed_ = true;
    } else if (missed_ && !kernel_.silent_miss) {
      kernel_.write_chance = 0;
      // Meanwhile the whole volume was looked at, more than once.
      if (waits && core.status().audited_granules > 3 * core.volume()->geometry().granule_count())
        core.ask_for_cutover(false);
    }
  }

  void crash(CrashMode mode) {
    kernel_.process_ended();
    if (mode == CrashMode::power) {
      state_.lose_power();
      kernel_.power_cut();
      for (auto& target : targets_) target->bytes.lose_power(world_.random);
    }
    check_what_is_left(mode == CrashMode::power ? "after a power cut" : "after a kill");
    if (lose_pins && world_.chance(0.2)) kernel_.attached = false;
  }

  void check_what_is_left(const std::string& when) {
    auto record = load_record(state_, "simrun");
    ASSERT_TRUE(record) << when << ", seed " << seed_ << ": " << record.error().message();
    record_ = std::move(*record);
    if (record_.bitmap_generation == 0) return;
    const bool tracked = record_.tracked && kernel_.attached;
    if (record_.final_pass_begun && !tracked) return;  // nothing is called clean
    const VolumeGeometry geometry{source_.bytes.current.size(), granule};
    auto volume = VolumeState::open(state_, record_.volume_id, geometry, record_.bitmap_generation);
    ASSERT_TRUE(volume) << when << ", seed " << seed_ << ": " << volume.error().message();
    for (std::uint64_t at = 0; at < geometry.granule_count(); ++at) {
      if ((*volume)->dirty().test(at) || (tracked && kernel_.covers(at))) continue;
      std::uint64_t recorded = 0;
      ASSERT_TRUE((*volume)->checksums().read(at, std::span(&recorded, 1)));
      const ByteRange bytes = geometry.bytes_of({at, 1});
      for (std::size_t i = 0; i < targets_.size(); ++i) {
        if (record_.target_lags[i]) continue;
        const auto content = std::span(targets_[i]->bytes.current).subspan(bytes.offset, bytes.bytes);
        ASSERT_EQ(crc64(content), recorded)
            << "granule " << at << " of " << targets_[i]->name << " is called synced, but is not; " << when
            << ", seed " << seed_ << (tracked ? ", tracked, " : ", not tracked, ")
            << (record_.final_pass_begun ? "final pass begun, " : "") << to_json(record_.status).dump();
      }
    }
  }

  const std::uint64_t seed_;
  World world_;
  SimStateDirectory state_;
  SimDisk source_;
  SimKernel kernel_;
  std::vector<std::unique_ptr<SimDisk>> targets_;
  RunRecord record_;
  RunLimits limits_;
  bool missed_ = false;
};

TEST(LiveSimulation, EveryCrashPoint) {
  for (const std::uint64_t seed : {1}) {
    for (const RunKind kind : {RunKind::clone, RunKind::migrate}) {
      const auto prepare = [&](LiveJourney& journey) {
        journey.request().kind = kind;
        journey.save();
      };
      LiveJourney whole(seed, 12, 1);
      prepare(whole);
      const std::uint64_t first = whole.world().steps;
      whole.finish();
      whole.expect_targets_as_at_cutover("without a crash");
      const std::uint64_t steps = whole.world().steps;
      ASSERT_GT(steps, first + 40) << "hardly anything happened";
      for (std::uint64_t at = first + 1; at <= steps; ++at) {
        for (const CrashMode mode : {CrashMode::kill, CrashMode::power}) {
          SCOPED_TRACE("seed " + std::to_string(seed) + ", crash before step " + std::to_string(at) +
                       (mode == CrashMode::power ? ", power" : ", kill"));
          LiveJourney journey(seed, 12, 1);
          prepare(journey);
          journey.world().crash_at = at;
          journey.live(mode);
          if (HasFatalFailure()) return;
          journey.finish();
          journey.expect_targets_as_at_cutover("after the crash");
          if (HasFatalFailure()) return;
        }
      }
    }
  }
}

/// What no counter tells: the audit does, while the run waits for its user.
TEST(LiveSimulation, TheAuditFindsAWriteThatTheTrackerMissed) {
  unsigned found = 0;
  for (std::uint64_t seed = 1; seed <= 30; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    LiveJourney journey(seed, 24, 1);
    journey.request().cutover = CutoverChoice::manual;
    journey.save();
    journey.miss_silently = true;
    journey.finish();
    journey.expect_targets_as_at_cutover("after a miss");
    if (HasFatalFailure()) return;
    found += journey.record().status.audit_misses > 0 ? 1 : 0;
  }
  // The granule may have been written again, or copied for another write, before the audit came by.
  EXPECT_GT(found, 5u);
}

/// Freezing is not silence (attack I): what is written then is copied too, even where no end is seen.
TEST(LiveSimulation, WritesWhileItIsFrozen) {
  unsigned strays = 0;
  for (std::uint64_t seed = 1; seed <= 60; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    LiveJourney journey(seed, 40, 1);
    journey.request().kind = seed % 2 == 0 ? RunKind::migrate : RunKind::clone;
    journey.request().max_freeze_ms = 60000;
    journey.save();
    journey.kernel().strays = true;
    journey.finish();
    journey.expect_targets_as_at_cutover("with strays");
    if (HasFatalFailure()) return;
    strays += journey.kernel().strays_begun;
  }
  EXPECT_GT(strays, 20u) << "hardly any came in time";
}

/// What was a hole when a pass began may be data by now.
TEST(LiveSimulation, WritesToHoles) {
  for (std::uint64_t seed = 1; seed <= 60; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    LiveJourney journey(seed, 48, 1);
    journey.make_holes(8 + seed % 32);
    journey.kernel().write_chance =
        0.03;  // so that the first to be copied may lie in what was looked at last
    journey.finish();
    journey.expect_targets_as_at_cutover("of a sparse source");
    if (HasFatalFailure()) return;
  }
}

/// Everything at once, by chance.
TEST(LiveSimulation, RandomJourneys) {
  const std::uint64_t only = number_from("BLOCKFERRY_SEED", 0);
  const std::uint64_t seeds = only != 0 ? 1 : number_from("BLOCKFERRY_SIM_SEEDS", 60);
  unsigned scans = 0, crashes_seen = 0, syncs = 0, rolled_back = 0;
  for (std::uint64_t i = 0; i < seeds; ++i) {
    const std::uint64_t seed = only != 0 ? only : 5000 + i;
    SCOPED_TRACE("to see it again: BLOCKFERRY_SEED=" + std::to_string(seed) +
                 " live_simulation_test --gtest_filter=LiveSimulation.RandomJourneys");
    std::mt19937_64 plan(seed);
    LiveJourney journey(seed, 8 + plan() % 60, 1 + plan() % 2);
    journey.people = plan() % 3 == 0;
    journey.lose_pins = plan() % 4 == 0;
    journey.kernel().misses = plan() % 4 == 0;
    journey.kernel().expires = plan() % 4 == 0;
    journey.kernel().write_chance = 0.02 + 0.3 * double(plan() % 100) / 100;
    RunRequest& request = journey.request();
    request.kind = plan() % 3 == 0 ? RunKind::migrate : RunKind::clone;
    if (plan() % 4 == 0) request.cutover_cmd = "true";
    if (plan() % 4 == 0) request.cutover = CutoverChoice::manual;
    request.keep = request.kind == RunKind::clone && plan() % 2 == 0;
    // A run that does not know that its time is over tries until the limit.
    request.max_freeze_ms = plan() % 5 == 0 ? 20 : journey.kernel().expires ? 200 : 10000;
    request.max_passes = plan() % 5 == 0 ? 3 : 0;
    journey.save();
    for (unsigned pass = 0; pass < (request.keep ? 3u : 1u); ++pass) {
      for (unsigned crashes = 0; crashes < 5; ++crashes) {
        journey.world().crash_at = journey.world().steps + 1 + plan() % 400;
        if (journey.live(plan() % 3 != 0 ? CrashMode::kill : CrashMode::power)) break;
        ++crashes_seen;
        if (HasFatalFailure()) return;
        if (run_state_ended(journey.record().status.state)) break;
      }
      journey.world().crash_at = 0;
      if (!run_state_ended(journey.record().status.state) || journey.unclear()) journey.finish();
      const bool failed = journey.record().status.state == RunState::failed && journey.kernel().misses;
      if (failed || journey.record().status.state == RunState::rolled_back) {
        // Writes were missed too often, or the guard's time was over at the hand-over: in peace it must
        // succeed.
        rolled_back += failed ? 0 : 1;
        journey.kernel().misses = false;
        ASSERT_FALSE(journey.kernel().handed_over) << "seed " << seed;
        journey.kernel().expires = false;
        journey.request().max_freeze_ms = 10000;
        journey.record().status.state = RunState::queued;
        journey.finish();
      }
      journey.expect_targets_as_at_cutover("at the end of pass " + std::to_string(pass));
      if (HasFatalFailure()) return;
      for (const auto& each : journey.record().status.passes)
        scans += each.kind == PassKind::checksum ? 1 : 0;
      if (!journey.record().status.request.keep) break;
      ++syncs;
      journey.sync_again();
    }
  }
  if (only != 0) return;
  EXPECT_GT(scans, seeds / 20) << "trackers hardly ever missed anything";
  EXPECT_GT(crashes_seen, seeds) << "hardly any crash came in time";
  EXPECT_GT(syncs, seeds / 10);
  EXPECT_GT(rolled_back, 0u);
}

/// A target's server is restarted now and then, and loses what was not flushed: in passes, and at the
/// cutover.
TEST(LiveSimulation, ConnectionsThatBreakLoseNothing) {
  const std::uint64_t only = number_from("BLOCKFERRY_SEED", 0);
  const std::uint64_t seeds = only != 0 ? 1 : number_from("BLOCKFERRY_SIM_SEEDS", 60);
  std::uint64_t told = 0;
  for (std::uint64_t i = 0; i < seeds; ++i) {
    const std::uint64_t seed = only != 0 ? only : 9000 + i;
    SCOPED_TRACE("BLOCKFERRY_SEED=" + std::to_string(seed));
    std::mt19937_64 plan(seed);
    LiveJourney journey(seed, 8 + plan() % 60, 1 + plan() % 2);
    journey.kernel().write_chance = 0.02 + 0.2 * double(plan() % 100) / 100;
    journey.people = plan() % 3 == 0;
    journey.request().kind = plan() % 2 == 0 ? RunKind::migrate : RunKind::clone;
    journey.request().verify = plan() % 2 == 0;
    if (plan() % 3 == 0) journey.request().cutover_cmd = "true";
    journey.target(0).break_chance = 0.01 + 0.04 * double(plan() % 100) / 100;
    journey.save();
    for (unsigned crashes = 0; crashes < 2; ++crashes) {
      journey.world().crash_at = journey.world().steps + 1 + plan() % 400;
      if (journey.live(plan() % 3 != 0 ? CrashMode::kill : CrashMode::power)) break;
      if (HasFatalFailure()) return;
      if (run_state_ended(journey.record().status.state)) break;
    }
    journey.world().crash_at = 0;
    if (!run_state_ended(journey.record().status.state) || journey.unclear()) journey.finish();
    if (journey.record().status.state == RunState::failed) {  // it broke again and again
      journey.target(0).break_chance = 0;
      journey.record().status.state = RunState::queued;
      journey.finish();
    }
    told += journey.target(0).losses_told;
    journey.expect_targets_as_at_cutover("after connections that broke");
    if (HasFatalFailure()) return;
  }
  EXPECT_GT(told, seeds / 4) << "hardly anything was ever lost";
}

}  // namespace
}  // namespace blockferry::sim
