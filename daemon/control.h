// SPDX-License-Identifier: Apache-2.0
// What the API can ask of the daemon. The server (api_server.h) knows only this; the Manager is behind it.
// Thread-safe.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include <nlohmann/json_fwd.hpp>

#include "blockio/base/error.h"
#include "daemon/messages/messages.h"

namespace blockferry {

class Control {
 public:
  virtual ~Control() = default;
  /// Preflight, then queued: answers the run's object at once. `refused` when preflight stands against it.
  virtual Result<nlohmann::json> create_run(const RunRequest& request) = 0;
  /// Volumes that are cut over together: a run for each, as an array; all are created, or none.
  virtual Result<nlohmann::json> create_group(const std::vector<RunRequest>& requests) = 0;
  /// Preflight alone: {"ok", "refusals": [{"device", "message"}], "warnings": […], "references": […],
  /// "source": {…}, "targets": […], "mode", "tracker"}.
  virtual Result<nlohmann::json> check(const RunRequest& request) = 0;
  virtual nlohmann::json list_runs() = 0;
  /// `run` is an id or a name (the newest run of that name) everywhere below.
  virtual Result<nlohmann::json> show_run(const std::string& run) = 0;
  virtual Result<nlohmann::json> command(const std::string& run, RunVerb verb) = 0;
  virtual Result<nlohmann::json> change_run(const std::string& run, const RunChange& change) = 0;
  /// Removes an ended run and its state; answers its last object.
  virtual Result<nlohmann::json> forget_run(const std::string& run) = 0;
  /// {"id", "bytes_total", "granule_bytes", "cells": [{"synced","dirty","zero","bad"} granules each]}, at
  /// most `cells`.
  virtual Result<nlohmann::json> map_run(const std::string& run, std::uint32_t cells) = 0;
  virtual Result<nlohmann::json> list_devices() = 0;
  /// Prometheus text format.
  virtual std::string metrics_text() = 0;
  /// True when the run has ended or waits for the user (completed, failed, cancelled, rolled-back, paused):
  /// for GET /v1/runs/{id}?wait_ms=N, which answers when this turns true or the time has passed. Cheap.
  virtual Result<bool> run_settled(const std::string& run) = 0;
};

}  // namespace blockferry
