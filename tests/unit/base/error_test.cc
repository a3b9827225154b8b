// SPDX-License-Identifier: Apache-2.0
#include "blockio/base/error.h"

#include <cerrno>

#include <gtest/gtest.h>

namespace blockferry {
namespace {

TEST(Error, IsOneLineThatSaysWhatWhereAndWhy) {
  Error error = error_from_errno(EIO, "read", "/dev/sda", 4096);
  EXPECT_EQ(error.message(), "read /dev/sda at offset 4096: Input/output error");
  error.hint = "replace the disk";
  EXPECT_EQ(error.message(), "read /dev/sda at offset 4096: Input/output error; replace the disk");
  EXPECT_EQ(make_error(ErrorCode::conflict, "pause", "run 7", "it has ended").message(),
            "pause run 7: it has ended");
  EXPECT_EQ(make_error(ErrorCode::internal, "set up io_uring", "", "").message(), "set up io_uring");
}

TEST(Error, IsOneLineWhateverItIsMadeOf) {
  const Error error = make_error(ErrorCode::refused, "open", "/dev/a\nb", "first\r\n\tsecond\x7f");
  EXPECT_EQ(error.message().find_first_of("\r\n\t\x7f"), std::string::npos);
}

TEST(Error, HasWordsForEveryErrno) {
  for (const int errno_value : {1, 5, 28, 133, 999, -1}) {
    const std::string text = error_from_errno(errno_value, "flush", "x").message();
    EXPECT_TRUE(text.starts_with("flush x: ")) << text;
    EXPECT_GT(text.size(), std::string("flush x: ").size());
  }
}

TEST(Error, TheCodeTellsWhatToDo) {
  const auto code = [](int errno_value) { return error_from_errno(errno_value, "", "").code; };
  EXPECT_EQ(code(EIO), ErrorCode::io);
  EXPECT_EQ(code(EREMOTEIO), ErrorCode::io);
  EXPECT_EQ(code(ENOSPC), ErrorCode::no_space);
  EXPECT_EQ(code(EDQUOT), ErrorCode::no_space);
  EXPECT_EQ(code(ENODEV), ErrorCode::device_gone);
  EXPECT_EQ(code(ENXIO), ErrorCode::device_gone);
  EXPECT_EQ(code(EBUSY), ErrorCode::busy);
  EXPECT_EQ(code(EWOULDBLOCK), ErrorCode::busy);
  EXPECT_EQ(code(EOPNOTSUPP), ErrorCode::unsupported);
  EXPECT_EQ(code(ENOENT), ErrorCode::not_found);
}

TEST(Error, EveryCodeHasANameOfItsOwn) {
  for (int i = 0; i <= int(ErrorCode::internal); ++i) {
    const auto code = ErrorCode(i);
    EXPECT_EQ(error_code_from_name(error_code_name(code)), code) << error_code_name(code);
  }
  EXPECT_FALSE(error_code_from_name("no such code"));
  EXPECT_FALSE(error_code_from_name(""));
}

}  // namespace
}  // namespace blockferry
