// SPDX-License-Identifier: Apache-2.0
#include "blockio/nbd_uri.h"

#include <random>

#include <gtest/gtest.h>

namespace blockferry {
namespace {

std::string identity_of(const std::string& text) {
  const auto uri = parse_nbd_uri(text);
  return uri ? nbd_identity(*uri) : "refused: " + uri.error().hint;
}

TEST(NbdUri, EveryPartIsRead) {
  const auto uri = parse_nbd_uri(
      "nbds+unix://alice@/a%20disk?socket=/run/x%3Dy.sock&tls-psk-file=/etc/keys&tls-certificates=/etc/pki");
  ASSERT_TRUE(uri) << uri.error().message();
  EXPECT_TRUE(uri->tls);
  EXPECT_EQ(uri->user, "alice");
  EXPECT_EQ(uri->export_name, "a disk");
  EXPECT_EQ(uri->socket_path, "/run/x=y.sock");
  EXPECT_EQ(uri->tls_psk_file, "/etc/keys");
  EXPECT_EQ(uri->tls_certificates, "/etc/pki");
}

TEST(NbdUri, OneExportHasOneIdentityHoweverItIsSpelled) {
  EXPECT_EQ(identity_of("nbd://Host"), "nbd:host:10809/");
  EXPECT_EQ(identity_of("nbds://bob@host:10809/"), "nbd:host:10809/");
  EXPECT_EQ(identity_of("nbd://host/%64isk"), identity_of("nbd://HOST:10809/disk"));
  EXPECT_EQ(identity_of("nbd://[::1]:5/x/y"), "nbd:[::1]:5/x/y");
  EXPECT_EQ(identity_of("nbd://[fe80::1%25eth0]"), "nbd:[fe80::1%eth0]:10809/");
  EXPECT_EQ(identity_of("nbd+unix:///e?socket=/s"), "nbd:unix:/s/e");
  EXPECT_EQ(identity_of("nbd+unix://?socket=/s"), "nbd:unix:/s/");
  EXPECT_NE(identity_of("nbd://host/disk"), identity_of("nbd://host/Disk"));
}

TEST(NbdUri, WhatIsUnsoundIsRefusedWithTheReason) {
  const struct {
    const char* text;
    const char* reason;
  } cases[] = {
      {"nbd:/host", "is expected"},
      {"http://host", "is expected"},
      {"nbd+vsock://1/", "is expected"},
      {"nbd://", "HOST"},
      {"nbd://host:", "HOST"},
      {"nbd://host:x", "HOST"},
      {"nbd://[::1", "HOST"},
      {"nbd://[::1]x", "HOST"},
      {"nbd://[host]", "HOST"},
      {"nbd://[::1%5D:1]", "HOST"},
      {"nbd://host:123456", "HOST"},
      {"nbd://user@host", "nbds"},
      {"nbds://user:secret@host", "password"},
      {"nbds://user%3Asecret@host", "password"},
      {"nbd://host/?socket=/s", "means nothing"},
      {"nbd://host/?tls-certificates=/c", "means nothing"},
      {"nbds://host/?tls-certificate=/c", "means nothing"},
      {"nbds://host/?tls-verify-peer=false", "means nothing"},
      {"nbds://host/?tls-certificates=c", "absolute"},
      {"nbds://host/?tls-certificates=", "no sound value"},
      {"nbds://host/?tls-certificates", "no sound value"},
      {"nbds://host/?tls-psk-file=/a&tls-psk-file=/b", "twice"},
      {"nbd+unix:///x", "where is the socket"},
      {"nbd+unix://host/x?socket=/s", "no host"},
      {"nbd+unix:///x?socket=s", "absolute"},
      {"nbd://host/a b", "%20"},
      {"nbd://host/a#b", "%20"},
      {"nbd://host/%", "escape"},
      {"nbd://host/%4", "escape"},
      {"nbd://host/%zz", "escape"},
      {"nbd://host/%00", "escape"},
  };
  for (const auto& [text, reason] : cases) {
    const auto uri = parse_nbd_uri(text);
    ASSERT_FALSE(uri) << text;
    EXPECT_EQ(uri.error().code, ErrorCode::invalid_argument);
    EXPECT_NE(uri.error().message().find(reason), std::string::npos) << text << ": " << uri.error().message();
    EXPECT_EQ(uri.error().message().find("secret"), std::string::npos) << uri.error().message();
  }
}

/// Whatever comes: an answer, and what was taken has an identity that stays the same when read again.
TEST(NbdUri, OddInputIsTakenOrRefused) {
  std::mt19937 random(20260419);
  const std::string pieces[] = {"nbd",  "s",  "+unix", "://",  "/",      "?",
                                "&",    "=",  "%",     "%41",  "[::1",   "]",
                                ":",    "@",  "#",     "host", "socket", "tls-psk-file",
                                "\xff", "\n", "",      "%00",  "10809",  "a",
                                "%%",   "..", "//",    "=/",   "\x7f",   "é"};
  unsigned taken = 0;
  for (int i = 0; i < 20000; ++i) {
    std::string text = i % 2 == 0 ? "nbd://h" : "nbd+unix://";
    for (unsigned count = random() % 8; count > 0; --count) text += pieces[random() % std::size(pieces)];
    const auto uri = parse_nbd_uri(text);
    if (!uri) {
      EXPECT_EQ(uri.error().message().find('\n'), std::string::npos);
      continue;
    }
    ++taken;
    EXPECT_TRUE(is_nbd_uri(text));
    EXPECT_EQ(identity_of(text), nbd_identity(*uri));
  }
  EXPECT_GT(taken, 100U);
}

}  // namespace
}  // namespace blockferry
