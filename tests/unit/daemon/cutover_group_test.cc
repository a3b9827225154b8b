// SPDX-License-Identifier: Apache-2.0
// Volumes that are cut over together, without volumes: who waits for whom, and that it is all or none.
#include "daemon/cutover_group.h"

#include <gtest/gtest.h>

namespace blockferry {
namespace {

class TestClock : public Clock {
 public:
  Nanoseconds now() const override { return time; }
  double wall_seconds() const override { return 0; }
  void sleep_for(Nanoseconds duration) override { time += duration; }
  Nanoseconds time{1};
};

struct Calls {
  unsigned made = 0, synced = 0, quiesced = 0, released = 0, handed_over = 0;
  bool quiesce_fails = false, hand_over_fails = false, expired = false;
};

class FakeQuiescer : public Quiescer {
 public:
  explicit FakeQuiescer(Calls& calls) : calls_(calls) { ++calls.made; }
  Result<void> sync_ahead() override {
    ++calls_.synced;
    return {};
  }
  Result<void> quiesce(Nanoseconds) override {
    if (calls_.quiesce_fails) return fail(make_error(ErrorCode::io, "freeze", "/x", ""));
    ++calls_.quiesced;
    return {};
  }
  Result<bool> release() override {
    ++calls_.released;
    return !calls_.expired;
  }
  Result<bool> hand_over() override {
    if (calls_.hand_over_fails) return fail(make_error(ErrorCode::conflict, "cut over", "/x", "status 1"));
    calls_.handed_over += calls_.expired ? 0 : 1;
    return !calls_.expired;
  }
  bool handed_over() const override { return calls_.handed_over > 0; }
  Nanoseconds quiesced_at() const override { return Nanoseconds(5); }
  Nanoseconds released_at() const override { return Nanoseconds(9); }
  Nanoseconds command_time() const override { return Nanoseconds(1); }

 private:
  Calls& calls_;
};

class CutoverGroupTest : public ::testing::Test {
 protected:
  std::unique_ptr<Quiescer> join(const std::string& member, bool rehearsal = false) {
    auto joined = group->join(member, rehearsal);
    return joined ? std::move(*joined) : nullptr;
  }
  /// Of both; whether all were there then.
  static bool both_at(Quiescer& one, Quiescer& other, CutoverStep step) {
    const auto first = one.all_at(step);
    EXPECT_TRUE(first);
    EXPECT_FALSE(first.value_or(true)) << "the other has not come so far";
    return other.all_at(step).value_or(false) && one.all_at(step).value_or(false);
  }
  static void quiesce_both(Quiescer& one, Quiescer& other) {
    ASSERT_TRUE(both_at(one, other, CutoverStep::caught_up));
    ASSERT_TRUE(both_at(one, other, CutoverStep::still));
    ASSERT_TRUE(one.quiesce(Nanoseconds(1)));
    ASSERT_TRUE(other.quiesce(Nanoseconds(1)));
  }

  TestClock clock;
  Calls calls;
  std::shared_ptr<CutoverGroup> group = std::make_shared<CutoverGroup>(
      std::vector<std::string>{"a", "b"}, clock,
      [this] { return Result<std::unique_ptr<Quiescer>>(std::make_unique<FakeQuiescer>(calls)); });
};

TEST_F(CutoverGroupTest, AllWaitUntilEachIsReady) {
  EXPECT_EQ(group->waits_for("a", true), "b");
  EXPECT_EQ(group->waits_for("b", false), "b");
  EXPECT_EQ(group->waits_for("b", true), "");
  EXPECT_EQ(group->waits_for("a", true), "");
  group->leave("b");
  EXPECT_EQ(group->waits_for("a", true), "b");
}

TEST_F(CutoverGroupTest, EverythingIsDoneOnce) {
  auto one = join("a"), other = join("b");
  ASSERT_TRUE(one->sync_ahead() && other->sync_ahead());
  quiesce_both(*one, *other);
  ASSERT_TRUE(both_at(*one, *other, CutoverStep::copied));
  ASSERT_TRUE(both_at(*one, *other, CutoverStep::targets_closed));
  EXPECT_TRUE(one->hand_over().value_or(false));
  EXPECT_TRUE(other->hand_over().value_or(false));
  EXPECT_TRUE(one->handed_over() && other->handed_over());
  one.reset();
  other.reset();
  EXPECT_EQ(calls.made, 1u);
  EXPECT_EQ(calls.synced, 1u);
  EXPECT_EQ(calls.quiesced, 1u);
  EXPECT_EQ(calls.handed_over, 1u);
  EXPECT_EQ(calls.released, 0u);
  EXPECT_EQ(group->waits_for("a", true), "b") << "whoever is to be cut over again says so anew";
}

TEST_F(CutoverGroupTest, OneThatGivesUpReleasesAll) {
  for (const CutoverStep step : {CutoverStep::caught_up, CutoverStep::still, CutoverStep::copied}) {
    SCOPED_TRACE(int(step));
    calls = {};
    auto one = join("a"), other = join("b");
    if (step == CutoverStep::caught_up) {
      ASSERT_FALSE(one->all_at(step).value_or(true));
    } else {
      quiesce_both(*one, *other);
      if (step == CutoverStep::copied) {
        ASSERT_FALSE(one->all_at(step).value_or(true));
      }
    }
    const bool frozen = calls.quiesced > 0;
    other.reset();
    EXPECT_FALSE(one->all_at(CutoverStep::copied)) << "it must hear of that";
    EXPECT_FALSE(one->hand_over().value_or(true));
    EXPECT_EQ(calls.handed_over, 0u);
    EXPECT_EQ(calls.released, frozen ? 1u : 0u);
    one.reset();
    EXPECT_EQ(calls.released, frozen ? 1u : 0u);
  }
}

TEST_F(CutoverGroupTest, AnAttemptThatBrokeIsNotJoined) {
  auto one = join("a");
  auto other = join("b");
  other.reset();
  auto again = join("b");
  EXPECT_EQ(calls.made, 2u);
  EXPECT_FALSE(one->all_at(CutoverStep::caught_up));
  one.reset();
  one = join("a");
  EXPECT_EQ(calls.made, 2u) << "both are in the new one";
  quiesce_both(*one, *again);
}

TEST_F(CutoverGroupTest, WhoComesTooLateToGiveUpIsHandedOver) {
  auto one = join("a"), other = join("b");
  quiesce_both(*one, *other);
  ASSERT_TRUE(both_at(*one, *other, CutoverStep::copied));
  ASSERT_TRUE(both_at(*one, *other, CutoverStep::targets_closed));
  ASSERT_TRUE(one->hand_over().value_or(false));
  static_cast<void>(other->release());  // it was cancelled in that moment
  EXPECT_TRUE(other->handed_over());
  EXPECT_EQ(calls.released, 0u);
}

TEST_F(CutoverGroupTest, WhoGivesUpInTimeKeepsTheOthersFromHandingOver) {
  auto one = join("a"), other = join("b");
  quiesce_both(*one, *other);
  ASSERT_TRUE(both_at(*one, *other, CutoverStep::copied));
  ASSERT_TRUE(both_at(*one, *other, CutoverStep::targets_closed));
  static_cast<void>(other->release());
  EXPECT_FALSE(one->hand_over().value_or(true));
  EXPECT_EQ(calls.handed_over, 0u);
  EXPECT_FALSE(one->handed_over());
}

TEST_F(CutoverGroupTest, NobodyWaitsForEver) {
  auto one = join("a");
  EXPECT_FALSE(one->all_at(CutoverStep::caught_up).value_or(true));
  clock.time += std::chrono::minutes(1);
  EXPECT_FALSE(one->all_at(CutoverStep::caught_up));
}

TEST_F(CutoverGroupTest, ARehearsalOfOneIsOneOfAll) {
  auto one = join("a", false), other = join("b", true);
  quiesce_both(*one, *other);
  EXPECT_TRUE(one->rehearses(false));
  EXPECT_TRUE(other->rehearses(true));
}

TEST_F(CutoverGroupTest, FailuresAreTheSameForAll) {
  calls.quiesce_fails = true;
  auto one = join("a"), other = join("b");
  ASSERT_TRUE(both_at(*one, *other, CutoverStep::caught_up));
  ASSERT_TRUE(both_at(*one, *other, CutoverStep::still));
  EXPECT_FALSE(one->quiesce(Nanoseconds(1)));
  EXPECT_FALSE(other->quiesce(Nanoseconds(1)));
  one.reset();
  other.reset();
  EXPECT_EQ(calls.released, 0u);
}

}  // namespace
}  // namespace blockferry
