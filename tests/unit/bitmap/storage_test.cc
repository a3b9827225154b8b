// SPDX-License-Identifier: Apache-2.0
// The real state directory, in one of the filesystem's own.
#include "bitmap/storage.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include <gtest/gtest.h>
#include <sys/stat.h>

#include "bitmap/bitmap_file.h"
#include "blockio/base/units.h"

namespace blockferry {
namespace {

std::span<const std::byte> bytes_of(const std::string& text) {
  return std::as_bytes(std::span(text));
}
std::string text_of(const std::vector<std::byte>& bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

class StorageTest : public testing::Test {
 protected:
  void SetUp() override {
    std::string name = (std::filesystem::temp_directory_path() / "blockferry-storage-XXXXXX").string();
    ASSERT_NE(::mkdtemp(name.data()), nullptr);
    path_ = name;
    auto opened = open_state_directory(path_ + "/state", true);
    ASSERT_TRUE(opened) << opened.error().message();
    directory = std::move(*opened);
  }
  void TearDown() override {
    directory.reset();
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  std::uint64_t allocated(const std::string& name) const {
    struct stat status {};
    return ::stat((path_ + "/state/" + name).c_str(), &status) == 0 ? std::uint64_t(status.st_blocks) * 512
                                                                    : UINT64_MAX;
  }

  std::string path_;
  std::unique_ptr<StateDirectory> directory;
};

TEST_F(StorageTest, TheDirectoryIsMadeForItsOwnerAlone) {
  struct stat status {};
  ASSERT_EQ(::stat((path_ + "/state").c_str(), &status), 0);
  EXPECT_EQ(status.st_mode & 0777, 0700U);
  EXPECT_TRUE(open_state_directory(path_ + "/state", true));
  EXPECT_TRUE(open_state_directory(path_ + "/state", false));
  EXPECT_EQ(open_state_directory(path_ + "/other", false).error().code, ErrorCode::not_found);
  EXPECT_FALSE(open_state_directory(path_ + "/no/such/parent", true));
  std::ofstream(path_ + "/file") << "x";
  EXPECT_FALSE(open_state_directory(path_ + "/file", true));
}

TEST_F(StorageTest, FilesAreMadeOnlyOnRequest) {
  EXPECT_EQ(directory->open("one", false).error().code, ErrorCode::not_found);
  EXPECT_EQ(directory->read_all("one", 100).error().code, ErrorCode::not_found);
  ASSERT_TRUE(directory->open("one", true));
  ASSERT_TRUE(directory->open("one", false));
  struct stat status {};
  ASSERT_EQ(::stat((path_ + "/state/one").c_str(), &status), 0);
  EXPECT_EQ(status.st_mode & 0777, 0600U);
  EXPECT_TRUE(directory->read_all("one", 0)->empty());
}

TEST_F(StorageTest, ReadsZeroesBeyondTheEnd) {
  auto file = directory->open("one", true);
  ASSERT_TRUE(file);
  ASSERT_TRUE((*file)->write(2, bytes_of("abc")));
  EXPECT_EQ(*(*file)->size(), 5U);
  std::byte buffer[8];
  std::memset(buffer, 0xff, sizeof buffer);
  ASSERT_TRUE((*file)->read(1, buffer));
  EXPECT_EQ(std::memcmp(buffer, "\0abc\0\0\0\0", 8), 0);
  std::memset(buffer, 0xff, sizeof buffer);
  ASSERT_TRUE((*file)->read(1000, buffer));
  EXPECT_EQ(std::memcmp(buffer, "\0\0\0\0\0\0\0\0", 8), 0);
}

TEST_F(StorageTest, ResizesBothWaysAndForgetsWhatWasCut) {
  auto file = directory->open("one", true);
  ASSERT_TRUE(file);
  ASSERT_TRUE((*file)->write(0, bytes_of("abcdef")));
  ASSERT_TRUE((*file)->resize(3));
  ASSERT_TRUE((*file)->resize(6));
  ASSERT_TRUE((*file)->sync());
  EXPECT_EQ(text_of(*directory->read_all("one", 6)), std::string("abc\0\0\0", 6));
  ASSERT_TRUE((*file)->resize(1 * TiB));
  EXPECT_EQ(*(*file)->size(), 1 * TiB);
  EXPECT_LT(allocated("one"), 1 * MiB);
}

TEST_F(StorageTest, ReplacesTheWhole) {
  ASSERT_TRUE(directory->replace("record", bytes_of("a long first one")));
  EXPECT_EQ(text_of(*directory->read_all("record", 100)), "a long first one");
  ASSERT_TRUE(directory->replace("record", bytes_of("short")));
  EXPECT_EQ(text_of(*directory->read_all("record", 5)), "short");
  EXPECT_EQ(directory->read_all("record", 4).error().code, ErrorCode::state_damaged);
  EXPECT_EQ(*directory->list(), std::vector<std::string>{"record"});
  // Over what an interrupted one left.
  std::ofstream(path_ + "/state/record.new") << "something longer than what comes";
  ASSERT_TRUE(directory->replace("record", bytes_of("third")));
  EXPECT_EQ(text_of(*directory->read_all("record", 100)), "third");
  EXPECT_EQ(*directory->list(), std::vector<std::string>{"record"});
}

TEST_F(StorageTest, ReplacementsFromManyThreadsAreEachWhole) {
  constexpr unsigned writers = 3, rounds = 40;
  ASSERT_TRUE(directory->replace("record", bytes_of(std::string(5000, 'a'))));
  std::atomic<unsigned> failures = 0, left = writers;
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < writers; ++i) {
    threads.emplace_back([&, i] {
      const std::string content(5000 + 1000 * i, char('a' + i));
      for (unsigned round = 0; round < rounds; ++round) {
        if (!directory->replace("record", bytes_of(content))) ++failures;
      }
      --left;
    });
  }
  while (left > 0) {
    const auto content = directory->read_all("record", 10000);
    const bool whole =
        content && content->size() == 5000 + 1000 * std::size_t(std::to_integer<int>(content->at(0)) - 'a') &&
        std::count(content->begin(), content->end(), content->at(0)) == std::ptrdiff_t(content->size());
    if (!whole) ++failures;
  }
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(failures, 0U);
}

TEST_F(StorageTest, AReplacementThatFailsLeavesTheOld) {
  ASSERT_TRUE(directory->replace("record", bytes_of("old")));
  std::filesystem::create_directory(path_ + "/state/record.new");
  EXPECT_FALSE(directory->replace("record", bytes_of("new")));
  EXPECT_EQ(text_of(*directory->read_all("record", 100)), "old");
}

TEST_F(StorageTest, ListsAndRemoves) {
  for (const char* name : {"b", "c", "a"}) ASSERT_TRUE(directory->open(name, true));
  EXPECT_EQ(*directory->list(), (std::vector<std::string>{"a", "b", "c"}));
  ASSERT_TRUE(directory->remove("b"));
  ASSERT_TRUE(directory->remove("b"));  // gone is gone
  EXPECT_EQ(*directory->list(), (std::vector<std::string>{"a", "c"}));
}

TEST_F(StorageTest, FindsDataAndPunchesHoles) {
  auto file = directory->open("one", true);
  ASSERT_TRUE(file);
  ASSERT_TRUE((*file)->resize(4 * MiB));
  const std::string data(128 * KiB, 'x');
  ASSERT_TRUE((*file)->write(2 * MiB, bytes_of(data)));
  ASSERT_TRUE((*file)->sync());
  // A filesystem without holes may answer the offset itself; never may data be passed over.
  EXPECT_LE(*(*file)->next_data(0), 2 * MiB);
  EXPECT_EQ(*(*file)->next_data(2 * MiB + 5), 2 * MiB + 5);
  EXPECT_LE(*(*file)->next_data(3 * MiB), 4 * MiB);
  EXPECT_GE(*(*file)->next_data(3 * MiB), 3 * MiB);

  ASSERT_TRUE((*file)->punch(2 * MiB + 1, data.size() - 2));
  ASSERT_TRUE((*file)->punch(0, 0));
  std::vector<std::byte> content(data.size());
  ASSERT_TRUE((*file)->read(2 * MiB, content));
  EXPECT_EQ(content.front(), std::byte('x'));
  EXPECT_EQ(content.back(), std::byte('x'));
  for (std::size_t i = 1; i + 1 < content.size(); ++i) ASSERT_EQ(content[i], std::byte(0)) << i;
  ASSERT_TRUE((*file)->punch(3 * MiB, 8 * MiB));
  EXPECT_EQ(*(*file)->size(), 4 * MiB);
}

TEST_F(StorageTest, ATerabytesBitmapTakesLittleRoom) {
  constexpr std::uint64_t granules = TiB / (4 * KiB);
  auto file = directory->open("bitmap", true);
  ASSERT_TRUE(file);
  auto bitmap = BitmapFile::create(std::move(*file), granules, 4 * KiB, true);
  ASSERT_TRUE(bitmap);
  BitmapPage page;
  page.index = 8000;
  page.words[5] = 1;
  ASSERT_TRUE((*bitmap)->commit({page}));
  EXPECT_LT(allocated("bitmap"), 1 * MiB);
  auto again = directory->open("bitmap", false);
  ASSERT_TRUE(again);
  auto opened = BitmapFile::open(std::move(*again), granules, 4 * KiB, 2);
  ASSERT_TRUE(opened) << opened.error().message();
  ChangeBitmap loaded(granules);
  ASSERT_TRUE((*opened)->load(loaded));
  EXPECT_EQ(loaded.count(), granules - ChangeBitmap::page_bits + 1);
  EXPECT_TRUE(loaded.test(8000 * ChangeBitmap::page_bits + 5 * 64));
}

}  // namespace
}  // namespace blockferry
