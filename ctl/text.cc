// SPDX-License-Identifier: Apache-2.0
#include "ctl/text.h"

#include <algorithm>
#include <cstdio>

#include <nlohmann/json.hpp>

#include "blockio/base/units.h"

namespace blockferry {

namespace {

using nlohmann::json;

const json* find(const json& object, const char* member) {
  if (!object.is_object()) return nullptr;
  const auto at = object.find(member);
  return at != object.end() ? &*at : nullptr;
}

bool begins_character(char letter) {
  return (static_cast<unsigned char>(letter) & 0xC0) != 0x80;
}

}  // namespace

std::string printable(std::string text) {
  for (std::size_t i = 0; i < text.size(); ++i) {
    const auto byte = static_cast<unsigned char>(text[i]);
    if (byte < 0x20 || byte == 0x7f) text[i] = '?';
    // U+0080 to U+009F, of which U+009B begins a command as ESC [ does.
    if (byte == 0xC2 && i + 1 < text.size() && static_cast<unsigned char>(text[i + 1]) < 0xA0) {
      text.replace(i, 2, "?");
    }
  }
  return text;
}

std::string text_of(const json& object, const char* member) {
  const json* const value = find(object, member);
  return value != nullptr && value->is_string() ? printable(value->get<std::string>()) : "";
}

bool has_number(const json& object, const char* member) {
  const json* const value = find(object, member);
  return value != nullptr && value->is_number();
}

double number_of(const json& object, const char* member) {
  return has_number(object, member) ? find(object, member)->get<double>() : 0;
}

std::uint64_t count_of(const json& object, const char* member) {
  const json* const value = find(object, member);
  if (value != nullptr && value->is_number_unsigned()) return value->get<std::uint64_t>();
  constexpr double counts_max = 9e18;
  const double number = number_of(object, member);
  return number > 0 ? std::uint64_t(std::min(number, counts_max)) : 0;
}

const json& list_of(const json& object, const char* member) {
  static const json empty = json::array();
  const json* const value = find(object, member);
  return value != nullptr && value->is_array() ? *value : empty;
}

const json& object_of(const json& object, const char* member) {
  static const json empty = json::object();
  const json* const value = find(object, member);
  return value != nullptr && value->is_object() ? *value : empty;
}

std::string joined(const json& list) {
  std::string text;
  for (const auto& item : list) {
    if (item.is_string()) text += (text.empty() ? "" : ", ") + printable(item.get<std::string>());
  }
  return text;
}

std::string size_text(const json& object, const char* member) {
  return format_size(count_of(object, member));
}

std::string percent_text(const json& run) {
  const double most = text_of(run, "state") == "completed" ? 100 : 99.9;
  char text[16];
  std::snprintf(text, sizeof text, "%.1f%%", std::clamp(number_of(run, "progress") * 100, 0.0, most));
  return text;
}

std::size_t columns_of(const std::string& text) {
  return std::size_t(std::count_if(text.begin(), text.end(), begins_character));
}

std::string shortened(const std::string& text, std::size_t columns, bool unicode) {
  if (columns_of(text) <= columns) return text;
  if (columns == 0) return "";
  std::size_t bytes = 0;
  for (std::size_t taken = 0; bytes < text.size(); ++bytes) {
    if (begins_character(text[bytes]) && taken++ == columns - 1) break;
  }
  return text.substr(0, bytes) + (unicode ? "…" : "~");
}

}  // namespace blockferry
