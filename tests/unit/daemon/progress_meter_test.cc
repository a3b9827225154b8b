// SPDX-License-Identifier: Apache-2.0
#include "daemon/progress_meter.h"

#include <gtest/gtest.h>

namespace blockferry {
namespace {

constexpr Nanoseconds ms(std::int64_t count) {
  return std::chrono::milliseconds(count);
}

TEST(ProgressMeter, ASteadyStreamGivesItsRateAndEta) {
  ProgressMeter meter;
  meter.restart(ms(0), 0);
  for (int i = 1; i <= 100; ++i) meter.update(ms(i * 200), std::uint64_t(i) * 20000);  // 100 kB/s
  EXPECT_NEAR(meter.bytes_per_second(), 100000, 1);
  EXPECT_NEAR(*meter.eta_seconds(1000000), 10, 0.01);
}

TEST(ProgressMeter, ABurstMovesTheRateLittle) {
  ProgressMeter meter;
  meter.restart(ms(0), 0);
  std::uint64_t bytes = 0;
  for (int i = 1; i <= 100; ++i) meter.update(ms(i * 200), bytes += 20000);
  meter.update(ms(20200), bytes += 200000);  // ten times as much, once
  EXPECT_LT(meter.bytes_per_second(), 130000);
  EXPECT_GT(meter.bytes_per_second(), 100000);
}

TEST(ProgressMeter, AChangeOfSpeedIsFollowedWithinHalfAMinute) {
  ProgressMeter meter;
  meter.restart(ms(0), 0);
  std::uint64_t bytes = 0;
  int tick = 0;
  for (; tick < 100;) meter.update(ms(++tick * 200), bytes += 20000);
  for (; tick < 250;) meter.update(ms(++tick * 200), bytes += 40000);
  EXPECT_NEAR(meter.bytes_per_second(), 200000, 5000);
}

TEST(ProgressMeter, KnowsNothingBeforeAnythingMoved) {
  ProgressMeter meter;
  meter.restart(ms(0), 500);
  EXPECT_FALSE(meter.eta_seconds(1));
  meter.update(ms(1000), 500);
  EXPECT_FALSE(meter.eta_seconds(1));
}

TEST(RateLimiter, LetsThroughWhatItWasToldTo) {
  RateLimiter limiter;
  limiter.set_rate(1000000, ms(0));
  std::uint64_t bytes = 0;
  for (int i = 0; i <= 10000; ++i) {
    while (limiter.may_start(ms(i))) {
      limiter.spend(65536);
      bytes += 65536;
    }
  }
  EXPECT_NEAR(double(bytes), 10 * 1000000.0, 200000);  // ten seconds, a burst and a debt
}

TEST(RateLimiter, ARequestLargerThanAMomentsAllowancePassesAndIsPaidFor) {
  RateLimiter limiter;
  limiter.set_rate(1000, ms(0));
  ASSERT_TRUE(limiter.may_start(ms(0)));
  limiter.spend(10000);
  EXPECT_FALSE(limiter.may_start(ms(9900)));
  EXPECT_TRUE(limiter.may_start(ms(10100)));
}

TEST(RateLimiter, NoRateIsNoLimit) {
  RateLimiter limiter;
  for (int i = 0; i < 1000; ++i) {
    ASSERT_TRUE(limiter.may_start(ms(0)));
    limiter.spend(1ULL << 40);
  }
}

}  // namespace
}  // namespace blockferry
