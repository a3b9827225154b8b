// SPDX-License-Identifier: Apache-2.0
// The engine against a plain model: whatever the sizes, depths and patterns, every target ends as the source,
// and the checksums are those of the source. Faults are in tests/fault.
#include "blockio/copy_engine.h"

#include <array>

#include <gtest/gtest.h>

#include "blockio/base/checksum.h"
#include "tests/support/engine_bench.h"

namespace blockferry {
namespace {

void fill_with_patterns(std::vector<std::byte>& content, std::mt19937_64& random) {
  for (std::size_t at = 0; at < content.size();) {
    const std::size_t end = std::min(content.size(), at + (1 + random() % 12) * 4096);
    const bool zero = random() % 2 == 0;
    for (; at < end; ++at) content[at] = zero ? std::byte(0) : std::byte(random());
  }
}

TEST(CopyEngine, EveryTargetEndsAsTheSource) {
  for (std::uint64_t seed = 1; seed <= 300; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    std::mt19937_64 random(seed);
    CopyEngineOptions options;
    options.granule_bytes = 4096ULL << random() % 3;
    options.io_bytes = options.granule_bytes * (1 + random() % 8);
    options.depth = unsigned(1 + random() % 6);
    options.small_depth = unsigned(random() % 3);
    options.checksums = random() % 4 != 0;
    const std::size_t bytes = 1 + random() % (400 * 1024);
    EngineBench bench(seed, bytes, 1 + random() % 3, options);
    fill_with_patterns(bench.source.content, random);
    std::uint64_t total = 0;
    for (const auto& result : bench.copy_all()) {
      ASSERT_FALSE(result.read_error);
      total += result.range.bytes;
      ASSERT_EQ(result.checksums.size(),
                options.checksums ? divide_up(result.range.bytes, options.granule_bytes) : 0);
      for (std::size_t i = 0; i < result.checksums.size(); ++i) {
        const std::uint64_t start = result.range.offset + i * options.granule_bytes;
        const auto granule =
            std::span(bench.source.content).subspan(start, std::min(options.granule_bytes, bytes - start));
        ASSERT_EQ(result.checksums[i], crc64(granule)) << "granule at " << start;
      }
    }
    ASSERT_EQ(total, bytes);
    for (const auto& target : bench.targets)
      ASSERT_TRUE(target->content == bench.source.content) << target->info().uri;
    ASSERT_EQ(bench.engine->stats().bytes_read, bytes);
  }
}

TEST(CopyEngine, ZeroRunsWorthItGoOutAsZeroesAndShortOnesAsData) {
  CopyEngineOptions options;
  options.io_bytes = 64 * 4096;
  options.depth = 2;
  EngineBench bench(1, 64 * 4096, 1, options);  // zero_run_bytes_min is 16384
  for (auto& byte : bench.source.content) byte = std::byte(5);
  std::fill_n(bench.source.content.begin() + 8 * 4096, 3 * 4096, std::byte(0));   // too short
  std::fill_n(bench.source.content.begin() + 20 * 4096, 4 * 4096, std::byte(0));  // just worth it
  const auto results = bench.copy_all();
  ASSERT_EQ(results.size(), 1u);
  EXPECT_EQ(results[0].bytes_zeroed, 4 * 4096u);
  EXPECT_EQ(bench.targets[0]->bytes_zeroed, 4 * 4096u);
  EXPECT_EQ(bench.targets[0]->bytes_written, 60 * 4096u);
  EXPECT_EQ(bench.targets[0]->content, bench.source.content);
}

TEST(CopyEngine, ADroppedTargetGetsNothingMore) {
  CopyEngineOptions options;
  options.io_bytes = 4 * 4096;
  EngineBench bench(2, 64 * 4096, 2, options);
  for (auto& byte : bench.source.content) byte = std::byte(9);
  bench.engine->drop_target(1);
  bench.copy_all();
  EXPECT_EQ(bench.targets[0]->content, bench.source.content);
  EXPECT_EQ(bench.targets[1]->bytes_written, 0u);
  bench.engine->start_flush();
  bench.drain();
  EXPECT_TRUE(bench.engine->take_flush_result());
  EXPECT_EQ(bench.targets[0]->flushes, 1u);
  EXPECT_EQ(bench.targets[1]->flushes, 0u);
}

TEST(CopyEngine, RangesInFlightCoverWhatWasStarted) {
  CopyEngineOptions options;
  options.io_bytes = 2 * 4096;
  options.depth = 3;
  EngineBench bench(3, 16 * 4096, 1, options);
  bench.engine->start_copy({0, 8192});
  bench.engine->start_zero({8192, 4096});
  const auto ranges = bench.engine->ranges_in_flight();
  EXPECT_EQ(ranges.size(), 2u);
  EXPECT_EQ(bench.engine->jobs_in_flight(), 2u);
  EXPECT_TRUE(bench.engine->can_start());
  bench.drain();
  EXPECT_TRUE(bench.engine->ranges_in_flight().empty());
}

TEST(CopyEngine, SmallJobsHaveBuffersOfTheirOwnAndLargeOnesGetNoneOfThem) {
  CopyEngineOptions options;
  options.io_bytes = 32 * 4096;
  options.depth = 1;
  options.small_depth = 1;
  EngineBench bench(4, 128 * 4096, 1, options);
  for (auto& byte : bench.source.content) byte = std::byte(6);
  EXPECT_EQ(bench.engine->room(), options.io_bytes);
  bench.engine->start_copy({0, 4096});  // small: the large buffer stays free
  EXPECT_EQ(bench.engine->room(), options.io_bytes);
  bench.engine->start_copy({64 * 4096, options.io_bytes});
  EXPECT_EQ(bench.engine->room(), 0u);
  EXPECT_EQ(bench.engine->bytes_in_flight(), options.io_bytes + 4096);
  bench.drain();
  EXPECT_EQ(bench.engine->bytes_in_flight(), 0u);
  bench.engine->start_copy({0, options.io_bytes});
  EXPECT_EQ(bench.engine->room(), CopyEngineOptions::small_io_bytes);
  bench.engine->start_copy({64 * 4096, CopyEngineOptions::small_io_bytes});
  bench.drain();
  EXPECT_EQ(bench.targets[0]->bytes_written, 2 * options.io_bytes + 4096 + CopyEngineOptions::small_io_bytes);
}

TEST(CopyEngineDeathTest, ALargeJobDoesNotFitASmallBuffer) {
  CopyEngineOptions options;
  options.io_bytes = 32 * 4096;
  options.depth = 1;
  options.small_depth = 1;
  EngineBench bench(4, 128 * 4096, 1, options);
  bench.engine->start_copy({0, options.io_bytes});
  EXPECT_DEATH(bench.engine->start_copy({64 * 4096, options.io_bytes}), "no slot is free for it");
  bench.drain();
}

/// Takes requests without a place to keep their data, so that it can be of any size.
class EndlessDevice : public Device {
 public:
  explicit EndlessDevice(MemoryQueue& queue) : queue_(queue) { info_.bytes = 16 * TiB; }
  const DeviceInfo& info() const override { return info_; }
  void submit(IoRequest& request) override {
    requests.push_back({request.offset, request.bytes});
    queue_.post(request, request.operation == IoOperation::zero ? 0 : std::int64_t(request.bytes));
  }
  Result<DeviceRegion> region_at(std::uint64_t) override { return DeviceRegion{false, info_.bytes}; }
  std::optional<std::string> change_stamp() override { return std::nullopt; }

  std::vector<ByteRange> requests;

 private:
  MemoryQueue& queue_;
  DeviceInfo info_;
};

TEST(CopyEngine, ALargeHoleIsZeroedInPiecesSoThatCancellingStaysQuick) {
  CopyEngineOptions options;
  options.io_bytes = 4 * 4096;
  options.depth = 1;
  ManualClock clock;
  MemoryQueue queue(5, clock);
  EndlessDevice device(queue);
  alignas(4096) static std::array<std::byte, 2 * 4 * 4096> memory;
  ASSERT_EQ(CopyEngine::memory_bytes(options), memory.size());
  CopyEngine engine(queue, clock, device, {&device}, memory, options);
  const ByteRange hole{4096, 3 * GiB + 4096};
  engine.start_zero(hole);
  std::vector<JobResult> results;
  for (int i = 0; i < 100 && results.empty(); ++i) engine.poll(std::chrono::milliseconds(1), results);
  ASSERT_EQ(results.size(), 1u);
  EXPECT_EQ(results[0].bytes_zeroed, hole.bytes);
  std::uint64_t next = hole.offset;
  for (const auto& request : device.requests) {
    EXPECT_EQ(request.offset, next);
    EXPECT_LE(request.bytes, 256 * MiB);
    next = request.end();
  }
  EXPECT_EQ(next, hole.end());
}

TEST(CopyEngine, EachRequestIsCountedByItsLatency) {
  CopyEngineOptions options;
  options.io_bytes = 4 * 4096;
  EngineBench bench(6, 64 * 4096, 2, options);
  for (auto& byte : bench.source.content) byte = std::byte(9);
  const auto results = bench.copy_all();
  const CopyEngineStats& stats = bench.engine->stats();
  EXPECT_EQ(stats.reads.count(), results.size());
  EXPECT_EQ(stats.writes.count(), 2 * results.size());
  // The simulated devices take 20 µs at least: never under 16 µs, the bounds of the first two buckets.
  EXPECT_EQ(stats.reads.counts[0] + stats.reads.counts[1], 0u);
  EXPECT_GE(stats.reads.seconds_sum, 20e-6 * double(results.size()) * 0.999);
}

TEST(CopyEngineDeathTest, TwoCopiesOfOneGranuleAreABrokenInvariant) {
  CopyEngineOptions options;
  options.io_bytes = 2 * 4096;
  EngineBench bench(4, 16 * 4096, 1, options);
  bench.engine->start_copy({0, 8192});
  EXPECT_DEATH(bench.engine->start_copy({4096, 8192}), "invariant 5");
  bench.drain();
}

}  // namespace
}  // namespace blockferry
