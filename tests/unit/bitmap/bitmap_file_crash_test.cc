// SPDX-License-Identifier: Apache-2.0
// BitmapFile at every moment of a crash: before each operation of a creation or a commit, with every
// combination of what becomes of the writes that were not synced.
#include <set>

#include <gtest/gtest.h>

#include "tests/unit/bitmap/bitmap_file_fixture.h"

namespace blockferry::test {
namespace {

constexpr std::uint64_t granules = 2 * 32768 + 500;

/// All combinations of fates of what is unsynced, each upon a copy of the medium; where those are very many,
/// every 13th: any three writes still meet with all of their fates.
void for_all_fates(const Medium& medium, const std::function<void(Medium&)>& body) {
  std::uint64_t combinations = 1;
  for (std::size_t i = 0; i < medium.unsynced(); ++i) combinations *= fate_count;
  const std::uint64_t step = combinations > 4000 ? 13 : 1;
  for (std::uint64_t chosen = 0; chosen < combinations; chosen += step) {
    Medium after = medium;
    std::uint64_t rest = chosen;
    after.cut_power([&](std::size_t) {
      const auto fate = Fate(rest % fate_count);
      rest /= fate_count;
      return fate;
    });
    after.crash_at.reset();
    after.fail_at.reset();
    body(after);
    if (testing::Test::HasFailure()) FAIL() << "fates " << chosen;
  }
}

/// Runs `action` once for each of its operations, ended before that one, and hands on what then is there.
/// Returns how many operations it has.
std::uint64_t crash_everywhere(const Medium& start, const std::function<void(Medium&)>& action,
                               const std::function<void(const Medium&)>& body) {
  for (std::uint64_t operation = 0;; ++operation) {
    Medium medium = start;
    medium.crash_at = start.operations + operation;
    bool crashed = false;
    try {
      action(medium);
    } catch (const Crash&) {
      crashed = true;
    }
    medium.crash_at.reset();
    medium.fail_at.reset();
    body(medium);
    if (testing::Test::HasFailure()) ADD_FAILURE() << "before operation " << operation;
    if (!crashed || testing::Test::HasFailure()) return operation;
  }
}

/// The content must be one of these; and the file must serve on.
void expect_one_of(Medium& medium, const std::vector<Content>& allowed, std::uint64_t generation_min) {
  auto opened = open_and_load(medium, granules, generation_min);
  ASSERT_TRUE(opened) << opened.error().message();
  ASSERT_NE(std::find(allowed.begin(), allowed.end(), opened->content), allowed.end());
  Content next = opened->content;
  std::mt19937_64 random(7);
  ASSERT_TRUE(opened->file->commit(change_pages(next, granules, random, 1)));
  ASSERT_EQ(open_and_load(medium, granules, opened->file->generation())->content, next);
}

TEST(BitmapFileCrash, EveryMomentOfACommitLeavesTheOldOrTheNewContent) {
  for (std::uint64_t seed = 1; seed <= 6; ++seed) {
    std::mt19937_64 random(seed);
    Medium medium;
    auto file = BitmapFile::create(file_on(medium), granules, granule_bytes, seed % 2 == 0);
    ASSERT_TRUE(file && (*file)->commit({})) << "durable from here on";
    Content before = uniform_content(granules, seed % 2 == 0);
    for (std::uint64_t i = 0; i < seed % 4; ++i)
      ASSERT_TRUE((*file)->commit(change_pages(before, granules, random)));
    const std::uint64_t generation = (*file)->generation();
    Content after = before;
    const auto pages = change_pages(after, granules, random, 1);
    const auto commit = [&](Medium& on) {
      auto opened = open_and_load(on, granules, generation);
      ASSERT_TRUE(opened && opened->file->commit(pages));
    };
    const auto operations = crash_everywhere(medium, commit, [&](const Medium& left) {
      Medium killed = left;  // the process alone ended: all that it wrote is there
      expect_one_of(killed, {before, after}, generation);
      for_all_fates(left, [&](Medium& cut) { expect_one_of(cut, {before, after}, generation); });
    });
    ASSERT_GE(operations, 3U);
    Medium done = medium;
    commit(done);
    for_all_fates(done, [&](Medium& cut) { expect_one_of(cut, {after}, generation + 1); });
    ASSERT_FALSE(HasFailure()) << "seed " << seed;
  }
}

TEST(BitmapFileCrash, EveryMomentOfACreationLeavesTheWholeOrDamage) {
  // What may stand there under this name: nothing, another volume's, or an earlier one of this volume.
  Medium nothing, other, earlier;
  ASSERT_TRUE(BitmapFile::create(file_on(other), 5 * 32768, granule_bytes, false));
  auto file = BitmapFile::create(file_on(earlier), granules, granule_bytes, false);
  ASSERT_TRUE(file && (*file)->commit({}));
  const Content all_set = uniform_content(granules, true), all_clear = uniform_content(granules, false);
  const auto create = [](Medium& on) {
    const auto created = BitmapFile::create(file_on(on), granules, granule_bytes, true);
    ASSERT_TRUE(created && (*created)->commit({}));
  };
  for (const Medium* start : {&nothing, &other, &earlier}) {
    const auto operations = crash_everywhere(*start, create, [&](const Medium& left) {
      for_all_fates(left, [&](Medium& cut) {
        const auto opened = open_and_load(cut, granules);
        if (opened) {
          ASSERT_TRUE(opened->content == all_set || (start == &earlier && opened->content == all_clear));
        } else {
          ASSERT_EQ(opened.error().code, ErrorCode::state_damaged);
        }
        create(cut);  // the owner creates it anew
        expect_one_of(cut, {all_set}, 1);
      });
    });
    ASSERT_GE(operations, 3U);
    Medium done = *start;
    create(done);
    for_all_fates(done, [&](Medium& cut) { expect_one_of(cut, {all_set}, 1); });
  }
}

/// Any number of crashes, each in the midst of going on from the last.
TEST(BitmapFileCrash, CrashUponCrashLosesNothing) {
  for (std::uint64_t seed = 1; seed <= 60; ++seed) {
    std::mt19937_64 random(seed);
    Medium medium;
    const auto created = BitmapFile::create(file_on(medium), granules, granule_bytes, true);
    ASSERT_TRUE(created && (*created)->commit({}));
    Content committed = uniform_content(granules, true), attempted = committed;
    std::uint64_t generation = 2;
    for (int life = 0; life < 12; ++life) {
      medium.crash_at = medium.operations + random() % 25;
      try {
        auto opened = open_and_load(medium, granules, generation);
        ASSERT_TRUE(opened) << "seed " << seed << ": " << opened.error().message();
        ASSERT_TRUE(opened->content == committed || opened->content == attempted) << "seed " << seed;
        committed = attempted = opened->content;
        generation = opened->file->generation();
        for (;;) {
          const auto pages = change_pages(attempted, granules, random);
          ASSERT_TRUE(opened->file->commit(pages));
          committed = attempted;
          generation = opened->file->generation();
        }
      } catch (const Crash&) {
      }
      if (random() % 2 == 0) medium.cut_power([&](std::size_t) { return Fate(random() % fate_count); });
    }
  }
}

/// A commit that fails at each of its operations, then another one with other content, cut short at each of
/// its own: what the failed one left must not stand in the way.
TEST(BitmapFileCrash, AFailedCommitHarmsNeitherTheLastGenerationNorTheNextCommit) {
  std::mt19937_64 random(3);
  Medium start;
  auto created = BitmapFile::create(file_on(start), granules, granule_bytes, false);
  ASSERT_TRUE(created);
  Content before = uniform_content(granules, false);
  for (int i = 0; i < 3; ++i) ASSERT_TRUE((*created)->commit(change_pages(before, granules, random, 1)));
  const std::uint64_t generation = (*created)->generation();
  Content failing = before, next = before;
  const auto failing_pages = change_pages(failing, granules, random, 1);
  const auto next_pages = change_pages(next, granules, random, 0.5);  // not all that the failing one had
  ASSERT_FALSE(next_pages.empty() || next_pages.size() == failing_pages.size());

  const auto with_next = [&](Content content) {
    for (const auto& page : next_pages)
      std::copy_n(page.words, 512, content.begin() + std::ptrdiff_t(page.index * 512));
    return content;
  };
  for (const Fate fate : {Fate::lost, Fate::kept, Fate::first_half}) {
    bool failed = true;
    for (std::uint64_t failing_operation = 0; failed; ++failing_operation) {
      const auto fail_then_commit = [&](Medium& on) {
        on.fate_of_failed_sync = [fate](std::size_t) { return fate; };
        auto opened = open_and_load(on, granules, generation);
        ASSERT_TRUE(opened);
        on.fail_at = on.operations + failing_operation;
        failed = !opened->file->commit(failing_pages);
        on.fail_at.reset();
        ASSERT_EQ(opened->file->generation(), failed ? generation : generation + 1);
        ASSERT_TRUE(opened->file->commit(next_pages));
      };
      const std::vector<Content> allowed{before, failing, with_next(before), with_next(failing)};
      crash_everywhere(start, fail_then_commit, [&](const Medium& left) {
        Medium killed = left;
        expect_one_of(killed, allowed, generation);
        Medium cut = left;
        cut.cut_power([&](std::size_t) { return Fate(random() % fate_count); });
        expect_one_of(cut, allowed, generation);
      });
      Medium done = start;
      fail_then_commit(done);
      expect_one_of(done, {with_next(failed ? before : failing)}, generation + 1);
      ASSERT_FALSE(HasFailure()) << "operation " << failing_operation << " failed, fate " << int(fate);
      ASSERT_TRUE(failed || failing_operation >= 3);
    }
  }
}

TEST(BitmapFileCrash, AFailedPunchIsNoFailedCommit) {
  Medium medium;
  auto file = BitmapFile::create(file_on(medium), granules, granule_bytes, false);
  ASSERT_TRUE(file);
  BitmapPage page;
  page.words[0] = 1;
  ASSERT_TRUE((*file)->commit({page}));
  page.words[0] = 0;
  medium.fail_at = medium.operations + 2;  // index, sync, then the punch
  ASSERT_TRUE((*file)->commit({page}));
  EXPECT_EQ(medium.operations, *medium.fail_at + 1);
  EXPECT_EQ(open_and_load(medium, granules, 3)->content, uniform_content(granules, false));
}

}  // namespace
}  // namespace blockferry::test
