// SPDX-License-Identifier: Apache-2.0
#include "ctl/render.h"

#include <algorithm>
#include <cstdio>
#include <ctime>
#include <vector>

#include <nlohmann/json.hpp>

#include "blockio/base/units.h"
#include "ctl/progress.h"
#include "ctl/text.h"

namespace blockferry {

namespace {

using nlohmann::json;
using Row = std::vector<std::string>;

std::string table(const std::vector<Row>& rows) {
  std::vector<std::size_t> widths;
  for (const auto& row : rows) {
    widths.resize(std::max(widths.size(), row.size()));
    for (std::size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], columns_of(row[i]));
  }
  std::string text;
  for (const auto& row : rows) {
    std::string line;
    for (std::size_t i = 0; i < row.size(); ++i) {
      line += row[i];
      if (i + 1 < row.size()) line += std::string(widths[i] - columns_of(row[i]) + 2, ' ');
    }
    line.erase(line.find_last_not_of(' ') + 1);
    text += line + "\n";
  }
  return text;
}

std::string rate(const json& run) {
  return number_of(run, "throughput_bytes_per_second") > 0
             ? size_text(run, "throughput_bytes_per_second") + "/s"
             : "";
}

std::string eta(const json& run) {
  return number_of(run, "eta_seconds") > 0 ? eta_text(number_of(run, "eta_seconds")) : "";
}

std::string time_text(double seconds) {
  if (seconds <= 0) return "";
  const auto whole = std::time_t(seconds);
  std::tm local{};
  char text[32];
  if (::localtime_r(&whole, &local) == nullptr ||
      std::strftime(text, sizeof text, "%Y-%m-%d %H:%M:%S", &local) == 0)
    return "";
  return text;
}

std::string targets_of(const json& run) {
  std::string text;
  for (const auto& target : list_of(run, "targets"))
    text += (text.empty() ? "" : " ") + text_of(target, "uri");
  return text;
}

std::string source_of(const json& run) {
  return text_of(object_of(run, "source"), "uri");
}

void add_passes(const json& run, std::string& text) {
  const json& passes = list_of(run, "passes");
  if (passes.empty()) return;
  std::vector<Row> rows{{"  pass", "kind", "granules", "bytes", "time"}};
  for (std::size_t i = 0; i < passes.size(); ++i) {
    rows.push_back({"  " + std::to_string(i + 1), text_of(passes[i], "kind"),
                    std::to_string(count_of(passes[i], "granules")), size_text(passes[i], "bytes"),
                    format_duration(number_of(passes[i], "seconds"))});
  }
  text += table(rows);
}

void add_findings(const json& report, const char* member, const char* title, std::string& text) {
  const json& findings = list_of(report, member);
  if (findings.empty()) return;
  text += std::string(title) + "\n";
  for (const auto& finding : findings) {
    text += "  " + text_of(finding, "device") + ": " + text_of(finding, "message") + "\n";
  }
}

std::string volume_line(const json& volume) {
  const std::string kind = text_of(volume, "kind");
  std::string text = text_of(volume, "path");
  if (kind != "nbd" && text_of(volume, "resolved") != text) text += " (" + text_of(volume, "resolved") + ")";
  if (kind == "missing") return text + ", a file that will be created";
  text += ", " +
          (kind == "block" ? std::string("block device, ")
           : kind == "nbd" ? std::string("NBD server, ")
           : kind.empty()  ? std::string()
                           : kind + ", ") +
          size_text(volume, "bytes");
  if (number_of(volume, "logical_block_bytes") > 0) {
    text += ", sectors of " + std::to_string(count_of(volume, "logical_block_bytes"));
  }
  if (const auto content = text_of(volume, "content"); !content.empty()) text += ", holds " + content;
  if (const auto mounts = joined(list_of(volume, "mounts")); !mounts.empty())
    text += ", mounted on " + mounts;
  if (const auto holders = joined(list_of(volume, "holders")); !holders.empty())
    text += ", held by " + holders;
  if (const auto abilities = joined(list_of(volume, "abilities")); !abilities.empty())
    text += "\n        " + abilities;
  return text;
}

}  // namespace

std::string render_list(const json& runs) {
  if (runs.empty()) return "no runs; `ferryctl clone SRC DST` begins one\n";
  std::vector<Row> rows{{"ID", "NAME", "STATE", "DONE", "RATE", "TIME LEFT", "SOURCE", "TARGETS"}};
  for (const auto& run : runs) {
    const std::string state = text_of(run, "state");
    const bool running = state == "copying" || state == "verifying";
    rows.push_back({text_of(run, "id"), text_of(run, "name"), state, percent_text(run),
                    running ? rate(run) : "", running ? eta(run) : "", source_of(run), targets_of(run)});
  }
  return table(rows);
}

std::string render_run(const json& run) {
  std::vector<Row> rows;
  const auto add = [&](const char* name, const std::string& value) {
    if (!value.empty()) rows.push_back({name, value});
  };
  add("run", text_of(run, "id") + (text_of(run, "name").empty() ? "" : " (" + text_of(run, "name") + ")"));
  add("state",
      text_of(run, "state") + (text_of(run, "activity").empty() ? "" : ", " + text_of(run, "activity")));
  add("source", source_of(run) + ", " + size_text(run, "bytes_total"));
  if (run.value("swapped", false)) add("swapped", "it lies on the target; the old disk is kept in step");
  for (const auto& target : list_of(run, "targets")) {
    const json& error = object_of(target, "error");
    add("target", text_of(target, "uri") + (error.empty() ? "" : ", failed: " + text_of(error, "message")));
  }
  add("mode", text_of(run, "mode") + ", tracker " + text_of(run, "tracker"));
  add("done", percent_text(run) + ", " + size_text(run, "bytes_copied") + " copied, " +
                  size_text(run, "bytes_zeroed") + " of it zeroes");
  add("rate", rate(run));
  add("time left", eta(run));
  const json& verify = object_of(run, "verify");
  if (has_number(verify, "granules")) {
    add("verified", std::to_string(count_of(verify, "granules")) + " granules, " +
                        std::to_string(count_of(verify, "mismatches")) + " mismatches");
  }
  if (has_number(run, "predicted_downtime_ms")) {
    add("written", size_text(run, "dirty_bytes_per_second") + "/s, between the last passes");
    add("predicted", "a pause of " + format_duration(number_of(run, "predicted_downtime_ms") / 1000) +
                         "; at most " + format_duration(number_of(run, "max_downtime_ms") / 1000) +
                         " is asked for");
  }
  add("pause", pause_line(run));
  const json& audit = object_of(run, "audit");
  if (number_of(audit, "granules") > 0) {
    add("audited", std::to_string(count_of(audit, "granules")) + " granules, " +
                       std::to_string(count_of(audit, "misses")) + " written without the tracker's knowing");
  }
  add("granule", size_text(run, "granule_bytes"));
  add("I/O", text_of(run, "io_engine"));
  add("restarts", std::to_string(count_of(run, "restarts")));
  add("created", time_text(number_of(run, "created_at")));
  add("ended", time_text(number_of(run, "ended_at")));
  add("warning", text_of(run, "warning"));
  add("error", text_of(object_of(run, "error"), "message"));
  for (const auto& bad : list_of(run, "bad_ranges")) {
    add("unreadable",
        std::to_string(count_of(bad, "offset")) + " +" + std::to_string(count_of(bad, "bytes")) + " bytes");
  }
  std::string text = table(rows);
  add_passes(run, text);
  return text;
}

std::string render_devices(const json& devices) {
  std::vector<Row> rows{{"DEVICE", "SIZE", "SECTOR", "CONTENT", "IN USE", "TRACKER", "IDENTITY"}};
  for (const auto& device : devices) {
    std::string use = joined(list_of(device, "mounts"));
    if (const auto holders = joined(list_of(device, "holders")); !holders.empty()) {
      use += (use.empty() ? "" : ", ") + holders;
    }
    const std::string tracker = text_of(device, "tracker");
    rows.push_back({text_of(device, "path"), size_text(device, "bytes"),
                    std::to_string(count_of(device, "logical_block_bytes")), text_of(device, "content"), use,
                    tracker.empty() ? "none" : tracker, text_of(device, "identity")});
  }
  std::string text = table(rows);
  for (const auto& device : devices) {
    if (const std::string why = text_of(device, "tracker_missing"); !why.empty())
      text += text_of(device, "path") + " cannot be moved while in use: " + why + "\n";
  }
  return text;
}

std::string render_check(const json& report) {
  std::string text = "source  " + volume_line(object_of(report, "source")) + "\n";
  for (const auto& target : list_of(report, "targets")) text += "target  " + volume_line(target) + "\n";
  text += "mode    " + text_of(report, "mode") + ", tracker " + text_of(report, "tracker");
  if (text_of(report, "handover") == "dm-swap") text += "; migrate would swap the volume in use (dm-swap)";
  text += "\n";
  add_findings(report, "refusals", "what stands against it:", text);
  add_findings(report, "warnings", "to be aware of:", text);
  add_findings(report, "references", "what refers to the source, and will still after a move:", text);
  if (report.value("ok", false)) text += "nothing stands against it\n";
  return text;
}

}  // namespace blockferry
