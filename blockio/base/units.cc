// SPDX-License-Identifier: Apache-2.0
#include "blockio/base/units.h"

#include <array>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <utility>

namespace blockferry {

namespace {

Error not_a(const char* what, std::string_view text, const char* examples) {
  return make_error(ErrorCode::invalid_argument, "read", std::string(text),
                    std::string("not a ") + what + "; try " + examples);
}

/// A decimal number, at most three digits after its point: whole and thousandths, and what follows it.
struct Number {
  std::uint64_t whole = 0, thousandths = 0;
  std::string_view suffix;
};

std::optional<Number> parse_number(std::string_view text) {
  Number number;
  const char* const end = text.data() + text.size();
  auto [at, error] = std::from_chars(text.data(), end, number.whole);
  if (error != std::errc() || at == text.data()) return std::nullopt;
  if (at != end && *at == '.') {
    std::uint64_t unit = 100;
    const char* const point = at++;
    for (; at != end && *at >= '0' && *at <= '9'; ++at, unit /= 10) {
      if (unit == 0) return std::nullopt;
      number.thousandths += std::uint64_t(*at - '0') * unit;
    }
    if (at == point + 1) return std::nullopt;
  }
  number.suffix = std::string_view(at, std::size_t(end - at));
  return number;
}

std::optional<std::uint64_t> times(const Number& number, std::uint64_t unit) {
  const auto total = static_cast<unsigned __int128>(number.whole) * unit +
                     static_cast<unsigned __int128>(number.thousandths) * unit / 1000;
  if (total > UINT64_MAX) return std::nullopt;
  return std::uint64_t(total);
}

}  // namespace

Result<std::uint64_t> parse_size(std::string_view text) {
  static constexpr std::array<std::pair<std::string_view, std::uint64_t>, 5> units{
      {{"", 1}, {"K", KiB}, {"M", MiB}, {"G", GiB}, {"T", TiB}}};
  const auto number = parse_number(text);
  for (const auto& [suffix, unit] : units) {
    if (!number || number->suffix != suffix || (unit == 1 && number->thousandths != 0)) continue;
    if (const auto bytes = times(*number, unit)) return *bytes;
  }
  return fail(not_a("size", text, "4K, 500M, 1.5G or 2T"));
}

Result<std::chrono::milliseconds> parse_duration(std::string_view text) {
  static constexpr std::array<std::pair<std::string_view, std::uint64_t>, 4> units{
      {{"ms", 1}, {"s", 1000}, {"m", 60 * 1000}, {"h", 3600 * 1000}}};
  if (text == "0") return std::chrono::milliseconds(0);
  const auto number = parse_number(text);
  for (const auto& [suffix, unit] : units) {
    if (!number || number->suffix != suffix) continue;
    const auto milliseconds = times(*number, unit);
    // A century is enough, and leaves room for arithmetic in nanoseconds.
    if (milliseconds && *milliseconds <= 100ULL * 366 * 24 * 3600 * 1000)
      return std::chrono::milliseconds(*milliseconds);
  }
  return fail(not_a("time", text, "300ms, 10s, 15m or 2h"));
}

std::string format_size(std::uint64_t bytes) {
  static constexpr std::array<const char*, 7> units{"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
  if (bytes < 1024) return std::to_string(bytes) + " B";
  double value = double(bytes);
  std::size_t unit = 0;
  // 1023.95 would be printed as 1024.0.
  while (value >= 1023.95 && unit + 1 < units.size()) {
    value /= 1024;
    ++unit;
  }
  char text[32];
  std::snprintf(text, sizeof text, "%.1f %s", value, units[unit]);
  return text;
}

std::string format_duration(double seconds) {
  char text[48];
  if (!(seconds >= 0)) return "?";
  if (seconds < 9.95) {
    const bool moment = seconds > 0 && seconds < 0.0995;
    std::snprintf(text, sizeof text, moment ? "%.0fms" : "%.1fs",
                  moment ? std::max(1.0, seconds * 1e3) : seconds);
    return text;
  }
  const auto whole = static_cast<unsigned long long>(std::llround(std::min(seconds, 1e12)));
  if (whole < 60) {
    std::snprintf(text, sizeof text, "%llus", whole);
  } else if (whole < 3600) {
    std::snprintf(text, sizeof text, "%llum%02llus", whole / 60, whole % 60);
  } else {
    std::snprintf(text, sizeof text, "%lluh%02llum", whole / 3600, whole / 60 % 60);
  }
  return text;
}

}  // namespace blockferry
