// SPDX-License-Identifier: Apache-2.0
#include "daemon/qmp_client.h"

#include <chrono>
#include <random>
#include <utility>

#include <gtest/gtest.h>

#include "daemon/qemu_node.h"
#include "tests/unit/daemon/fake_qemu.h"

namespace blockferry {
namespace {

using fake_qemu::FakeQemu;
using nlohmann::json;

constexpr QmpPatience short_patience{std::chrono::milliseconds(1000), std::chrono::milliseconds(500)};

TEST(QmpClient, PassesOverEventsAndAnswersToOthers) {
  FakeQemu qemu;
  qemu.play("query-status", [](const json& request) {
    return R"({"event":"STOP","timestamp":{}})"
           "\r\n"
           R"({"return":{"running":false},"id":"blockferry-guard-1"})"
           "\r\n\r\n" +
           json{{"id", request.at("id")}, {"return", {{"running", true}}}}.dump();
  });
  QmpClient client(qemu.socket(), short_patience);
  const auto answer = client.execute("query-status");
  ASSERT_TRUE(answer) << answer.error().message();
  EXPECT_EQ((*answer)["running"], true);
}

TEST(QmpClient, ALateAnswerIsNotTakenForTheNextOnes) {
  FakeQemu qemu;
  json held;
  qemu.play("query-status", [&](const json& request) {
    held = request.at("id");
    return "";
  });
  QmpClient client(qemu.socket(), short_patience);
  const auto late = client.execute("query-status");
  ASSERT_FALSE(late);
  EXPECT_EQ(late.error().code, ErrorCode::io);
  EXPECT_NE(late.error().message().find("did not answer to query-status in time"), std::string::npos);
  qemu.play("query-status", [&](const json& request) {
    return json{{"id", held}, {"return", {{"running", false}}}}.dump() + "\n" +
           json{{"id", request.at("id")}, {"return", {{"running", true}}}}.dump();
  });
  EXPECT_EQ((*client.execute("query-status"))["running"], true);
}

TEST(QmpClient, TellsWhyItCannotTalk) {
  QmpClient nobody("/nowhere/qmp", short_patience);
  EXPECT_EQ(nobody.execute("query-status").error().code, ErrorCode::not_found);
  FakeQemu qemu;
  QmpClient first(qemu.socket(), short_patience), second(qemu.socket(), short_patience);
  ASSERT_TRUE(first.execute("query-status"));
  const auto busy = second.execute("query-status");
  ASSERT_FALSE(busy);
  EXPECT_EQ(busy.error().code, ErrorCode::busy);
  EXPECT_NE(busy.error().message().find("another program"), std::string::npos);
}

TEST(QmpClient, ConnectsAgainWhereTheConnectionWasLost) {
  FakeQemu qemu;
  QmpClient client(qemu.socket(), short_patience);
  ASSERT_TRUE(client.execute("query-status"));
  qemu.play("query-status", [](const json&) { return "close"; });
  EXPECT_EQ(client.execute("query-status").error().code, ErrorCode::device_gone);
  qemu.behave();
  EXPECT_TRUE(client.execute("query-status"));
}

TEST(QmpClient, RefusesAServerOfAnotherKind) {
  FakeQemu qemu;
  qemu.locked([&] { qemu.greeting = "220 mail.example.org ESMTP"; });
  QmpClient client(qemu.socket(), short_patience);
  const auto answer = client.execute("query-status");
  ASSERT_FALSE(answer);
  EXPECT_NE(answer.error().message().find("makes no sense"), std::string::npos);
}

TEST(QmpClient, ALineWithoutEndIsGivenUp) {
  FakeQemu qemu;
  qemu.play("query-status", [](const json&) { return std::string(18 << 20, ' '); });
  QmpPatience patience;
  QmpClient client(qemu.socket(), patience);
  const auto answer = client.execute("query-status");
  ASSERT_FALSE(answer);
  EXPECT_NE(answer.error().message().find("has no end"), std::string::npos);
}

/// Whoever cleans up after it has many commands, and would wait for each.
TEST(QmpClient, AQemuThatHangsIsNotWaitedForAgainAndAgain) {
  FakeQemu qemu;
  const QmpPatience patience{std::chrono::seconds(20), std::chrono::milliseconds(200)};
  QmpClient client(qemu.socket(), patience);
  ASSERT_TRUE(client.execute("query-status"));
  qemu.play("query-status", [](const json&) { return ""; });
  const std::string greeting = qemu.locked([&] { return std::exchange(qemu.greeting, ""); });
  EXPECT_FALSE(client.execute("query-status"));
  const auto begun = std::chrono::steady_clock::now();
  for (int i = 0; i < 3; ++i) EXPECT_FALSE(client.execute("query-status"));
  EXPECT_LT(std::chrono::steady_clock::now() - begun, std::chrono::seconds(15)) << "one wait is longer";
  qemu.behave();
  qemu.locked([&] { qemu.greeting = greeting; });
  EXPECT_TRUE(client.execute("query-status")) << "it is back";
}

TEST(QemuUri, SaysWhatIsWrongWithIt) {
  const auto uri = parse_qemu_uri("qemu:/run/vm%201/qmp?node=%23block1&agent=/run/agent&bitmap=night-1.a_b");
  ASSERT_TRUE(uri) << uri.error().message();
  EXPECT_EQ(uri->socket, "/run/vm 1/qmp");
  EXPECT_EQ(uri->node, "#block1");
  EXPECT_EQ(uri->agent, "/run/agent");
  EXPECT_EQ(uri->bitmap, "night-1.a_b");
  for (const std::string wrong :
       {"qemu:", "qemu:qmp?node=a", "qemu:/qmp", "qemu:/qmp?", "qemu:/qmp?node=", "qemu:/qmp?node=a&device=b",
        "qemu:/qmp?node=a&node=b", "qemu:/qmp?nod=a", "qemu:/qmp?node=a%2", "qemu:/qmp?node=%00",
        "qemu:/qmp?node=a&bitmap=", "qemu:/qmp?node=a&bitmap=1st", "qemu:/qmp?node=a&bitmap=a/b",
        "qemu:/qmp?node=a=b", "qemu:/qmp?node=a&agent=b", "qemu:/qmp?node=a&", "qemu:/%zz?node=a"}) {
    const auto read = parse_qemu_uri(wrong);
    ASSERT_FALSE(read) << wrong;
    EXPECT_EQ(read.error().code, ErrorCode::invalid_argument) << wrong;
  }
}

TEST(QemuNode, IsFoundByItsNameOrTheDeviceThatHasIt) {
  FakeQemu qemu;
  QmpClient client(qemu.socket(), short_patience);
  for (const std::string query :
       {"?node=disk", "?device=vd0", "?device=/machine/peripheral/vd0/virtio-backend"}) {
    const auto node = find_qemu_node(client, *parse_qemu_uri("qemu:" + qemu.socket() + query));
    ASSERT_TRUE(node) << node.error().message();
    EXPECT_EQ(node->name, "disk");
    EXPECT_EQ(node->device, "/machine/peripheral/vd0/virtio-backend");
    EXPECT_EQ(node->bytes, qemu.bytes);
  }
  const auto none = find_qemu_node(client, *parse_qemu_uri("qemu:" + qemu.socket() + "?device=vd1"));
  EXPECT_NE(none.error().message().find("it has vd0"), std::string::npos) << none.error().message();
  const auto other = find_qemu_node(client, *parse_qemu_uri("qemu:" + qemu.socket() + "?node=x"));
  EXPECT_NE(other.error().message().find("it has disk"), std::string::npos) << other.error().message();
}

/// Some bytes of it are others, missing or added.
std::string mutated(std::string text, std::mt19937& random) {
  for (unsigned changes = 1 + random() % 4; changes > 0 && !text.empty(); --changes) {
    const std::size_t at = random() % text.size();
    const char byte = char(random() % 256);
    switch (random() % 4) {
      case 0:
        text.erase(at, 1 + random() % 20);
        break;
      case 1:
        text.insert(at, 1, byte);
        break;
      case 2:
        text.insert(at, text.substr(random() % text.size(), random() % 40));
        break;
      default:
        text[at] = "{}[]\",:0-e"[random() % 11];
    }
  }
  return text;
}

json sound_answer(FakeQemu& qemu, const std::string& command) {
  QmpClient client(qemu.socket());
  const auto answer = client.execute(command);
  EXPECT_TRUE(answer) << answer.error().message();
  return answer.value_or(json());
}

TEST(QemuNode, AnswersThatMakeNoSenseDoNoHarm) {
  const unsigned seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937 random(seed);
  FakeQemu qemu;
  qemu.locked([&] { qemu.bitmaps["a"] = {}; });
  const auto uri = *parse_qemu_uri(qemu.uri());
  for (const std::string command : {"query-named-block-nodes", "query-block", "query-block-exports"}) {
    const json sound = sound_answer(qemu, command);
    QmpClient client(qemu.socket(), {std::chrono::milliseconds(1000), std::chrono::milliseconds(20)});
    qemu.play(command, [&](const json& request) {
      return mutated(json{{"return", sound}, {"id", request.at("id")}}.dump(), random);
    });
    unsigned errors = 0;
    for (int i = 0; i < 200; ++i) {
      const bool node = find_qemu_node(client, uri).has_value();
      const bool exports = list_qemu_exports(client).has_value();
      errors += node && exports ? 0 : 1;
    }
    EXPECT_GT(errors, 0u);
    qemu.behave();
  }
}

}  // namespace
}  // namespace blockferry
