// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstdio>

#include <nlohmann/json.hpp>

#include "blockio/base/units.h"
#include "ctl/render.h"
#include "ctl/text.h"

namespace blockferry {

namespace {

using nlohmann::json;

struct Kind {
  const char* member;
  const char* name;
  char letter;
  const char* colour;
  const char* block;
};

// What matters most to the reader first: one bad granule shows in a cell of a million.
constexpr Kind kinds[] = {
    {"bad", "bad", 'X', "\033[31m", "█"},
    {"dirty", "dirty", 'd', "\033[33m", "▓"},
    {"synced", "synced", '#', "\033[32m", "█"},
    {"zero", "zero", '.', "\033[90m", "░"},
};

std::string cell_text(const json& cell, bool colour) {
  for (const Kind& kind : kinds) {
    if (number_of(cell, kind.member) <= 0) continue;
    return colour ? std::string(kind.colour) + kind.block : std::string(1, kind.letter);
  }
  return " ";
}

/// One column is left free: a terminal may wrap when its last one is filled.
std::size_t columns_of_map(const MapStyle& style) {
  return std::max<std::size_t>(style.columns, 2) - 1;
}

std::string legend(const json& cells, bool colour) {
  double total = 0;
  for (const auto& cell : cells) {
    for (const Kind& kind : kinds) total += number_of(cell, kind.member);
  }
  std::string text;
  for (const Kind& kind : kinds) {
    double sum = 0;
    for (const auto& cell : cells) sum += number_of(cell, kind.member);
    char part[64];
    // A few granules of very many are not nothing.
    const double percent = total > 0 ? sum / total * 100 : 0;
    std::snprintf(part, sizeof part, sum > 0 && percent < 0.1 ? "%s <0.1%%" : "%s %.1f%%", kind.name,
                  percent);
    text += (text.empty() ? "" : "   ") + cell_text(json{{kind.member, 1}}, colour) +
            (colour ? "\033[0m " : " ") + part;
  }
  return text;
}

}  // namespace

std::size_t map_cells(const MapStyle& style) {
  return columns_of_map(style) * std::max<std::size_t>(style.rows, 1);
}

std::string render_map(const json& map, const MapStyle& style) {
  const json& cells = list_of(map, "cells");
  const std::size_t columns = columns_of_map(style);
  std::string text = "run " + text_of(map, "id") + ", " + size_text(map, "bytes_total") + ", granules of " +
                     size_text(map, "granule_bytes") + "\n";
  if (cells.empty()) return text + "nothing is known of its granules yet\n";
  for (std::size_t i = 0; i < cells.size(); ++i) {
    text += cell_text(cells[i], style.colour);
    if ((i + 1) % columns == 0 || i + 1 == cells.size()) text += style.colour ? "\033[0m\n" : "\n";
  }
  return text + legend(cells, style.colour) + "\n";
}

}  // namespace blockferry
