// SPDX-License-Identifier: Apache-2.0
#include "daemon/run_status.h"

#include <limits>
#include <set>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "tests/unit/daemon/fake_control.h"

namespace blockferry {
namespace {

using nlohmann::json;

/// What the contract promises to scripts.
const std::set<std::string> contract = {
    "id",           "name",       "state",         "mode",        "tracker",
    "source",       "targets",    "granule_bytes", "bytes_total", "bytes_copied",
    "bytes_zeroed", "bytes_read", "passes",        "downtime_ms", "throughput_bytes_per_second",
    "eta_seconds",  "verify",     "bad_ranges",    "restarts",    "error"};

std::set<std::string> members_of(const json& object) {
  std::set<std::string> members;
  for (const auto& [member, value] : object.items()) members.insert(member);
  return members;
}

TEST(RunStatusJson, HoldsTheContractAlways) {
  const json empty = to_json(RunStatus{}), full = to_json(FakeControl::sample_run());
  for (const auto& member : contract) {
    EXPECT_TRUE(empty.contains(member)) << member;
    EXPECT_TRUE(full.contains(member)) << member;
    EXPECT_FALSE(full[member].is_null()) << member;
  }
  EXPECT_EQ(members_of(empty), members_of(full));
}

TEST(RunStatusJson, WhatIsNotKnownIsNull) {
  RunStatus status;
  status.request.source = "/dev/a";
  status.request.targets = {"/dev/b", "/dev/c"};
  const json object = to_json(status);
  for (const char* member : {"granule_bytes", "bytes_total", "downtime_ms", "throughput_bytes_per_second",
                             "eta_seconds", "error", "warning", "started_at", "ended_at", "granules_dirty"})
    EXPECT_TRUE(object[member].is_null()) << member;
  EXPECT_EQ(object["source"], json({{"uri", "/dev/a"}, {"bytes", nullptr}, {"identity", nullptr}}));
  ASSERT_EQ(object["targets"].size(), 2U);
  EXPECT_EQ(object["targets"][1]["uri"], "/dev/c");
  EXPECT_TRUE(object["targets"][1]["bytes"].is_null());
  EXPECT_EQ(object["verify"], json({{"granules", nullptr}, {"mismatches", nullptr}}));
  EXPECT_EQ(object["bad_ranges"], json::array());
  EXPECT_EQ(object["passes"], json::array());
  EXPECT_EQ(object["state"], "queued");
}

TEST(RunStatusJson, ZeroIsNotUnknown) {
  RunStatus status;  // a volume of 0 bytes, verified
  status.granule_bytes = 4096;
  status.verify_ran = true;
  status.targets = {{"/t", 0, "", std::nullopt}};
  const json object = to_json(status);
  EXPECT_EQ(object["bytes_total"], 0);
  EXPECT_EQ(object["source"]["bytes"], 0);
  EXPECT_EQ(object["targets"][0]["bytes"], 0);
  EXPECT_EQ(object["verify"], json({{"granules", 0}, {"mismatches", 0}}));
}

TEST(RunStatusJson, SaysWhatTheRunSays) {
  const json object = to_json(FakeControl::sample_run());
  EXPECT_EQ(object["name"], "known");
  EXPECT_EQ(object["state"], "failed");
  EXPECT_EQ(object["passes"],
            json::array({{{"kind", "full"}, {"granules", 256}, {"bytes", 1 << 20}, {"seconds", 0.5}}}));
  EXPECT_EQ(object["bad_ranges"], json::array({{{"offset", 4096}, {"bytes", 4096}}}));
  EXPECT_EQ(object["error"]["code"], "io");
  EXPECT_EQ(object["error"]["offset"], 4096);
  EXPECT_EQ(object["targets"][0]["error"]["code"], "no_space");
  EXPECT_EQ(object["verify"]["granules"], 256);
  EXPECT_EQ(object["downtime_ms"], 12.5);
}

TEST(RunStatusJson, NumbersThatJsonCannotSayAreHandled) {
  RunStatus status;
  status.progress = std::numeric_limits<double>::quiet_NaN();
  status.eta_seconds = std::numeric_limits<double>::infinity();
  status.downtime_ms = -1;
  json object = to_json(status);
  EXPECT_EQ(object["progress"], 0);
  EXPECT_TRUE(object["eta_seconds"].is_null());
  EXPECT_EQ(object["downtime_ms"], 0);
  status.progress = 1.0001;
  EXPECT_EQ(to_json(status)["progress"], 1);
}

TEST(RunStates, NamesLeadBack) {
  for (int i = 0; i <= static_cast<int>(RunState::rolled_back); ++i) {
    const auto state = static_cast<RunState>(i);
    EXPECT_EQ(run_state_from_name(run_state_name(state)), state);
  }
  EXPECT_STREQ(run_state_name(RunState::cutting_over), "cutting-over");
  EXPECT_STREQ(run_state_name(RunState::rolled_back), "rolled-back");
  EXPECT_STREQ(pass_kind_name(PassKind::final), "final");
  EXPECT_FALSE(run_state_from_name("cutting_over"));
  EXPECT_TRUE(run_state_ended(RunState::cancelled));
  EXPECT_FALSE(run_state_ended(RunState::paused));
}

}  // namespace
}  // namespace blockferry
