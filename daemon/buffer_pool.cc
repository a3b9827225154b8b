// SPDX-License-Identifier: Apache-2.0
#include "daemon/buffer_pool.h"

#include <algorithm>
#include <cerrno>

#include <sys/mman.h>

#include "blockio/base/units.h"

namespace blockferry {

namespace {

constexpr std::size_t huge_page_bytes = 2 * MiB;
constexpr std::size_t idle_bytes_max = 24 * MiB;  // the buffers of one run with the default depth

/// Of a mapping: huge pages where they are to be had, for the kernel then splits each I/O into far fewer
/// pieces.
std::byte* huge_page_start(std::byte* address) {
  return reinterpret_cast<std::byte*>(round_up(reinterpret_cast<std::uintptr_t>(address), huge_page_bytes));
}

}  // namespace

Buffers::Buffers(BufferPool& pool, Mapping mapping, std::size_t bytes)
    : pool_(pool), mapping_(mapping), memory_(huge_page_start(mapping.address), bytes) {}

Buffers::~Buffers() {
  pool_.give_back(mapping_);
}

BufferPool::~BufferPool() {
  for (const auto& mapping : idle_) ::munmap(mapping.address, mapping.length);
}

Result<std::unique_ptr<Buffers>> BufferPool::take(std::size_t bytes) {
  const std::size_t length = round_up(bytes, huge_page_bytes) + huge_page_bytes;
  const std::lock_guard lock(mutex_);
  const auto found =
      std::find_if(idle_.begin(), idle_.end(), [&](const auto& mapping) { return mapping.length >= length; });
  if (found != idle_.end()) {
    const Buffers::Mapping mapping = *found;
    idle_.erase(found);
    return std::unique_ptr<Buffers>(new Buffers(*this, mapping, bytes));
  }
  void* address = ::mmap(nullptr, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (address == MAP_FAILED) return fail(error_from_errno(errno, "allocate buffers", ""));
  const Buffers::Mapping mapping{static_cast<std::byte*>(address), length};
  if (bytes >= huge_page_bytes)
    ::madvise(huge_page_start(mapping.address), round_up(bytes, huge_page_bytes), MADV_HUGEPAGE);
  return std::unique_ptr<Buffers>(new Buffers(*this, mapping, bytes));
}

void BufferPool::give_back(const Buffers::Mapping& mapping) {
  const std::lock_guard lock(mutex_);
  std::size_t idle_bytes = mapping.length;
  for (const auto& idle : idle_) idle_bytes += idle.length;
  if (mapping.length > idle_bytes_max) {
    ::munmap(mapping.address, mapping.length);
    return;
  }
  idle_.push_back(mapping);
  // The smallest go first: the largest serve every run.
  std::sort(idle_.begin(), idle_.end(), [](const auto& a, const auto& b) { return a.length > b.length; });
  while (idle_bytes > idle_bytes_max) {
    ::munmap(idle_.back().address, idle_.back().length);
    idle_bytes -= idle_.back().length;
    idle_.pop_back();
  }
}

}  // namespace blockferry
