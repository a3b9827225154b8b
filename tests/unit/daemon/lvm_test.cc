// SPDX-License-Identifier: Apache-2.0
#include "daemon/lvm.h"

#include <gtest/gtest.h>

namespace blockferry {
namespace {

// As vgcfgbackup writes it, shortened.
constexpr const char* metadata = R"(contents = "Text Format Volume Group"
version = 1

group {
	id = "aaaaaa"
	seqno = 4
	physical_volumes {
		pv0 {
			device = "/dev/sda"	# Hint only
		}
	}
	logical_volumes {
		data {
			id = "dddddd"
			segment_count = 2

			segment1 {
				start_extent = 0
				stripes = [
					"pv0", 0
				]
			}
			segment2 {
				start_extent = 5
				stripes = [
					"pv0", 9
				]
			}
		}
		data_new {
			id = "nnnnnn"
			segment_count = 1

			segment1 {
				start_extent = 0
				stripes = [
					"pv1", 3
				]
			}
		}
	}
}
)";

std::string section(const std::string& text, const char* from, const char* to) {
  const auto begin = text.find(from);
  return text.substr(begin, to != nullptr ? text.find(to, begin) - begin : std::string::npos);
}

TEST(Lvm, ExchangesTheSegmentsOfTwoVolumesAndNothingElse) {
  const auto exchanged = exchange_segments(metadata, "data", "data_new");
  ASSERT_TRUE(exchanged) << exchanged.error().message();
  const std::string data = section(*exchanged, "\tdata {", "\tdata_new {");
  const std::string data_new = section(*exchanged, "\tdata_new {", nullptr);
  EXPECT_NE(data.find("id = \"dddddd\""), std::string::npos);
  EXPECT_NE(data.find("segment_count = 1"), std::string::npos);
  EXPECT_NE(data.find("\"pv1\", 3"), std::string::npos);
  EXPECT_EQ(data.find("pv0"), std::string::npos);
  EXPECT_NE(data_new.find("id = \"nnnnnn\""), std::string::npos);
  EXPECT_NE(data_new.find("segment_count = 2"), std::string::npos);
  EXPECT_NE(data_new.find("\"pv0\", 9"), std::string::npos);
  EXPECT_EQ(section(*exchanged, "contents", "\tdata {"), section(metadata, "contents", "\tdata {"));
}

TEST(Lvm, ExchangedTwiceItIsAsBefore) {
  const auto once = exchange_segments(metadata, "data_new", "data");
  ASSERT_TRUE(once);
  EXPECT_NE(*once, metadata);
  EXPECT_EQ(*exchange_segments(*once, "data", "data_new"), metadata);
}

TEST(Lvm, NamesTheVolumeThatIsNotThere) {
  const auto exchanged = exchange_segments(metadata, "data", "other");
  ASSERT_FALSE(exchanged);
  EXPECT_NE(exchanged.error().message().find("other"), std::string::npos);
}

}  // namespace
}  // namespace blockferry
