// SPDX-License-Identifier: Apache-2.0
// The checksum against its definition, bit by bit; zero detection at every length and alignment.
#include "blockio/base/checksum.h"

#include <random>
#include <string_view>
#include <vector>

#include <gtest/gtest.h>

namespace blockferry {
namespace {

/// CRC-64, Jones polynomial, reflected, with all bits inverted before and after (as ISA-L does).
std::uint64_t crc64_by_definition(std::span<const std::byte> data, std::uint64_t initial) {
  constexpr std::uint64_t jones_reflected = 0x95ac9329ac4bc9b5;
  std::uint64_t remainder = ~initial;
  for (const std::byte byte : data) {
    remainder ^= std::uint64_t(byte);
    for (int bit = 0; bit < 8; ++bit) {
      remainder = (remainder >> 1) ^ ((remainder & 1) != 0 ? jones_reflected : 0);
    }
  }
  return ~remainder;
}

std::vector<std::byte> random_bytes(std::mt19937_64& random, std::size_t count) {
  std::vector<std::byte> bytes(count);
  for (auto& byte : bytes) byte = std::byte(random());
  return bytes;
}

TEST(Checksum, IsCrc64JonesAtEveryLengthAndAlignment) {
  std::mt19937_64 random(1);
  const auto bytes = random_bytes(random, 5000);
  for (std::size_t length = 0; length < 600; ++length) {
    const auto part = std::span(bytes).subspan(random() % 64, length);
    const std::uint64_t initial = length % 2 == 0 ? 0 : random();
    ASSERT_EQ(crc64(part, initial), crc64_by_definition(part, initial)) << length << " bytes";
  }
  ASSERT_EQ(crc64(std::span(bytes).first(4096)), crc64_by_definition(std::span(bytes).first(4096), 0));
}

/// State on disk depends on it: a library that changed it would make every record look damaged.
TEST(Checksum, StaysWhatItIs) {
  constexpr std::string_view text = "123456789";
  EXPECT_EQ(crc64(std::as_bytes(std::span(text))), 0x3558e8e979f60d7eU);
}

TEST(Checksum, GoesOnFromAnEarlierPart) {
  std::mt19937_64 random(2);
  const auto bytes = random_bytes(random, 9000);
  const std::uint64_t whole = crc64(bytes);
  for (const std::size_t cut : {0UL, 1UL, 511UL, 4096UL, 8999UL, 9000UL}) {
    EXPECT_EQ(crc64(std::span(bytes).subspan(cut), crc64(std::span(bytes).first(cut))), whole) << cut;
  }
  EXPECT_EQ(crc64({}), 0u);
}

TEST(Checksum, OfZeroesNeedsNoZeroes) {
  for (const std::size_t length : {0UL, 1UL, 4095UL, 4096UL, 65536UL, 65537UL, 1048576UL}) {
    EXPECT_EQ(crc64_of_zeroes(length), crc64(std::vector<std::byte>(length))) << length;
  }
}

TEST(Zeroes, AreFoundAtEveryLengthAndAlignment) {
  std::vector<std::byte> bytes(4096 + 64);
  EXPECT_TRUE(is_zero({}));
  for (std::size_t start = 0; start < 33; ++start) {
    for (const std::size_t length :
         {1UL, 2UL, 7UL, 8UL, 15UL, 31UL, 33UL, 63UL, 65UL, 123UL, 511UL, 4096UL}) {
      const auto part = std::span(bytes).subspan(start, length);
      ASSERT_TRUE(is_zero(part)) << length << " bytes at " << start;
      for (const std::size_t place : {std::size_t(0), length / 2, length - 1}) {
        part[place] = std::byte(0x80);
        ASSERT_FALSE(is_zero(part)) << length << " bytes at " << start << ", other at " << place;
        part[place] = std::byte(0);
      }
    }
  }
}

TEST(Zeroes, OneBitAnywhereIsSeenAtEveryLength) {
  std::vector<std::byte> bytes(200);
  for (std::size_t length = 0; length <= bytes.size(); ++length) {
    const auto part = std::span(bytes).first(length);
    ASSERT_TRUE(is_zero(part)) << length << " bytes";
    for (std::size_t bit = 0; bit < length * 8; ++bit) {
      part[bit / 8] = std::byte(1u << (bit % 8));
      ASSERT_FALSE(is_zero(part)) << length << " bytes, bit " << bit;
      part[bit / 8] = std::byte(0);
    }
  }
}

TEST(Zeroes, WhatLiesBesideDoesNotCount) {
  std::vector<std::byte> bytes(300, std::byte(1));
  for (std::size_t length = 1; length < 200; ++length) {
    for (std::size_t start = 1; start < 40; start += 3) {
      const auto part = std::span(bytes).subspan(start, length);
      std::fill(part.begin(), part.end(), std::byte(0));
      ASSERT_TRUE(is_zero(part)) << length << " bytes at " << start;
      std::fill(part.begin(), part.end(), std::byte(1));
    }
  }
}

}  // namespace
}  // namespace blockferry
