// SPDX-License-Identifier: Apache-2.0
#include "blockio/base/percent_encoding.h"

#include <cctype>

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

std::string percent_encoded(std::string_view text, std::string_view plain) {
  static constexpr char digits[] = "0123456789ABCDEF";
  static constexpr std::string_view marks = "-._~";
  std::string encoded;
  for (const char letter : text) {
    const auto byte = static_cast<unsigned char>(letter);
    const bool alphanumeric = byte < 0x80 && std::isalnum(byte) != 0;
    if (alphanumeric || marks.find(letter) != std::string_view::npos ||
        plain.find(letter) != std::string_view::npos) {
      encoded += letter;
    } else {
      encoded += '%';
      encoded += digits[byte >> 4];
      encoded += digits[byte & 15];
    }
  }
  return encoded;
}

}  // namespace blockferry
