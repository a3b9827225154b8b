// SPDX-License-Identifier: Apache-2.0
#include "daemon/api_server.h"

#include <chrono>
#include <future>
#include <vector>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "tests/unit/daemon/api_server_fixture.h"

namespace blockferry {
namespace {

using nlohmann::json;
using std::chrono::milliseconds;
using SteadyClock = std::chrono::steady_clock;

const std::string request_body = R"({"source":"/dev/a","targets":["/dev/b"]})";

std::string body_with_source(const std::string& source) {
  return R"({"source":")" + source + R"(","targets":["/dev/b"]})";
}

std::string code_of(const HttpAnswer& answer) {
  const json body = json::parse(answer.body, nullptr, false);
  return body.is_object() && body.contains("error") ? body["error"]["code"].get<std::string>()
                                                    : "no error object";
}

TEST_F(ApiServerTest, AnswersOverOneKeptConnection) {
  start();
  auto http = client();
  ASSERT_TRUE(http.connected());
  for (int i = 0; i < 3; ++i) {
    const auto version = http.ask("GET", "/v1/version");
    EXPECT_EQ(version.status, 200);
    EXPECT_EQ(version.field("Content-Type"), "application/json");
    EXPECT_EQ(json::parse(version.body)["version"], blockferry_version());
  }
  EXPECT_EQ(http.ask("POST", "/v1/runs", request_body).status, 201);
  EXPECT_EQ(control_.runs_created, 1U);
  EXPECT_EQ(json::parse(http.ask("GET", "/v1/runs").body).size(), 2U);
  EXPECT_EQ(json::parse(http.ask("GET", "/v1/runs/known").body)["name"], "known");
  EXPECT_EQ(http.ask("GET", "/v1/runs/%6Bnown").status, 200);
  EXPECT_EQ(json::parse(http.ask("GET", "/v1/runs/known/map").body)["cells"].size(), 1024U);
  EXPECT_EQ(json::parse(http.ask("GET", "/v1/runs/known/map?cells=65536").body)["cells"].size(), 65536U);
  EXPECT_EQ(http.ask("POST", "/v1/runs/known/cancel").status, 200);
  EXPECT_EQ(control_.last_verb, RunVerb::cancel);
  EXPECT_EQ(http.ask("PATCH", "/v1/runs/known", R"({"rate_bytes_per_second":7})").status, 200);
  EXPECT_EQ(control_.last_rate, 7U);
  EXPECT_EQ(http.ask("DELETE", "/v1/runs/known").status, 200);
}

TEST_F(ApiServerTest, RefusesWhatItDoesNotKnow) {
  start();
  auto http = client();
  struct Case {
    const char *method, *target, *body;
    int status;
    const char* code;
  };
  for (const Case& one : {Case{"GET", "/v2/runs", "", 404, "not_found"},
                          {"GET", "/v1/runs/", "", 404, "not_found"},
                          {"GET", "/v1/runs/unknown", "", 404, "not_found"},
                          {"GET", "/v1/runs/a%2Fb", "", 404, "not_found"},
                          {"GET", "/v1/runs/%zz", "", 404, "not_found"},
                          {"POST", "/v1/runs/known/explode", "", 404, "not_found"},
                          {"POST", "/v1/runs/known/commit", "", 501, "unsupported"},
                          {"POST", "/v1/runs/known/pause", "{}", 400, "invalid_argument"},
                          {"PUT", "/v1/runs", "", 405, "invalid_argument"},
                          {"GET", "/v1/check", "", 405, "invalid_argument"},
                          {"GET", "/v1/runs/known/pause", "", 405, "invalid_argument"},
                          {"POST", "/v1/runs", "", 400, "invalid_argument"},
                          {"POST", "/v1/runs", "{\"source\":1}", 400, "invalid_argument"},
                          {"PATCH", "/v1/runs/known", "{}", 400, "invalid_argument"},
                          {"GET", "/v1/runs/known?wait_ms=60001", "", 400, "invalid_argument"},
                          {"GET", "/v1/runs/known?wait_ms=-1", "", 400, "invalid_argument"},
                          {"GET", "/v1/runs/known?wait=1", "", 400, "invalid_argument"},
                          {"GET", "/v1/runs/known/map?cells=0", "", 400, "invalid_argument"},
                          {"GET", "/v1/runs/known/map?cells=65537", "", 400, "invalid_argument"},
                          {"GET", "/v1/runs?x", "", 400, "invalid_argument"},
                          {"GET", "v1/runs", "", 400, "invalid_argument"}}) {
    const auto answer = http.ask(one.method, one.target, one.body);
    EXPECT_EQ(answer.status, one.status) << one.method << " " << one.target;
    EXPECT_EQ(code_of(answer), one.code) << one.method << " " << one.target;
  }
  EXPECT_EQ(http.ask("PUT", "/v1/runs").field("Allow"), "POST, GET");
  const auto refused = http.ask("POST", "/v1/runs", body_with_source("/refused"));
  EXPECT_EQ(refused.status, 412);
  EXPECT_EQ(code_of(refused), "refused");
}

TEST_F(ApiServerTest, AnExceptionIsAnAnswer) {
  start();
  auto http = client();
  const auto answer = http.ask("POST", "/v1/runs", body_with_source("/throws"));
  EXPECT_EQ(answer.status, 500);
  EXPECT_EQ(code_of(answer), "internal");
  EXPECT_EQ(http.ask("GET", "/v1/version").status, 200);
}

TEST_F(ApiServerTest, CallsThatHangStopNobodyElse) {
  control_.devices_hang = true;
  start();
  std::vector<HttpClient> stuck;
  // Every thread of the slow pool is held, and then some.
  for (int i = 0; i < 6; ++i) {
    stuck.push_back(client());
    ASSERT_TRUE(stuck.back().send(HttpClient::request_text("GET", "/v1/devices")));
  }
  control_.wait_for_hanging(4);
  auto http = client();
  EXPECT_EQ(http.ask("GET", "/v1/runs").status, 200);
  EXPECT_EQ(http.ask("GET", "/v1/runs/known").status, 200);
  EXPECT_EQ(http.ask("POST", "/v1/runs/known/cancel").status, 200);
  EXPECT_EQ(http.ask("GET", "/metrics").status, 200);
  EXPECT_EQ(metrics_client().ask("GET", "/metrics").status, 200);
  control_.release();
  for (auto& one : stuck) EXPECT_EQ(one.receive().status, 200);
}

TEST_F(ApiServerTest, StopDoesNotWaitForeverForACallThatHangs) {
  control_.devices_hang = true;
  options_.stop_timeout_seconds = 1;
  start();
  auto http = client();
  ASSERT_TRUE(http.send(HttpClient::request_text("GET", "/v1/devices")));
  control_.wait_for_hanging(1);
  EXPECT_FALSE(server_->stop());
  EXPECT_TRUE(http.ended());
  server_.reset();     // what the call uses lives on,
  control_.release();  // until it comes back
  control_.wait_for_none_hanging();
}

TEST_F(ApiServerTest, StopLetsRequestsUnderWayEnd) {
  control_.devices_hang = true;
  start();
  auto http = client();
  ASSERT_TRUE(http.send(HttpClient::request_text("GET", "/v1/devices")));
  control_.wait_for_hanging(1);
  auto stopped = std::async(std::launch::async, [this] { return server_->stop(); });
  control_.release();
  EXPECT_EQ(http.receive().status, 200);
  EXPECT_TRUE(stopped.get());
  EXPECT_FALSE(std::filesystem::exists(options_.socket_path));
  EXPECT_FALSE(client().connected());
}

TEST_F(ApiServerTest, WaitAnswersWhenTheRunSettles) {
  start();
  auto http = client();
  const auto begun = SteadyClock::now();
  ASSERT_TRUE(http.send(HttpClient::request_text("GET", "/v1/runs/known?wait_ms=60000")));
  while (control_.settled_calls < 3 && SteadyClock::now() < begun + std::chrono::seconds(30)) continue;
  EXPECT_EQ(client().ask("GET", "/v1/runs/known").status, 200);
  control_.settled = true;
  EXPECT_EQ(http.receive().status, 200);
  EXPECT_LT(SteadyClock::now() - begun, std::chrono::seconds(30));
}

TEST_F(ApiServerTest, WaitAnswersWhenTheTimeHasPassed) {
  start();
  auto http = client();
  const auto begun = SteadyClock::now();
  EXPECT_EQ(http.ask("GET", "/v1/runs/known?wait_ms=50").status, 200);
  EXPECT_GE(SteadyClock::now() - begun, milliseconds(50));
  EXPECT_EQ(http.ask("GET", "/v1/runs/unknown?wait_ms=60000").status, 404);
}

TEST_F(ApiServerTest, AWaiterThatLeftIsNotWaitedFor) {
  start();
  auto http = client();
  ASSERT_TRUE(http.send(HttpClient::request_text("GET", "/v1/runs/known?wait_ms=60000")));
  const auto limit = SteadyClock::now() + std::chrono::seconds(30);
  while (control_.settled_calls == 0 && SteadyClock::now() < limit) continue;
  http.close();
  // The poll stops: two readings of the counter some polls apart come out the same.
  unsigned before = 0, after = 1;
  while (before != after && SteadyClock::now() < limit) {
    before = control_.settled_calls;
    client().ask("GET", "/v1/runs/known?wait_ms=0");
    const auto pause = SteadyClock::now() + milliseconds(40);
    while (SteadyClock::now() < pause) continue;
    after = control_.settled_calls;
  }
  EXPECT_EQ(before, after);
}

TEST_F(ApiServerTest, MetricsAddressServesOnlyReading) {
  start();
  auto http = metrics_client();
  ASSERT_TRUE(http.connected());
  const auto metrics = http.ask("GET", "/metrics?x=y");
  EXPECT_EQ(metrics.status, 200);
  EXPECT_EQ(metrics.field("Content-Type"), "text/plain; version=0.0.4; charset=utf-8");
  EXPECT_EQ(metrics.body, "# no metrics\n");
  EXPECT_NE(http.ask("GET", "/").body.find("/metrics"), std::string::npos);
  EXPECT_EQ(http.ask("POST", "/metrics").status, 405);
  EXPECT_EQ(http.ask("GET", "/v1/runs").status, 404);
  EXPECT_EQ(http.ask("POST", "/v1/runs", request_body).status, 404);
  EXPECT_EQ(http.ask("DELETE", "/v1/runs/known").status, 404);
  EXPECT_EQ(control_.runs_created, 0U);
}

}  // namespace
}  // namespace blockferry
