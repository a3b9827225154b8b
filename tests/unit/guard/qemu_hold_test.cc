// SPDX-License-Identifier: Apache-2.0
// What the guard does to a guest, over a connection that it shares, with a QEMU that misbehaves at every
// step.
#include "guard/qemu_hold.h"

#include <gtest/gtest.h>

#include "daemon/qmp_client.h"
#include "tests/unit/daemon/fake_qemu.h"

namespace blockferry {
namespace {

using fake_qemu::FakeQemu;
using nlohmann::json;

constexpr auto limit = std::chrono::milliseconds(500);
const std::string to_target =
    R"("execute":"qom-set","arguments":{"path":"vd0","property":"drive","value":"target"})";
const std::string back =
    R"("execute":"qom-set","arguments":{"path":"vd0","property":"drive","value":"disk"})";

class QemuHoldTest : public ::testing::Test {
 protected:
  int connection() {
    const auto fd = client.descriptor();
    EXPECT_TRUE(fd) << fd.error().message();
    return fd.value_or(-1);
  }
  std::optional<HoldFailure> take(Hold& hold) { return hold.take(limit, never); }
  void trick(const std::string& command, const std::string& how) {
    qemu.play(command, [how](const json& request) -> std::string {
      if (how == "error")
        return json{{"error", {{"class", "GenericError"}, {"desc", "not \"now\""}}}, {"id", request["id"]}}
            .dump();
      if (how == "senseless") return "{]] " + request["id"].dump();
      return "";
    });
  }
  std::string drive() {
    return qemu.locked([&] { return qemu.drive; });
  }

  FakeQemu qemu;
  QmpClient client{qemu.socket()};
  const std::atomic<bool> never{false};
};

TEST_F(QemuHoldTest, StopsTheGuestAndStartsItAgain) {
  auto hold = make_guest_hold(connection(), false);
  EXPECT_FALSE(take(*hold));
  EXPECT_FALSE(qemu.runs());
  EXPECT_FALSE(hold->hand_over());
  hold->release(true);
  EXPECT_TRUE(qemu.runs());
  EXPECT_TRUE(client.execute("query-status")) << "the connection serves its owner as before";
}

TEST_F(QemuHoldTest, WhatSomebodyElseHasStoppedStaysSo) {
  qemu.locked([&] { qemu.running = false; });
  auto hold = make_guest_hold(connection(), false);
  EXPECT_FALSE(take(*hold));
  hold->release(false);
  EXPECT_FALSE(qemu.runs());
  EXPECT_EQ(qemu.count("stop") + qemu.count("cont"), 0u);
}

TEST_F(QemuHoldTest, OneThatIsGivenAwayStaysStopped) {
  auto hold = make_guest_hold(connection(), true);
  EXPECT_FALSE(take(*hold));
  hold->release(true);
  EXPECT_FALSE(qemu.runs());
}

TEST_F(QemuHoldTest, AGuestThatRunsAgainIsNotHandedOver) {
  auto hold = make_guest_hold(connection(), false);
  EXPECT_FALSE(take(*hold));
  qemu.locked([&] { qemu.running = true; });
  const auto failure = hold->hand_over();
  ASSERT_TRUE(failure);
  EXPECT_NE(failure->detail.find("started the guest again"), std::string::npos);
  hold->release(false);
}

TEST_F(QemuHoldTest, WhateverQemuAnswersTheGuestRunsInTheEnd) {
  for (const std::string command : {"query-status", "stop"}) {
    for (const std::string how : {"error", "senseless", "late"}) {
      SCOPED_TRACE(command + ": " + how);
      qemu.behave();
      trick(command, how);
      auto hold = make_guest_hold(connection(), false);
      const auto failure = take(*hold);
      ASSERT_TRUE(failure);
      EXPECT_FALSE(failure->detail.empty());
      if (how == "error") {
        EXPECT_EQ(failure->detail, "not \"now\"");
      }
      const std::size_t started = qemu.count("cont");
      hold->release(false);
      EXPECT_EQ(qemu.count("cont"), started + (command == "stop" ? 1 : 0)) << "one that it may have stopped";
      EXPECT_TRUE(qemu.runs());
    }
  }
}

TEST_F(QemuHoldTest, GivesTheGuestAnotherDiskOrNone) {
  auto hold = make_guest_disk_hold(connection(), to_target, back);
  EXPECT_FALSE(take(*hold));
  EXPECT_EQ(drive(), "disk");
  EXPECT_FALSE(hold->hand_over());
  EXPECT_EQ(drive(), "target");
  hold->take_back();
  EXPECT_EQ(drive(), "disk");
}

TEST_F(QemuHoldTest, AnAnswerThatDoesNotComeIsUndone) {
  for (const std::string how : {"error", "senseless", "late"}) {
    SCOPED_TRACE(how);
    qemu.behave();
    trick("qom-set", how);
    auto hold = make_guest_disk_hold(connection(), to_target, back);
    const std::size_t before = qemu.count("qom-set");
    const auto failure = hold->hand_over();
    ASSERT_TRUE(failure);
    EXPECT_EQ(qemu.count("qom-set") - before, how == "error" ? 1u : 2u)
        << "one that was refused needs no undoing";
  }
}

std::string mirror(const std::string& from, const std::string& to) {
  return R"("execute":"blockdev-mirror","arguments":{"job-id":"job","device":")" + from + R"(","target":")" +
         to + "\"}";
}

/// What is to be seen of a node that is moved.
class NodeHoldTest : public QemuHoldTest {
 protected:
  std::unique_ptr<Hold> hold() {
    return make_node_hold(connection(), mirror("disk", "target"), mirror("target", "disk"), "job");
  }
  std::optional<HoldFailure> prepare(Hold& hold) { return hold.prepare_hand_over(limit, never); }
  std::string node() {
    return qemu.locked([&] { return qemu.exported_node; });
  }
  std::string job() {
    return qemu.locked([&] { return qemu.job; });
  }
};

TEST_F(NodeHoldTest, GivesItsUsersAnotherNodeAndTakesThemBack) {
  auto hold = this->hold();
  EXPECT_FALSE(take(*hold));
  EXPECT_FALSE(prepare(*hold));
  EXPECT_EQ(node(), "disk");
  EXPECT_FALSE(hold->hand_over());
  EXPECT_EQ(node(), "target");
  EXPECT_EQ(job(), "") << "nothing is left of it";
  hold->take_back();
  EXPECT_EQ(node(), "disk");
  EXPECT_EQ(job(), "");
  hold->release(false);
  EXPECT_EQ(qemu.count("job-cancel"), 0u);
}

TEST_F(NodeHoldTest, OneThatIsReleasedLeavesNoJob) {
  auto hold = this->hold();
  EXPECT_FALSE(prepare(*hold));
  hold->release(false);
  EXPECT_EQ(node(), "disk");
  EXPECT_EQ(job(), "");
}

/// Handed over is what QEMU has done, not what it has answered.
TEST_F(NodeHoldTest, WhateverQemuAnswersItIsKnownWhereItsUsersAre) {
  for (const std::string command : {"blockdev-mirror", "job-complete"}) {
    for (const std::string how : {"error", "senseless", "late"}) {
      SCOPED_TRACE(command + ": " + how);
      qemu.behave();
      auto hold = this->hold();
      trick(command, how);
      auto failure = prepare(*hold);
      if (!failure) failure = hold->hand_over();
      ASSERT_TRUE(failure);
      EXPECT_FALSE(failure->detail.empty());
      qemu.behave();
      hold->release(false);
      EXPECT_EQ(node(), "disk");
      EXPECT_EQ(job(), "");
    }
  }
}

TEST_F(NodeHoldTest, AnAnswerThatIsLostIsNoFailure) {
  auto hold = this->hold();
  EXPECT_FALSE(prepare(*hold));
  qemu.play("job-complete", [this](const json&) -> std::string {
    qemu.job = "moved";  // its thread has the mutex
    qemu.exported_node = "target";
    return "";
  });
  EXPECT_FALSE(hold->hand_over());
  EXPECT_EQ(node(), "target");
}

TEST_F(QemuHoldTest, AQemuThatIsGoneIsAFailure) {
  const int fd = connection();
  qemu.play("query-status", [](const json&) { return "close"; });
  auto hold = make_guest_hold(fd, false);
  EXPECT_TRUE(take(*hold));
  hold->release(false);
}

}  // namespace
}  // namespace blockferry
