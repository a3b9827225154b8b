// SPDX-License-Identifier: Apache-2.0
// In which order the guard undoes and releases, when a hand-over comes to nothing.
#include "guard/guard.h"

#include <algorithm>
#include <condition_variable>
#include <filesystem>

#include <fcntl.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <sys/socket.h>

#include "blockio/base/file_descriptor.h"
#include "tests/support/loop_device.h"

namespace blockferry::test {
namespace {

using std::chrono::milliseconds;

/// What was done, in order; and gates that keep a step from ending.
class Events {
 public:
  void add(const std::string& event) {
    const std::lock_guard lock(mutex_);
    list_.push_back(event);
    changed_.notify_all();
  }
  /// Waits for it, bounded.
  bool have(const std::string& event) {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, std::chrono::seconds(20),
                             [&] { return std::find(list_.begin(), list_.end(), event) != list_.end(); });
  }
  std::vector<std::string> list() {
    const std::lock_guard lock(mutex_);
    return list_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::string> list_;  // guarded by mutex_
};

class FakeMap : public Hold {
 public:
  explicit FakeMap(Events& events) : events_(events) {}
  std::optional<HoldFailure> take(milliseconds, const std::atomic<bool>&) override {
    events_.add("suspended");
    return std::nullopt;
  }
  void release(bool handed_over) override {
    events_.add(handed_over ? "resumed on the new disk" : "resumed");
  }

 private:
  Events& events_;
};

struct RecordScript {
  bool fails = false;         ///< the change does
  bool hangs = false;         ///< it ends only when it is given up
  std::string undo_awaits{};  ///< the undoing ends only after this event
};

class FakeRecord : public Hold {
 public:
  FakeRecord(Events& events, RecordScript script) : events_(events), script_(std::move(script)) {}
  std::optional<HoldFailure> take(milliseconds, const std::atomic<bool>&) override { return std::nullopt; }
  std::optional<HoldFailure> prepare_hand_over(milliseconds, const std::atomic<bool>& give_up) override {
    events_.add("change begun");
    begun_ = true;
    while (script_.hangs && !give_up) std::this_thread::sleep_for(milliseconds(1));
    if (script_.fails || script_.hangs) return HoldFailure{0, "no"};
    return std::nullopt;
  }
  bool undoes_preparation() const override { return true; }
  void undo_preparation() override {
    if (!begun_) return;
    begun_ = false;
    if (!script_.undo_awaits.empty()) {
      EXPECT_TRUE(events_.have(script_.undo_awaits));
    }
    events_.add("undone");
  }
  void release(bool handed_over) override {
    if (!handed_over) undo_preparation();
  }
  bool released_by_command() const override { return true; }

 private:
  Events& events_;
  const RecordScript script_;
  bool begun_ = false;
};

class GuardTest : public ::testing::Test {
 protected:
  void begin(RecordScript script, std::uint32_t limit_ms = 20000) {
    int pair[2];
    ASSERT_EQ(::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair), 0);
    ours_ = FileDescriptor(pair[0]);
    theirs_ = FileDescriptor(pair[1]);
    mark_ = FileDescriptor(::open(scratch_.path().c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    std::vector<std::unique_ptr<Hold>> holds;
    holds.push_back(std::make_unique<FakeMap>(events_));
    holds.push_back(std::make_unique<FakeRecord>(events_, std::move(script)));
    guard_ = std::make_unique<Guard>(std::move(holds), "", theirs_.get(), mark_.get());
    thread_ = std::thread([this] { guard_->run(); });
    ask({GuardRequest::quiesce, limit_ms});
    EXPECT_EQ(answer().kind, GuardAnswer::quiesced);
    ask({GuardRequest::hand_over, 0});
  }
  void TearDown() override {
    ours_.reset();
    if (thread_.joinable()) thread_.join();
  }
  void ask(GuardRequest request) {
    ASSERT_EQ(::send(ours_.get(), &request, sizeof request, MSG_NOSIGNAL), ssize_t(sizeof request));
  }
  GuardAnswer answer() {
    GuardAnswer answer{};
    pollfd event{ours_.get(), POLLIN, 0};
    EXPECT_GT(::poll(&event, 1, 20000), 0);
    EXPECT_EQ(::recv(ours_.get(), &answer, sizeof answer, MSG_DONTWAIT), ssize_t(sizeof answer));
    return answer;
  }
  bool marked() const { return std::filesystem::exists(scratch_.path(guard_mark)); }

  using List = std::vector<std::string>;
  ScratchDirectory scratch_;
  Events events_;
  FileDescriptor ours_, theirs_, mark_;
  std::unique_ptr<Guard> guard_;
  std::thread thread_;
};

TEST_F(GuardTest, HandsOver) {
  begin({});
  EXPECT_EQ(answer().kind, GuardAnswer::released);
  EXPECT_EQ(events_.list(), (List{"suspended", "change begun", "resumed on the new disk"}));
  EXPECT_TRUE(marked());
}

/// Whatever tells where the volume lies says the old disk again before anybody writes there.
TEST_F(GuardTest, AChangeThatFailedIsUndoneBeforeTheRelease) {
  begin({.fails = true});
  EXPECT_EQ(answer().kind, GuardAnswer::failed);
  EXPECT_EQ(events_.list(), (List{"suspended", "change begun", "undone", "resumed"}));
  EXPECT_FALSE(marked());
}

TEST_F(GuardTest, AChangeThatFerrydDiedInIsUndoneBeforeTheRelease) {
  begin({.hangs = true});
  ASSERT_TRUE(events_.have("change begun"));
  ours_.reset();
  thread_.join();
  EXPECT_EQ(events_.list(), (List{"suspended", "change begun", "undone", "resumed"}));
}

/// But nothing stays still for longer than it may.
TEST_F(GuardTest, UndoingThatTakesTooLongIsNotWaitedFor) {
  begin({.fails = true, .undo_awaits = "resumed"}, 300);
  EXPECT_EQ(answer().kind, GuardAnswer::failed);
  EXPECT_EQ(events_.list(), (List{"suspended", "change begun", "resumed", "undone"}));
}

TEST_F(GuardTest, AChangeThatTakesTooLongIsUndoneAfterTheRelease) {
  begin({.hangs = true}, 100);
  EXPECT_EQ(answer().kind, GuardAnswer::expired);
  EXPECT_EQ(events_.list(), (List{"suspended", "change begun", "resumed", "undone"}));
  EXPECT_FALSE(marked());
}

}  // namespace
}  // namespace blockferry::test
