// SPDX-License-Identifier: Apache-2.0
// Progress as people see it: lines that fit, times that settle, sums that are true.
#include "ctl/progress.h"

#include <random>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "ctl/nearest.h"
#include "ctl/text.h"
#include "tests/unit/ctl/fake_ferryd.h"

namespace blockferry {
namespace {

using nlohmann::json;
using namespace std::chrono_literals;

json copying() {
  return fake_run("copying", json::parse(R"({"activity": "copying", "progress": 0.688,
      "bytes_copied": 2147483648, "bytes_zeroed": 1073741824, "throughput_bytes_per_second": 209715200})"));
}

std::string all_of(const std::vector<std::string>& lines) {
  std::string text;
  for (const auto& line : lines) text += line + "\n";
  return text;
}

TEST(ProgressLines, a_wide_terminal_gets_one_line_with_everything) {
  const auto lines = progress_lines(copying(), 130, {160, true});
  ASSERT_EQ(lines.size(), 1u);
  EXPECT_NE(lines[0].find(
                " 68.8%  copying  about 2 min left  2.0 GiB of 4.0 GiB  200.0 MiB/s  1.0 GiB of it zeroes"),
            std::string::npos)
      << lines[0];
  EXPECT_NE(lines[0].find("█"), std::string::npos);
}

TEST(ProgressLines, eighty_columns_get_two_lines_with_everything) {
  const auto lines = progress_lines(copying(), 130, {79, true});
  ASSERT_EQ(lines.size(), 2u);
  EXPECT_NE(lines[0].find(" 68.8%  about 2 min left"), std::string::npos) << lines[0];
  EXPECT_EQ(lines[1], "copying  2.0 GiB of 4.0 GiB  200.0 MiB/s  1.0 GiB of it zeroes");
}

TEST(ProgressLines, no_line_is_wider_than_the_terminal) {
  json full = copying();
  full["warning"] = "no answer from /dev/disk/by-id/ata-Ämter for 31 s (write at offset 4096)";
  full["bad_ranges"] = json::parse(R"([{"offset": 0, "bytes": 4096}])");
  for (const json& run : {copying(), full, fake_run("queued"), fake_run("paused"), json::object()}) {
    for (std::size_t columns = 0; columns <= 250; ++columns) {
      for (const bool unicode : {true, false}) {
        const auto lines = progress_lines(run, 1000.0, {columns, unicode});
        EXPECT_EQ(lines.size(), columns < 130 ? 2u : 1u);
        for (const auto& line : lines) EXPECT_LE(columns_of(line), columns) << line;
      }
    }
  }
}

TEST(ProgressLines, what_matters_most_is_left_out_last) {
  json run = copying();
  run["warning"] = "no answer from /dev/sdc for 31 s";
  const std::string narrow = all_of(progress_lines(run, 130, {50, true}));
  EXPECT_NE(narrow.find("68.8%"), std::string::npos);
  EXPECT_NE(narrow.find("copying  no answer from /dev/sdc for 31 s"), std::string::npos);
  EXPECT_EQ(narrow.find("zeroes"), std::string::npos);
  EXPECT_EQ(all_of(progress_lines(run, 130, {6, true})), " 68.8%\ncopyi…\n");
}

TEST(ProgressLines, the_bar_grows_in_eighths_and_needs_no_unicode) {
  std::string before;
  for (int percent = 0; percent <= 100; ++percent) {
    const auto lines =
        progress_lines(fake_run("copying", {{"progress", percent / 100.0}}), std::nullopt, {79, true});
    EXPECT_NE(lines[0], before);
    before = lines[0];
  }
  const auto plain = progress_lines(fake_run("copying", {{"progress", 0.5}}), std::nullopt, {79, false});
  EXPECT_EQ(plain[0], "[" + std::string(20, '#') + std::string(20, '-') + "]  50.0%");
}

TEST(ProgressLines, odd_numbers_are_survived) {
  for (const double progress : {-1.0, 2.0, 1e300, -1e300}) {
    const auto lines = progress_lines(fake_run("copying", {{"progress", progress}, {"bytes_copied", -5}}),
                                      progress, {79, true});
    EXPECT_LE(columns_of(lines[0]), 79u);
  }
}

TEST(ProgressLines, a_hundred_percent_is_said_at_the_end_only) {
  EXPECT_EQ(percent_text(fake_run("verifying", {{"progress", 0.99999}})), "99.9%");
  EXPECT_EQ(percent_text(fake_completed_run()), "100.0%");
}

TEST(ProgressLines, a_paused_run_says_how_to_go_on) {
  const auto lines = progress_lines(fake_run("paused", {{"activity", "paused"}}), std::nullopt, {79, true});
  EXPECT_EQ(lines[1].substr(0, lines[1].find("  ")), "paused; `ferryctl resume abcd1234` goes on");
}

TEST(ProgressLines, bytes_beyond_the_total_are_not_a_part_of_it) {
  // A second pass, or a crash in between: copied twice.
  const auto text = progress_text(fake_run("copying", {{"bytes_copied", 5368709120}}), std::nullopt);
  EXPECT_NE(text.find("5.0 GiB"), std::string::npos);
  EXPECT_EQ(text.find("of 4.0 GiB"), std::string::npos);
}

TEST(ProgressText, is_one_plain_line) {
  EXPECT_EQ(progress_text(copying(), 61),
            "run abcd1234: 68.8%, copying, 2.0 GiB of 4.0 GiB, 200.0 MiB/s, 1.0 GiB of it zeroes, "
            "about 1 min left");
}

TEST(EtaText, is_coarser_the_farther_away) {
  EXPECT_EQ(eta_text(0), "about 1 s");
  EXPECT_EQ(eta_text(4.4), "about 4 s");
  EXPECT_EQ(eta_text(43), "about 45 s");
  EXPECT_EQ(eta_text(58), "about 1 min");
  EXPECT_EQ(eta_text(100), "about 1 min 30 s");
  EXPECT_EQ(eta_text(115), "about 2 min");
  EXPECT_EQ(eta_text(1234), "about 21 min");
  EXPECT_EQ(eta_text(2 * 3600 + 1400), "about 2 h 20 min");
  EXPECT_EQ(eta_text(3599), "about 1 h");
  EXPECT_EQ(eta_text(30 * 3600), "about 30 h");
  EXPECT_EQ(eta_text(75 * 3600), "about 3 days 3 h");
  for (const double nonsense : {-1.0, 1e12, double(INFINITY), double(NAN)}) EXPECT_EQ(eta_text(nonsense), "");
}

TEST(SteadyEta, settles_though_the_estimates_are_noisy) {
  // 300 s of work, each estimate off by up to a quarter: what is shown stays near the truth, and goes up
  // rarely.
  std::mt19937 random(20260101);
  std::uniform_real_distribution<double> noise(0.75, 1.25);
  SteadyEta eta;
  double before = 1e9;
  int rises = 0, shown_count = 0;
  for (double seconds = 0; seconds < 295; seconds += 0.4) {
    const double left = 300 - seconds;
    const auto shown =
        eta.update(std::chrono::duration_cast<Nanoseconds>(seconds * 1s), left * noise(random));
    if (seconds < 1) {
      EXPECT_FALSE(shown) << "the first estimates are guesses";
      continue;
    }
    ASSERT_TRUE(shown);
    ++shown_count;
    rises += *shown > before;
    before = *shown;
    if (seconds > 20 && left > 30) {
      EXPECT_NEAR(*shown, left, left * 0.15 + 30) << "at " << seconds;
    }
  }
  EXPECT_GT(shown_count, 700);
  EXPECT_LE(rises, 6);
}

TEST(SteadyEta, follows_a_lasting_change_within_seconds) {
  SteadyEta eta;
  Nanoseconds now = 0s;
  for (int i = 0; i < 50; ++i, now += 200ms) eta.update(now, 1000 - 0.2 * i);
  for (int i = 0; i < 20; ++i, now += 200ms) eta.update(now, 100.0);  // the rate limit was lifted
  const auto shown = eta.update(now, 100.0);
  ASSERT_TRUE(shown);
  EXPECT_NEAR(*shown, 100, 30);
}

TEST(SteadyEta, a_passing_stall_changes_little) {
  SteadyEta eta;
  Nanoseconds now = 0s;
  for (int i = 0; i < 50; ++i, now += 200ms) eta.update(now, 100 - 0.2 * i);
  const double before = *eta.update(now, 90.0);
  for (int i = 0; i < 5; ++i, now += 200ms) eta.update(now, 400.0);
  EXPECT_NEAR(*eta.update(now, 89.0), before, 60);
}

TEST(SteadyEta, without_an_estimate_nothing_is_shown) {
  SteadyEta eta;
  eta.update(0s, 10.0);
  EXPECT_TRUE(eta.update(2s, 8.0));
  EXPECT_FALSE(eta.update(3s, std::nullopt));
  EXPECT_FALSE(eta.update(4s, 6.0)) << "begins anew";
}

TEST(Summary, of_a_full_copy) {
  EXPECT_EQ(summary_line(fake_completed_run()),
            "copied 4.0 GiB (1.2 GiB of zeroes) in 1.1s, 4.0 GiB/s; verified, no mismatch");
}

TEST(Summary, says_what_was_not_verified_or_not_read) {
  json run = fake_completed_run();
  run["verify"] = {{"granules", nullptr}, {"mismatches", nullptr}};
  run["bad_ranges"] = json::parse(R"([{"offset": 0, "bytes": 4096}, {"offset": 8192, "bytes": 4096}])");
  const std::string text = summary_line(run);
  EXPECT_NE(text.find("; not verified; 2 ranges could not be read"), std::string::npos) << text;
  EXPECT_NE(text.find("ferryctl show abcd1234"), std::string::npos) << text;
}

TEST(Summary, of_a_checksum_pass_tells_what_was_compared) {
  json run = fake_completed_run();
  run["mode"] = "incremental";
  run["passes"].push_back(
      json::parse(R"({"kind": "checksum", "granules": 256, "bytes": 1048576, "seconds": 0.5})"));
  EXPECT_EQ(summary_line(run),
            "compared 4.0 GiB, copied 1.0 MiB that differed, in 0.5s, 8.0 GiB/s; verified, no mismatch");
}

TEST(Summary, of_an_empty_volume_divides_by_nothing) {
  const std::string text = summary_line(
      fake_run("completed", json::parse(R"({"bytes_total": 0, "passes": [], "ended_at": 1000.0})")));
  EXPECT_EQ(text, "copied 0 B in 0.0s; not verified");
}

TEST(Summary, of_verify_counts_mismatches) {
  json run = fake_completed_run();
  EXPECT_EQ(verify_summary_line(run, 2),
            "compared 1048576 granules with their checksums in 2.0s, 2.0 GiB/s; verified, no mismatch");
  run["verify"]["mismatches"] = 3;
  EXPECT_NE(verify_summary_line(run, 2).find("; 3 granules differ"), std::string::npos);
}

TEST(Live, what_serves_and_what_a_cutover_would_take) {
  EXPECT_EQ(live_line(fake_run("copying")), "");
  json run = fake_run("tracking", {{"tracker", "ebpf"}});
  EXPECT_EQ(live_line(run), "tracker ebpf, pass 1");
  run.update({{"predicted_downtime_ms", 42},
              {"dirty_bytes_per_second", 1048576},
              {"downtime_ms", 30},
              {"pause", {{"freeze_ms", 20}, {"drain_ms", 10}, {"rehearsal", true}}}});
  EXPECT_EQ(live_line(run),
            "tracker ebpf, pass 1; written at 1.0 MiB/s; a cutover now would pause for 42ms\n"
            "rehearsed: a pause of 30ms: freeze 20ms, drain 10ms");
  EXPECT_NE(progress_text(run, std::nullopt).find("tracker ebpf, pass 1, written at"), std::string::npos);
}

TEST(Text, names_cannot_command_the_terminal) {
  EXPECT_EQ(printable("a\033[2Jb\nc\x7f"), "a?[2Jb?c?");
  EXPECT_EQ(printable("\xc2\x9b"
                      "31m"),
            "?31m");
  EXPECT_EQ(printable("ä€😀"), "ä€😀");
}

TEST(Text, is_cut_between_characters) {
  EXPECT_EQ(shortened("äöü", 3, true), "äöü");
  EXPECT_EQ(shortened("äöüß", 3, true), "äö…");
  EXPECT_EQ(shortened("äöüß", 3, false), "äö~");
  EXPECT_EQ(shortened("äöüß", 1, true), "…");
  EXPECT_EQ(shortened("äöüß", 0, true), "");
}

TEST(Nearest, is_near) {
  const std::vector<std::string> verbs{"clone", "list", "cancel", "map", "set"};
  EXPECT_EQ(nearest("clon", verbs), "clone");
  EXPECT_EQ(nearest("lsit", verbs), "list");
  EXPECT_EQ(nearest("canc", verbs), "cancel");
  EXPECT_EQ(nearest("xyz", verbs), "");
  EXPECT_EQ(nearest("", verbs), "");
  EXPECT_EQ(nearest(std::string(100000, 'a'), verbs), "");
  EXPECT_EQ(nearest("clone", {}), "");
}

}  // namespace
}  // namespace blockferry
