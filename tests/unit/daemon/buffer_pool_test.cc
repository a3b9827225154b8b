// SPDX-License-Identifier: Apache-2.0
#include "daemon/buffer_pool.h"

#include <cstdint>
#include <cstring>

#include <gtest/gtest.h>

#include "blockio/base/units.h"

namespace blockferry {
namespace {

TEST(BufferPool, GivesAsManyBytesAsAskedForAligned) {
  BufferPool pool;
  for (const std::size_t bytes : {std::size_t(4096), 2 * MiB, 2 * MiB + 4096, 20 * MiB, 100 * MiB}) {
    auto buffers = pool.take(bytes);
    ASSERT_TRUE(buffers);
    const auto memory = (*buffers)->memory();
    EXPECT_EQ(memory.size(), bytes);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(memory.data()) % 4096, 0u);
    std::memset(memory.data(), 1, memory.size());
  }
}

TEST(BufferPool, KeepsOneRunsWorthForTheNext) {
  BufferPool pool;
  auto first = pool.take(20 * MiB);
  ASSERT_TRUE(first);
  const std::byte* const address = (*first)->memory().data();
  auto meanwhile = pool.take(20 * MiB);
  ASSERT_TRUE(meanwhile);
  EXPECT_NE((*meanwhile)->memory().data(), address) << "in use";
  first->reset();
  auto next = pool.take(16 * MiB);
  ASSERT_TRUE(next);
  EXPECT_EQ((*next)->memory().data(), address);
}

TEST(BufferPool, DoesNotHoardWhatOneLargeRunNeeded) {
  BufferPool pool;
  auto large = pool.take(200 * MiB);
  ASSERT_TRUE(large);
  std::memset((*large)->memory().data(), 1, 200 * MiB);
  large->reset();
  auto next = pool.take(200 * MiB);  // fresh: what it holds is zeroes again
  ASSERT_TRUE(next);
  EXPECT_EQ((*next)->memory()[100 * MiB], std::byte(0));
}

TEST(BufferPool, SaysSoWhenThereIsNoMemory) {
  BufferPool pool;
  const auto buffers = pool.take(1ULL << 60);
  ASSERT_FALSE(buffers);
  EXPECT_EQ(buffers.error().errno_value, ENOMEM);
}

}  // namespace
}  // namespace blockferry
