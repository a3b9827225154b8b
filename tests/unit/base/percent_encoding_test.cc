// SPDX-License-Identifier: Apache-2.0
#include "blockio/base/percent_encoding.h"

#include <gtest/gtest.h>

namespace blockferry {
namespace {

using namespace std::string_view_literals;

TEST(PercentEncoding, IsUndone) {
  EXPECT_EQ(percent_decoded(""), "");
  EXPECT_EQ(percent_decoded("plain/+ text"), "plain/+ text");
  EXPECT_EQ(percent_decoded("%41%2f%2F%fF"), "A//\xff");
  EXPECT_EQ(percent_decoded("%2541"), "%41") << "once only";
}

TEST(PercentEncoding, IsDone) {
  EXPECT_EQ(percent_encoded("a Z/9-._~%\xc3"), "a%20Z%2F9-._~%25%C3");
  EXPECT_EQ(percent_encoded("/run/a b", "/"), "/run/a%20b");
  EXPECT_EQ(percent_decoded(percent_encoded("any \x7f\xff%41")), "any \x7f\xff%41");
}

TEST(PercentEncoding, WhatIsNoneIsNotGuessedAt) {
  for (const auto text : {"%"sv, "%4"sv, "a%"sv, "%4g"sv, "%g4"sv, "%%41"sv, "%-1"sv, "%00"sv, "a\0b"sv})
    EXPECT_EQ(percent_decoded(text), std::nullopt) << text;
}

}  // namespace
}  // namespace blockferry
