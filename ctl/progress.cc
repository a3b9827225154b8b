// SPDX-License-Identifier: Apache-2.0
#include "ctl/progress.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include <nlohmann/json.hpp>

#include "blockio/base/units.h"

namespace blockferry {

namespace {

using nlohmann::json;

constexpr std::size_t bar_columns_max = 24;

std::string bar(double part, std::size_t columns) {
  // Eighths of a cell, so that a slow run is seen to move.
  static constexpr const char* eighths[] = {" ", "▏", "▎", "▍", "▌", "▋", "▊", "▉"};
  const auto filled = std::size_t(std::clamp(part, 0.0, 1.0) * double(columns) * 8);
  std::string text;
  for (std::size_t i = 0; i < columns; ++i) {
    text += filled >= (i + 1) * 8 ? "█" : filled > i * 8 ? eighths[filled - i * 8] : " ";
  }
  return text;
}

std::string size_of(const json& run, const char* member) {
  return format_size(std::uint64_t(number_of(run, member)));
}

std::string bytes_text(const json& run) {
  // Over passes and restarts more may be copied than the volume holds: then the plain sum says it best.
  std::string text = size_of(run, "bytes_copied");
  if (number_of(run, "bytes_copied") <= number_of(run, "bytes_total"))
    text += " of " + size_of(run, "bytes_total");
  return text;
}

std::string activity_text(const json& run) {
  const std::string state = text_of(run, "state");
  if (state == "queued") return "waiting for its turn";
  if (state == "paused") return "paused";
  const std::string activity = text_of(run, "activity");
  return activity.empty() ? state : activity;
}

}  // namespace

std::string text_of(const json& object, const char* member) {
  const auto at = object.find(member);
  return at != object.end() && at->is_string() ? at->get<std::string>() : "";
}

double number_of(const json& object, const char* member) {
  const auto at = object.find(member);
  return at != object.end() && at->is_number() ? at->get<double>() : 0;
}

std::size_t columns_of(const std::string& text) {
  return std::size_t(
      std::count_if(text.begin(), text.end(), [](char letter) { return (letter & 0xC0) != 0x80; }));
}

std::string eta_text(double seconds) {
  if (!(seconds >= 0) || seconds > 100.0 * 24 * 3600) return "";
  if (seconds < 1) return "about 1s";
  const double step = seconds < 10 ? 1 : seconds < 60 ? 5 : seconds < 600 ? 10 : seconds < 3600 ? 60 : 300;
  const double rounded = std::max(step, std::round(seconds / step) * step);
  if (rounded < 60) return "about " + std::to_string(int(rounded)) + "s";
  if (rounded < 600) {
    const int whole = int(rounded);
    return "about " + std::to_string(whole / 60) + "m" +
           (whole % 60 != 0 ? std::to_string(whole % 60) + "s" : "");
  }
  if (rounded < 3600) return "about " + std::to_string(int(rounded) / 60) + "m";
  const int minutes = int(rounded) / 60;
  return "about " + std::to_string(minutes / 60) + "h" +
         (minutes % 60 != 0 ? std::to_string(minutes % 60) + "m" : "");
}

std::string progress_line(const json& run, std::size_t columns) {
  const double progress = std::clamp(number_of(run, "progress"), 0.0, 1.0);
  char percent[16];
  // 100 % is said by the end alone.
  std::snprintf(percent, sizeof percent, "%5.1f%%", std::min(progress * 100, 99.9));
  const double rate = number_of(run, "throughput_bytes_per_second");
  const auto eta = run.find("eta_seconds");
  const std::string warning = text_of(run, "warning");

  // In the order of importance; what does not fit is left out from the end.
  std::vector<std::string> parts{percent, activity_text(run)};
  if (!warning.empty()) parts.push_back(warning);
  parts.push_back(bytes_text(run));
  if (rate > 0) parts.push_back(format_size(std::uint64_t(rate)) + "/s");
  if (eta != run.end() && eta->is_number()) {
    if (const std::string text = eta_text(eta->get<double>()); !text.empty()) parts.push_back(text + " left");
  }
  if (number_of(run, "bytes_zeroed") > 0) parts.push_back(size_of(run, "bytes_zeroed") + " of it zeroes");
  if (!run.value("bad_ranges", json::array()).empty()) {
    parts.push_back(std::to_string(run["bad_ranges"].size()) + " ranges unreadable");
  }
  std::string text;
  for (const auto& part : parts) {
    const std::string next = text.empty() ? part : text + "  " + part;
    if (columns_of(next) > columns) break;
    text = next;
  }
  const std::size_t used = columns_of(text);
  if (columns < used + 10) return text;
  return "▕" + bar(progress, std::min(columns - used - 3, bar_columns_max)) + "▏ " + text;
}

std::string summary_line(const json& run) {
  const double seconds = number_of(run, "ended_at") - number_of(run, "started_at");
  double bytes = 0, pass_seconds = 0;
  for (const auto& pass : run.value("passes", json::array())) {
    bytes += number_of(pass, "bytes");
    pass_seconds += number_of(pass, "seconds");
  }
  std::string text = "copied " + size_of(run, "bytes_copied");
  if (number_of(run, "bytes_zeroed") > 0) text += " (" + size_of(run, "bytes_zeroed") + " of zeroes)";
  text += " in " + format_duration(std::max(seconds, 0.0));
  if (pass_seconds > 0 && bytes > 0) text += ", " + format_size(std::uint64_t(bytes / pass_seconds)) + "/s";
  const json verify = run.value("verify", json::object());
  if (verify.is_object() && verify.contains("granules") && verify["granules"].is_number()) {
    const double mismatches = number_of(verify, "mismatches");
    text += mismatches > 0 ? "; " + std::to_string(std::uint64_t(mismatches)) + " granules differ"
                           : "; verified, no mismatch";
  } else {
    text += "; not verified";
  }
  if (const auto bad = run.value("bad_ranges", json::array()); !bad.empty()) {
    text += "; " + std::to_string(bad.size()) +
            " ranges could not be read and are zeroes on the target (see `ferryctl show " +
            text_of(run, "id") + "`)";
  }
  return text;
}

}  // namespace blockferry
