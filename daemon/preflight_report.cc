// SPDX-License-Identifier: Apache-2.0
// A preflight's report, as it is told.
#include <nlohmann/json.hpp>

#include "daemon/preflight.h"

namespace blockferry {

namespace {

nlohmann::json findings_to_json(const std::vector<PreflightFinding>& findings) {
  nlohmann::json list = nlohmann::json::array();
  for (const auto& finding : findings)
    list.push_back({{"device", finding.device}, {"message", finding.message}});
  return list;
}

nlohmann::json volume_to_json(const PreflightVolume& volume) {
  return {{"path", volume.path},          {"resolved", volume.resolved},
          {"kind", volume.kind},          {"identity", volume.identity},
          {"bytes", volume.bytes},        {"logical_block_bytes", volume.logical_block_bytes},
          {"mounts", volume.mounts},      {"holders", volume.holders},
          {"content", volume.content},    {"in_use", volume.in_use},
          {"abilities", volume.abilities}};
}

}  // namespace

Error refusal_error(const PreflightReport& report) {
  const PreflightFinding& first = report.refusals.front();
  std::string more;
  if (report.refusals.size() > 1) {
    more = " (and " + std::to_string(report.refusals.size() - 1) + " more; see `ferryctl check`)";
  }
  return make_error(ErrorCode::refused, "refused", first.device, first.message + more);
}

nlohmann::json to_json(const PreflightReport& report) {
  nlohmann::json targets = nlohmann::json::array();
  for (const auto& target : report.targets) targets.push_back(volume_to_json(target));
  return {{"ok", report.refusals.empty()},
          {"refusals", findings_to_json(report.refusals)},
          {"warnings", findings_to_json(report.warnings)},
          {"references", findings_to_json(report.references)},
          {"source", volume_to_json(report.source)},
          {"targets", std::move(targets)},
          {"mode", report.mode},
          {"tracker", report.tracker},
          {"handover", report.handover.empty() ? nlohmann::json(nullptr) : nlohmann::json(report.handover)}};
}

}  // namespace blockferry
