// SPDX-License-Identifier: Apache-2.0
#include "daemon/run_record.h"

#include <string_view>

#include <gtest/gtest.h>

namespace blockferry {
namespace {

RunRecord sample() {
  RunRecord record;
  RunStatus& status = record.status;
  status.id = "k3v9x2ab";
  status.state = RunState::verifying;
  status.request.source = "/dev/sda";
  status.request.targets = {"/dev/sdb", "/srv/b.img"};
  status.request.name = "nightly";
  status.request.rate_bytes_per_second = 123456;
  status.source_uri = "/dev/sda";
  status.source_identity = "block:abc";
  status.source_bytes = status.bytes_total = 10 * MiB + 123;
  status.granule_bytes = 4096;
  status.targets = {{"/dev/sdb", 20 * MiB, "block:b", std::nullopt},
                    {"/srv/b.img", 0, "", make_error(ErrorCode::no_space, "write", "/srv/b.img", "full")}};
  status.bytes_copied = 5 * MiB;
  status.passes = {{PassKind::full, 2561, 10 * MiB + 123, 1.5}, {PassKind::checksum, 7, 28672, 0.25}};
  status.bad_ranges = {{8192, 4096}};
  status.restarts = 3;
  status.error = make_error(ErrorCode::io, "read", "/dev/sda", "");
  record.volume_id = "k3v9x2ab";
  record.bitmap_generation = 42;
  record.phase = RunPhase::verifying;
  record.cursor = 77;
  record.verify_target = 1;
  record.suspect = true;
  record.source_stamp = "boot:1:2";
  record.target_stamps = {std::nullopt, "file:9"};
  record.target_lags = {false, true};
  return record;
}

RunRecord swapped_sample() {
  RunRecord record = sample();
  record.status.request.targets = {"/dev/sdb"};
  record.status.targets.resize(1);
  record.verify_target = 0;
  record.status.request.handover = "dm-swap";
  record.status.swapped = true;
  record.swap = SwapPlan{{{"wwid-a", "8:0", 2048, 100}, {"wwid-b", "8:16", 0, 28}},
                         {{"wwid-c", "8:32", 4096, 128}},
                         "",
                         "group",
                         "data",
                         "data_new"};
  return record;
}

std::vector<std::byte> bytes_of(std::string_view text) {
  const auto bytes = std::as_bytes(std::span(text));
  return {bytes.begin(), bytes.end()};
}

TEST(RunRecord, RemembersWhereASwappedVolumeLay) {
  const auto content = encode_record(swapped_sample());
  const auto record = decode_record(content, "run-k3v9x2ab");
  ASSERT_TRUE(record) << record.error().message();
  EXPECT_EQ(encode_record(*record), content);
  EXPECT_TRUE(record->status.swapped);
  EXPECT_EQ(record->swap->old_place, swapped_sample().swap->old_place);
  EXPECT_EQ(record->swap->new_place, swapped_sample().swap->new_place);
  EXPECT_EQ(record->swap->target_volume, "data_new");
}

std::string_view text_of(const std::vector<std::byte>& content) {
  return {reinterpret_cast<const char*>(content.data()), content.size()};
}

TEST(RunRecord, ALaterVersionOnlyWhereItIsNeeded) {
  RunRecord tracked = sample();
  tracked.tracker_position = 3;
  EXPECT_TRUE(text_of(encode_record(sample())).starts_with("blockferry-run 1 "));
  EXPECT_TRUE(text_of(encode_record(swapped_sample())).starts_with("blockferry-run 2 "));
  EXPECT_TRUE(text_of(encode_record(tracked)).starts_with("blockferry-run 3 "));
  RunRecord nowhere = swapped_sample();
  nowhere.swap.reset();
  EXPECT_FALSE(decode_record(encode_record(nowhere), "run-k3v9x2ab")) << "swapped, and nobody knows whence";
}

/// As ferryd has written them before there were positions.
TEST(RunRecord, EarlierVersionsAreRead) {
  for (const RunRecord& earlier : {sample(), swapped_sample()}) {
    const auto content = encode_record(earlier);
    ASSERT_EQ(text_of(content).find("tracker_position"), std::string_view::npos);
    const auto record = decode_record(content, "run-k3v9x2ab");
    ASSERT_TRUE(record) << record.error().message();
    EXPECT_FALSE(record->tracker_position);
  }
}

TEST(RunRecord, RemembersWhereItsTrackerStands) {
  RunRecord tracked = sample();
  tracked.tracker_position = 1ULL << 40;
  const auto record = decode_record(encode_record(tracked), "run-k3v9x2ab");
  ASSERT_TRUE(record) << record.error().message();
  EXPECT_EQ(record->tracker_position, 1ULL << 40);
}

TEST(RunRecord, SurvivesARoundTripWhole) {
  const auto content = encode_record(sample());
  const auto record = decode_record(content, "run-k3v9x2ab");
  ASSERT_TRUE(record) << record.error().message();
  EXPECT_EQ(encode_record(*record), content);
  EXPECT_EQ(record->status.targets[1].error->code, ErrorCode::no_space);
  EXPECT_EQ(record->status.passes[1].kind, PassKind::checksum);
  EXPECT_EQ(record->target_stamps[1], "file:9");
  EXPECT_TRUE(record->target_lags[1]);
  EXPECT_EQ(record->status.bad_ranges, sample().status.bad_ranges);
  EXPECT_EQ(record->cursor, 77u);
}

TEST(RunRecord, EveryTruncationIsDamage) {
  const auto content = encode_record(sample());
  for (std::size_t length = 0; length < content.size(); ++length) {
    const auto record = decode_record(std::span(content).first(length), "run-x");
    ASSERT_FALSE(record) << "at length " << length;
    ASSERT_EQ(record.error().code, ErrorCode::state_damaged) << "at length " << length;
  }
}

TEST(RunRecord, EveryFlippedBitIsNoticed) {
  const auto content = encode_record(sample());
  for (std::size_t at = 0; at < content.size(); ++at) {
    auto flipped = content;
    flipped[at] ^= std::byte(1 << (at % 8));
    const auto record = decode_record(flipped, "run-x");
    // The version digit may turn into a later version's; every other change is damage. White space of the
    // first line may change without changing what it says.
    if (record) {
      ASSERT_EQ(encode_record(*record), content) << "at byte " << at;
    } else {
      ASSERT_TRUE(record.error().code == ErrorCode::state_damaged ||
                  record.error().code == ErrorCode::state_newer)
          << "at byte " << at;
    }
  }
}

TEST(RunRecord, ALaterVersionIsLeftAlone) {
  const auto record = decode_record(bytes_of("blockferry-run 4 0000000000000000 2\n{}"), "run-x");
  ASSERT_FALSE(record);
  EXPECT_EQ(record.error().code, ErrorCode::state_newer);
}

TEST(RunRecord, MembersThatContradictEachOtherAreDamage) {
  auto record = sample();
  record.cursor = 1 << 20;  // beyond the volume
  EXPECT_FALSE(decode_record(encode_record(record), "run-x"));
  record = sample();
  record.status.granule_bytes = 5000;
  EXPECT_FALSE(decode_record(encode_record(record), "run-x"));
  record = sample();
  record.volume_id = "../../etc/passwd";
  EXPECT_FALSE(decode_record(encode_record(record), "run-x"));
}

TEST(RunRecord, FileNamesAreToldApart) {
  EXPECT_EQ(run_id_of_file(record_file_name("abc")), "abc");
  EXPECT_EQ(volume_id_of_file(bitmap_file_name("abc")), "abc");
  EXPECT_EQ(volume_id_of_file(checksums_file_name("abc")), "abc");
  EXPECT_EQ(volume_id_of_file(lag_file_name("abc", 2)), "abc");
  EXPECT_FALSE(run_id_of_file(bitmap_file_name("abc")));
  EXPECT_FALSE(run_id_of_file("run-abc.tmp"));
  EXPECT_FALSE(volume_id_of_file(record_file_name("abc")));
  EXPECT_FALSE(volume_id_of_file("lock"));
}

}  // namespace
}  // namespace blockferry
