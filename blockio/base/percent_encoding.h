// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <optional>
#include <string>
#include <string_view>

namespace blockferry {

/// As in URIs (RFC 3986): "%41" is "A". Nothing: a '%' that no two digits follow, or a NUL.
std::optional<std::string> percent_decoded(std::string_view text);

/// The reverse: all but letters, digits, "-._~" and what stands in `plain` becomes %XX.
std::string percent_encoded(std::string_view text, std::string_view plain = "");

}  // namespace blockferry
