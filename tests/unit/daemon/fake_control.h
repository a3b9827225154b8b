// SPDX-License-Identifier: Apache-2.0
// A Control of plain values for tests of the API: one run named "known", and calls that can be made to hang.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <stdexcept>
#include <string>

#include <nlohmann/json.hpp>

#include "daemon/control.h"
#include "daemon/run_status.h"

namespace blockferry {

class FakeControl : public Control {
 public:
  static RunStatus sample_run() {
    RunStatus status;
    status.id = "20261123-1";
    status.state = RunState::failed;
    status.request.name = "known";
    status.request.source = "/dev/a";
    status.request.targets = {"/dev/b"};
    status.source_uri = "/dev/a";
    status.source_identity = "serial-1";
    status.source_bytes = 1 << 20;
    status.targets = {
        {"/dev/b", 1 << 20, "serial-2", make_error(ErrorCode::no_space, "write", "/dev/b", "make room")}};
    status.granule_bytes = 4096;
    status.bytes_total = status.bytes_copied = status.bytes_read = 1 << 20;
    status.bytes_zeroed = 4096;
    status.passes = {{PassKind::full, 256, 1 << 20, 0.5}};
    status.downtime_ms = 12.5;
    status.throughput_bytes_per_second = 2 << 20;
    status.eta_seconds = 0;
    status.progress = 0.75;
    status.activity = "copying";
    status.verify_ran = true;
    status.granules_verified = 256;
    status.bad_ranges = {{4096, 4096}};
    status.error = error_from_errno(EIO, "read", "/dev/a", 4096);
    status.warning = "no answer from /dev/a for 30 s";
    status.io_engine = "io_uring";
    status.created_at = status.started_at = status.ended_at = 1.7e9;
    return status;
  }

  Result<nlohmann::json> create_run(const RunRequest& request) override {
    if (request.source == "/refused")
      return fail(make_error(ErrorCode::refused, "clone to", "/x", "it is mounted"));
    if (request.source == "/hangs") hang();
    if (request.source == "/throws") throw std::runtime_error("thrown in create_run");
    ++runs_created;
    auto run = sample_run();
    run.request = request;
    return to_json(run);
  }
  Result<nlohmann::json> create_group(const std::vector<RunRequest>& requests) override {
    nlohmann::json runs = nlohmann::json::array();
    for (const auto& request : requests) {
      auto run = create_run(request);
      if (!run) return run;
      runs.push_back(std::move(*run));
    }
    return runs;
  }
  Result<nlohmann::json> check(const RunRequest& request) override {
    if (request.source == "/hangs") hang();
    const nlohmann::json volume = {{"path", request.source},
                                   {"resolved", request.source},
                                   {"kind", "block"},
                                   {"identity", ""},
                                   {"bytes", 0},
                                   {"logical_block_bytes", 512},
                                   {"mounts", {"/mnt"}},
                                   {"holders", {"dm-0"}},
                                   {"content", "ext4"},
                                   {"in_use", true},
                                   {"abilities", {"flushes"}}};
    const nlohmann::json findings = {{{"device", "/dev/b"}, {"message", "mounted"}}};
    return nlohmann::json{{"ok", false},
                          {"refusals", findings},
                          {"warnings", nlohmann::json::array()},
                          {"references", findings},
                          {"source", volume},
                          {"targets", nlohmann::json::array({volume})},
                          {"mode", "full"},
                          {"tracker", "none"},
                          {"handover", nullptr}};
  }
  nlohmann::json list_runs() override {
    return nlohmann::json::array({to_json(sample_run()), to_json(RunStatus{})});
  }
  Result<nlohmann::json> show_run(const std::string& run) override { return known(run); }
  Result<nlohmann::json> command(const std::string& run, RunVerb verb) override {
    if (verb == RunVerb::commit)
      return fail(make_error(ErrorCode::unsupported, "commit", run, "not of this run"));
    last_verb = verb;
    return known(run);
  }
  Result<nlohmann::json> change_run(const std::string& run, const RunChange& change) override {
    last_rate = change.rate_bytes_per_second.value_or(0);
    return known(run);
  }
  Result<nlohmann::json> forget_run(const std::string& run) override { return known(run); }
  Result<nlohmann::json> map_run(const std::string& run, std::uint32_t cells) override {
    if (auto found = known(run); !found) return found;
    nlohmann::json list = nlohmann::json::array();
    for (std::uint32_t i = 0; i < cells; ++i)
      list.push_back({{"synced", i}, {"dirty", 1}, {"zero", 2}, {"bad", 3}});
    return nlohmann::json{{"id", run}, {"bytes_total", 1 << 20}, {"granule_bytes", 4096}, {"cells", list}};
  }
  Result<nlohmann::json> list_devices() override {
    ++device_calls;
    if (devices_hang) hang();
    return nlohmann::json::array({{{"path", "/dev/a"},
                                   {"bytes", 1 << 20},
                                   {"logical_block_bytes", 512},
                                   {"identity", "serial-1"},
                                   {"model", ""},
                                   {"read_only", false},
                                   {"mounts", {"/mnt"}},
                                   {"holders", nlohmann::json::array()},
                                   {"content", "ext4"},
                                   {"in_use", true},
                                   {"tracker", "checksum"},
                                   {"tracker_missing", nullptr}}});
  }
  std::string metrics_text() override { return "# no metrics\n"; }
  Result<bool> run_settled(const std::string& run) override {
    ++settled_calls;
    if (run != "known") return fail(make_error(ErrorCode::not_found, "find run", run, "no such run"));
    return settled.load();
  }

  /// Lets every call that hangs, and will hang, come back.
  void release() {
    const std::lock_guard lock(mutex_);
    released_ = true;
    changed_.notify_all();
  }
  void wait_for_hanging(unsigned count) {
    std::unique_lock lock(mutex_);
    changed_.wait_for(lock, std::chrono::seconds(30), [&] { return hanging_ >= count; });
  }

  void wait_for_none_hanging() {
    std::unique_lock lock(mutex_);
    changed_.wait_for(lock, std::chrono::seconds(30), [&] { return hanging_ == 0; });
  }

  std::atomic<bool> devices_hang = false, settled = false;
  std::atomic<unsigned> runs_created = 0, device_calls = 0, settled_calls = 0;
  std::atomic<RunVerb> last_verb = RunVerb::pause;
  std::atomic<std::uint64_t> last_rate = 0;

 private:
  Result<nlohmann::json> known(const std::string& run) {
    if (run != "known") return fail(make_error(ErrorCode::not_found, "find run", run, "no such run"));
    return to_json(sample_run());
  }
  void hang() {
    std::unique_lock lock(mutex_);
    ++hanging_;
    changed_.notify_all();
    changed_.wait(lock, [&] { return released_; });
    --hanging_;
    changed_.notify_all();
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  unsigned hanging_ = 0;
  bool released_ = false;
};

}  // namespace blockferry
