// SPDX-License-Identifier: Apache-2.0
// The HTTP client against servers that answer, refuse, hang up, hang, and talk nonsense.
#include "ctl/client.h"

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>
#include <signal.h>

#include "blockio/base/percent_encoding.h"
#include "ctl/interrupt.h"
#include "tests/unit/ctl/fake_ferryd.h"

namespace blockferry {
namespace {

using nlohmann::json;
using namespace std::chrono_literals;

constexpr const char* ended = "ferryd went away before it answered";

Error error_of(const Result<json>& answer) {
  EXPECT_FALSE(answer);
  return answer ? Error() : answer.error();
}

TEST(Client, sends_and_receives_json_on_one_connection) {
  std::atomic<int> count = 0;
  FakeFerryd ferryd([&](const FakeRequest&) { return FakeAnswer{201, {{"n", ++count}}}; });
  Client client(ferryd.socket_path());
  EXPECT_EQ(client.request("POST", "/runs", {{"source", "/a"}})->at("n"), 1);
  EXPECT_EQ(client.get("/version")->at("n"), 2);
  const auto requests = ferryd.requests();
  EXPECT_EQ(requests[0].line(), "POST /v1/runs");
  EXPECT_EQ(json::parse(requests[0].body), json({{"source", "/a"}}));
  EXPECT_EQ(requests[1].line(), "GET /v1/version");
  EXPECT_EQ(requests[1].body, "");
}

TEST(Client, large_answers_come_whole) {
  const json list(100000, "twelve bytes");
  FakeFerryd ferryd([&](const FakeRequest&) { return FakeAnswer{200, list}; });
  Client client(ferryd.socket_path());
  const auto answer = client.get("/runs");
  ASSERT_TRUE(answer);
  EXPECT_EQ(*answer, list);
}

TEST(Client, large_requests_go_whole) {
  FakeFerryd ferryd([](const FakeRequest&) { return FakeAnswer{}; });
  Client client(ferryd.socket_path());
  const json body{{"text", std::string(1 << 20, 'x')}};
  ASSERT_TRUE(client.request("POST", "/check", body));
  EXPECT_EQ(ferryd.requests()[0].body, body.dump());
}

TEST(Client, errors_keep_their_parts) {
  FakeFerryd ferryd([](const FakeRequest&) {
    return FakeAnswer{412, fake_error("refused", "clone", "/dev/sdc", "it is mounted")};
  });
  Client client(ferryd.socket_path());
  const Error error = error_of(client.get("/runs"));
  EXPECT_EQ(error.code, ErrorCode::refused);
  EXPECT_EQ(error.message(), "clone /dev/sdc: it is mounted");
}

TEST(Client, a_refused_caller_cannot_reach_ferryd_whatever_the_code) {
  FakeFerryd ferryd([](const FakeRequest&) {
    return FakeAnswer{403, fake_error("refused", "use the control socket", "", "only root may")};
  });
  Client client(ferryd.socket_path());
  EXPECT_EQ(error_of(client.get("/runs")).code, ErrorCode::unreachable);
}

TEST(Client, a_refusal_before_the_request_was_read_is_heard) {
  // ferryd may answer 403 and close without reading a large body.
  FakeFerryd ferryd([](const FakeRequest&) {
    FakeAnswer answer;
    const std::string body = fake_error("unreachable", "use the control socket", "", "only root may").dump();
    answer.raw =
        "HTTP/1.1 403 Forbidden\r\nConnection: close\r\nContent-Length: " + std::to_string(body.size()) +
        "\r\n\r\n" + body;
    answer.drop = true;
    return answer;
  });
  Client client(ferryd.socket_path());
  for (int i = 0; i < 2; ++i) {  // the second on a new connection
    const Error error = error_of(client.request("POST", "/runs", {{"a", 1}}));
    EXPECT_EQ(error.code, ErrorCode::unreachable);
    EXPECT_NE(error.message().find("only root may"), std::string::npos);
  }
}

TEST(Client, no_ferryd_says_how_to_start_it) {
  Client client("/nonexistent/control.sock");
  const Error error = error_of(client.get("/runs"));
  EXPECT_EQ(error.code, ErrorCode::unreachable);
  EXPECT_NE(error.message().find("/nonexistent/control.sock"), std::string::npos);
  EXPECT_NE(error.message().find("systemctl start ferryd"), std::string::npos);
}

TEST(Client, impossible_socket_paths_are_usage) {
  for (const auto& path : {std::string(), std::string(300, 'x')}) {
    Client client(path);
    EXPECT_EQ(error_of(client.get("/runs")).code, ErrorCode::invalid_argument);
  }
}

TEST(Client, a_full_backlog_ends_with_the_connect_timeout) {
  std::string name = std::filesystem::temp_directory_path() / "blockferry-ctl-XXXXXX";
  const std::string directory = ::mkdtemp(name.data());
  const FileDescriptor listener(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::strncpy(address.sun_path, (directory + "/s").c_str(), sizeof address.sun_path - 1);
  ASSERT_EQ(::bind(listener.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address), 0);
  ASSERT_EQ(::listen(listener.get(), 0), 0);
  std::vector<FileDescriptor> waiting;
  int outcome = 0;
  for (int i = 0; i < 1000 && outcome == 0; ++i) {
    waiting.emplace_back(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    outcome = ::connect(waiting.back().get(), reinterpret_cast<const sockaddr*>(&address), sizeof address);
  }
  EXPECT_EQ(outcome, -1) << "the backlog never filled";
  Client client(directory + "/s", {.connect = 50ms, .answer = 10s});
  const Error error = error_of(client.get("/runs"));
  EXPECT_EQ(error.code, ErrorCode::unreachable);
  EXPECT_NE(error.message().find("no more connections"), std::string::npos) << error.message();
  std::filesystem::remove_all(directory);
}

TEST(Client, a_ferryd_that_never_answers_ends_with_the_timeout) {
  FakeFerryd ferryd([](const FakeRequest&) { return FakeAnswer{.silent = true}; });
  Client client(ferryd.socket_path(), {.connect = 5s, .answer = 50ms});
  const Error error = error_of(client.get("/runs"));
  EXPECT_EQ(error.code, ErrorCode::unreachable);
  EXPECT_NE(error.message().find("no answer in time"), std::string::npos) << error.message();
}

TEST(Client, a_lost_connection_is_told_with_its_doubt) {
  FakeFerryd ferryd([](const FakeRequest&) { return FakeAnswer{.drop = true}; });
  Client client(ferryd.socket_path());
  const std::string get = error_of(client.get("/runs")).message();
  EXPECT_NE(get.find(ended), std::string::npos) << get;
  EXPECT_EQ(get.find("ferryctl list"), std::string::npos) << get;
  const Error post = error_of(client.request("POST", "/runs", {{"a", 1}}));
  EXPECT_EQ(post.code, ErrorCode::unreachable);
  EXPECT_NE(post.message().find("`ferryctl list` shows whether it was done"), std::string::npos)
      << post.message();
}

TEST(Client, an_answer_cut_short_is_a_lost_connection) {
  FakeFerryd ferryd([](const FakeRequest&) {
    return FakeAnswer{.raw = "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{\"a\"", .drop = true};
  });
  Client client(ferryd.socket_path());
  EXPECT_NE(error_of(client.get("/runs")).message().find(ended), std::string::npos);
}

TEST(Client, what_is_not_ferryd_is_told) {
  for (const char* raw : {"SSH-2.0-OpenSSH_9.2\r\n\r\n", "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
                          "HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n",
                          "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n\x00\x01\x02\x03"}) {
    FakeFerryd ferryd([raw](const FakeRequest&) { return FakeAnswer{.raw = raw, .drop = true}; });
    Client client(ferryd.socket_path());
    const Error error = error_of(client.get("/runs"));
    EXPECT_EQ(error.code, ErrorCode::unreachable) << raw;
  }
}

TEST(Client, an_error_of_an_unknown_shape_is_an_error_all_the_same) {
  FakeFerryd ferryd([](const FakeRequest&) { return FakeAnswer{500, json::array({1, 2})}; });
  Client client(ferryd.socket_path());
  EXPECT_EQ(error_of(client.get("/runs")).code, ErrorCode::internal);
}

TEST(Client, a_new_connection_is_made_after_a_lost_one) {
  std::atomic<int> count = 0;
  FakeFerryd ferryd([&](const FakeRequest&) { return FakeAnswer{.drop = ++count == 1}; });
  Client client(ferryd.socket_path());
  EXPECT_FALSE(client.get("/runs"));
  EXPECT_TRUE(client.get("/runs"));
}

TEST(Client, ctrl_c_ends_a_wait_at_once) {
  const pthread_t waiting = ::pthread_self();
  FakeFerryd ferryd([&](const FakeRequest&) {
    ::pthread_kill(waiting, SIGINT);
    return FakeAnswer{.silent = true};
  });
  Client client(ferryd.socket_path());
  {
    const InterruptGuard guard;
    const Error error = error_of(client.request("POST", "/runs", {{"a", 1}}));
    EXPECT_TRUE(interrupted());
    EXPECT_NE(error.message().find("interrupted"), std::string::npos);
  }
  EXPECT_FALSE(interrupted());
}

TEST(Client, ctrl_c_is_noticed_without_a_wait_and_ends_with_the_guard) {
  {
    const InterruptGuard guard;
    EXPECT_FALSE(interrupted());
    ::raise(SIGINT);
    EXPECT_TRUE(interrupted());
  }
  EXPECT_FALSE(interrupted());
  const InterruptGuard again;
  EXPECT_FALSE(interrupted()) << "held back from the first guard";
}

TEST(Client, an_ignored_ctrl_c_stays_ignored) {
  struct sigaction ignore {
  }, before{};
  ignore.sa_handler = SIG_IGN;
  ::sigaction(SIGINT, &ignore, &before);
  {
    const InterruptGuard guard;
    ::raise(SIGINT);
    EXPECT_FALSE(interrupted());
    EXPECT_EQ(wait_for(-1, 0, 0s), Waited::timed_out);
  }
  ::sigaction(SIGINT, &before, nullptr);
}

TEST(PercentEncode, leaves_plain_names_alone) {
  EXPECT_EQ(percent_encoded("nightly-2.0_x~"), "nightly-2.0_x~");
  EXPECT_EQ(percent_encoded("a b/c?d%\xc3\xa4"), "a%20b%2Fc%3Fd%25%C3%A4");
  EXPECT_EQ(percent_encoded(""), "");
}

}  // namespace
}  // namespace blockferry
