// SPDX-License-Identifier: Apache-2.0
// Answers as people read them: pure functions from JSON to text, each line ended.
#pragma once

#include <cstddef>
#include <string>

#include <nlohmann/json_fwd.hpp>

namespace blockferry {

std::string render_list(const nlohmann::json& runs);
std::string render_run(const nlohmann::json& run);
std::string render_devices(const nlohmann::json& devices);
std::string render_check(const nlohmann::json& report);

struct MapStyle {
  std::size_t columns = 80, rows = 16;
  bool colour = false;  ///< else letters
};
/// As many cells as the picture has room for.
std::size_t map_cells(const MapStyle& style);
std::string render_map(const nlohmann::json& map, const MapStyle& style);

}  // namespace blockferry
