// SPDX-License-Identifier: Apache-2.0
// Every fault that a device can show the engine: what is lost (nothing), what is said (one clear error), what
// is left.
#include <cerrno>

#include <gtest/gtest.h>

#include "blockio/base/checksum.h"
#include "tests/support/engine_bench.h"

namespace blockferry {
namespace {

constexpr std::uint64_t granule = 4096;

CopyEngineOptions options(bool skip = false) {
  CopyEngineOptions engine_options;
  engine_options.io_bytes = 8 * granule;
  engine_options.depth = 4;
  engine_options.skip_unreadable = skip;
  return engine_options;
}

void fill(MemoryDevice& device) {
  for (std::size_t i = 0; i < device.content.size(); ++i) device.content[i] = std::byte(1 + i * 7 % 251);
}

FaultRule rule(IoOperation operation, FaultRule::Effect effect, ByteRange range, unsigned count,
               int errno_value = EIO) {
  FaultRule made;
  made.operation = operation;
  made.effect = effect;
  made.range = range;
  made.count = count;
  made.errno_value = errno_value;
  return made;
}

TEST(CopyEngineFaults, AReadErrorThatPassesIsTriedAgain) {
  EngineBench bench(1, 64 * granule, 1, options());
  fill(bench.source);
  bench.source_faults.rules = {rule(IoOperation::read, FaultRule::Effect::error, {9 * granule, granule}, 1)};
  for (const auto& result : bench.copy_all()) EXPECT_FALSE(result.read_error);
  EXPECT_EQ(bench.source_faults.rules[0].struck, 1u);
  EXPECT_EQ(bench.targets[0]->content, bench.source.content);
  EXPECT_EQ(bench.engine->stats().retries, 1u);
}

TEST(CopyEngineFaults, AGranuleThatCannotBeReadNamesItsOffset) {
  EngineBench bench(2, 64 * granule, 1, options());
  fill(bench.source);
  bench.source_faults.rules = {
      rule(IoOperation::read, FaultRule::Effect::error, {11 * granule, granule}, UINT32_MAX)};
  unsigned failed = 0;
  for (const auto& result : bench.copy_all()) {
    if (!result.read_error) continue;
    ++failed;
    EXPECT_EQ(result.range.offset, 8 * granule);
    EXPECT_EQ(result.read_error->offset, 11 * granule);
    EXPECT_EQ(result.read_error->code, ErrorCode::io);
  }
  EXPECT_EQ(failed, 1u);
  // Twice as a whole, then the granules before it, then twice by itself.
  EXPECT_EQ(bench.source_faults.rules[0].struck, 4u);
  EXPECT_EQ(bench.targets[0]->content[8 * granule], std::byte(0xEE))
      << "a job that could not be read was written";
}

TEST(CopyEngineFaults, UnreadableGranulesAreSkippedWhenAskedFor) {
  EngineBench bench(3, 64 * granule, 2, options(true));
  fill(bench.source);
  bench.source_faults.rules = {
      rule(IoOperation::read, FaultRule::Effect::error, {11 * granule + 512, 512}, UINT32_MAX),
      rule(IoOperation::read, FaultRule::Effect::error, {63 * granule, granule}, UINT32_MAX)};
  std::vector<ByteRange> unreadable;
  for (const auto& result : bench.copy_all()) {
    EXPECT_FALSE(result.read_error);
    unreadable.insert(unreadable.end(), result.unreadable.begin(), result.unreadable.end());
    for (const auto& range : result.unreadable) {
      EXPECT_EQ(result.checksums[(range.offset - result.range.offset) / granule], crc64_of_zeroes(granule));
    }
  }
  std::sort(unreadable.begin(), unreadable.end(), [](auto a, auto b) { return a.offset < b.offset; });
  EXPECT_EQ(unreadable, (std::vector<ByteRange>{{11 * granule, granule}, {63 * granule, granule}}));
  auto expected = bench.source.content;
  std::fill_n(expected.begin() + 11 * granule, granule, std::byte(0));
  std::fill_n(expected.begin() + 63 * granule, granule, std::byte(0));
  EXPECT_EQ(bench.targets[0]->content, expected);
  EXPECT_EQ(bench.targets[1]->content, expected);
}

TEST(CopyEngineFaults, ADeviceThatIsGoneIsNotAskedAgain) {
  EngineBench bench(4, 64 * granule, 1, options(true));
  bench.source_faults.rules = {
      rule(IoOperation::read, FaultRule::Effect::error, {0, granule}, UINT32_MAX, ENODEV)};
  unsigned gone = 0;
  for (const auto& result : bench.copy_all())
    gone += result.read_error && result.read_error->code == ErrorCode::device_gone;
  EXPECT_EQ(gone, 1u);
  EXPECT_EQ(bench.source_faults.rules[0].struck, 1u);
}

TEST(CopyEngineFaults, ShortReadsAndWritesAreContinued) {
  EngineBench bench(5, 64 * granule + 123, 1, options());
  fill(bench.source);
  for (const auto operation : {IoOperation::read, IoOperation::write}) {
    FaultRule shorten = rule(operation, FaultRule::Effect::shorten, {0, UINT64_MAX}, 12);
    shorten.bytes = granule + 512;  // not even a whole number of granules
    (operation == IoOperation::read ? bench.source_faults : *bench.target_faults[0]).rules = {shorten};
  }
  for (const auto& result : bench.copy_all()) EXPECT_FALSE(result.read_error || result.target_errors[0]);
  EXPECT_EQ(bench.source_faults.rules[0].struck, 12u);
  EXPECT_EQ(bench.target_faults[0]->rules[0].struck, 12u);
  EXPECT_EQ(bench.targets[0]->content, bench.source.content);
}

TEST(CopyEngineFaults, ASourceThatEndsEarlyIsAnError) {
  EngineBench bench(6, 16 * granule, 1, options());
  bench.source.content.resize(10 * granule);
  unsigned failed = 0;
  for (const auto& result : bench.copy_all()) {
    if (!result.read_error) continue;
    ++failed;
    EXPECT_EQ(result.read_error->code, ErrorCode::device_gone);
    EXPECT_EQ(result.read_error->offset, 10 * granule);
  }
  EXPECT_EQ(failed, 1u);
}

TEST(CopyEngineFaults, AWriteErrorIsTriedOnceAgain) {
  EngineBench bench(7, 64 * granule, 1, options());
  fill(bench.source);
  bench.target_faults[0]->rules = {rule(IoOperation::write, FaultRule::Effect::error, {0, granule}, 1)};
  for (const auto& result : bench.copy_all()) EXPECT_FALSE(result.target_errors[0]);
  EXPECT_EQ(bench.target_faults[0]->rules[0].struck, 1u);
  EXPECT_EQ(bench.targets[0]->content, bench.source.content);
}

TEST(CopyEngineFaults, OneTargetFailingLeavesTheOthersAlone) {
  EngineBench bench(8, 64 * granule, 3, options());
  fill(bench.source);
  bench.target_faults[1]->rules = {
      rule(IoOperation::write, FaultRule::Effect::error, {20 * granule, granule}, UINT32_MAX)};
  unsigned failed = 0;
  for (const auto& result : bench.copy_all()) {
    EXPECT_FALSE(result.target_errors[0] || result.target_errors[2]);
    if (!result.target_errors[1]) continue;
    ++failed;
    EXPECT_EQ(result.target_errors[1]->device, "target1");
    EXPECT_EQ(result.range.offset, 16 * granule);
  }
  EXPECT_EQ(failed, 1u);
  EXPECT_EQ(bench.targets[0]->content, bench.source.content);
  EXPECT_EQ(bench.targets[2]->content, bench.source.content);
}

TEST(CopyEngineFaults, AFullTargetIsNotTriedAgain) {
  EngineBench bench(9, 16 * granule, 1, options());
  fill(bench.source);
  bench.target_faults[0]->rules = {
      rule(IoOperation::write, FaultRule::Effect::error, {0, granule}, UINT32_MAX, ENOSPC)};
  unsigned full = 0;
  for (const auto& result : bench.copy_all()) {
    full += result.target_errors[0] && result.target_errors[0]->code == ErrorCode::no_space;
  }
  EXPECT_EQ(full, 1u);
  EXPECT_EQ(bench.target_faults[0]->rules[0].struck, 1u);
}

TEST(CopyEngineFaults, WhereZeroingIsNotSupportedZeroesAreWritten) {
  EngineBench bench(10, 64 * granule + 77, 2, options());
  fill(bench.source);
  std::fill_n(bench.source.content.begin() + 8 * granule, 40 * granule, std::byte(0));
  bench.target_faults[0]->rules = {
      rule(IoOperation::zero, FaultRule::Effect::error, {0, UINT64_MAX}, UINT32_MAX, EOPNOTSUPP)};
  for (const auto& result : bench.copy_all()) EXPECT_FALSE(result.target_errors[0]);
  EXPECT_GE(bench.target_faults[0]->rules[0].struck, 1u);
  EXPECT_LE(bench.target_faults[0]->rules[0].struck, 4u) << "asked again and again";
  EXPECT_EQ(bench.targets[0]->content, bench.source.content);
  EXPECT_EQ(bench.targets[1]->content, bench.source.content);
  EXPECT_EQ(bench.targets[1]->bytes_zeroed, 40 * granule);
}

TEST(CopyEngineFaults, ALargeHoleIsWrittenInPiecesWhereItCannotBeZeroed) {
  EngineBench bench(11, 1000 * granule + 5, 1, options());
  bench.target_faults[0]->rules = {
      rule(IoOperation::zero, FaultRule::Effect::error, {0, UINT64_MAX}, UINT32_MAX, EOPNOTSUPP)};
  bench.engine->start_zero({0, 1000 * granule + 5});
  const auto results = bench.drain();
  ASSERT_EQ(results.size(), 1u);
  EXPECT_FALSE(results[0].target_errors[0]);
  EXPECT_EQ(results[0].bytes_zeroed, 1000 * granule + 5);
  EXPECT_EQ(bench.targets[0]->content, std::vector<std::byte>(1000 * granule + 5));
}

TEST(CopyEngineFaults, AFailedFlushIsToldOnceAndNeverTriedAgain) {
  EngineBench bench(12, 16 * granule, 2, options());
  bench.target_faults[1]->rules = {
      rule(IoOperation::flush, FaultRule::Effect::error, {0, UINT64_MAX}, UINT32_MAX)};
  bench.engine->start_flush();
  bench.drain();
  const auto outcome = bench.engine->take_flush_result();
  ASSERT_TRUE(outcome);
  EXPECT_FALSE((*outcome)[0]);
  ASSERT_TRUE((*outcome)[1]);
  EXPECT_EQ((*outcome)[1]->operation, "flush");
  EXPECT_EQ(bench.target_faults[1]->rules[0].struck, 1u);
  EXPECT_FALSE(bench.engine->take_flush_result()) << "an outcome was given twice";
}

TEST(CopyEngineFaults, ADeviceThatHangsIsSeenAndItsRequestComesBackLater) {
  EngineBench bench(13, 16 * granule, 1, options());
  fill(bench.source);
  bench.target_faults[0]->rules = {
      rule(IoOperation::write, FaultRule::Effect::hang, {8 * granule, granule}, 1)};
  bench.engine->start_copy({0, 8 * granule});
  bench.engine->start_copy({8 * granule, 8 * granule});
  std::vector<JobResult> results;
  for (int i = 0; i < 200; ++i) bench.engine->poll(std::chrono::milliseconds(100), results);
  EXPECT_EQ(results.size(), 1u);
  const auto oldest = bench.engine->oldest_request();
  ASSERT_TRUE(oldest);
  EXPECT_EQ(oldest->offset, 8 * granule);
  EXPECT_EQ(oldest->operation, IoOperation::write);
  EXPECT_GT(oldest->age, std::chrono::seconds(10));
  bench.queue.release(-EIO);  // the first failure: it is tried again, and goes through
  bench.drain();
  EXPECT_EQ(bench.targets[0]->content, bench.source.content);
}

TEST(CopyEngineFaults, AFlippedBitShowsInTheChecksumReadBack) {
  EngineBench bench(14, 16 * granule, 1, options());
  fill(bench.source);
  bench.target_faults[0]->rules = {
      rule(IoOperation::write, FaultRule::Effect::flip_bit, {8 * granule, granule}, 1)};
  std::vector<std::uint64_t> recorded(16);
  for (const auto& result : bench.copy_all()) {
    std::copy(result.checksums.begin(), result.checksums.end(),
              recorded.begin() + std::ptrdiff_t(result.range.offset / granule));
  }
  ASSERT_EQ(bench.target_faults[0]->rules[0].struck, 1u);
  bench.engine->start_checksum(*bench.targets[0], {0, 8 * granule});
  bench.engine->start_checksum(*bench.targets[0], {8 * granule, 8 * granule});
  unsigned different = 0;
  for (const auto& result : bench.drain()) {
    for (std::size_t i = 0; i < result.checksums.size(); ++i) {
      different += result.checksums[i] != recorded[result.range.offset / granule + i];
    }
  }
  EXPECT_EQ(different, 1u);
}

TEST(CopyEngineFaults, AnInterruptedRequestIsSentAgain) {
  for (const int interruption : {EINTR, EAGAIN}) {
    EngineBench bench(15, 64 * granule, 1, options());
    fill(bench.source);
    std::fill_n(bench.source.content.begin() + 8 * granule, 8 * granule, std::byte(0));
    bench.source_faults.rules = {
        rule(IoOperation::read, FaultRule::Effect::error, {0, 2 * granule}, 20, interruption)};
    bench.target_faults[0]->rules = {
        rule(IoOperation::write, FaultRule::Effect::error, {0, 2 * granule}, 20, interruption),
        rule(IoOperation::zero, FaultRule::Effect::error, {0, UINT64_MAX}, 20, interruption)};
    for (const auto& result : bench.copy_all()) EXPECT_FALSE(result.read_error || result.target_errors[0]);
    EXPECT_EQ(bench.source_faults.rules[0].struck, 20u);
    for (const auto& each : bench.target_faults[0]->rules) EXPECT_EQ(each.struck, 20u);
    EXPECT_EQ(bench.targets[0]->content, bench.source.content);
    EXPECT_EQ(bench.engine->stats().read_errors + bench.engine->stats().write_errors, 0u)
        << "an interruption was counted as an error";
  }
}

TEST(CopyEngineFaults, ADeviceThatIsInterruptedForEverIsGivenUp) {
  EngineBench bench(16, 8 * granule, 1, options());
  fill(bench.source);
  bench.target_faults[0]->rules = {
      rule(IoOperation::write, FaultRule::Effect::error, {0, UINT64_MAX}, UINT32_MAX, EAGAIN)};
  const auto results = bench.copy_all();
  ASSERT_EQ(results.size(), 1u);
  EXPECT_TRUE(results[0].target_errors[0]);
}

TEST(CopyEngineFaults, ATargetThatIsGoneIsNotAskedAgain) {
  EngineBench bench(17, 8 * granule, 2, options());
  fill(bench.source);
  bench.target_faults[1]->rules = {
      rule(IoOperation::write, FaultRule::Effect::error, {0, UINT64_MAX}, UINT32_MAX, ENXIO)};
  const auto results = bench.copy_all();
  ASSERT_EQ(results.size(), 1u);
  ASSERT_TRUE(results[0].target_errors[1]);
  EXPECT_EQ(results[0].target_errors[1]->code, ErrorCode::device_gone);
  EXPECT_EQ(bench.target_faults[1]->rules[0].struck, 1u);
  EXPECT_EQ(bench.targets[0]->content, bench.source.content);
}

/// What verification of a target cannot see: the checksum is that of what was read. Reading the source again
/// tells.
TEST(CopyEngineFaults, ABitFlippedWhileReadingShowsWhenTheSourceIsReadAgain) {
  EngineBench bench(18, 8 * granule, 1, options());
  fill(bench.source);
  bench.source_faults.rules = {rule(IoOperation::read, FaultRule::Effect::flip_bit, {0, granule}, 1)};
  const auto copied = bench.copy_all();
  ASSERT_EQ(copied.size(), 1u);
  ASSERT_EQ(bench.source_faults.rules[0].struck, 1u);
  bench.engine->start_checksum(*bench.targets[0], {0, 8 * granule});
  EXPECT_EQ(bench.drain().at(0).checksums, copied[0].checksums);
  bench.engine->start_checksum(bench.source_faults, {0, 8 * granule});
  EXPECT_NE(bench.drain().at(0).checksums, copied[0].checksums);
}

TEST(CopyEngineFaults, AFlippedBitReachesOneTargetAlone) {
  EngineBench bench(19, 8 * granule, 2, options());
  fill(bench.source);
  bench.target_faults[0]->rules = {rule(IoOperation::write, FaultRule::Effect::flip_bit, {0, granule}, 1)};
  bench.copy_all();
  ASSERT_EQ(bench.target_faults[0]->rules[0].struck, 1u);
  EXPECT_NE(bench.targets[0]->content, bench.source.content);
  EXPECT_EQ(bench.targets[1]->content, bench.source.content);
}

}  // namespace
}  // namespace blockferry
