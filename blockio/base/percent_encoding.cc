// SPDX-License-Identifier: Apache-2.0
#include "blockio/base/percent_encoding.h"

namespace blockferry {

namespace {

std::optional<unsigned> hex_value(char digit) {
  if (digit >= '0' && digit <= '9') return unsigned(digit - '0');
  if (digit >= 'a' && digit <= 'f') return unsigned(digit - 'a' + 10);
  if (digit >= 'A' && digit <= 'F') return unsigned(digit - 'A' + 10);
  return std::nullopt;
}

}  // namespace

std::optional<std::string> percent_decoded(std::string_view text) {
  std::string plain;
  for (std::size_t i = 0; i < text.size(); ++i) {
    char letter = text[i];
    if (letter == '%') {
      if (i + 2 >= text.size()) return std::nullopt;
      const auto high = hex_value(text[i + 1]), low = hex_value(text[i + 2]);
      if (!high || !low) return std::nullopt;
      letter = char(*high * 16 + *low);
      i += 2;
    }
    if (letter == '\0') return std::nullopt;
    plain += letter;
  }
  return plain;
}

}  // namespace blockferry
