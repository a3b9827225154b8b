// SPDX-License-Identifier: Apache-2.0
// Preflight asked about one source and one target, and what it said.
#pragma once

#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "blockio/base/units.h"
#include "daemon/preflight.h"
#include "tests/support/loop_device.h"

namespace blockferry {

inline RunRequest clone_of(const std::string& source, const std::string& target) {
  RunRequest request;
  request.source = source;
  request.targets = {target};
  return request;
}

inline PreflightReport report_on(const RunRequest& request, const std::vector<VolumeInUse>& in_use = {}) {
  auto report = preflight(request, in_use);
  EXPECT_TRUE(report) << report.error().message();
  return report ? *report : PreflightReport{};
}

/// "DEVICE: MESSAGE" a line; empty where nothing was found.
inline std::string text_of(const std::vector<PreflightFinding>& findings) {
  std::string text;
  for (const auto& finding : findings) text += finding.device + ": " + finding.message + "\n";
  return text;
}

inline std::string refusals_of(const RunRequest& request, const std::vector<VolumeInUse>& in_use = {}) {
  return text_of(report_on(request, in_use).refusals);
}

inline bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

/// The request is refused for this volume and this reason, whatever else stands against it, and each refusal
/// is one line.
inline void expect_refused(const RunRequest& request, const std::string& device, const std::string& reason,
                           const std::vector<VolumeInUse>& in_use = {}) {
  const PreflightReport report = report_on(request, in_use);
  bool found = false;
  for (const auto& refusal : report.refusals) {
    found = found || (refusal.device == device && contains(refusal.message, reason));
    EXPECT_FALSE(contains(refusal.message, "\n")) << refusal.message;
  }
  EXPECT_TRUE(found) << "expected " << device << ": …" << reason << "…; got\n" << text_of(report.refusals);
}

inline void expect_accepted(const RunRequest& request, const std::vector<VolumeInUse>& in_use = {}) {
  EXPECT_EQ(refusals_of(request, in_use), "");
}

}  // namespace blockferry
