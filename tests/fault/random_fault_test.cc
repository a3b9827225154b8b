// SPDX-License-Identifier: Apache-2.0
// Faults at random, several at a time, against a plain model. Whatever happens, each job comes back once, and
// says the truth: where no error stands, the target holds what the source holds, the checksums are those of
// it, and where one stands, it names the device and a place in the job's range. What no job was about is
// untouched.
//
// A failure prints the seed; BLOCKFERRY_SEED=N runs that one alone.
#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdlib>
#include <map>

#include <gtest/gtest.h>

#include "blockio/base/checksum.h"
#include "tests/support/engine_bench.h"

namespace blockferry {
namespace {

constexpr std::byte untouched{0xEE};

/// How often each kind of fault struck, over all seeds: one that never did proves nothing.
using Strikes = std::map<std::string, unsigned>;

class FaultyCopy {
 public:
  explicit FaultyCopy(std::uint64_t seed)
      : random_(seed), options_(random_options()), bench_(seed, random_size(), 1 + below(3), options_) {
    fill_source();
    plan_jobs();
    add_faults();
  }

  void run() {
    std::vector<JobResult> results;
    std::size_t next = 0;
    for (unsigned i = 0; i < 100000 && (next < jobs_.size() || bench_.engine->jobs_in_flight() > 0); ++i) {
      while (next < jobs_.size() && bench_.engine->can_start()) start(jobs_[next++]);
      const std::size_t before = results.size();
      bench_.engine->poll(std::chrono::milliseconds(1), results);
      if (results.size() == before && bench_.queue.holds_any() && below(8) == 0) bench_.queue.release(-EIO);
    }
    ASSERT_EQ(bench_.engine->jobs_in_flight(), 0u) << "a job never came back";
    EXPECT_TRUE(bench_.engine->ranges_in_flight().empty());
    EXPECT_FALSE(bench_.engine->oldest_request());
    ASSERT_EQ(results.size(), jobs_.size());
    for (const auto& result : results) {
      check(result);
      if (::testing::Test::HasFatalFailure()) return;
    }
    EXPECT_TRUE(jobs_by_offset_.empty()) << "a job came back twice, another never";
    check_the_rest();
  }

  void count_strikes(Strikes& strikes) const {
    for (const auto& rule : bench_.source_faults.rules) strikes["source " + name_of(rule)] += rule.struck;
    for (const auto& target : bench_.target_faults) {
      for (const auto& rule : target->rules) strikes["target " + name_of(rule)] += rule.struck;
    }
  }

 private:
  struct Job {
    JobKind kind;
    ByteRange range;
  };

  std::uint64_t below(std::uint64_t bound) { return random_() % bound; }
  std::size_t random_size() { return std::size_t(1 + below(300 * 1024)); }

  CopyEngineOptions random_options() {
    CopyEngineOptions options;
    options.granule_bytes = 4096ULL << below(3);
    options.io_bytes = options.granule_bytes * (1 + below(8));
    options.depth = unsigned(1 + below(6));
    options.checksums = below(4) != 0;
    options.skip_unreadable = below(2) == 0;
    return options;
  }

  void fill_source() {
    auto& content = bench_.source.content;
    for (std::size_t at = 0; at < content.size();) {
      const std::size_t end = std::min(content.size(), at + std::size_t(1 + below(12)) * 4096);
      const bool zero = below(2) == 0;
      for (; at < end; ++at) content[at] = zero ? std::byte(0) : std::byte(random_() | 1);
    }
  }

  /// Cuts the volume into jobs, leaves some ranges out, and shuffles them.
  void plan_jobs() {
    const std::uint64_t bytes = bench_.source.content.size();
    for (std::uint64_t at = 0; at < bytes;) {
      const bool zero = below(6) == 0;
      const std::uint64_t granules = 1 + below(options_.io_bytes / options_.granule_bytes * (zero ? 4 : 1));
      const ByteRange range{at, std::min(granules * options_.granule_bytes, bytes - at)};
      at = range.end();
      if (below(8) == 0) continue;
      const JobKind kind = zero ? JobKind::zero : below(5) == 0 ? JobKind::checksum : JobKind::copy;
      jobs_.push_back({kind, range});
      jobs_by_offset_[range.offset] = jobs_.back();
    }
    std::shuffle(jobs_.begin(), jobs_.end(), random_);
  }

  ByteRange random_range() {
    const std::uint64_t sectors = divide_up(bench_.source.content.size(), 512);
    return {below(sectors) * 512, (1 + below(64)) * 512};
  }

  FaultRule random_fault(IoOperation operation) {
    constexpr std::array errors{EIO, EIO, EIO, EINTR, EAGAIN, ETIMEDOUT, ENODEV, ENOSPC};
    FaultRule rule;
    rule.operation = operation;
    rule.range = below(3) == 0 ? ByteRange{0, UINT64_MAX} : random_range();
    rule.skip = unsigned(below(4));
    rule.count = below(3) == 0 ? 1000 : unsigned(1 + below(4));
    rule.errno_value = errors[below(errors.size())];
    if (operation == IoOperation::zero && below(2) == 0) rule.errno_value = EOPNOTSUPP;
    if (operation != IoOperation::zero && below(3) == 0) {
      rule.effect = FaultRule::Effect::shorten;
      rule.bytes = 512 * (1 + below(40));
      if (rule.count == 1000) rule.count = 20;  // less than a page each time is put up with for long
    } else if (below(8) == 0) {
      rule.effect = FaultRule::Effect::hang;
      rule.count = 2;
    }
    return rule;
  }

  void add_faults() {
    for (std::uint64_t i = below(4); i > 0; --i)
      bench_.source_faults.rules.push_back(random_fault(IoOperation::read));
    for (auto& target : bench_.target_faults) {
      for (std::uint64_t i = below(3); i > 0; --i)
        target->rules.push_back(random_fault(below(3) == 0 ? IoOperation::zero : IoOperation::write));
    }
  }

  void start(const Job& job) {
    switch (job.kind) {
      case JobKind::copy:
        return bench_.engine->start_copy(job.range);
      case JobKind::checksum:
        return bench_.engine->start_checksum(bench_.source_faults, job.range);
      case JobKind::zero:
        return bench_.engine->start_zero(job.range);
    }
  }

  std::span<std::byte> of(MemoryDevice& device, ByteRange range) {
    return std::span(device.content).subspan(range.offset, range.bytes);
  }

  /// What the targets must hold after this job, where they did not fail.
  std::vector<std::byte> expected(const JobResult& result) {
    const auto source = of(bench_.source, result.range);
    std::vector<std::byte> content(source.begin(), source.end());
    if (result.kind == JobKind::zero) std::fill(content.begin(), content.end(), std::byte(0));
    for (const auto& range : result.unreadable)
      std::fill_n(content.begin() + std::ptrdiff_t(range.offset - result.range.offset), range.bytes,
                  std::byte(0));
    return content;
  }

  void check(const JobResult& result) {
    const auto job = jobs_by_offset_.find(result.range.offset);
    ASSERT_NE(job, jobs_by_offset_.end());
    ASSERT_EQ(job->second.range, result.range);
    ASSERT_EQ(job->second.kind, result.kind);
    jobs_by_offset_.erase(job);
    ASSERT_EQ(result.target_errors.size(), bench_.targets.size());
    check_unreadable(result);
    const bool written = result.kind != JobKind::checksum && !result.read_error;
    if (result.read_error) check_error(*result.read_error, result.range, bench_.source);
    if (!result.read_error) check_checksums(result);
    const auto content = expected(result);
    for (std::size_t i = 0; i < bench_.targets.size(); ++i) {
      const auto held = of(*bench_.targets[i], result.range);
      if (result.target_errors[i]) {
        ASSERT_TRUE(written) << "a target failed that was not written";
        check_error(*result.target_errors[i], result.range, *bench_.targets[i]);
      } else if (written) {
        ASSERT_TRUE(std::ranges::equal(held, content)) << "a wrong copy at " << result.range.offset;
      } else {
        ASSERT_TRUE(std::ranges::all_of(held, [](auto byte) { return byte == untouched; }))
            << "written without having been read, at " << result.range.offset;
      }
    }
  }

  void check_unreadable(const JobResult& result) {
    ASSERT_TRUE(result.unreadable.empty() || options_.skip_unreadable);
    for (const auto& range : result.unreadable) {
      ASSERT_EQ(range.offset % options_.granule_bytes, 0u);
      ASSERT_EQ(range.bytes, std::min(options_.granule_bytes, result.range.end() - range.offset));
      unsigned refusals = 0;  // by rules that reach this granule; several may have had a part in it
      for (const auto& rule : bench_.source_faults.rules) {
        const bool reaches = rule.range.bytes == UINT64_MAX ||
                             (rule.range.offset < range.end() && range.offset < rule.range.end());
        if (reaches && rule.effect != FaultRule::Effect::shorten) refusals += rule.struck;
      }
      ASSERT_GE(refusals, 2u) << "called unreadable, but never refused twice";
    }
  }

  void check_error(const Error& error, ByteRange range, const MemoryDevice& device) {
    EXPECT_EQ(error.device, device.info().uri);
    ASSERT_TRUE(error.offset);
    EXPECT_GE(*error.offset, range.offset);
    EXPECT_LT(*error.offset, range.end());
    EXPECT_NE(error.errno_value, EOPNOTSUPP);
  }

  void check_checksums(const JobResult& result) {
    const bool wanted = options_.checksums && result.kind != JobKind::zero;
    ASSERT_EQ(result.checksums.size(), wanted ? divide_up(result.range.bytes, options_.granule_bytes) : 0);
    const auto content = expected(result);
    for (std::size_t i = 0; i < result.checksums.size(); ++i) {
      const std::uint64_t start = i * options_.granule_bytes;
      const std::uint64_t bytes = std::min(options_.granule_bytes, content.size() - start);
      ASSERT_EQ(result.checksums[i], crc64(std::span(content).subspan(start, bytes)));
    }
  }

  void check_the_rest() {
    std::vector<bool> covered(bench_.source.content.size());
    for (const auto& job : jobs_) {
      if (job.kind == JobKind::checksum) continue;
      std::fill_n(covered.begin() + std::ptrdiff_t(job.range.offset), job.range.bytes, true);
    }
    for (const auto& target : bench_.targets) {
      for (std::size_t at = 0; at < covered.size(); ++at) {
        ASSERT_TRUE(covered[at] || target->content[at] == untouched) << "no job was about byte " << at;
      }
    }
  }

  static std::string name_of(const FaultRule& rule) {
    constexpr std::array operations{"read", "write", "zero", "flush"};
    std::string name = operations[std::size_t(rule.operation)];
    if (rule.effect == FaultRule::Effect::shorten) return name + " short";
    if (rule.effect == FaultRule::Effect::hang) return name + " hang";
    return name + " errno " + std::to_string(rule.errno_value);
  }

  std::mt19937_64 random_;
  const CopyEngineOptions options_;
  EngineBench bench_;
  std::vector<Job> jobs_;
  std::map<std::uint64_t, Job> jobs_by_offset_;
};

TEST(RandomFaults, EveryJobTellsTheTruth) {
  const char* only = std::getenv("BLOCKFERRY_SEED");
  const std::uint64_t first = only != nullptr ? std::strtoull(only, nullptr, 10) : 1;
  const std::uint64_t last = only != nullptr ? first : 1000;
  Strikes strikes;
  for (std::uint64_t seed = first; seed <= last; ++seed) {
    SCOPED_TRACE("to see it again: BLOCKFERRY_SEED=" + std::to_string(seed));
    FaultyCopy copy(seed);
    copy.run();
    copy.count_strikes(strikes);
    if (HasFailure()) return;
  }
  if (only != nullptr) return;
  for (const char* kind :
       {"source read errno 5", "source read short", "source read hang", "source read errno 19",
        "target write errno 5", "target write short", "target write hang", "target write errno 28",
        "target zero errno 5", "target zero errno 95", "target zero hang", "target zero errno 28"}) {
    EXPECT_GT(strikes[kind], 5u) << kind << " hardly ever happened";
  }
}

}  // namespace
}  // namespace blockferry
