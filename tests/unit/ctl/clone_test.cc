// SPDX-License-Identifier: Apache-2.0
// clone from the command to its end: progress, pauses, restarts of ferryd, Ctrl-C.
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>
#include <pty.h>
#include <signal.h>
#include <unistd.h>

#include "tests/unit/ctl/ferryctl_runner.h"

namespace blockferry {
namespace {

using nlohmann::json;
using namespace std::chrono_literals;

TEST(Clone, posts_follows_and_sums_up) {
  FakeFerryd ferryd(in_turn({ok(fake_run("queued")), ok(fake_run("copying")), ok(fake_completed_run())}));
  const auto outcome = ferryctl(ferryd, {"clone", "/dev/sdb", "/dev/sdc", "--no-verify"});
  EXPECT_EQ(outcome.status, 0);
  EXPECT_EQ(outcome.out, "copied 4.0 GiB (1.2 GiB of zeroes) in 1.1s, 4.0 GiB/s; verified, no mismatch\n");
  EXPECT_EQ(outcome.err, "") << "a short run needs no progress in a log";
  const auto requests = ferryd.requests();
  ASSERT_EQ(requests.size(), 3u);
  EXPECT_EQ(requests[0].line(), "POST /v1/runs");
  RunRequest expected;
  expected.source = "/dev/sdb";
  expected.targets = {"/dev/sdc"};
  expected.verify = false;
  EXPECT_EQ(json::parse(requests[0].body), to_json(expected));
  EXPECT_EQ(requests[1].line(), "GET /v1/runs/abcd1234?wait_ms=100");
  EXPECT_EQ(requests[2].line(), "GET /v1/runs/abcd1234?wait_ms=400");
}

TEST(Clone, a_run_that_has_already_ended_is_not_asked_for_again) {
  FakeFerryd ferryd(in_turn({ok(fake_completed_run())}));
  EXPECT_EQ(ferryctl(ferryd, {"clone", "/a", "/b"}).status, 0);
  EXPECT_EQ(ferryd.requests().size(), 1u);
}

TEST(Clone, with_json_prints_the_run_once_at_its_end) {
  FakeFerryd ferryd(in_turn({ok(fake_run("queued")), ok(fake_run("copying")), ok(fake_completed_run())}));
  const auto outcome = ferryctl(ferryd, {"clone", "/a", "/b", "--json"}, {.first_line = 0s, .next_line = 0s});
  EXPECT_EQ(outcome.status, 0);
  EXPECT_EQ(json::parse(outcome.out), fake_completed_run());
  EXPECT_EQ(outcome.err, "");
}

TEST(Clone, a_failed_run_exits_1_and_says_how_to_go_on) {
  FakeFerryd ferryd(in_turn({ok(fake_run("queued")), ok(failed_run())}));
  const auto outcome = ferryctl(ferryd, {"clone", "/a", "/b"});
  EXPECT_EQ(outcome.status, 1);
  EXPECT_EQ(outcome.out, "");
  EXPECT_EQ(outcome.err,
            "ferryctl: write /dev/sdc: the cable is out; `ferryctl resume abcd1234` goes on once the cause "
            "is gone\n");
}

TEST(Clone, a_failed_run_with_json_prints_object_and_error) {
  FakeFerryd ferryd(in_turn({ok(fake_run("queued")), ok(failed_run())}));
  const auto outcome = ferryctl(ferryd, {"--json", "clone", "/a", "/b"});
  EXPECT_EQ(outcome.status, 1);
  EXPECT_EQ(json::parse(outcome.out), failed_run());
  EXPECT_TRUE(is_one_line(outcome.err));
  EXPECT_EQ(json::parse(outcome.err)["error"]["code"], "io");
}

TEST(Clone, whatever_the_cause_a_run_that_did_not_complete_exits_1) {
  json refused = failed_run();
  refused["error"]["code"] = "refused";
  json unknown = fake_run("failed");
  for (const json& end : {fake_run("cancelled"), fake_run("rolled-back"), refused, unknown}) {
    FakeFerryd ferryd(in_turn({ok(fake_run("queued")), ok(end)}));
    const auto outcome = ferryctl(ferryd, {"clone", "/a", "/b"});
    EXPECT_EQ(outcome.status, 1) << end;
    EXPECT_TRUE(is_one_line(outcome.err)) << outcome.err;
  }
}

TEST(Clone, detached_prints_the_id_or_the_object) {
  FakeFerryd ferryd(in_turn({ok(fake_run("queued"))}));
  EXPECT_EQ(ferryctl(ferryd, {"clone", "/a", "/b", "--detach"}).out, "abcd1234\n");
  EXPECT_EQ(json::parse(ferryctl(ferryd, {"clone", "/a", "/b", "--detach", "--json"}).out),
            fake_run("queued"));
  EXPECT_EQ(ferryd.lines(), (std::vector<std::string>{"POST /v1/runs", "POST /v1/runs"}));
}

TEST(Clone, a_log_gets_plain_lines) {
  FakeFerryd ferryd(in_turn(
      {ok(fake_run("queued")), ok(fake_run("copying", {{"progress", 0.25}})), ok(fake_completed_run())}));
  const auto outcome = ferryctl(ferryd, {"clone", "/a", "/b"}, {.first_line = 0s, .next_line = 0s});
  EXPECT_EQ(outcome.err,
            "run abcd1234: 0.0%, waiting for its turn, 0 B of 4.0 GiB\n"
            "run abcd1234: 25.0%, copying, 0 B of 4.0 GiB\n");
}

TEST(Clone, a_paused_run_is_waited_for_and_told_of_once) {
  FakeFerryd ferryd(in_turn(
      {ok(fake_run("queued")), ok(fake_run("paused")), ok(fake_run("paused")), ok(fake_completed_run())}));
  const auto outcome = ferryctl(ferryd, {"clone", "/a", "/b"}, {.first_line = 1h});
  EXPECT_EQ(outcome.status, 0);
  EXPECT_TRUE(is_one_line(outcome.err)) << outcome.err;
  EXPECT_NE(outcome.err.find("paused; `ferryctl resume abcd1234` goes on"), std::string::npos);
}

TEST(Clone, outlives_a_restart_of_ferryd) {
  FakeFerryd ferryd(in_turn({ok(fake_run("queued")),
                             ok(fake_run("copying")),
                             {.drop = true},
                             error_answer(503, "busy"),
                             {.drop = true},
                             ok(fake_completed_run())}));
  const auto outcome = ferryctl(ferryd, {"clone", "/a", "/b"}, {.first_line = 1h});
  EXPECT_EQ(outcome.status, 0);
  EXPECT_EQ(outcome.err, "run abcd1234: ferryd does not answer; waiting for it to come back\n");
}

TEST(Clone, a_ferryd_that_stays_away_exits_3) {
  FakeFerryd ferryd(in_turn({ok(fake_run("queued")), {.drop = true}}));
  const auto outcome = ferryctl(ferryd, {"clone", "/a", "/b"}, {.reconnect = 0s});
  EXPECT_EQ(outcome.status, 3);
  EXPECT_TRUE(is_one_line(outcome.err));
  EXPECT_NE(outcome.err.find("ferryd went away; the run goes on from its last checkpoint when it is back: "
                             "`ferryctl watch abcd1234`"),
            std::string::npos)
      << outcome.err;
}

TEST(Clone, ctrl_c_detaches_and_says_how_to_go_on) {
  const pthread_t waiting = ::pthread_self();
  FakeFerryd ferryd([&](const FakeRequest& request) -> FakeAnswer {
    if (request.method == "POST") return ok(fake_run("queued"));
    ::pthread_kill(waiting, SIGINT);
    return {.silent = true};
  });
  const auto outcome = ferryctl(ferryd, {"clone", "/a", "/b"});
  EXPECT_EQ(outcome.status, 130);
  EXPECT_TRUE(is_one_line(outcome.err));
  for (const char* part : {"goes on", "ferryctl watch abcd1234", "ferryctl cancel abcd1234"})
    EXPECT_NE(outcome.err.find(part), std::string::npos) << outcome.err;
  EXPECT_EQ(ferryd.lines().size(), 2u) << "the run was left alone";
}

TEST(Clone, ctrl_c_with_json_prints_the_run_as_last_seen) {
  // Answered as well: the signal may find the command before it waits, and must be noticed all the same.
  const pthread_t waiting = ::pthread_self();
  FakeFerryd ferryd([&](const FakeRequest& request) -> FakeAnswer {
    if (request.method != "POST") ::pthread_kill(waiting, SIGINT);
    return ok(fake_run("queued"));
  });
  const auto outcome = ferryctl(ferryd, {"clone", "/a", "/b", "--json"});
  EXPECT_EQ(outcome.status, 130);
  EXPECT_EQ(json::parse(outcome.out)["id"], "abcd1234");
  EXPECT_EQ(ferryd.lines().size(), 2u);
}

TEST(Clone, ctrl_c_at_the_very_end_loses_no_output) {
  const pthread_t waiting = ::pthread_self();
  FakeFerryd ferryd([&](const FakeRequest&) -> FakeAnswer {
    ::pthread_kill(waiting, SIGINT);
    return ok(fake_completed_run());
  });
  const auto outcome = ferryctl(ferryd, {"clone", "/a", "/b", "--detach"});
  // Whichever was first, the answer or the signal: the process lives to tell.
  if (outcome.status == 0) {
    EXPECT_EQ(outcome.out, "abcd1234\n");
  } else {
    EXPECT_EQ(outcome.status, 130);
    EXPECT_NE(outcome.err.find("`ferryctl list` shows whether"), std::string::npos) << outcome.err;
  }
}

TEST(Clone, ctrl_c_before_the_answer_tells_of_the_doubt) {
  const pthread_t waiting = ::pthread_self();
  FakeFerryd ferryd([&](const FakeRequest&) -> FakeAnswer {
    ::pthread_kill(waiting, SIGINT);
    return {.silent = true};
  });
  const auto outcome = ferryctl(ferryd, {"clone", "/a", "/b"});
  EXPECT_EQ(outcome.status, 130);
  EXPECT_NE(outcome.err.find("`ferryctl list` shows whether"), std::string::npos) << outcome.err;
}

TEST(Terminal, progress_is_rewritten_in_place_and_gone_at_the_end) {
  FakeFerryd ferryd(
      in_turn({ok(fake_run("queued")), ok(fake_run("copying", {{"progress", 0.5}})), ok(failed_run())}));
  ::setenv("TERM", "xterm", 1);
  ::setenv("LC_ALL", "C.UTF-8", 1);
  int terminal = -1, process_side = -1;
  winsize size{};
  size.ws_col = 60;
  size.ws_row = 24;
  ASSERT_EQ(::openpty(&terminal, &process_side, nullptr, nullptr, &size), 0);
  std::fflush(stderr);
  const int before = ::dup(STDERR_FILENO);
  ::dup2(process_side, STDERR_FILENO);
  const int status = run_ferryctl({"--socket", ferryd.socket_path(), "clone", "/a", "/b"});
  std::fflush(stderr);
  ::dup2(before, STDERR_FILENO);
  ::close(before);
  ::close(process_side);
  // The kernel hands it over piece by piece; with the other side closed, reading fails after the last one.
  std::string shown;
  char buffer[4096];
  for (ssize_t bytes = 0; (bytes = ::read(terminal, buffer, sizeof buffer)) > 0;)
    shown.append(buffer, std::size_t(bytes));
  ::close(terminal);
  ::unsetenv("LC_ALL");
  EXPECT_EQ(status, 1);
  const auto at_half = shown.find("50.0%"), cleared = shown.rfind("\r\033[1A\033[J");
  EXPECT_NE(at_half, std::string::npos) << shown;
  EXPECT_NE(shown.find("\r\033[1A"), std::string::npos) << "two lines, drawn over each other";
  EXPECT_NE(cleared, std::string::npos) << shown;
  EXPECT_GT(cleared, at_half);
  EXPECT_GT(shown.find("ferryctl: write /dev/sdc"), cleared) << "the error stands alone";
}

}  // namespace
}  // namespace blockferry
