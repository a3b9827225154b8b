// SPDX-License-Identifier: Apache-2.0
// What a run's progress looks like: pure functions from the run's object to text.
#pragma once

#include <cstddef>
#include <string>

#include <nlohmann/json_fwd.hpp>

namespace blockferry {

/// One line of at most `columns` columns: bar, percent, bytes, rate, time left, activity. Parts that do not
/// fit are left out, the least important first.
std::string progress_line(const nlohmann::json& run, std::size_t columns);

/// "copied 4.0 GiB (1.2 GiB of zeroes) in 1.1s, 3.6 GiB/s; verified, no mismatch"
std::string summary_line(const nlohmann::json& run);

/// "about 2m": coarser the farther away it is, so that it settles.
std::string eta_text(double seconds);

// Members that may be null.
std::string text_of(const nlohmann::json& object, const char* member);
double number_of(const nlohmann::json& object, const char* member);

/// How many columns a UTF-8 text takes; the characters used here are one column each.
std::size_t columns_of(const std::string& text);

}  // namespace blockferry
