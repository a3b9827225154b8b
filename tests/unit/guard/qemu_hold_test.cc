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

TEST_F(QemuHoldTest, AQemuThatIsGoneIsAFailure) {
  const int fd = connection();
  qemu.play("query-status", [](const json&) { return "close"; });
  auto hold = make_guest_hold(fd, false);
  EXPECT_TRUE(take(*hold));
  hold->release(false);
}

}  // namespace
}  // namespace blockferry
