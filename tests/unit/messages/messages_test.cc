// SPDX-License-Identifier: Apache-2.0
#include "daemon/messages/messages.h"

#include <set>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

namespace blockferry {
namespace {

using nlohmann::json;

json smallest() {
  return {{"source", "/dev/a"}, {"targets", {"/dev/b"}}};
}

json with(const char* member, json value) {
  json request = smallest();
  request[member] = std::move(value);
  return request;
}

/// The message names the member, so that the user knows what to change.
void expect_refused(const json& request, const std::string& member) {
  const auto parsed = run_request_from_json(request);
  ASSERT_FALSE(parsed) << request.dump();
  EXPECT_EQ(parsed.error().code, ErrorCode::invalid_argument);
  EXPECT_NE(parsed.error().message().find(member), std::string::npos) << parsed.error().message();
  EXPECT_EQ(parsed.error().message().find('\n'), std::string::npos);
}

RunRequest unusual_request() {
  RunRequest r;
  r.kind = RunKind::migrate;
  r.source = "/dev/disk/by-id/x";
  r.targets = {"/a", "nbd://host/export"};
  r.name = "a.B-c_9";
  r.mode = RunMode::hybrid;
  r.tracker = TrackerChoice::checksum;
  r.rate_bytes_per_second = 500 << 20;
  r.queue_depth = 7;
  r.io_size_bytes = 1 << 20;
  r.granule_bytes = 64 << 10;
  r.verify = false;
  r.overwrite = r.force = r.keep = true;
  r.on_read_error = OnReadError::skip;
  r.io_engine = "aio";
  r.tls_certificates = "/etc/pki/nbd";
  r.tls_psk_file = "/etc/keys.psk";
  r.max_downtime_ms = 1;
  r.max_passes = 9;
  r.cutover = CutoverChoice::manual;
  r.quiesce_cmd = "q";
  r.resume_cmd = "r";
  r.cutover_cmd = "c \"quoted\" \xc3\xa4";
  r.handover = "dm-swap";
  r.max_freeze_ms = 5;
  r.sync_every_ms = 60000;
  r.sync_freeze = false;
  return r;
}

TEST(RunRequestMessage, SmallestHasTheDefaults) {
  const auto parsed = run_request_from_json(smallest());
  ASSERT_TRUE(parsed) << parsed.error().message();
  RunRequest expected;
  expected.source = "/dev/a";
  expected.targets = {"/dev/b"};
  EXPECT_EQ(to_json(*parsed), to_json(expected));
  EXPECT_TRUE(parsed->verify);
  EXPECT_EQ(parsed->max_downtime_ms, 300U);
}

TEST(RunRequestMessage, EveryMemberSurvivesTheRoundTrip) {
  const json sent = to_json(unusual_request());
  const auto parsed = run_request_from_json(sent);
  ASSERT_TRUE(parsed) << parsed.error().message();
  EXPECT_EQ(to_json(*parsed), sent);
  const json defaults = to_json(RunRequest{});
  for (const auto& [member, value] : sent.items())
    EXPECT_NE(value, defaults[member]) << member << " is at its default: the round trip shows nothing";
}

TEST(RunRequestMessage, NullMeansTheDefault) {
  json request = to_json(RunRequest{});
  for (auto& [member, value] : request.items()) value = nullptr;
  request["source"] = "/dev/a";
  request["targets"] = {"/dev/b"};
  const auto parsed = run_request_from_json(request);
  ASSERT_TRUE(parsed) << parsed.error().message();
  EXPECT_EQ(to_json(*parsed), to_json(*run_request_from_json(smallest())));
}

TEST(RunRequestMessage, RefusesWrongTypesOfEveryMember) {
  const json shape = to_json(unusual_request());
  for (const auto& [member, value] : shape.items()) {
    for (const json& wrong :
         {json(1.5), json(-1), json("text"), json(true), json::array({1}), json::object()}) {
      if (wrong.is_string() && value.is_string()) continue;
      if (wrong.is_boolean() && value.is_boolean()) continue;
      json request = shape;
      request[member] = wrong;
      expect_refused(request, member);
    }
  }
}

TEST(RunRequestMessage, RefusesNumbersOutOfRange) {
  for (const char* member : {"rate_bytes_per_second", "queue_depth", "io_size_bytes", "granule_bytes",
                             "max_downtime_ms", "max_passes", "max_freeze_ms", "sync_every_ms"}) {
    expect_refused(with(member, -1), member);
    expect_refused(with(member, INT64_MIN), member);
    expect_refused(with(member, UINT64_MAX), member);
    expect_refused(with(member, 4096.0), member);
    expect_refused(with(member, 1e300), member);
    expect_refused(with(member, "4096"), member);
  }
  expect_refused(*parse_json(R"({"source":"/a","targets":["/b"],"queue_depth":18446744073709551616})"),
                 "queue_depth");
  // Would be 0 if it were cut to 32 bits.
  expect_refused(with("queue_depth", 1ULL << 32), "queue_depth");
}

TEST(RunRequestMessage, RefusesSizesThatNoDeviceCanUse) {
  for (const std::uint64_t size : {1ULL, 512ULL, 4097ULL, 12288ULL})
    expect_refused(with("granule_bytes", size), "granule_bytes");
  expect_refused(with("io_size_bytes", 4097), "io_size_bytes");
  json request = with("granule_bytes", 65536);
  request["io_size_bytes"] = 69632;
  expect_refused(request, "io_size_bytes");
  request["io_size_bytes"] = 131072;
  EXPECT_TRUE(run_request_from_json(request));
}

TEST(RunRequestMessage, RefusesUnknownMembersAndShapes) {
  expect_refused(with("sorce", "/dev/a"), "sorce");
  expect_refused(with("a\nb\x1b[31m", 1), "a?b?[31m");
  for (const json& shape : {json(nullptr), json(1), json("x"), json::array(), json::array({smallest()})})
    expect_refused(shape, "object");
  expect_refused(json::object(), "source");
  expect_refused({{"source", "/a"}}, "targets");
}

TEST(RunRequestMessage, ChecksVolumesAndNames) {
  for (const char* source : {"", "dev/a", "://x", "a b://x"})
    expect_refused(with("source", source), "source");
  expect_refused(with("source", std::string("/dev/a\0b", 8)), "source");
  expect_refused(with("source", "/" + std::string(4096, 'a')), "source");
  expect_refused(with("targets", json::array()), "targets");
  expect_refused(with("targets", "/dev/b"), "targets");
  expect_refused(with("targets", {"/dev/b", "relative"}), "targets");
  expect_refused(with("targets", json(std::vector<std::string>(targets_max + 1, "/dev/b"))), "targets");
  EXPECT_TRUE(run_request_from_json(with("targets", json(std::vector<std::string>(targets_max, "/dev/b")))));
  for (const char* name : {"a b", "a/b", "..", ".", "\xc3\xa4", "a\n"})
    expect_refused(with("name", name), "name");
  expect_refused(with("name", std::string(65, 'a')), "name");
  EXPECT_TRUE(run_request_from_json(with("name", std::string(64, 'a'))));
  EXPECT_TRUE(run_request_from_json(with("name", "")));
}

TEST(RunRequestMessage, ChoicesSayWhatIsPossible) {
  expect_refused(with("mode", "fast"), "full, incremental, hybrid");
  expect_refused(with("tracker", "EBPF"), "tracker");
  expect_refused(with("io_engine", ""), "auto, uring, aio");
  expect_refused(with("handover", "swap"), "fs, dm-swap, qemu, cmd");
  expect_refused(with("on_read_error", "ignore"), "fail, skip");
  expect_refused(with("kind", "copy"), "clone, migrate");
}

TEST(RunChangeMessage, NeedsSomethingToChange) {
  EXPECT_FALSE(run_change_from_json(json::object()));
  EXPECT_FALSE(run_change_from_json({{"rate_bytes_per_second", nullptr}}));
  EXPECT_FALSE(run_change_from_json({{"rate_bytes_per_second", -1}}));
  EXPECT_FALSE(run_change_from_json({{"rate", 1}}));
  EXPECT_FALSE(run_change_from_json(json::array()));
  const auto change = run_change_from_json({{"rate_bytes_per_second", 0}});
  ASSERT_TRUE(change) << change.error().message();
  EXPECT_EQ(change->rate_bytes_per_second, 0U);
  EXPECT_FALSE(change->max_downtime_ms);
  EXPECT_EQ(to_json(*change), json({{"rate_bytes_per_second", 0}}));
}

TEST(RunVerbs, NamesLeadBack) {
  std::set<std::string> names;
  for (int i = 0; i <= static_cast<int>(RunVerb::commit); ++i) {
    const auto verb = static_cast<RunVerb>(i);
    EXPECT_EQ(run_verb_from_name(run_verb_name(verb)), verb);
    names.insert(run_verb_name(verb));
  }
  EXPECT_EQ(names.size(), 10U);
  EXPECT_FALSE(run_verb_from_name("explode"));
  EXPECT_FALSE(run_verb_from_name(""));
}

TEST(ErrorMessage, SurvivesTheRoundTrip) {
  Error error = error_from_errno(ENOSPC, "write", "/dev/x", 1ULL << 63);
  error.hint = "make room";
  for (const Error& sent : {error, make_error(ErrorCode::refused, "", "", ""), Error{},
                            make_error(ErrorCode::busy, "open", "/dev/\"q\"", "held")}) {
    const json message = error_to_json(sent);
    for (const char* member : {"code", "message", "operation", "device", "offset", "errno"})
      EXPECT_TRUE(message["error"].contains(member)) << member;
    EXPECT_EQ(message["error"]["message"], sent.message());
    for (const json& form : {message, message["error"]}) {
      const Error back = error_from_json(form);
      EXPECT_EQ(back.code, sent.code);
      EXPECT_EQ(back.message(), sent.message());
      EXPECT_EQ(back.offset, sent.offset);
      EXPECT_EQ(back.errno_value, sent.errno_value);
    }
  }
}

TEST(ErrorMessage, OtherShapesAreInternal) {
  for (const char* text : {"null", "1", "[]", "{}", R"({"error":1})", R"({"error":{}})", R"({"error":null})",
                           R"({"error":{"code":5}})", R"({"error":{"code":"new_code","message":"m"}})"})
    EXPECT_EQ(error_from_json(*parse_json(text)).code, ErrorCode::internal) << text;
  const Error odd = error_from_json(*parse_json(
      R"({"error":{"code":"io","message":"the line","offset":-5,"errno":1.5,"device":{},"hint":[]}})"));
  EXPECT_EQ(odd.code, ErrorCode::io);
  EXPECT_FALSE(odd.offset);
  EXPECT_EQ(odd.errno_value, 0);
  EXPECT_NE(odd.message().find("the line"), std::string::npos);
  for (const char* text : {R"({"code":"io","errno":628})", R"({"code":"io","errno":99999999999})"})
    EXPECT_EQ(error_from_json(*parse_json(text)).message(), "") << text;
}

TEST(ErrorMessage, EveryCodeHasAStatusOfAnError) {
  for (int i = 0; i <= static_cast<int>(ErrorCode::internal); ++i) {
    const int status = http_status_of(static_cast<ErrorCode>(i));
    EXPECT_GE(status, 400);
    EXPECT_LT(status, 600);
  }
  EXPECT_EQ(http_status_of(ErrorCode::invalid_argument), 400);
  EXPECT_EQ(http_status_of(ErrorCode::not_found), 404);
  EXPECT_EQ(http_status_of(ErrorCode::conflict), 409);
  EXPECT_EQ(http_status_of(ErrorCode::refused), 412);
  EXPECT_EQ(http_status_of(ErrorCode::unreachable), 403);
}

TEST(ParseJson, BoundsNesting) {
  const auto nested = [](std::size_t depth) { return std::string(depth, '[') + std::string(depth, ']'); };
  EXPECT_TRUE(parse_json(nested(64)));
  const auto deep = parse_json(nested(65));
  ASSERT_FALSE(deep);
  EXPECT_EQ(deep.error().code, ErrorCode::invalid_argument);
  EXPECT_FALSE(parse_json(std::string(1 << 20, '[')));
  EXPECT_FALSE(parse_json(std::string(1 << 20, '{')));
  // Brackets in strings nest nothing, escaped quotes do not end strings.
  EXPECT_TRUE(parse_json("\"" + std::string(1000, '[') + "\""));
  EXPECT_TRUE(parse_json(R"("\")" + std::string(1000, '{') + "\""));
  EXPECT_TRUE(parse_json("[" + nested(1) + std::string(200, ' ') + "," + nested(63) + "]"));
}

TEST(ParseJson, RefusesWhatIsNotOneValue) {
  for (const char* text : {"", " ", "{", "}", "]", "{}{}", "[1,]", "{\"a\":}", "nul", "'a'", "1e400", "// x",
                           "\"\\", "\"\xff\"", "\"\\ud800\"", "NaN", "\xef\xbb"})
    EXPECT_FALSE(parse_json(text)) << text;
  EXPECT_FALSE(parse_json(std::string_view("{}\0", 3)));
  EXPECT_FALSE(parse_json(std::string(json_bytes_max + 1, ' ')));
}

TEST(ParseJson, DuplicatedMembersAreOneMember) {
  const auto parsed = parse_json(R"({"source":"/a","source":"/b","targets":["/c"]})");
  ASSERT_TRUE(parsed);
  const auto request = run_request_from_json(*parsed);
  ASSERT_TRUE(request);
  EXPECT_EQ(request->source, "/b");
}

TEST(RunNames, AreWhatCanStandInAPath) {
  for (const char* name : {"a", "A.b_c-9", "...", "-"}) EXPECT_TRUE(is_run_name(name)) << name;
  for (const char* name : {"", ".", "..", "a/b", "a b", "%41", "a?"}) EXPECT_FALSE(is_run_name(name)) << name;
}

TEST(CompiledIn, OpenapiAndVersion) {
  EXPECT_STRNE(blockferry_version(), "");
  const auto parsed = parse_json(openapi_text());
  ASSERT_TRUE(parsed);
  EXPECT_TRUE((*parsed)["paths"].contains("/v1/runs"));
}

}  // namespace
}  // namespace blockferry
