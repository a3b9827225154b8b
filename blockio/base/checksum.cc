// SPDX-License-Identifier: Apache-2.0
#include "blockio/base/checksum.h"

#include <algorithm>
#include <array>

#include <isa-l/crc64.h>
#include <isa-l/mem_routines.h>

namespace blockferry {

std::uint64_t crc64(std::span<const std::byte> data, std::uint64_t initial) {
  return ::crc64_jones_refl(initial, reinterpret_cast<const unsigned char*>(data.data()), data.size());
}

std::uint64_t crc64_of_zeroes(std::uint64_t bytes) {
  static constexpr std::array<std::byte, 65536> zeroes{};
  std::uint64_t checksum = 0;
  while (bytes > 0) {
    const auto piece = std::min<std::uint64_t>(bytes, zeroes.size());
    checksum = crc64(std::span(zeroes).first(piece), checksum);
    bytes -= piece;
  }
  return checksum;
}

bool is_zero(std::span<const std::byte> data) {
  // ISA-L reads only; its signature merely lacks the const.
  return data.empty() || ::isal_zero_detect(const_cast<std::byte*>(data.data()), data.size()) == 0;
}

}  // namespace blockferry
