// SPDX-License-Identifier: Apache-2.0
// What a tracker marks against what was really written, on whatever device.
#pragma once

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <iterator>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include <fcntl.h>
#include <gtest/gtest.h>
#include <linux/fs.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "bitmap/ebpf_tracker.h"
#include "blockio/base/file_descriptor.h"
#include "blockio/base/units.h"
#include "tests/support/loop_device.h"

namespace blockferry::test {

constexpr std::uint64_t page = 4096;

struct alignas(page) Granule {
  std::byte bytes[page];
};

/// Some granules' worth of memory, as direct I/O wants it.
class Granules {
 public:
  explicit Granules(std::uint64_t count) : granules_(count) {}
  void fill(std::mt19937_64& random) {
    for (auto& granule : granules_) {
      for (std::size_t i = 0; i < page; i += sizeof(std::uint64_t)) {
        const std::uint64_t word = random();
        std::memcpy(granule.bytes + i, &word, sizeof word);
      }
    }
  }
  void* data() { return granules_.data(); }
  std::size_t bytes() const { return granules_.size() * page; }
  Granule& operator[](std::uint64_t index) { return granules_[index]; }

 private:
  std::vector<Granule> granules_;
};

inline FileDescriptor open_direct(const std::string& path) {
  FileDescriptor fd(::open(path.c_str(), O_RDWR | O_DIRECT | O_CLOEXEC));
  EXPECT_TRUE(fd.valid()) << path << ": " << std::strerror(errno);
  return fd;
}

inline std::unique_ptr<EbpfTracker> attached(const std::string& path,
                                             const EbpfTrackerOptions& options = {}) {
  const auto range = tracked_range_of(path);
  if (!range) {
    ADD_FAILURE() << range.error().message();
    return nullptr;
  }
  auto tracker = EbpfTracker::attach(*range, options);
  if (tracker) return std::move(*tracker);
  ADD_FAILURE() << tracker.error().message();
  return nullptr;
}

inline std::set<std::uint64_t> collected(EbpfTracker& tracker, std::uint64_t granules) {
  ChangeBitmap dirty(granules);
  const auto done = tracker.collect(dirty);
  EXPECT_TRUE(done) << done.error().message();
  if (done) tracker.release();
  std::set<std::uint64_t> marked;
  while (const auto range = dirty.claim(0, granules)) {
    for (std::uint64_t granule = range->first; granule < range->end(); ++granule) marked.insert(granule);
  }
  return marked;
}

inline void expect_no_losses(EbpfTracker& tracker) {
  const TrackerLosses losses = tracker.losses();
  EXPECT_FALSE(losses.any()) << "records_refused " << losses.records_refused << ", ranges_unknown "
                             << losses.ranges_unknown << ", ends_unmatched " << losses.ends_unmatched
                             << ", programs_skipped " << losses.programs_skipped;
}

/// Just what was changed; except that writes of earlier whose end the kernel hid may be given once more.
inline void expect_marks(EbpfTracker& tracker, const std::set<std::uint64_t>& marked,
                         const std::set<std::uint64_t>& changed,
                         const std::set<std::uint64_t>& earlier = {}) {
  EXPECT_TRUE(std::includes(marked.begin(), marked.end(), changed.begin(), changed.end()))
      << "marks are missing";
  std::set<std::uint64_t> others;
  std::set_difference(marked.begin(), marked.end(), changed.begin(), changed.end(),
                      std::inserter(others, others.end()));
  if (others.empty()) return;
  EXPECT_TRUE(std::includes(earlier.begin(), earlier.end(), others.begin(), others.end()))
      << others.size() << " granules, the first " << *others.begin() << ", were never written to";
  const auto standing = tracker.queued();
  EXPECT_TRUE(!standing.empty() || tracker.losses().ends_unseen > 0)
      << others.size() << " granules were marked twice";
}

/// Writes, zeroes and discards at random; the granules that they touched.
inline std::set<std::uint64_t> change_at_random(int fd, std::uint64_t granules, std::mt19937_64& random,
                                                bool discards) {
  std::set<std::uint64_t> changed;
  for (int i = 0; i < 60; ++i) {
    const std::uint64_t count = i % 10 == 0 ? 1 + random() % 700 : 1 + random() % 20;
    const std::uint64_t first = random() % (granules - count);
    std::uint64_t range[2] = {first * page, count * page};
    int status = 0;
    switch (discards ? random() % 4 : 0) {
      case 1:
        status = ::ioctl(fd, BLKDISCARD, range);
        break;
      case 2:
        status = ::ioctl(fd, BLKZEROOUT, range);
        break;
      default:
        Granules data(count);
        data.fill(random);
        status = ::pwrite(fd, data.data(), data.bytes(), off_t(range[0])) == ssize_t(data.bytes()) ? 0 : -1;
    }
    EXPECT_EQ(status, 0) << std::strerror(errno);
    for (std::uint64_t granule = first; granule < first + count; ++granule) changed.insert(granule);
  }
  return changed;
}

inline void expect_exact_marks(const std::string& path, std::uint64_t bytes, bool discards = true) {
  const std::uint64_t granules = bytes / page;
  auto tracker = attached(path);
  ASSERT_TRUE(tracker);
  const auto fd = open_direct(path);
  std::set<std::uint64_t> earlier;
  for (std::uint64_t seed = 1; seed <= 5; ++seed) {
    std::mt19937_64 random(seed);
    const auto changed = change_at_random(fd.get(), granules, random, discards);
    SCOPED_TRACE(path + ", seed " + std::to_string(seed));
    expect_marks(*tracker, collected(*tracker, granules), changed, earlier);
    earlier.insert(changed.begin(), changed.end());
  }
  expect_marks(*tracker, collected(*tracker, granules), {}, earlier);
  expect_no_losses(*tracker);
}

/// Passes as a run makes them, while others write: in the end the copy is the volume.
inline void expect_faithful_copy(const std::string& path, std::uint64_t bytes) {
  const std::uint64_t granules = bytes / page;
  auto tracker = attached(path);
  ASSERT_TRUE(tracker);
  const auto fd = open_direct(path);
  std::atomic<bool> stop{false};
  std::vector<std::thread> writers;
  for (std::uint64_t seed = 1; seed <= 3; ++seed) {
    writers.emplace_back([&, seed] {
      std::mt19937_64 random(seed);
      while (!stop) static_cast<void>(change_at_random(fd.get(), granules, random, seed == 1));
    });
  }
  ChangeBitmap dirty(granules);
  dirty.set_all();
  Granules copy(granules);
  const auto copy_dirty = [&] {
    while (const auto range = dirty.claim(0, 64)) {
      const auto length = range->count * page;
      ASSERT_EQ(::pread(fd.get(), &copy[range->first], length, off_t(range->first * page)), ssize_t(length));
    }
  };
  for (int pass = 0; pass < 12; ++pass) {
    copy_dirty();
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    const auto done = tracker->collect(dirty);
    EXPECT_TRUE(done) << done.error().message();
    if (done) tracker->release();
  }
  stop = true;
  for (auto& writer : writers) writer.join();
  ASSERT_TRUE(tracker->collect(dirty));
  copy_dirty();
  Granules now(granules);
  ASSERT_EQ(::pread(fd.get(), now.data(), now.bytes(), 0), ssize_t(now.bytes()));
  EXPECT_EQ(std::memcmp(now.data(), copy.data(), now.bytes()), 0);
  expect_no_losses(*tracker);
}

class EbpfTrackerTest : public testing::Test {
 protected:
  void SetUp() override {
    if (const auto missing = volumes_missing(); !missing.empty()) GTEST_SKIP() << missing;
  }
  ScratchDirectory scratch_;
};

}  // namespace blockferry::test
