// SPDX-License-Identifier: Apache-2.0
// Tables, pages and the map, from the JSON that ferryd answers.
#include "ctl/render.h"

#include <sstream>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "ctl/text.h"
#include "tests/unit/ctl/fake_ferryd.h"

namespace blockferry {
namespace {

using nlohmann::json;

std::vector<std::string> lines_of(const std::string& text) {
  std::vector<std::string> lines;
  std::istringstream stream(text);
  for (std::string line; std::getline(stream, line);) lines.push_back(line);
  return lines;
}

json cell(int synced, int dirty, int zero, int bad) {
  return {{"synced", synced}, {"dirty", dirty}, {"zero", zero}, {"bad", bad}};
}

json map_of(const std::vector<json>& cells) {
  return {{"id", "abcd1234"}, {"bytes_total", 1048576}, {"granule_bytes", 4096}, {"cells", cells}};
}

TEST(Map, each_cell_shows_what_matters_most_in_it) {
  const auto map =
      map_of({cell(8, 0, 0, 0), cell(7, 1, 0, 0), cell(0, 0, 8, 0), cell(4, 2, 1, 1), cell(1, 0, 7, 0)});
  const auto lines = lines_of(render_map(map, {80, 16, false}));
  ASSERT_EQ(lines.size(), 3u);
  EXPECT_EQ(lines[0], "run abcd1234, 1.0 MiB, granules of 4.0 KiB");
  EXPECT_EQ(lines[1], "#d.X#");
  EXPECT_EQ(lines[2], "X bad 2.5%   d dirty 7.5%   # synced 50.0%   . zero 40.0%");
}

TEST(Map, a_single_granule_of_very_many_is_not_nothing) {
  const auto lines = lines_of(render_map(map_of({cell(1000000, 0, 0, 1)}), {80, 16, false}));
  EXPECT_NE(lines.back().find("X bad <0.1%"), std::string::npos);
  EXPECT_NE(lines.back().find("dirty 0.0%"), std::string::npos);
}

TEST(Map, fits_the_terminal) {
  for (const std::size_t columns : {0, 1, 2, 20, 80, 200}) {
    for (const std::size_t rows : {0, 1, 16}) {
      const MapStyle style{columns, rows, false};
      const auto map = map_of(std::vector<json>(map_cells(style), cell(1, 0, 0, 0)));
      const auto lines = lines_of(render_map(map, style));
      EXPECT_EQ(lines.size(), std::max<std::size_t>(rows, 1) + 2);
      for (std::size_t i = 1; i + 1 < lines.size(); ++i)
        EXPECT_EQ(lines[i].size(), std::max<std::size_t>(columns, 2) - 1);
    }
  }
}

TEST(Map, colours_end_with_each_line) {
  const auto lines = lines_of(render_map(map_of({cell(1, 0, 0, 0), cell(0, 0, 1, 0)}), {80, 16, true}));
  EXPECT_EQ(lines[1], "\033[32m█\033[90m░\033[0m");
}

TEST(Map, of_an_unknown_volume_says_so) {
  EXPECT_NE(render_map(map_of({}), {}).find("nothing is known"), std::string::npos);
}

TEST(List, columns_are_aligned) {
  json running = fake_run("copying", json::parse(R"({"progress": 0.5, "throughput_bytes_per_second": 1048576,
      "eta_seconds": 120, "name": "ein-längerer-Name"})"));
  const auto lines = lines_of(render_list(json::array({fake_completed_run(), running})));
  ASSERT_EQ(lines.size(), 3u);
  for (const char* part :
       {"abcd1234", "copying", "50.0%", "1.0 MiB/s", "about 2 min", "/dev/sdb", "/dev/sdc"})
    EXPECT_NE(lines[2].find(part), std::string::npos) << part;
  // Columns, not bytes: the name has a letter of two bytes.
  const auto column_of = [&](std::size_t line, const char* text) {
    return columns_of(lines[line].substr(0, lines[line].find(text)));
  };
  EXPECT_EQ(column_of(1, "completed"), column_of(0, "STATE"));
  EXPECT_EQ(column_of(2, "copying"), column_of(0, "STATE"));
  EXPECT_EQ(column_of(2, "/dev/sdb"), column_of(0, "SOURCE"));
  EXPECT_NE(render_list(json::array()).find("ferryctl clone"), std::string::npos);
}

TEST(Show, tells_what_happened) {
  json run = fake_completed_run();
  run["state"] = "failed";
  run["restarts"] = 2;
  run["error"] = fake_error("io", "write", "/dev/sdc", "the device is gone")["error"];
  run["targets"][0]["error"] = run["error"];
  run["bad_ranges"] = json::parse(R"([{"offset": 4096, "bytes": 8192}])");
  const std::string text = render_run(run);
  for (const char* part :
       {"abcd1234 (nightly)", "failed", "/dev/sdb, 4.0 GiB", "/dev/sdc, failed: write /dev/sdc",
        "4096 +8192 bytes", "1048576 granules, 0 mismatches", "full", "1.2 GiB of it zeroes"})
    EXPECT_NE(text.find(part), std::string::npos) << part << "\n" << text;
}

TEST(Show, of_a_damaged_answer_is_survived) {
  for (const char* damaged :
       {"{}", R"({"passes": null, "targets": 3, "verify": [], "error": "x", "source": null})",
        R"({"targets": [null, 5, {"uri": 7}], "passes": [[]], "bad_ranges": [1]})"})
    EXPECT_FALSE(render_run(json::parse(damaged)).empty());
}

TEST(Show, names_cannot_command_the_terminal) {
  json run = fake_run("copying");
  run["source"]["uri"] = "/tmp/\033[2J\n";
  EXPECT_EQ(render_run(run).find('\033'), std::string::npos);
}

json check_report() {
  return json::parse(R"json({"ok": false, "mode": "full", "tracker": "checksum",
    "source": {"path": "/dev/mapper/old", "resolved": "/dev/dm-3", "kind": "block", "identity": "x",
               "bytes": 1073741824, "logical_block_bytes": 512, "mounts": ["/srv", "/mnt"],
               "holders": ["process 12 (qemu)"], "content": "ext4", "in_use": true},
    "targets": [{"path": "/srv/new.img", "resolved": "/srv/new.img", "kind": "missing", "bytes": 0,
                 "logical_block_bytes": 0, "mounts": [], "holders": [], "content": "", "in_use": false}],
    "refusals": [{"device": "/dev/mapper/old", "message": "the source is mounted"}],
    "warnings": [{"device": "/srv/new.img", "message": "little room"}],
    "references": [{"device": "/dev/mapper/old", "message": "/etc/fstab line 3"}]
})json");
}

TEST(Check, tells_volumes_plan_and_findings) {
  const std::string text = render_check(check_report());
  for (const char* part : {"/dev/mapper/old (/dev/dm-3), block device, 1.0 GiB, sectors of 512, holds ext4, "
                           "mounted on /srv, /mnt, held by "
                           "process 12 (qemu)",
                           "/srv/new.img, a file that will be created", "full, tracker checksum",
                           "/dev/mapper/old: the source is mounted", "/srv/new.img: little room",
                           "/dev/mapper/old: /etc/fstab line 3"})
    EXPECT_NE(text.find(part), std::string::npos) << part << "\n" << text;
  EXPECT_EQ(text.find("nothing stands against it"), std::string::npos);
}

TEST(Check, tells_what_a_server_can) {
  json report = check_report();
  report["source"] = {{"path", "nbd://host/x"},
                      {"resolved", "nbd:host:10809/x"},
                      {"kind", "nbd"},
                      {"bytes", 1048576},
                      {"abilities", {"flushes", "not encrypted"}}};
  const std::string text = render_check(report);
  EXPECT_NE(text.find("source  nbd://host/x, NBD server, 1.0 MiB\n        flushes, not encrypted\n"),
            std::string::npos)
      << text;
}

TEST(Check, without_refusals_says_so) {
  json report = check_report();
  report["ok"] = true;
  report["refusals"] = json::array();
  const std::string text = render_check(report);
  EXPECT_NE(text.find("nothing stands against it"), std::string::npos);
  EXPECT_EQ(text.find("what stands against it:"), std::string::npos);
}

TEST(Devices, show_use_and_tracker) {
  const auto lines = lines_of(render_devices(json::parse(R"([
    {"path": "/dev/sda", "bytes": 1073741824, "logical_block_bytes": 4096, "mounts": ["/"], "holders": ["dm-0"],
     "content": "ext4", "identity": "serial-1", "tracker": null, "tracker_missing": "it is held by dm-0"},
    {"path": "/dev/sdb", "bytes": 0, "logical_block_bytes": 512, "mounts": [], "holders": [], "content": "",
     "identity": null, "tracker": "checksum"}])")));
  ASSERT_EQ(lines.size(), 4u);
  EXPECT_EQ(lines[3], "/dev/sda cannot be moved while in use: it is held by dm-0");
  for (const char* part : {"/dev/sda", "1.0 GiB", "4096", "ext4", "/, dm-0", "none", "serial-1"})
    EXPECT_NE(lines[1].find(part), std::string::npos) << part;
  EXPECT_NE(lines[2].find("checksum"), std::string::npos);
}

}  // namespace
}  // namespace blockferry
