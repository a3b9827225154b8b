// SPDX-License-Identifier: Apache-2.0
// Bitmaps in QEMU as a tracker of live writes, against a QEMU that misbehaves where it is told to.
#include "daemon/qemu_tracker.h"

#include <gtest/gtest.h>

#include "tests/unit/daemon/fake_qemu.h"

namespace blockferry {
namespace {

using fake_qemu::FakeQemu;
using nlohmann::json;

constexpr std::uint64_t granule = 4096;
const std::vector<std::string> misbehaviour = {"error", "senseless", "cut", "close", "late", "wrong shape"};

class QemuTrackerTest : public ::testing::Test {
 protected:
  std::shared_ptr<QemuDisk> new_disk() {
    return std::make_shared<QemuDisk>(client, *parse_qemu_uri(qemu.uri() + named), "run", "volume",
                                      qemu.directory);
  }

  /// Reads the bitmap out of the fake, as NBD would give it.
  ReadQemuBitmap reader() {
    return [this](const std::string&, const std::string& bitmap, std::uint64_t,
                  const std::function<void(ByteRange)>& found, Nanoseconds) -> Result<void> {
      if (reading_fails) return fail(make_error(ErrorCode::io, "read", bitmap, "test"));
      const std::lock_guard lock(qemu.mutex);
      for (const auto& [offset, length] : qemu.bitmaps.at(bitmap).dirty) found({offset, length});
      return {};
    };
  }

  Result<std::unique_ptr<QemuTracker>> attach() { return QemuTracker::attach(new_disk(), granule, reader()); }
  Result<std::unique_ptr<QemuTracker>> adopt(std::uint64_t position = 0) {
    return QemuTracker::adopt(new_disk(), granule, reader(), position);
  }

  std::vector<std::uint64_t> collected(QemuTracker& tracker) {
    ChangeBitmap dirty(qemu.bytes / granule);
    const auto done = tracker.collect(dirty);
    EXPECT_TRUE(done) << done.error().message();
    std::vector<std::uint64_t> granules;
    for (std::uint64_t i = 0; i < dirty.granule_count(); ++i) {
      if (dirty.test(i)) granules.push_back(i);
    }
    return granules;
  }

  std::vector<std::string> bitmap_names() {
    const std::lock_guard lock(qemu.mutex);
    std::vector<std::string> names;
    for (const auto& [name, bitmap] : qemu.bitmaps) names.push_back(name);
    return names;
  }

  void misbehave(const std::string& command, const std::string& how) {
    qemu.play(command, [how](const json& request) -> std::string {
      if (how == "error")
        return json{{"id", request.at("id")}, {"error", {{"class", "GenericError"}, {"desc", "no, not now"}}}}
            .dump();
      if (how == "senseless") return "\x01\xff not JSON";
      if (how == "cut") return R"({"return": {"a": )";
      if (how == "close") return "close";
      if (how == "wrong shape") return json{{"id", request.at("id")}, {"return", {{"x", 1}}}}.dump();
      return "";  // late
    });
  }

  std::size_t exports() {
    return qemu.locked([&] { return qemu.exports.size(); });
  }

  FakeQemu qemu;
  std::shared_ptr<QmpClient> client = std::make_shared<QmpClient>(
      qemu.socket(), QmpPatience{std::chrono::milliseconds(1000), std::chrono::milliseconds(300)});
  bool reading_fails = false;
  std::string named;  ///< of the URI: &bitmap=NAME
};

using Granules = std::vector<std::uint64_t>;
using Names = std::vector<std::string>;

TEST_F(QemuTrackerTest, BitmapsTakeTurnsAndGoOnlyWhenReleased) {
  auto tracker = attach();
  ASSERT_TRUE(tracker) << tracker.error().message();
  qemu.write(0, 512);
  qemu.write(8 * granule - 1, 2);
  EXPECT_EQ(collected(**tracker), (Granules{0, 7, 8}));
  EXPECT_EQ(bitmap_names(), (Names{"blockferry-run-0", "blockferry-run-1"}));
  qemu.write(granule, granule);
  EXPECT_EQ(collected(**tracker), (Granules{1})) << "the first ones were given already";
  EXPECT_EQ(bitmap_names().size(), 3u) << "nothing may go before it is committed";
  (*tracker)->release();
  EXPECT_EQ(bitmap_names(), (Names{"blockferry-run-2"}));
  EXPECT_EQ(exports(), 0u);
  EXPECT_FALSE((*tracker)->losses().any());
}

/// For an idle guest nothing is committed, and what is not committed may not change what is found.
TEST_F(QemuTrackerTest, AnIdleGuestKeepsItsBitmap) {
  auto tracker = attach();
  ASSERT_TRUE(tracker);
  for (int i = 0; i < 5; ++i) EXPECT_TRUE(collected(**tracker).empty());
  EXPECT_EQ(bitmap_names(), (Names{"blockferry-run-0"}));
  EXPECT_EQ(qemu.count("block-export-add"), 0u) << "there was nothing to be read";
  EXPECT_EQ(qemu.count("transaction"), 5u) << "writes that are on their way are waited for";
  EXPECT_EQ((*tracker)->position(), 0u);
  EXPECT_TRUE(adopt(0));
}

/// A write that ends while the transaction waits for it.
TEST_F(QemuTrackerTest, AWriteThatWasOnItsWayIsCollected) {
  auto tracker = attach();
  ASSERT_TRUE(tracker);
  qemu.locked([&] { qemu.on_its_way = {{2 * granule, granule}}; });
  EXPECT_EQ(collected(**tracker), (Granules{2}));
  EXPECT_EQ((*tracker)->position(), 1u);
}

/// Invariant 4: what was not released is given again by whoever comes after a crash.
TEST_F(QemuTrackerTest, WhatWasNotReleasedIsGivenAgain) {
  {
    auto tracker = attach();
    ASSERT_TRUE(tracker);
    qemu.write(0, granule);
    EXPECT_EQ(collected(**tracker), (Granules{0}));
    qemu.write(granule, granule);
  }
  auto again = adopt();
  ASSERT_TRUE(again) << again.error().message();
  qemu.write(2 * granule, granule);
  EXPECT_EQ(collected(**again), (Granules{0, 1, 2}));
  (*again)->release();
  EXPECT_EQ(bitmap_names().size(), 1u);
  EXPECT_FALSE((*again)->losses().any());
}

/// And what was committed, and not released any more, is not.
TEST_F(QemuTrackerTest, WhatWasCommittedIsNotGivenAgain) {
  std::optional<std::uint64_t> committed;
  {
    auto tracker = attach();
    ASSERT_TRUE(tracker);
    qemu.write(0, granule);
    EXPECT_EQ(collected(**tracker), (Granules{0}));
    committed = (*tracker)->position();
    qemu.write(granule, granule);
  }
  ASSERT_EQ(committed, 1u);
  auto again = adopt(*committed);
  ASSERT_TRUE(again) << again.error().message();
  EXPECT_EQ(bitmap_names(), (Names{"blockferry-run-1"}));
  EXPECT_EQ(collected(**again), (Granules{1}));
}

/// The lowest one, too, which no other one tells of: nothing stands below it.
TEST_F(QemuTrackerTest, TheLowestBitmapIsMissed) {
  {
    auto tracker = attach();
    ASSERT_TRUE(tracker);
    qemu.write(0, granule);
    EXPECT_EQ(collected(**tracker), (Granules{0}));
  }
  qemu.locked([&] { qemu.bitmaps.erase("blockferry-run-0"); });
  EXPECT_EQ(adopt(0).error().code, ErrorCode::state_damaged);
  EXPECT_EQ(adopt(2).error().code, ErrorCode::state_damaged) << "the one of the position is not there yet";
  EXPECT_TRUE(adopt(1));
}

/// A record that was committed before must never fit to them.
TEST_F(QemuTrackerTest, NumbersAreNotUsedAgain) {
  auto tracker = QemuTracker::attach(new_disk(), granule, reader(), 7);
  ASSERT_TRUE(tracker);
  EXPECT_EQ(bitmap_names(), (Names{"blockferry-run-8"}));
  EXPECT_EQ((*tracker)->position(), 8u);
  EXPECT_EQ(adopt(7).error().code, ErrorCode::state_damaged);
}

TEST_F(QemuTrackerTest, BitmapsThatAreNotAllThereAreNotTakenUp) {
  EXPECT_EQ(adopt().error().code, ErrorCode::state_damaged) << "QEMU was started anew";
  auto tracker = attach();
  ASSERT_TRUE(tracker);
  for (int i = 0; i < 2; ++i) {
    qemu.write(0, granule);
    collected(**tracker);
  }
  const auto bitmaps = qemu.locked([&] { return qemu.bitmaps; });
  ASSERT_EQ(bitmaps.size(), 3u);
  qemu.locked([&] { qemu.bitmaps.erase("blockferry-run-1"); });
  EXPECT_EQ(adopt().error().code, ErrorCode::state_damaged) << "one of several is gone";
  const auto set = [&](const std::string& name, bool fake_qemu::Bitmap::*member, bool value) {
    qemu.locked([&] {
      qemu.bitmaps = bitmaps;
      qemu.bitmaps[name].*member = value;
    });
  };
  set("blockferry-run-2", &fake_qemu::Bitmap::recording, false);
  EXPECT_EQ(adopt().error().code, ErrorCode::state_damaged) << "none records";
  set("blockferry-run-0", &fake_qemu::Bitmap::inconsistent, true);
  EXPECT_EQ(adopt().error().code, ErrorCode::state_damaged) << "one is not to be trusted";
  set("blockferry-run-0", &fake_qemu::Bitmap::inconsistent, false);
  EXPECT_TRUE(adopt());
}

TEST_F(QemuTrackerTest, ABitmapThatWasTamperedWithIsALoss) {
  for (const std::string how : {"removed", "disabled", "inconsistent"}) {
    auto tracker = attach();
    ASSERT_TRUE(tracker);
    qemu.write(0, granule);
    EXPECT_EQ(collected(**tracker).size(), 1u);
    {
      const std::lock_guard lock(qemu.mutex);
      if (how == "removed") qemu.bitmaps.erase("blockferry-run-1");
      if (how == "disabled") qemu.bitmaps["blockferry-run-1"].recording = false;
      if (how == "inconsistent") qemu.bitmaps["blockferry-run-1"].inconsistent = true;
    }
    EXPECT_TRUE(collected(**tracker).empty());
    EXPECT_EQ((*tracker)->losses().interruptions, 1u) << how;
  }
  auto anew = attach();
  ASSERT_TRUE(anew);
  EXPECT_EQ(bitmap_names(), (Names{"blockferry-run-0"})) << "what was left is gone";
}

/// They are the volume's, of which the next run is another one; and go only when they are forgotten.
TEST_F(QemuTrackerTest, BitmapsThatTheUserNamesOutliveTheRun) {
  named = "&bitmap=nightly";
  auto disk = new_disk();
  ASSERT_TRUE(disk->export_source("disk"));
  auto tracker = QemuTracker::attach(disk, granule, reader());
  ASSERT_TRUE(tracker) << tracker.error().message();
  qemu.write(0, granule);
  EXPECT_EQ(collected(**tracker), (Granules{0}));
  (*tracker)->release();
  EXPECT_EQ(bitmap_names(), (Names{"nightly-volume-1"}));
  EXPECT_TRUE(qemu.locked([&] { return qemu.bitmaps["nightly-volume-1"].persistent; }));
  ASSERT_TRUE(disk->remove_all());
  EXPECT_EQ(bitmap_names(), (Names{"nightly-volume-1"}));
  EXPECT_EQ(exports(), 0u);
  qemu.write(granule, granule);
  auto next = adopt(1);
  ASSERT_TRUE(next) << next.error().message();
  EXPECT_EQ(collected(**next), (Granules{1}));
  ASSERT_TRUE(disk->remove_bitmaps());
  EXPECT_TRUE(bitmap_names().empty());
}

/// Nobody else's, and none of another state of the volume's.
TEST_F(QemuTrackerTest, OfBitmapsInAnImageOnlyItsOwnAreBelieved) {
  named = "&bitmap=nightly";
  const auto there = [&](const std::string& name, bool persistent) {
    fake_qemu::Bitmap bitmap;
    bitmap.granularity = granule;
    bitmap.persistent = persistent;
    qemu.locked([&] { qemu.bitmaps = {{name, bitmap}}; });
  };
  there("nightly-volume-4", true);
  EXPECT_TRUE(adopt(4));
  EXPECT_EQ(adopt(3).error().code, ErrorCode::state_damaged) << "an older state";
  EXPECT_EQ(adopt(5).error().code, ErrorCode::state_damaged) << "an older image";
  there("nightly-other-4", true);
  EXPECT_EQ(adopt(4).error().code, ErrorCode::state_damaged);
  there("nightly-volume-4", false);
  EXPECT_EQ(adopt(4).error().code, ErrorCode::state_damaged) << "not the image's";
}

TEST_F(QemuTrackerTest, ADiskThatIsAnotherNodeNowIsAnError) {
  auto tracker = attach();
  ASSERT_TRUE(tracker);
  ChangeBitmap dirty(qemu.bytes / granule);
  {
    const std::lock_guard lock(qemu.mutex);
    qemu.read_only = true;  // as a snapshot leaves it
  }
  const auto done = (*tracker)->collect(dirty);
  ASSERT_FALSE(done);
  EXPECT_NE(done.error().message().find("a snapshot has moved"), std::string::npos) << done.error().message();
}

/// At each step: a clear error, the guest left as it was, and no mark lost.
TEST_F(QemuTrackerTest, AnyStepMayFailAndNothingIsLost) {
  for (const std::string command :
       {"query-block", "query-named-block-nodes", "transaction", "nbd-server-start", "block-export-add",
        "block-export-del", "query-block-exports"}) {
    for (const auto& how : misbehaviour) {
      SCOPED_TRACE(command + ": " + how);
      qemu.behave();
      auto tracker = attach();
      ASSERT_TRUE(tracker) << tracker.error().message();
      qemu.write(3 * granule, granule);
      misbehave(command, how);
      ChangeBitmap dirty(qemu.bytes / granule);
      const auto done = (*tracker)->collect(dirty);
      const bool ignores =
          how == "wrong shape" && (command == "transaction" || command == "nbd-server-start" ||
                                   command == "block-export-add" || command == "block-export-del");
      const bool removing = command == "block-export-del" && how != "close" && how != "late";
      if (!ignores && !removing) {
        ASSERT_FALSE(done) << "it was taken for an answer";
        EXPECT_NE(done.error().message().find(qemu.socket()), std::string::npos) << done.error().message();
      }
      qemu.behave();
      EXPECT_EQ(qemu.count("stop"), 0u);
      auto again = adopt();
      ASSERT_TRUE(again) << again.error().message();
      EXPECT_EQ(collected(**again), (Granules{3}));
      (*again)->release();
    }
  }
}

/// Likewise when a run begins; and what it has added until then is taken away once QEMU answers again.
TEST_F(QemuTrackerTest, ABeginningThatFailsLeavesNothing) {
  for (const std::string command :
       {"query-block", "query-named-block-nodes", "nbd-server-start", "block-export-add",
        "block-dirty-bitmap-add", "query-block-exports", "blockdev-add"}) {
    for (const auto& how : misbehaviour) {
      SCOPED_TRACE(command + ": " + how);
      misbehave(command, how);
      auto disk = new_disk();
      Result<void> done;
      if (auto uri = disk->export_source("disk"); !uri) done = fail(uri.error());
      if (done) {
        if (auto tracker = QemuTracker::attach(disk, granule, reader()); !tracker)
          done = fail(tracker.error());
      }
      if (done) done = disk->add_target("/dev/null", QemuNode{});
      const bool no_answer_is_read = command != "query-block" && command != "query-named-block-nodes" &&
                                     command != "query-block-exports";
      if (how != "wrong shape" || !no_answer_is_read) {
        ASSERT_FALSE(done) << "it was taken for an answer";
        EXPECT_NE(done.error().message().find(qemu.socket()), std::string::npos) << done.error().message();
      }
      qemu.behave();
      const auto removed = disk->remove_all();
      EXPECT_TRUE(removed) << removed.error().message();
      EXPECT_TRUE(bitmap_names().empty());
      EXPECT_EQ(exports(), 0u);
      EXPECT_EQ(qemu.count("stop") + qemu.count("qom-set"), 0u);
    }
  }
}

TEST_F(QemuTrackerTest, ABitmapThatCannotBeReadIsKept) {
  auto tracker = attach();
  ASSERT_TRUE(tracker);
  qemu.write(0, granule);
  reading_fails = true;
  ChangeBitmap dirty(qemu.bytes / granule);
  EXPECT_FALSE((*tracker)->collect(dirty));
  EXPECT_EQ(exports(), 0u) << "the export is gone all the same";
  reading_fails = false;
  EXPECT_EQ(collected(**tracker), (Granules{0}));
}

TEST_F(QemuTrackerTest, AllThatARunAddedIsTakenAway) {
  auto disk = new_disk();
  ASSERT_TRUE(disk->export_source("disk"));
  auto tracker = QemuTracker::attach(disk, granule, reader());
  ASSERT_TRUE(tracker);
  qemu.locked([&] { qemu.bitmaps["somebody-elses"] = {}; });
  qemu.write(0, granule);
  EXPECT_EQ(collected(**tracker), (Granules{0}));
  ASSERT_TRUE(disk->remove_all());
  EXPECT_EQ(bitmap_names(), (Names{"somebody-elses"}));
  EXPECT_EQ(exports(), 0u);
}

}  // namespace
}  // namespace blockferry
