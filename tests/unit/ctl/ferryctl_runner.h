// SPDX-License-Identifier: Apache-2.0
// ferryctl run within the test, against a FakeFerryd.
#pragma once

#include <deque>
#include <memory>
#include <string>
#include <vector>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "ctl/verbs.h"
#include "tests/unit/ctl/fake_ferryd.h"

namespace blockferry {

struct Outcome {
  int status = -1;
  std::string out, err;
};

inline Outcome ferryctl(const FakeFerryd& ferryd, std::vector<std::string> words,
                        const FollowPatience& patience = {}) {
  words.insert(words.begin(), {"--socket", ferryd.socket_path()});
  Outcome outcome;
  testing::internal::CaptureStdout();
  testing::internal::CaptureStderr();
  outcome.status = run_ferryctl(words, patience);
  outcome.out = testing::internal::GetCapturedStdout();
  outcome.err = testing::internal::GetCapturedStderr();
  return outcome;
}

/// Answers these in turn, the last one for ever.
inline FakeFerryd::Handler in_turn(std::vector<FakeAnswer> answers) {
  auto left = std::make_shared<std::deque<FakeAnswer>>(answers.begin(), answers.end());
  return [left](const FakeRequest&) {
    FakeAnswer answer = left->front();
    if (left->size() > 1) left->pop_front();
    return answer;
  };
}

inline FakeAnswer ok(const nlohmann::json& body) {
  return {200, body};
}

inline FakeAnswer error_answer(unsigned status, const std::string& code) {
  return {status, fake_error(code, "do it to", "/dev/sdc", "it cannot be")};
}

inline bool is_one_line(const std::string& text) {
  return !text.empty() && text.find('\n') == text.size() - 1;
}

inline nlohmann::json failed_run() {
  nlohmann::json run = fake_run("failed");
  run["error"] = fake_error("io", "write", "/dev/sdc", "the cable is out")["error"];
  return run;
}

}  // namespace blockferry
