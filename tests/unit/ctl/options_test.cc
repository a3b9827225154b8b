// SPDX-License-Identifier: Apache-2.0
// The command line: every verb and option, and what is said of those that do not exist.
#include "ctl/options.h"

#include <cstdlib>
#include <filesystem>
#include <functional>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "blockio/base/units.h"

namespace blockferry {
namespace {

using Words = std::vector<std::string>;

Command parsed(const Words& words) {
  const auto command = parse_command(words);
  EXPECT_TRUE(command) << command.error().message();
  return command ? *command : Command();
}

std::string error_of(const Words& words) {
  const auto command = parse_command(words);
  EXPECT_FALSE(command);
  if (command) return "";
  EXPECT_EQ(command.error().code, ErrorCode::invalid_argument);
  const std::string message = command.error().message();
  EXPECT_EQ(message.find('\n'), std::string::npos) << message;
  return message;
}

TEST(Options, every_verb_is_understood) {
  for (const auto& info : verb_infos()) {
    Words words{info.name};
    for (std::size_t i = 0; i < info.words_min; ++i) words.push_back("/dev/x" + std::to_string(i));
    if (info.verb == Verb::set) words.insert(words.end(), {"--rate", "1M"});
    EXPECT_EQ(parsed(words).verb, info.verb) << info.name;
  }
}

struct OptionCase {
  Words words;
  std::function<void(RunRequest&)> expected;
};

TEST(Options, each_option_of_clone_reaches_the_request) {
  const OptionCase cases[] = {
      {{}, [](RunRequest&) {}},
      {{"--name", "nightly"}, [](RunRequest& r) { r.name = "nightly"; }},
      {{"--mode", "full"}, [](RunRequest& r) { r.mode = RunMode::full; }},
      {{"--mode=incremental"}, [](RunRequest& r) { r.mode = RunMode::incremental; }},
      {{"--mode", "hybrid"}, [](RunRequest& r) { r.mode = RunMode::hybrid; }},
      {{"--tracker", "auto"}, [](RunRequest& r) { r.tracker = TrackerChoice::automatic; }},
      {{"--tracker", "ebpf"}, [](RunRequest& r) { r.tracker = TrackerChoice::ebpf; }},
      {{"--tracker", "qemu"}, [](RunRequest& r) { r.tracker = TrackerChoice::qemu; }},
      {{"--tracker", "checksum"}, [](RunRequest& r) { r.tracker = TrackerChoice::checksum; }},
      {{"--tracker", "none"}, [](RunRequest& r) { r.tracker = TrackerChoice::none; }},
      {{"--max-downtime", "250ms"}, [](RunRequest& r) { r.max_downtime_ms = 250; }},
      {{"--max-passes", "7"}, [](RunRequest& r) { r.max_passes = 7; }},
      {{"--cutover", "manual"}, [](RunRequest& r) { r.cutover = CutoverChoice::manual; }},
      {{"--cutover", "auto"}, [](RunRequest& r) { r.cutover = CutoverChoice::automatic; }},
      {{"--quiesce-cmd", "stop it"}, [](RunRequest& r) { r.quiesce_cmd = "stop it"; }},
      {{"--resume-cmd", "go on"}, [](RunRequest& r) { r.resume_cmd = "go on"; }},
      {{"--cutover-cmd", "switch over"}, [](RunRequest& r) { r.cutover_cmd = "switch over"; }},
      {{"--handover", "dm-swap"}, [](RunRequest& r) { r.handover = "dm-swap"; }},
      {{"--max-freeze", "2s"}, [](RunRequest& r) { r.max_freeze_ms = 2000; }},
      {{"--sync-every", "15m"}, [](RunRequest& r) { r.sync_every_ms = 15 * 60 * 1000; }},
      {{"--rate", "500M"}, [](RunRequest& r) { r.rate_bytes_per_second = 500 * MiB; }},
      {{"--rate", "none"}, [](RunRequest&) {}},
      {{"--queue-depth", "64"}, [](RunRequest& r) { r.queue_depth = 64; }},
      {{"--io-size", "1M"}, [](RunRequest& r) { r.io_size_bytes = MiB; }},
      {{"--granule", "64K"}, [](RunRequest& r) { r.granule_bytes = 64 * KiB; }},
      {{"--io-engine", "aio"}, [](RunRequest& r) { r.io_engine = "aio"; }},
      {{"--no-verify"}, [](RunRequest& r) { r.verify = false; }},
      {{"--overwrite"}, [](RunRequest& r) { r.overwrite = true; }},
      {{"--force"}, [](RunRequest& r) { r.force = true; }},
      {{"--keep"}, [](RunRequest& r) { r.keep = true; }},
      {{"--on-read-error", "skip"}, [](RunRequest& r) { r.on_read_error = OnReadError::skip; }},
      {{"--on-read-error", "fail"}, [](RunRequest&) {}},
  };
  for (const auto& each : cases) {
    for (const auto& [verb, kind] :
         {std::pair("clone", RunKind::clone), std::pair("migrate", RunKind::migrate)}) {
      Words words{verb, "/dev/a", "/dev/b"};
      words.insert(words.end(), each.words.begin(), each.words.end());
      RunRequest expected;
      expected.kind = kind;
      expected.source = "/dev/a";
      expected.targets = {"/dev/b"};
      each.expected(expected);
      EXPECT_EQ(to_json(parsed(words).request), to_json(expected)) << testing::PrintToString(words);
    }
  }
}

TEST(Options, each_option_is_one_of_the_messages) {
  // What ferryctl sends, ferryd takes.
  const auto request =
      parsed({"clone", "/dev/a", "/dev/b", "/dev/c", "--granule", "64K", "--name", "n"}).request;
  EXPECT_EQ(request.targets, (Words{"/dev/b", "/dev/c"}));
  EXPECT_TRUE(run_request_from_json(to_json(request)));
}

TEST(Options, stand_before_and_after_the_verb) {
  EXPECT_TRUE(parsed({"--json", "list"}).json);
  EXPECT_TRUE(parsed({"list", "--json"}).json);
  EXPECT_EQ(parsed({"--socket", "/a", "list"}).socket_path, "/a");
  EXPECT_EQ(parsed({"--socket=/a", "list"}).socket_path, "/a");
  EXPECT_EQ(parsed({"list", "--socket", "/a"}).socket_path, "/a");
  EXPECT_TRUE(parsed({"clone", "--detach", "/a", "/b"}).detach);
  EXPECT_TRUE(parsed({"cutover", "r", "--rehearse"}).rehearse);
}

TEST(Options, the_environment_names_the_socket_unless_the_option_does) {
  ::unsetenv("BLOCKFERRY_SOCKET");
  EXPECT_EQ(parsed({"list"}).socket_path, default_socket_path);
  ::setenv("BLOCKFERRY_SOCKET", "/from/environment", 1);
  EXPECT_EQ(parsed({"list"}).socket_path, "/from/environment");
  EXPECT_EQ(parsed({"--socket", "/a", "list"}).socket_path, "/a");
  ::unsetenv("BLOCKFERRY_SOCKET");
}

TEST(Options, set_changes_only_what_is_named) {
  const auto rate = parsed({"set", "r", "--rate", "2G"}).change;
  EXPECT_EQ(rate.rate_bytes_per_second, 2 * GiB);
  EXPECT_FALSE(rate.max_downtime_ms);
  EXPECT_EQ(parsed({"set", "r", "--rate", "none"}).change.rate_bytes_per_second, 0u);
  const auto downtime = parsed({"set", "r", "--max-downtime", "1s"}).change;
  EXPECT_EQ(downtime.max_downtime_ms, 1000u);
  EXPECT_FALSE(downtime.rate_bytes_per_second);
  EXPECT_NE(error_of({"set", "r"}).find("--rate"), std::string::npos);
}

TEST(Options, paths_become_absolute_and_nothing_else) {
  const std::string here = std::filesystem::current_path();
  EXPECT_EQ(absolute_path("/dev/../dev/sdb"), "/dev/../dev/sdb");
  EXPECT_EQ(absolute_path("image"), here + "/image");
  EXPECT_EQ(absolute_path("./a://b"), here + "/./a://b");
  EXPECT_EQ(absolute_path("nbd://host/export"), "nbd://host/export");
  EXPECT_EQ(absolute_path("nbd+unix:///x?socket=/s"), "nbd+unix:///x?socket=/s");
  EXPECT_EQ(absolute_path("qemu:/run/vm1?node=a"), "qemu:/run/vm1?node=a");
  EXPECT_EQ(absolute_path("qemu:vm1/qmp?node=a"), "qemu:" + absolute_path("vm1/qmp") + "?node=a");
  EXPECT_EQ(parsed({"check", "a", "b"}).request.source, here + "/a");
}

TEST(Options, what_does_not_exist_is_answered_with_the_nearest) {
  EXPECT_NE(error_of({"clnoe"}).find("`ferryctl clone`"), std::string::npos);
  EXPECT_NE(error_of({"ls"}).find("`ferryctl list`"), std::string::npos);
  EXPECT_NE(error_of({"frobnicate"}).find("`ferryctl --help`"), std::string::npos);
  EXPECT_NE(error_of({"clone", "/a", "/b", "--overwite"}).find("did you mean --overwrite?"),
            std::string::npos);
  EXPECT_NE(error_of({"clone", "/a", "/b", "--qeue-depth", "3"}).find("did you mean --queue-depth?"),
            std::string::npos);
  EXPECT_NE(error_of({"--jsn", "list"}).find("did you mean --json?"), std::string::npos);
  EXPECT_NE(error_of({"clone", "/a", "/b", "--mode", "incremental-ish"}).find("full, incremental, hybrid"),
            std::string::npos);
  EXPECT_NE(error_of({"clone", "/a", "/b", "--tracker", "epbf"}).find("did you mean ebpf?"),
            std::string::npos);
}

TEST(Options, no_option_is_guessed_from_its_beginning) {
  EXPECT_NE(error_of({"clone", "/a", "/b", "--over"}).find("did you mean --overwrite?"), std::string::npos);
}

TEST(Options, what_is_wrong_is_named) {
  EXPECT_NE(error_of({"clone", "/a", "/b", "--rate", "fast"}).find("--rate fast"), std::string::npos);
  EXPECT_NE(error_of({"clone", "/a", "/b", "--max-freeze", "10"}).find("--max-freeze 10"), std::string::npos);
  EXPECT_NE(error_of({"clone", "/a", "/b", "--queue-depth", "-1"}).find("--queue-depth -1"),
            std::string::npos);
  EXPECT_NE(error_of({"clone", "/a", "/b", "--max-passes", "4294967296"}).find("4294967296"),
            std::string::npos);
  EXPECT_NE(error_of({"clone", "/a"}).find("SRC DST"), std::string::npos);
  EXPECT_NE(error_of({"migrate", "/a", "/b", "/c"}).find("/c"), std::string::npos);
  EXPECT_NE(error_of({"show", ""}).find("empty"), std::string::npos);
  EXPECT_NE(error_of({"show", "r", "--rate", "1M"}).find("--rate"), std::string::npos);
  EXPECT_NE(error_of({"--socket"}).find("--socket"), std::string::npos);
  EXPECT_NE(error_of({"list", "--socket"}).find("--socket"), std::string::npos);
  EXPECT_NE(error_of({"list", "--json", "--json"}).find("--json"), std::string::npos);
  error_of({});
}

TEST(Options, only_utf8_can_be_said_in_json) {
  for (const char* wrong :
       {"/a\xff", "/\xc0\xaf", "/\xe2\x82", "/\xed\xa0\x80", "/\xf4\x90\x80\x80", "/\x80"})
    EXPECT_NE(error_of({"clone", wrong, "/b"}).find("UTF-8"), std::string::npos);
  for (const char* right : {"/ä", "/€", "/😀", "/\xef\xbf\xbf", "/\xf4\x8f\xbf\xbf"})
    EXPECT_EQ(parsed({"clone", right, "/b"}).request.source, right);
}

TEST(Help, names_every_verb_and_every_exit_status) {
  const std::string text = help_text();
  for (const auto& info : verb_infos())
    EXPECT_NE(text.find(std::string("\n  ") + info.name + " "), std::string::npos) << info.name;
  for (const char* status : {"0 done", "1 the run failed", "2 usage", "3 ferryd", "4 preflight", "130 "})
    EXPECT_NE(text.find(status), std::string::npos) << status;
}

TEST(Help, of_a_verb_has_examples_that_are_right) {
  for (const auto& info : verb_infos()) {
    EXPECT_TRUE(parsed({info.name, "--help"}).help);
    EXPECT_TRUE(parsed({info.name, "-h"}).help);
    const std::string text = help_text(info.verb);
    EXPECT_NE(text.find("\nExamples\n"), std::string::npos);
    std::istringstream examples(info.examples);
    std::string line;
    while (std::getline(examples, line)) {
      std::istringstream split(line.substr(0, line.find(" | ")));
      Words words{std::istream_iterator<std::string>(split), {}};
      ASSERT_EQ(words.at(0), "ferryctl");
      EXPECT_EQ(parsed({words.begin() + 1, words.end()}).verb, info.verb) << line;
    }
  }
}

}  // namespace
}  // namespace blockferry
