// SPDX-License-Identifier: Apache-2.0
// All runs of one ferryd: their records, their queue, their limits. Behind the API; thread-safe.
//
// One mutex guards the table of runs and is never held over device I/O. A keeper thread starts queued runs
// when there is room and takes back finished ones.
#pragma once

#include <condition_variable>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "bitmap/storage.h"
#include "daemon/control.h"
#include "daemon/cutover_group.h"
#include "daemon/metrics.h"
#include "daemon/preflight.h"
#include "daemon/qemu_sources.h"
#include "daemon/real_environment.h"
#include "daemon/run.h"
#include "daemon/run_record.h"
#include "daemon/tracker_pins.h"

namespace blockferry {

struct ManagerOptions {
  std::string tls_certificates, tls_psk_file;  ///< where a request does not say
  unsigned runs_max = 16;                      ///< at once; others wait their turn
  std::uint64_t memory_bytes_max = 512 * MiB;  ///< of all runs' buffers; one run always may start
  IoEngine io_engine = IoEngine::automatic;
  std::string runtime_directory = "/run/blockferry";  ///< for sockets
  RunLimits limits;
  std::function<void(const RunStatus&)> on_run_ended;  ///< for the log; on the keeper's thread
};

class Manager : public Control {
 public:
  /// Reads every record; damaged ones become failed runs that can only be shown and forgotten.
  static Result<std::unique_ptr<Manager>> create(StateDirectory& state, const ManagerOptions& options);
  ~Manager() override;

  /// Takes up what an earlier process left, and begins to start runs.
  void start();
  /// Every run makes a checkpoint and stops; whatever hangs longer than `patience` is left. False then: the
  /// process must end without destroying this.
  bool stop(Nanoseconds patience);
  /// Takes the mutex: a manager that is stuck does not answer. For the watchdog.
  std::size_t run_count();

  Result<nlohmann::json> create_run(const RunRequest& request) override;
  Result<nlohmann::json> create_group(const std::vector<RunRequest>& requests) override;
  Result<nlohmann::json> check(const RunRequest& request) override;
  nlohmann::json list_runs() override;
  Result<nlohmann::json> show_run(const std::string& run) override;
  Result<nlohmann::json> command(const std::string& run, RunVerb verb) override;
  Result<nlohmann::json> change_run(const std::string& run, const RunChange& change) override;
  Result<nlohmann::json> forget_run(const std::string& run) override;
  Result<nlohmann::json> map_run(const std::string& run, std::uint32_t cells) override;
  Result<nlohmann::json> list_devices() override;
  std::string metrics_text() override;
  Result<bool> run_settled(const std::string& run) override;

 private:
  struct Entry {
    RunRecord record;             ///< as last saved; stale while `active`
    std::shared_ptr<Run> active;  ///< has a thread
    bool damaged = false;         ///< the record could not be read
    bool begun = false;           ///< it was under way when ferryd ended
    bool after_restart = false;   ///< of an earlier process: its I/O may still be under way
    RunStatus status() const { return active ? active->status() : record.status; }
  };
  using Entries = std::map<std::string, Entry>;

  Manager(StateDirectory& state, const ManagerOptions& options);
  Result<void> load();
  void remove_orphans();
  LiveSources live_sources() { return {*pins_, qemu_}; }
  void keep();
  void clean_up_guests();
  void start_queued();
  void start_due_syncs();
  void take_back_finished();
  bool fits(const RunRecord& record) const;

  // All of these: with mutex_ held.
  Result<Entries::iterator> find(const std::string& run);
  std::vector<VolumeInUse> volumes_in_use(const std::set<std::string>& except) const;
  const RunRecord* base_of(const RunRequest& request, const PreflightReport& report) const;
  Result<void> owns_volume(const Entry& entry) const;
  std::string overwritten_by(const RunRecord& record) const;
  Result<void> may_run_again(const Entry& entry, RunVerb verb);
  std::string group_goes_on(const RunStatus& status) const;
  Result<std::shared_ptr<CutoverGroup>> group_of(const Entry& entry);
  bool sync_is_due(const RunStatus& status) const;
  Result<nlohmann::json> enqueue(Entry& entry);
  Result<void> save(Entry& entry);
  Result<nlohmann::json> command_ended(Entry& entry, RunVerb verb);
  Result<nlohmann::json> command_waiting(Entry& entry, RunVerb verb);

  static Result<void> serves(const Entry& entry, RunVerb verb);
  Result<nlohmann::json> command_active(Run& run, RunVerb verb);
  Result<nlohmann::json> command_going(const std::string& run, RunVerb verb);
  Result<nlohmann::json> command_ended_runs(const std::vector<std::string>& ids, const std::string& answered,
                                            RunVerb verb);
  static std::vector<std::string> concerned(const RunStatus& status, RunVerb verb);

  // New runs.
  void fill_in(RunRequest& request) const;
  Result<nlohmann::json> create_runs(std::vector<RunRequest> requests);
  Result<std::vector<PreflightReport>> checked(const std::vector<RunRequest>& requests,
                                               const std::set<std::string>& except);
  Result<RunRecord> checked_record(const RunRequest& request, const PreflightReport& report);
  Result<void> fits_together(const std::vector<RunRecord>& records) const;
  RunRecord new_record(const RunRequest& request, const PreflightReport& report, const RunRecord* base);

  StateDirectory& state_;
  BufferPool buffers_;
  std::unique_ptr<TrackerPins> pins_;  ///< made by load()
  const ManagerOptions options_;
  QemuSources qemu_;
  Metrics metrics_;

  std::mutex mutex_;
  std::condition_variable changed_;
  Entries entries_;                                            // guarded by mutex_
  std::map<std::string, std::weak_ptr<CutoverGroup>> groups_;  // guarded by mutex_: by the first run's id
  std::uint64_t creations_ = 0;  // guarded by mutex_: tells a preflight that others were created meanwhile
  bool started_ = false, stopping_ = false;  // guarded by mutex_
  std::thread keeper_;
};

}  // namespace blockferry
