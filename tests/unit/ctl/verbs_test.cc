// SPDX-License-Identifier: Apache-2.0
// ferryctl as people and scripts see it: what it asks, what it prints where, and its exit status.
#include <tuple>

#include <fcntl.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>
#include <unistd.h>

#include "tests/unit/ctl/ferryctl_runner.h"

namespace blockferry {
namespace {

using nlohmann::json;

TEST(Migrate, asks_for_its_kind) {
  FakeFerryd ferryd(in_turn({ok(fake_completed_run())}));
  EXPECT_EQ(ferryctl(ferryd, {"migrate", "/a", "/b"}).status, 0);
  EXPECT_EQ(json::parse(ferryd.requests()[0].body)["kind"], "migrate");
}

TEST(ExitStatus, follows_from_the_code) {
  const std::tuple<unsigned, const char*, int> cases[] = {
      {412, "refused", 4},  {400, "invalid_argument", 2}, {404, "not_found", 2}, {403, "unreachable", 3},
      {403, "refused", 3},  {409, "conflict", 1},         {409, "busy", 1},      {500, "io", 1},
      {500, "internal", 1}, {501, "unsupported", 1},      {507, "no_space", 1},  {500, "state_damaged", 1}};
  for (const auto& [http_status, code, status] : cases) {
    FakeFerryd ferryd(in_turn({error_answer(http_status, code)}));
    for (const std::vector<std::string>& words : {std::vector<std::string>{"clone", "/a", "/b"},
                                                  {"list"},
                                                  {"pause", "r"},
                                                  {"watch", "r"},
                                                  {"map", "r"},
                                                  {"verify", "r"},
                                                  {"check", "/a", "/b"},
                                                  {"devices"},
                                                  {"forget", "r"},
                                                  {"set", "r", "--rate", "1"}}) {
      const auto plain = ferryctl(ferryd, words);
      EXPECT_EQ(plain.status, status) << code << " " << words[0];
      EXPECT_EQ(plain.out, "");
      EXPECT_EQ(plain.err, "ferryctl: do it to /dev/sdc: it cannot be\n") << words[0];
      auto with_json = words;
      with_json.push_back("--json");
      const auto as_json = ferryctl(ferryd, with_json);
      EXPECT_EQ(as_json.status, status);
      EXPECT_EQ(as_json.out, "");
      EXPECT_TRUE(is_one_line(as_json.err));
      EXPECT_EQ(json::parse(as_json.err)["error"]["message"], "do it to /dev/sdc: it cannot be");
    }
  }
}

TEST(ExitStatus, of_no_ferryd_is_3_at_once_for_every_verb) {
  for (const std::vector<std::string>& words : {std::vector<std::string>{"list"},
                                                {"watch", "r"},
                                                {"clone", "/a", "/b"},
                                                {"pause", "r"},
                                                {"sync", "r"}}) {
    testing::internal::CaptureStderr();
    std::vector<std::string> all{"--socket", "/nonexistent/control.sock"};
    all.insert(all.end(), words.begin(), words.end());
    EXPECT_EQ(run_ferryctl(all), 3);
    const std::string err = testing::internal::GetCapturedStderr();
    EXPECT_TRUE(is_one_line(err)) << err;
    EXPECT_NE(err.find("systemctl start ferryd"), std::string::npos) << err;
  }
}

TEST(ExitStatus, of_bad_usage_is_2_also_as_json) {
  for (const std::vector<std::string>& words : {std::vector<std::string>{"frobnicate", "--json"},
                                                {"--json"},
                                                {"clone", "/a", "--json"},
                                                {"list", "--json", "--no-such"}}) {
    testing::internal::CaptureStderr();
    EXPECT_EQ(run_ferryctl(words), 2);
    EXPECT_EQ(json::parse(testing::internal::GetCapturedStderr())["error"]["code"], "invalid_argument");
  }
}

TEST(ExitStatus, of_answers_of_an_unpromised_shape_is_1) {
  FakeFerryd ferryd(in_turn({ok(json::array({1, "x", nullptr}))}));
  for (const std::vector<std::string>& words :
       {std::vector<std::string>{"check", "/a", "/b"}, {"set", "r", "--rate", "1"}}) {
    const auto outcome = ferryctl(ferryd, words);
    EXPECT_LE(outcome.status, 1) << "and no crash";
  }
}

TEST(UnknownRun, the_nearest_one_is_named) {
  FakeFerryd ferryd([](const FakeRequest& request) -> FakeAnswer {
    if (request.line() == "GET /v1/runs") return ok(json::array({fake_completed_run()}));
    return {404, fake_error("not_found", "find run", "nihgtly", "no run has this id or name")};
  });
  for (const std::vector<std::string>& words : {std::vector<std::string>{"show", "nihgtly"},
                                                {"watch", "nihgtly"},
                                                {"verify", "nihgtly"},
                                                {"cutover", "nihgtly", "--rehearse"},
                                                {"set", "nihgtly", "--rate", "1"}}) {
    const auto outcome = ferryctl(ferryd, words);
    EXPECT_EQ(outcome.status, 2);
    EXPECT_TRUE(is_one_line(outcome.err));
    EXPECT_NE(outcome.err.find("did you mean nightly?"), std::string::npos) << outcome.err;
  }
  EXPECT_EQ(ferryctl(ferryd, {"show", "something-else"}).err.find("did you mean"), std::string::npos);
}

TEST(RunVerbs, ask_and_print) {
  const json run = fake_run("paused", {{"rate_bytes_per_second", 1048576}});
  const std::tuple<std::vector<std::string>, const char*, const char*> cases[] = {
      {{"pause", "my run"}, "POST /v1/runs/my%20run/pause", "run abcd1234 is paused\n"},
      {{"resume", "r"}, "POST /v1/runs/r/resume", "run abcd1234 is paused\n"},
      {{"cancel", "r"}, "POST /v1/runs/r/cancel", "run abcd1234 is paused\n"},
      {{"commit", "r"}, "POST /v1/runs/r/commit", "run abcd1234 is paused\n"},
      {{"forget", "r"}, "DELETE /v1/runs/r", "run abcd1234 is forgotten\n"},
      {{"set", "r", "--rate", "1M"}, "PATCH /v1/runs/r", "run abcd1234 is paused, rate: at most 1.0 MiB/s\n"},
  };
  for (const auto& [words, request, line] : cases) {
    FakeFerryd ferryd(in_turn({ok(run)}));
    const auto outcome = ferryctl(ferryd, words);
    EXPECT_EQ(outcome.status, 0);
    EXPECT_EQ(outcome.out, line);
    EXPECT_EQ(ferryd.lines(), std::vector<std::string>{request});
    auto with_json = words;
    with_json.push_back("--json");
    EXPECT_EQ(json::parse(ferryctl(ferryd, with_json).out), run);
  }
}

json pause_measured(bool rehearsal) {
  return {{"downtime_ms", 35.5},
          {"pause",
           {{"freeze_ms", 30.0},
            {"drain_ms", 0.01},
            {"copy_ms", 5.25},
            {"flush_ms", 0.0},
            {"command_ms", 0.0},
            {"release_ms", 0.24},
            {"rehearsal", rehearsal}}}};
}

TEST(RunVerbs, a_rollback_is_followed_to_its_end) {
  const json tracking = fake_run("tracking");
  const json back = fake_run("rolled-back", pause_measured(false));
  FakeFerryd ferryd(in_turn({ok(tracking), ok(tracking), ok(back)}));
  const auto outcome = ferryctl(ferryd, {"rollback", "r"});
  EXPECT_EQ(outcome.status, 0);
  EXPECT_EQ(outcome.out.find("rolled back; "), 0U) << outcome.out;
  EXPECT_NE(outcome.out.find("36ms"), std::string::npos) << outcome.out;
  EXPECT_EQ(ferryd.lines(),
            (std::vector<std::string>{"POST /v1/runs/r/rollback", "GET /v1/runs/r", "GET /v1/runs/r"}));
}

TEST(RunVerbs, a_rollback_that_comes_to_nothing_says_why) {
  FakeFerryd ferryd(in_turn(
      {ok(fake_run("tracking")),
       ok(fake_run("tracking",
                   {{"cutover_error", fake_error("busy", "swap", "/dev/vg/data", "no")["error"]}}))}));
  const auto outcome = ferryctl(ferryd, {"rollback", "r"});
  EXPECT_EQ(outcome.status, 1);
  EXPECT_NE(outcome.err.find("swap /dev/vg/data"), std::string::npos) << outcome.err;
}

TEST(RunVerbs, set_sends_only_the_change) {
  FakeFerryd ferryd(in_turn({ok(fake_run("copying"))}));
  EXPECT_EQ(ferryctl(ferryd, {"set", "r", "--rate", "none"}).out,
            "run abcd1234 is copying, rate: no limit\n");
  EXPECT_EQ(json::parse(ferryd.requests()[0].body), json({{"rate_bytes_per_second", 0}}));
}

TEST(RunVerbs, a_rehearsal_tells_the_pause_that_it_measured) {
  const json before = fake_run("tracking", {{"downtime_ms", 40.0}});
  const json after = fake_run("tracking", pause_measured(true));
  FakeFerryd ferryd(in_turn({ok(before), ok(before), ok(before), ok(after)}));
  const auto outcome = ferryctl(ferryd, {"cutover", "--rehearse", "r"});
  EXPECT_EQ(outcome.status, 0);
  EXPECT_EQ(outcome.out, "rehearsed: a pause of 36ms: freeze 30ms, copy 5ms, release 1ms\n");
  EXPECT_EQ(ferryd.lines()[1], "POST /v1/runs/r/rehearse") << "never a cutover, which would be one";
}

TEST(RunVerbs, a_rehearsal_that_could_not_be_is_an_error) {
  FakeFerryd ferryd(
      in_turn({ok(fake_run("tracking")), ok(fake_run("tracking")),
               ok(fake_run("tracking", {{"warning", "it does not converge"}})),
               ok(fake_run("tracking", {{"cutover_error", fake_error("busy", "freeze", "/srv",
                                                                     "frozen by somebody")["error"]}}))}));
  const auto outcome = ferryctl(ferryd, {"cutover", "--rehearse", "r"});
  EXPECT_EQ(outcome.status, 1);
  EXPECT_NE(outcome.err.find("frozen by somebody"), std::string::npos) << outcome.err;
}

TEST(SyncVerifyAndCutover, are_followed_to_their_end) {
  for (const char* verb : {"sync", "verify", "cutover"}) {
    FakeFerryd ferryd(in_turn({ok(fake_run("queued")), ok(fake_run("verifying")), ok(fake_completed_run())}));
    const auto outcome = ferryctl(ferryd, {verb, "nightly"});
    EXPECT_EQ(outcome.status, 0);
    EXPECT_NE(outcome.out.find("verified, no mismatch\n"), std::string::npos);
    EXPECT_EQ(ferryd.lines()[0], std::string("POST /v1/runs/nightly/") + verb);
    EXPECT_EQ(ferryd.lines().size(), 3u);
    EXPECT_EQ(ferryctl(ferryd, {verb, "nightly", "--detach"}).out, "abcd1234\n");
  }
}

TEST(SyncAndVerify, mismatches_exit_1) {
  json run = failed_run();
  run["verify"] = {{"granules", 1048576}, {"mismatches", 3}};
  FakeFerryd ferryd(in_turn({ok(fake_run("queued")), ok(run)}));
  EXPECT_EQ(ferryctl(ferryd, {"verify", "nightly"}).status, 1);
}

TEST(Watch, with_json_prints_a_line_for_each_change) {
  const json first = fake_run("copying"), second = fake_run("copying", {{"progress", 0.5}});
  FakeFerryd ferryd(in_turn({ok(first), ok(first), ok(second), ok(second), ok(fake_completed_run())}));
  const auto outcome = ferryctl(ferryd, {"watch", "nightly", "--json"});
  EXPECT_EQ(outcome.status, 0);
  std::vector<json> lines;
  std::istringstream stream(outcome.out);
  for (std::string line; std::getline(stream, line);) lines.push_back(json::parse(line));
  EXPECT_EQ(lines, (std::vector<json>{first, second, fake_completed_run()}));
}

TEST(Watch, of_an_ended_run_tells_its_end) {
  FakeFerryd completed(in_turn({ok(fake_completed_run())}));
  EXPECT_EQ(ferryctl(completed, {"watch", "r"}).status, 0);
  FakeFerryd failed(in_turn({ok(failed_run())}));
  const auto outcome = ferryctl(failed, {"watch", "r", "--json"});
  EXPECT_EQ(outcome.status, 1);
  EXPECT_EQ(json::parse(outcome.out), failed_run());
  EXPECT_EQ(json::parse(outcome.err)["error"]["code"], "io");
}

TEST(Watch, follows_the_run_and_not_the_name) {
  // A name goes to the newest run that bears it; what is watched stays the same run.
  FakeFerryd ferryd(in_turn({ok(fake_run("copying")), ok(fake_completed_run())}));
  ferryctl(ferryd, {"watch", "nightly"});
  EXPECT_EQ(ferryd.lines(),
            (std::vector<std::string>{"GET /v1/runs/nightly", "GET /v1/runs/abcd1234?wait_ms=100"}));
}

TEST(Looking, prints_text_or_the_answer_itself) {
  const json runs = json::array({fake_completed_run()});
  const json map{{"id", "x"}, {"bytes_total", 1}, {"granule_bytes", 4096}, {"cells", json::array()}};
  const json report{{"ok", true}, {"refusals", json::array()}, {"mode", "full"}};
  const std::tuple<std::vector<std::string>, json, const char*> cases[] = {
      {{"list"}, runs, "abcd1234"},
      {{"show", "r"}, runs[0], "abcd1234"},
      {{"map", "r"}, map, "nothing is known"},
      {{"check", "/a", "/b"}, report, "nothing stands against it"},
      {{"devices"}, json::array({{{"path", "/dev/sdb"}}}), "/dev/sdb"}};
  for (const auto& [words, answer, part] : cases) {
    FakeFerryd ferryd(in_turn({ok(answer)}));
    const auto outcome = ferryctl(ferryd, words);
    EXPECT_EQ(outcome.status, 0);
    EXPECT_NE(outcome.out.find(part), std::string::npos) << outcome.out;
    auto with_json = words;
    with_json.push_back("--json");
    EXPECT_EQ(json::parse(ferryctl(ferryd, with_json).out), answer);
  }
}

TEST(Looking, map_asks_for_as_many_cells_as_fit) {
  FakeFerryd ferryd(in_turn({ok(json::object())}));
  ferryctl(ferryd, {"map", "r"});
  ferryctl(ferryd, {"map", "r", "--json"});
  EXPECT_EQ(ferryd.lines(), (std::vector<std::string>{"GET /v1/runs/r/map?cells=1580", "GET /v1/runs/r",
                                                      "GET /v1/runs/r/map"}));
}

TEST(Check, refusals_exit_4_and_are_on_stdout) {
  const json report{{"ok", false}, {"refusals", json::array({{{"device", "/b"}, {"message", "mounted"}}})}};
  FakeFerryd ferryd(in_turn({ok(report)}));
  const auto plain = ferryctl(ferryd, {"check", "/a", "/b"});
  EXPECT_EQ(plain.status, 4);
  EXPECT_NE(plain.out.find("/b: mounted"), std::string::npos);
  const auto as_json = ferryctl(ferryd, {"check", "/a", "/b", "--json"});
  EXPECT_EQ(as_json.status, 4);
  EXPECT_EQ(json::parse(as_json.out), report);
}

TEST(Version, is_told_without_a_ferryd_too) {
  FakeFerryd ferryd(in_turn({ok({{"version", "9.9"}})}));
  const auto outcome = ferryctl(ferryd, {"version"});
  EXPECT_EQ(outcome.status, 0);
  EXPECT_EQ(outcome.out, std::string("ferryctl ") + blockferry_version() + "\nferryd 9.9\n");
  testing::internal::CaptureStdout();
  EXPECT_EQ(run_ferryctl({"--socket", "/nonexistent/s", "version", "--json"}), 0);
  EXPECT_EQ(json::parse(testing::internal::GetCapturedStdout()),
            json({{"ferryctl", blockferry_version()}, {"ferryd", nullptr}}));
}

TEST(Help, of_an_unknown_verb_names_the_nearest) {
  testing::internal::CaptureStderr();
  EXPECT_EQ(run_ferryctl({"help", "clnoe"}), 2);
  EXPECT_NE(testing::internal::GetCapturedStderr().find("ferryctl clone"), std::string::npos);
}

TEST(Output, that_cannot_be_written_is_an_error) {
  FakeFerryd ferryd(in_turn({ok(json::array())}));
  std::fflush(stdout);
  const int before = ::dup(STDOUT_FILENO), full = ::open("/dev/full", O_WRONLY | O_CLOEXEC);
  ::dup2(full, STDOUT_FILENO);
  testing::internal::CaptureStderr();
  const int status = run_ferryctl({"--socket", ferryd.socket_path(), "list"});
  const std::string err = testing::internal::GetCapturedStderr();
  ::dup2(before, STDOUT_FILENO);
  ::close(before);
  ::close(full);
  EXPECT_EQ(status, 1);
  EXPECT_NE(err.find("standard output"), std::string::npos) << err;
}

}  // namespace
}  // namespace blockferry
