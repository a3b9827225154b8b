// SPDX-License-Identifier: Apache-2.0
// The checksum of a granule, and of everything Blockferry writes down about itself: CRC-64 (Jones polynomial,
// reflected, initial value 0, by ISA-L). Jones is the fastest of ISA-L's CRC-64 variants.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace blockferry {

std::uint64_t crc64(std::span<const std::byte> data, std::uint64_t initial = 0);

/// The CRC-64 of that many zero bytes.
std::uint64_t crc64_of_zeroes(std::uint64_t bytes);

/// Whether every byte is zero.
bool is_zero(std::span<const std::byte> data);

}  // namespace blockferry
