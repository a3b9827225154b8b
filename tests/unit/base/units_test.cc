// SPDX-License-Identifier: Apache-2.0
#include "blockio/base/units.h"

#include <limits>

#include <gtest/gtest.h>

namespace blockferry {
namespace {

using std::chrono::milliseconds;

TEST(Sizes, AsPeopleTypeThem) {
  EXPECT_EQ(parse_size("0"), 0u);
  EXPECT_EQ(parse_size("123"), 123u);
  EXPECT_EQ(parse_size("4K"), 4096u);
  EXPECT_EQ(parse_size("500M"), 500 * MiB);
  EXPECT_EQ(parse_size("1.5G"), GiB + GiB / 2);
  EXPECT_EQ(parse_size("0.125T"), TiB / 8);
  EXPECT_EQ(parse_size("18446744073709551615"), std::numeric_limits<std::uint64_t>::max());
  EXPECT_EQ(parse_size("16777215T"), 16777215 * TiB);
}

TEST(Sizes, RefusesEverythingElse) {
  for (const char* text : {"",          " ",
                           "K",         ".",
                           ".5K",       "1.",
                           "1.K",       "4k",
                           "4KB",       "4KiB",
                           "4 K",       " 4K",
                           "4K ",       "+4K",
                           "-4K",       "0x10",
                           "1e3",       "1.5",
                           "1.2.3K",    "1.2345K",
                           "4KK",       "inf",
                           "nan",       "18446744073709551616",
                           "16777216T", "99999999999999999999999T"}) {
    const auto parsed = parse_size(text);
    ASSERT_FALSE(parsed) << text << " was read as " << *parsed;
    EXPECT_EQ(parsed.error().code, ErrorCode::invalid_argument) << text;
  }
  EXPECT_FALSE(parse_size(std::string_view("4\0K", 3)));
}

TEST(Durations, AsPeopleTypeThem) {
  EXPECT_EQ(parse_duration("0"), milliseconds(0));
  EXPECT_EQ(parse_duration("300ms"), milliseconds(300));
  EXPECT_EQ(parse_duration("10s"), milliseconds(10'000));
  EXPECT_EQ(parse_duration("1.5s"), milliseconds(1500));
  EXPECT_EQ(parse_duration("15m"), milliseconds(900'000));
  EXPECT_EQ(parse_duration("2h"), milliseconds(7'200'000));
}

TEST(Durations, RefusesEverythingElse) {
  for (const char* text : {"", "10", "1", "s", "ms", "10S", "10 s", "-1s", "1d", "10sec", "1h30m", "1.s",
                           "00s0", "99999999999999999999s", "1000000h"}) {
    const auto parsed = parse_duration(text);
    ASSERT_FALSE(parsed) << text << " was read as " << parsed->count();
    EXPECT_EQ(parsed.error().code, ErrorCode::invalid_argument) << text;
  }
}

TEST(Formats, SizesForPeople) {
  EXPECT_EQ(format_size(0), "0 B");
  EXPECT_EQ(format_size(1023), "1023 B");
  EXPECT_EQ(format_size(1024), "1.0 KiB");
  EXPECT_EQ(format_size(1610612736), "1.5 GiB");
  EXPECT_EQ(format_size(MiB - 1), "1.0 MiB");
  EXPECT_EQ(format_size(std::numeric_limits<std::uint64_t>::max()), "16.0 EiB");
}

TEST(Formats, DurationsForPeople) {
  EXPECT_EQ(format_duration(0), "0.0s");
  EXPECT_EQ(format_duration(0.00001), "1ms");
  EXPECT_EQ(format_duration(0.0123), "12ms");
  EXPECT_EQ(format_duration(0.0996), "0.1s");
  EXPECT_EQ(format_duration(4.2), "4.2s");
  EXPECT_EQ(format_duration(9.96), "10s");
  EXPECT_EQ(format_duration(59.6), "1m00s");
  EXPECT_EQ(format_duration(75), "1m15s");
  EXPECT_EQ(format_duration(3599.7), "1h00m");
  EXPECT_EQ(format_duration(7325), "2h02m");
  EXPECT_EQ(format_duration(-1), "?");
  EXPECT_EQ(format_duration(std::numeric_limits<double>::quiet_NaN()), "?");
  EXPECT_FALSE(format_duration(std::numeric_limits<double>::infinity()).empty());
}

}  // namespace
}  // namespace blockferry
