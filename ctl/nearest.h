// SPDX-License-Identifier: Apache-2.0
// "Did you mean …?"
#pragma once

#include <string>
#include <vector>

namespace blockferry {

/// The candidate that takes the fewest letters changed, added or dropped; empty where none is near.
std::string nearest(const std::string& word, const std::vector<std::string>& candidates);

}  // namespace blockferry
