// SPDX-License-Identifier: Apache-2.0
#include "ctl/progress.h"

#include <algorithm>
#include <cmath>

#include <nlohmann/json.hpp>

#include "blockio/base/units.h"
#include "ctl/text.h"

namespace blockferry {

namespace {

using nlohmann::json;

constexpr std::size_t one_line_columns = 130;  // enough for all parts beside a bar
constexpr std::size_t bar_columns_max = 40, bar_columns_min = 8;

std::string bar(double part, std::size_t columns, bool unicode) {
  // Eighths of a cell, so that a slow run is seen to move.
  static constexpr const char* eighths[] = {" ", "▏", "▎", "▍", "▌", "▋", "▊", "▉"};
  const auto filled = std::size_t(std::clamp(part, 0.0, 1.0) * double(columns) * 8);
  std::string text = unicode ? "▕" : "[";
  for (std::size_t i = 0; i < columns; ++i) {
    if (!unicode) {
      text += filled >= (i + 1) * 8 ? "#" : "-";
    } else {
      text += filled >= (i + 1) * 8 ? "█" : filled > i * 8 ? eighths[filled - i * 8] : " ";
    }
  }
  return text + (unicode ? "▏" : "]");
}

std::string bytes_text(const json& run) {
  // Over passes and restarts more may be copied than the volume holds: then the plain sum says it best.
  std::string text = size_text(run, "bytes_copied");
  if (count_of(run, "bytes_copied") <= count_of(run, "bytes_total"))
    text += " of " + size_text(run, "bytes_total");
  return text;
}

std::string activity_text(const json& run) {
  const std::string state = text_of(run, "state"), activity = text_of(run, "activity");
  if (state == "queued") return "waiting for its turn";
  if (state == "paused" && activity != "pausing")
    return "paused; `ferryctl resume " + text_of(run, "id") + "` goes on";
  return activity.empty() ? state : activity;
}

std::string eta_part(std::optional<double> eta_seconds) {
  const std::string text = eta_seconds ? eta_text(*eta_seconds) : "";
  return text.empty() ? "" : text + " left";
}

/// Of a source in use: how far its passes have come, and what a cutover would take.
std::vector<std::string> live_parts(const json& run) {
  const std::string tracker = text_of(run, "tracker");
  if (tracker == "none" || tracker == "checksum" || tracker.empty()) return {};
  std::vector<std::string> parts{"tracker " + tracker + ", pass " +
                                 std::to_string(list_of(run, "passes").size())};
  if (has_number(run, "predicted_downtime_ms") && !has_number(run, "ended_at")) {
    parts.push_back("written at " + size_text(run, "dirty_bytes_per_second") + "/s");
    parts.push_back("a cutover now would pause for " +
                    format_duration(number_of(run, "predicted_downtime_ms") / 1000));
  }
  return parts;
}

/// What happens, the most important first.
std::vector<std::string> details_of(const json& run) {
  std::vector<std::string> parts{activity_text(run)};
  const auto add = [&](const std::string& part) {
    if (!part.empty()) parts.push_back(part);
  };
  add(text_of(run, "warning"));
  if (has_number(run, "bytes_total")) add(bytes_text(run));
  if (number_of(run, "throughput_bytes_per_second") > 0)
    add(size_text(run, "throughput_bytes_per_second") + "/s");
  for (const auto& part : live_parts(run)) add(part);
  if (number_of(run, "bytes_zeroed") > 0) add(size_text(run, "bytes_zeroed") + " of it zeroes");
  if (const auto bad = list_of(run, "bad_ranges").size(); bad > 0)
    add(std::to_string(bad) + " unreadable range" + (bad > 1 ? "s" : ""));
  return parts;
}

/// As many of the parts as fit, the first one cut where it must be.
std::string fitting(const std::vector<std::string>& parts, const ProgressStyle& style) {
  std::string text;
  for (const auto& part : parts) {
    if (part.empty()) continue;
    if (text.empty()) {
      text = shortened(part, style.columns, style.unicode);
    } else if (columns_of(text) + 2 + columns_of(part) <= style.columns) {
      text += "  " + part;
    } else {
      break;
    }
  }
  return text;
}

std::string padded_percent(const json& run) {
  const std::string text = percent_text(run);
  return std::string(6 - std::min<std::size_t>(text.size(), 6), ' ') + text;
}

/// A bar in the room that `text` leaves, if that is worth it.
std::string with_bar(const json& run, const std::string& text, const ProgressStyle& style) {
  const std::size_t used = columns_of(text) + 3;
  if (style.columns < used + bar_columns_min) return text;
  const std::size_t room = std::min(style.columns - used, bar_columns_max);
  return bar(number_of(run, "progress"), room, style.unicode) + " " + text;
}

std::string verified_text(const json& run) {
  const json& verify = object_of(run, "verify");
  if (!has_number(verify, "granules")) return "; not verified";
  const auto mismatches = count_of(verify, "mismatches");
  if (mismatches == 0) return "; verified, no mismatch";
  return "; " + std::to_string(mismatches) + " granules differ";
}

std::string unreadable_text(const json& run) {
  const auto bad = list_of(run, "bad_ranges").size();
  if (bad == 0) return "";
  return "; " + std::to_string(bad) + (bad > 1 ? " ranges" : " range") +
         " could not be read (`ferryctl show " + text_of(run, "id") + "` lists them)";
}

std::string rate_text(double bytes, double seconds) {
  if (!(bytes > 0) || !(seconds > 0) || !(bytes / seconds < 1e18)) return "";
  return format_size(std::uint64_t(bytes / seconds)) + "/s";
}

/// Rounded to what is worth saying of a time so far away, and the step it was rounded to.
struct RoundedEta {
  double seconds, step;
};
RoundedEta rounded_eta(double seconds) {
  const double step = seconds < 10      ? 1
                      : seconds < 60    ? 5
                      : seconds < 300   ? 30
                      : seconds < 3600  ? 60
                      : seconds < 21600 ? 600
                                        : 3600;
  return {std::max(1.0, std::round(seconds / step) * step), step};
}

}  // namespace

std::vector<std::string> progress_lines(const json& run, std::optional<double> eta_seconds,
                                        const ProgressStyle& style) {
  std::vector<std::string> parts = details_of(run);
  const std::string percent = padded_percent(run), eta = eta_part(eta_seconds);
  if (style.columns < one_line_columns) {
    // Two lines always, whatever their content: a layout that comes and goes is hard to read.
    return {with_bar(run, fitting({percent, eta}, style), style), fitting(parts, style)};
  }
  parts.insert(parts.begin(), percent);
  parts.insert(parts.begin() + 2, eta);
  return {with_bar(run, fitting(parts, style), style)};
}

std::string progress_text(const json& run, std::optional<double> eta_seconds) {
  std::string text = "run " + text_of(run, "id") + ": " + percent_text(run);
  std::vector<std::string> parts = details_of(run);
  parts.push_back(eta_part(eta_seconds));
  for (const auto& part : parts) {
    if (!part.empty()) text += ", " + part;
  }
  return text;
}

std::string summary_line(const json& run) {
  const json& passes = list_of(run, "passes");
  const json last = passes.empty() ? json::object() : passes.back();
  double bytes = 0, pass_seconds = 0;
  for (const auto& pass : passes) {
    bytes += number_of(pass, "bytes");
    pass_seconds += number_of(pass, "seconds");
  }
  std::string text;
  if (text_of(last, "kind") == "checksum") {
    // The pass read the whole volume; what it copied says nothing of its speed.
    const double seconds = number_of(last, "seconds");
    text = "compared " + size_text(run, "bytes_total") + ", copied " + size_text(last, "bytes") +
           " that differed, in " + format_duration(seconds);
    if (const auto rate = rate_text(number_of(run, "bytes_total"), seconds); !rate.empty())
      text += ", " + rate;
  } else {
    const double seconds = number_of(run, "ended_at") - number_of(run, "started_at");
    text = "copied " + size_text(run, "bytes_copied");
    if (number_of(run, "bytes_zeroed") > 0) text += " (" + size_text(run, "bytes_zeroed") + " of zeroes)";
    text += " in " + format_duration(std::max(seconds, 0.0));
    if (const auto rate = rate_text(bytes, pass_seconds); !rate.empty()) text += ", " + rate;
  }
  text += verified_text(run) + unreadable_text(run);
  if (run.value("unfrozen", false))
    return text + "; the source was not frozen, so what it wrote meanwhile may be there in part";
  const std::string pause = pause_line(run);
  return text + (pause.empty() ? "" : "\n" + pause);
}

std::string pause_line(const json& run) {
  const json& pause = object_of(run, "pause");
  if (pause.empty()) return "";
  const auto time = [](double milliseconds) { return format_duration(milliseconds / 1000); };
  std::string text = pause.value("rehearsal", false) ? "rehearsed: a pause of " : "the source paused for ";
  text += time(number_of(run, "downtime_ms")) + ":";
  for (const char* phase : {"freeze", "drain", "copy", "flush", "command", "release"}) {
    const double milliseconds = number_of(pause, (std::string(phase) + "_ms").c_str());
    if (milliseconds >= 0.05)
      text += (text.back() == ':' ? " " : ", ") + std::string(phase) + " " + time(milliseconds);
  }
  return text;
}

std::string live_line(const json& run) {
  std::string text;
  for (const auto& part : live_parts(run)) text += (text.empty() ? "" : "; ") + part;
  const std::string pause = text.empty() ? "" : pause_line(run);
  return text + (pause.empty() ? "" : "\n" + pause);
}

std::string verify_summary_line(const json& run, double seconds) {
  const json& verify = object_of(run, "verify");
  const double bytes = number_of(run, "bytes_total") * double(list_of(run, "targets").size());
  std::string text = "compared " + std::to_string(count_of(verify, "granules")) +
                     " granules with their checksums in " + format_duration(seconds);
  if (const auto rate = rate_text(bytes, seconds); !rate.empty()) text += ", " + rate;
  return text + verified_text(run) + unreadable_text(run);
}

std::string eta_text(double seconds) {
  constexpr double seconds_max = 100.0 * 24 * 3600;
  if (!(seconds >= 0) || seconds > seconds_max) return "";
  const auto whole = std::uint64_t(rounded_eta(seconds).seconds);
  const auto number = [](std::uint64_t value, const char* unit) {
    return value > 0 ? " " + std::to_string(value) + unit : "";
  };
  if (whole < 60) return "about" + number(whole, " s");
  if (whole < 3600) return "about" + number(whole / 60, " min") + number(whole % 60, " s");
  if (whole < 48 * 3600) return "about" + number(whole / 3600, " h") + number(whole % 3600 / 60, " min");
  return "about" + number(whole / 86400, " days") + number(whole % 86400 / 3600, " h");
}

std::optional<double> SteadyEta::update(Nanoseconds now, std::optional<double> eta_seconds) {
  constexpr double follow_seconds = 10;                         // an estimate counts 1/e after that long
  constexpr Nanoseconds settle_time = std::chrono::seconds(1);  // the first estimates are guesses
  constexpr Nanoseconds give_in_after = std::chrono::seconds(3);
  if (!eta_seconds || !(*eta_seconds >= 0)) {
    *this = {};
    return std::nullopt;
  }
  const auto seconds = [](Nanoseconds time) { return std::chrono::duration<double>(time).count(); };
  const double estimated_end = seconds(now) + *eta_seconds;
  if (!known_) {
    known_ = true;
    first_ = last_ = disagrees_since_ = now;
    end_seconds_ = estimated_end;
    return std::nullopt;
  }
  end_seconds_ += (1 - std::exp(-seconds(now - last_) / follow_seconds)) * (estimated_end - end_seconds_);
  last_ = now;
  // Off by half for some seconds on end, something has changed for good: another rate, a busy device.
  const double left = std::max(end_seconds_ - seconds(now), 1.0);
  if (std::abs(estimated_end - end_seconds_) < left / 2) {
    disagrees_since_ = now;
  } else if (now - disagrees_since_ >= give_in_after) {
    end_seconds_ = estimated_end;
    disagrees_since_ = now;
    shown_.reset();
  }
  if (now - first_ < settle_time) return std::nullopt;
  return calmed(std::max(end_seconds_ - seconds(now), 0.0));
}

std::optional<double> SteadyEta::calmed(double seconds_left) {
  const RoundedEta rounded = rounded_eta(seconds_left);
  const bool grows = shown_ && rounded.seconds > *shown_;
  if (!grows || seconds_left > *shown_ + rounded.step) shown_ = rounded.seconds;
  return shown_;
}

}  // namespace blockferry
