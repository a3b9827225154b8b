// SPDX-License-Identifier: Apache-2.0
// The change bitmap's argument (change_bitmap.cc), checked case by case: every atomic operation of one call
// is a point at which other threads' whole calls run, and so on inside of those. Threads would hit these
// moments too rarely. The bitmap's own source is compiled here with atomics that can be interrupted.
#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <vector>

#include <gtest/gtest.h>

namespace blockferry::interleaving {

/// Runs when the call under way, or one that runs inside of it, comes to its `step`-th atomic operation.
struct Interruption {
  unsigned step = 0;
  std::function<void()> action;
};

// One thread only: that is the point.
std::vector<Interruption> plan;
std::size_t plan_next = 0;
unsigned steps = 0;
unsigned undisturbed = 0;

/// While one stands, steps do not count.
struct Undisturbed {
  Undisturbed() { ++undisturbed; }
  ~Undisturbed() { --undisturbed; }
  Undisturbed(const Undisturbed&) = delete;
  Undisturbed& operator=(const Undisturbed&) = delete;
};

void step() {
  if (undisturbed > 0) return;
  ++steps;
  if (plan_next == plan.size() || plan[plan_next].step != steps) return;
  steps = 0;
  plan[plan_next++].action();
}

}  // namespace blockferry::interleaving

namespace std {

template <typename T>
class interruptible_ref {
 public:
  explicit interruptible_ref(T& value) : value_(value) {}
  T load(memory_order) const {
    blockferry::interleaving::step();
    return value_;
  }
  void store(T bits, memory_order) const {
    blockferry::interleaving::step();
    value_ = bits;
  }
  T exchange(T bits) const {
    blockferry::interleaving::step();
    const T before = value_;
    value_ = bits;
    return before;
  }
  T fetch_or(T bits) const {
    blockferry::interleaving::step();
    const T before = value_;
    value_ |= bits;
    return before;
  }
  T fetch_and(T bits) const {
    blockferry::interleaving::step();
    const T before = value_;
    value_ &= bits;
    return before;
  }

 private:
  T& value_;
};

}  // namespace std

#define atomic_ref interruptible_ref
#include "bitmap/change_bitmap.cc"  // NOLINT(bugprone-suspicious-include)
#undef atomic_ref

namespace blockferry {
namespace {

using interleaving::plan;

constexpr std::uint64_t granules = 64 * 64 * 64 + 5;  // four levels
constexpr std::uint64_t sticky = 0;                   // always dirty, never claimed

/// A volume whose granules hold version numbers; its owner must come to read each one's last.
class Volume {
 public:
  Volume() { dirty.set({sticky, 1}); }

  void write(GranuleRange range) {
    for (std::uint64_t i = range.first; i < range.end(); ++i) ++data[i];
    dirty.set(range);
  }
  bool claim_and_read() {
    const auto range = dirty.claim(sticky + 1, UINT64_MAX);
    if (!range) return false;
    for (std::uint64_t i = range->first; i < range->end(); ++i) read[i] = data[i];
    const interleaving::Undisturbed look;
    // Never too small, whatever is under way; too large by at most that.
    EXPECT_GE(dirty.count(), dirty.count({0, granules}));
    EXPECT_LT(dirty.count(), 1000U);
    return true;
  }
  void finish() {
    while (claim_and_read()) {
    }
    EXPECT_EQ(read, data);
    EXPECT_EQ(dirty.count(), 1U);
    EXPECT_EQ(dirty.find(0, UINT64_MAX), (GranuleRange{sticky, 1}));
  }

  ChangeBitmap dirty{granules};
  std::map<std::uint64_t, unsigned> data, read;
};

/// Granules that share a word with `at`, or only a summary of each level.
std::vector<std::uint64_t> neighbours(std::uint64_t at) {
  return {at, at + 1, at + 64, at + 64 * 64, at + 2 * 64 * 64 + 64};
}

/// Calls `body` with the interruptions placed at every pair of steps, until the steps are beyond what runs.
void at_all_steps(const std::vector<std::function<void(Volume&)>>& actions,
                  const std::function<void(Volume&)>& body) {
  for (unsigned first = 1;; ++first) {
    for (unsigned second = 1;; ++second) {
      Volume volume;
      plan.clear();
      const unsigned at[] = {first, second};
      interleaving::plan_next = interleaving::steps = 0;
      for (std::size_t i = 0; i < actions.size(); ++i)
        plan.push_back({at[i], [&volume, &action = actions[i]] { action(volume); }});
      body(volume);
      const std::size_t happened = interleaving::plan_next;
      plan.clear();
      interleaving::plan_next = 0;
      ASSERT_NO_FATAL_FAILURE(volume.finish()) << first << " " << second;
      ASSERT_FALSE(testing::Test::HasFailure()) << "interrupted at steps " << first << " and " << second;
      if (happened == 0) return;
      if (happened < actions.size() || actions.size() == 1) break;
    }
  }
}

constexpr std::uint64_t place = 64 * 64 + 3 * 64 + 7;

void mark_undisturbed(Volume& volume, std::uint64_t granule) {
  const interleaving::Undisturbed setup;
  volume.write({granule, 1});
}

TEST(ChangeBitmapInterleaving, MarksInTheMidstOfAClaim) {
  for (const std::uint64_t one : neighbours(place)) {
    for (const std::uint64_t other : neighbours(place)) {
      at_all_steps({[&](Volume& volume) {
                      volume.write({one, 1});
                    },
                    [&](Volume& volume) {
                      volume.write({other, 1});
                    }},
                   [](Volume& volume) {
                     mark_undisturbed(volume, place);
                     volume.claim_and_read();
                   });
    }
  }
}

TEST(ChangeBitmapInterleaving, ClaimsInTheMidstOfAMark) {
  for (const std::uint64_t marked : neighbours(place)) {
    at_all_steps(
        {[](Volume& volume) { volume.claim_and_read(); }, [](Volume& volume) { volume.claim_and_read(); }},
        [&](Volume& volume) {
          mark_undisturbed(volume, place);
          volume.write({marked, 1});
        });
  }
}

TEST(ChangeBitmapInterleaving, AMarkInAClaimInAMark) {
  for (const std::uint64_t outer : neighbours(place)) {
    for (const std::uint64_t inner : neighbours(place)) {
      at_all_steps({[](Volume& volume) { volume.claim_and_read(); },
                    [&](Volume& volume) {
                      volume.write({inner, 1});
                    }},
                   [&](Volume& volume) {
                     mark_undisturbed(volume, place);
                     volume.write({outer, 1});
                   });
    }
  }
}

TEST(ChangeBitmapInterleaving, LongMarksAndClaims) {
  const auto claim = [](Volume& volume) { volume.claim_and_read(); };
  const auto mark_long = [](Volume& volume) { volume.write({place - 30, 200}); };
  const auto mark_short = [](Volume& volume) { volume.write({place, 2}); };
  at_all_steps({claim, mark_short}, [&](Volume& volume) {
    mark_undisturbed(volume, place);
    mark_long(volume);
  });
  at_all_steps({mark_long, mark_short}, [&](Volume& volume) {
    mark_undisturbed(volume, place);
    claim(volume);
  });
}

}  // namespace
}  // namespace blockferry
