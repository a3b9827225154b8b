// SPDX-License-Identifier: Apache-2.0
// What no honest client does, and who may not come in at all.
#include <chrono>
#include <fstream>
#include <vector>

#include <grp.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tests/unit/daemon/api_server_fixture.h"

namespace blockferry {
namespace {

using nlohmann::json;

std::string code_of(const HttpAnswer& answer) {
  const json body = json::parse(answer.body, nullptr, false);
  return body.is_object() && body.contains("error") ? body["error"]["code"].get<std::string>()
                                                    : "no error object";
}

using ApiAbuse = ApiServerTest;

TEST_F(ApiAbuse, WhatIsNoHttpIsAnsweredAndClosed) {
  start();
  for (const char* text :
       {"hello\r\n\r\n", "GET\r\n\r\n", "GET / HTTP/9.9\r\n\r\n", "\r\n\r\n\r\nX\r\n\r\n",
        "GET / HTTP/1.1\r\nbad header\r\n\r\n", "GET / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        "GET / HTTP/1.1\r\nContent-Length: 99999999999999999999999\r\n\r\n",
        "POST /v1/runs HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"}) {
    auto http = client();
    ASSERT_TRUE(http.send(text));
    const auto answer = http.receive();
    EXPECT_EQ(answer.status, 400) << text;
    EXPECT_EQ(code_of(answer), "invalid_argument") << text;
    EXPECT_TRUE(http.ended()) << text;
  }
  EXPECT_EQ(client().ask("GET", "/v1/version").status, 200);
}

TEST_F(ApiAbuse, OversizedRequestsAreRefused) {
  start();
  auto declared = client();
  ASSERT_TRUE(declared.send("POST /v1/runs HTTP/1.1\r\nContent-Length: 1048577\r\n\r\n"));
  EXPECT_EQ(declared.receive().status, 413);
  EXPECT_TRUE(declared.ended());

  auto chunked = client();
  ASSERT_TRUE(chunked.send("POST /v1/runs HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"));
  const std::string chunk = "10000\r\n" + std::string(65536, ' ') + "\r\n";
  for (int i = 0; i < 64 && chunked.send(chunk); ++i) continue;
  EXPECT_EQ(chunked.receive().status, 413);

  auto header = client();
  header.send("GET / HTTP/1.1\r\nX: " + std::string(20 << 10, 'x') + "\r\n\r\n");
  EXPECT_EQ(header.receive().status, 431);
  auto target = client();
  target.send("GET /" + std::string(200 << 10, 'x'));
  EXPECT_EQ(target.receive().status, 431);

  const std::string largest = R"({"source":"/dev/a","targets":["/dev/b"]})";
  const std::string padded = largest + std::string(request_bytes_max - largest.size(), ' ');
  EXPECT_EQ(client().ask("POST", "/v1/runs", padded).status, 201);
}

TEST_F(ApiAbuse, EndlessHeadersEnd) {
  start();
  auto http = client();
  http.send("GET / HTTP/1.1\r\n");
  bool taken = true;
  for (int i = 0; i < 1000000 && taken; ++i) taken = http.send("X-" + std::to_string(i) + ": endless\r\n");
  EXPECT_FALSE(taken);
  EXPECT_EQ(http.receive().status, 431);
}

TEST_F(ApiAbuse, SlowRequestsTimeOut) {
  options_.request_timeout_seconds = 1;
  start();
  auto header = client();
  ASSERT_TRUE(header.send("GET /v1/version HT"));
  EXPECT_EQ(header.receive().status, 408);
  EXPECT_TRUE(header.ended());
  auto body = client();
  ASSERT_TRUE(body.send("POST /v1/runs HTTP/1.1\r\nContent-Length: 100\r\n\r\n{"));
  EXPECT_EQ(body.receive().status, 408);
  EXPECT_TRUE(body.ended());
}

TEST_F(ApiAbuse, IdleConnectionsAreClosedInTheEnd) {
  options_.idle_timeout_seconds = 1;
  start();
  auto never = client();
  auto once = client();
  EXPECT_EQ(once.ask("GET", "/v1/version").status, 200);
  EXPECT_TRUE(never.ended());
  EXPECT_TRUE(once.ended());
}

TEST_F(ApiAbuse, AHundredIdleConnectionsHinderNobody) {
  start();
  std::vector<HttpClient> idle;
  idle.reserve(100);
  for (int i = 0; i < 100; ++i) idle.push_back(client());
  for (auto& one : idle) ASSERT_TRUE(one.connected());
  auto http = client();
  for (int i = 0; i < 20; ++i) EXPECT_EQ(http.ask("GET", "/v1/runs").status, 200);
  EXPECT_EQ(idle.front().ask("GET", "/v1/version").status, 200);
}

TEST_F(ApiAbuse, TooManyConnectionsAreToldSo) {
  options_.connections_max = 3;
  start();
  std::vector<HttpClient> held;
  for (int i = 0; i < 3; ++i) {
    held.push_back(client());
    EXPECT_EQ(held.back().ask("GET", "/v1/version").status, 200);
  }
  auto late = client();
  const auto answer = late.ask("GET", "/v1/version");
  EXPECT_EQ(answer.status, 503);
  EXPECT_EQ(code_of(answer), "busy");
  EXPECT_TRUE(late.ended());
  held.front().close();
  const auto limit = std::chrono::steady_clock::now() + std::chrono::seconds(30);
  int status = 0;
  while (status != 200 && std::chrono::steady_clock::now() < limit)
    status = client().ask("GET", "/v1/version").status;
  EXPECT_EQ(status, 200);
}

TEST_F(ApiAbuse, PipelinedRequestsAreAnsweredInOrder) {
  start();
  auto http = client();
  ASSERT_TRUE(http.send(HttpClient::request_text("GET", "/v1/devices") +
                        HttpClient::request_text("GET", "/v1/version") +
                        HttpClient::request_text("GET", "/nowhere")));
  EXPECT_TRUE(json::parse(http.receive().body).is_array());
  EXPECT_TRUE(json::parse(http.receive().body).contains("version"));
  EXPECT_EQ(http.receive().status, 404);
}

TEST_F(ApiAbuse, ExpectContinueAndCloseAreHonoured) {
  start();
  auto http = client();
  const std::string body = R"({"source":"/dev/a","targets":["/dev/b"]})";
  ASSERT_TRUE(
      http.send("POST /v1/runs HTTP/1.1\r\nConnection: close\r\nExpect: 100-continue\r\nContent-Length: " +
                std::to_string(body.size()) + "\r\n\r\n"));
  EXPECT_EQ(http.receive().status, 100);
  ASSERT_TRUE(http.send(body));
  EXPECT_EQ(http.receive().status, 201);
  EXPECT_TRUE(http.ended());
}

TEST_F(ApiAbuse, ASocketThatSomebodyAnswersOnIsKept) {
  start();
  FakeControl other_control;
  auto options = options_;
  options.metrics_listen = "none";
  const auto second = ApiServer::create(options, other_control);
  ASSERT_FALSE(second);
  EXPECT_EQ(second.error().code, ErrorCode::busy);
  EXPECT_NE(second.error().message().find("another ferryd"), std::string::npos);
  EXPECT_EQ(client().ask("GET", "/v1/version").status, 200);
}

TEST_F(ApiAbuse, AStaleSocketIsReplacedAndOtherFilesAreNot) {
  {
    const FileDescriptor dead(::socket(AF_UNIX, SOCK_STREAM, 0));
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::strncpy(address.sun_path, options_.socket_path.c_str(), sizeof address.sun_path - 1);
    ASSERT_EQ(::bind(dead.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address), 0);
  }
  start();
  EXPECT_EQ(client().ask("GET", "/v1/version").status, 200);
  struct stat info {};
  ASSERT_EQ(::stat(options_.socket_path.c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 07777, 0600U);

  auto options = options_;
  options.metrics_listen = "none";
  options.socket_path = directory_ + "/precious";
  std::ofstream(options.socket_path) << "data";
  EXPECT_FALSE(ApiServer::create(options, control_));
  EXPECT_TRUE(std::filesystem::is_regular_file(options.socket_path));
  options.socket_path = directory_ + "/missing/control.sock";
  EXPECT_EQ(ApiServer::create(options, control_).error().code, ErrorCode::not_found);
  options.socket_path = directory_ + "/" + std::string(200, 'x');
  EXPECT_EQ(ApiServer::create(options, control_).error().code, ErrorCode::invalid_argument);
}

TEST_F(ApiAbuse, StopLeavesASocketThatIsNotItsOwn) {
  start();
  std::filesystem::remove(options_.socket_path);
  std::ofstream(options_.socket_path) << "somebody else's";
  EXPECT_TRUE(server_->stop());
  EXPECT_TRUE(std::filesystem::exists(options_.socket_path));
}

TEST_F(ApiAbuse, AMetricsAddressInUseIsSaidPlainly) {
  start();
  auto options = options_;
  options.socket_path = directory_ + "/second.sock";
  options.metrics_listen = server_->metrics_address();
  const auto second = ApiServer::create(options, control_);
  ASSERT_FALSE(second);
  EXPECT_EQ(second.error().code, ErrorCode::busy);
  EXPECT_FALSE(std::filesystem::exists(options.socket_path));
  for (const char* wrong : {"9753", "127.0.0.1", "127.0.0.1:", ":9753", "127.0.0.1:http", "127.0.0.1:99999",
                            "::1:80", "example.org:80"}) {
    options.metrics_listen = wrong;
    const auto made = ApiServer::create(options, control_);
    ASSERT_FALSE(made) << wrong;
    EXPECT_EQ(made.error().code, ErrorCode::invalid_argument) << wrong << ": " << made.error().message();
  }
}

TEST_F(ApiAbuse, APassedSocketIsTakenOverAndItsFileStays) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::strncpy(address.sun_path, options_.socket_path.c_str(), sizeof address.sun_path - 1);
  options_.socket_fd = ::socket(AF_UNIX, SOCK_STREAM, 0);
  ASSERT_EQ(::bind(options_.socket_fd, reinterpret_cast<const sockaddr*>(&address), sizeof address), 0);
  ASSERT_EQ(::listen(options_.socket_fd, 8), 0);
  start();
  EXPECT_EQ(client().ask("GET", "/v1/version").status, 200);
  EXPECT_TRUE(server_->stop());
  EXPECT_TRUE(std::filesystem::exists(options_.socket_path));

  options_.socket_fd = ::socket(AF_UNIX, SOCK_STREAM, 0);
  EXPECT_FALSE(ApiServer::create(options_, control_)) << "it does not listen";
}

/// Asks for the version as another user, in a process of its own; the status of the answer, 0 for none.
int status_as(const std::string& socket_path, uid_t uid, gid_t gid, const std::vector<gid_t>& groups) {
  const pid_t child = ::fork();
  if (child == 0) {
    if (::setgroups(groups.size(), groups.data()) != 0 || ::setgid(gid) != 0 || ::setuid(uid) != 0)
      ::_exit(99);
    const auto answer = HttpClient::unix_socket(socket_path).ask("GET", "/v1/version");
    ::_exit(answer.status == 200 ? 20 : answer.status == 403 && code_of(answer) == "unreachable" ? 43 : 0);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

TEST_F(ApiAbuse, OnlyRootAndTheGroupMayOperate) {
  if (::geteuid() != 0) GTEST_SKIP() << "needs root, to become somebody else";
  options_.group = "daemon";  // a group that every system has
  start();
  const group* daemon_group = ::getgrnam("daemon");
  ASSERT_NE(daemon_group, nullptr);
  const gid_t group = daemon_group->gr_gid;
  struct stat info {};
  ASSERT_EQ(::stat(options_.socket_path.c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 07777, 0660U);
  EXPECT_EQ(info.st_gid, group);
  // With the file open to all, the peer's credentials alone decide.
  ASSERT_EQ(::chmod(directory_.c_str(), 0755), 0);
  ASSERT_EQ(::chmod(options_.socket_path.c_str(), 0666), 0);
  constexpr uid_t nobody = 65534;
  EXPECT_EQ(status_as(options_.socket_path, nobody, 65534, {}), 43);
  EXPECT_EQ(status_as(options_.socket_path, nobody, 65534, {65533, group}), 20);
  EXPECT_EQ(status_as(options_.socket_path, nobody, group, {}), 20);
  EXPECT_EQ(status_as(options_.socket_path, 0, 0, {}), 20);
}

}  // namespace
}  // namespace blockferry
