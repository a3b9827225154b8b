// SPDX-License-Identifier: Apache-2.0
// A StateFile whose process and power can end before any of its operations. What was not synced is then lost,
// kept or torn, each write for itself, as the test decides.
#pragma once

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "bitmap/storage.h"

namespace blockferry::test {

/// Thrown at the operation before which the process ends.
struct Crash {};

/// Of an unsynced write after a power cut. Sectors are written whole.
enum class Fate : std::uint8_t { lost, kept, first_half, second_half, every_other_sector };
constexpr std::size_t fate_count = 5;

using Bytes = std::vector<std::byte>;

/// What outlives the process. VolatileFile is a process's view of it.
class Medium {
 public:
  static constexpr std::size_t sector_bytes = 512;

  Bytes current;  ///< what a reader sees
  Bytes durable;
  std::uint64_t operations = 0;  ///< writes, resizes, syncs and punches so far
  std::uint64_t writes = 0;
  std::uint64_t bytes_written = 0;
  std::optional<std::uint64_t> crash_at;       ///< the operation before which the process ends
  std::optional<std::uint64_t> fail_at;        ///< the operation that fails, with EIO
  std::optional<std::uint64_t> fail_reads_in;  ///< the 4096 bytes from here on cannot be read

  std::size_t unsynced() const { return unsynced_.size(); }

  /// The power is cut: `fate` decides for each change that was not synced, in the order of the changes.
  void cut_power(const std::function<Fate(std::size_t)>& fate) {
    for (std::size_t i = 0; i < unsynced_.size(); ++i) apply_some(unsynced_[i], fate(i));
    unsynced_.clear();
    current = durable;
  }
  void write(std::uint64_t offset, Bytes data) { change({offset, std::move(data), std::nullopt}); }
  void resize(std::uint64_t bytes) { change({0, {}, bytes}); }
  void sync() {
    durable = current;
    unsynced_.clear();
  }
  /// A sync that fails: the kernel may have written anything of it, and forgets the rest.
  void fail_sync(const std::function<Fate(std::size_t)>& fate) {
    for (std::size_t i = 0; i < unsynced_.size(); ++i) apply_some(unsynced_[i], fate(i));
    unsynced_.clear();
  }
  std::function<Fate(std::size_t)> fate_of_failed_sync = [](std::size_t) { return Fate::lost; };

 private:
  struct Change {
    std::uint64_t offset = 0;
    Bytes data;
    std::optional<std::uint64_t> size;
  };

  void change(Change made) {
    apply(current, made);
    unsynced_.push_back(std::move(made));
  }
  static void apply(Bytes& bytes, const Change& change) {
    if (change.size) {
      bytes.resize(*change.size);
      return;
    }
    if (bytes.size() < change.offset + change.data.size()) bytes.resize(change.offset + change.data.size());
    std::copy(change.data.begin(), change.data.end(), bytes.begin() + std::ptrdiff_t(change.offset));
  }
  void apply_some(const Change& change, Fate fate) {
    if (fate == Fate::lost) return;
    if (fate == Fate::kept || change.size) return apply(durable, change);
    const std::size_t half = change.data.size() / sector_bytes / 2;
    for (std::size_t sector = 0; sector * sector_bytes < change.data.size(); ++sector) {
      const bool kept = fate == Fate::first_half    ? sector < half
                        : fate == Fate::second_half ? sector >= half
                                                    : sector % 2 == 1;
      if (!kept) continue;
      const std::size_t from = sector * sector_bytes, to = std::min(from + sector_bytes, change.data.size());
      apply(durable,
            {change.offset + from,
             Bytes(change.data.begin() + std::ptrdiff_t(from), change.data.begin() + std::ptrdiff_t(to)),
             std::nullopt});
    }
  }

  std::vector<Change> unsynced_;
};

class VolatileFile : public StateFile {
 public:
  explicit VolatileFile(Medium& medium) : medium_(medium) {}

  Result<std::uint64_t> size() override { return medium_.current.size(); }
  Result<void> resize(std::uint64_t bytes) override {
    if (!begin()) return failed("resize");
    medium_.resize(bytes);
    return {};
  }
  Result<void> read(std::uint64_t offset, std::span<std::byte> buffer) override {
    const auto bad = medium_.fail_reads_in;
    if (bad && offset < *bad + 4096 && offset + buffer.size() > *bad) return failed("read");
    for (std::size_t i = 0; i < buffer.size(); ++i)
      buffer[i] = offset + i < medium_.current.size() ? medium_.current[offset + i] : std::byte(0);
    return {};
  }
  Result<void> write(std::uint64_t offset, std::span<const std::byte> data) override {
    if (!begin()) return failed("write");
    ++medium_.writes;
    medium_.bytes_written += data.size();
    medium_.write(offset, Bytes(data.begin(), data.end()));
    return {};
  }
  Result<void> sync() override {
    if (!begin()) {
      medium_.fail_sync(medium_.fate_of_failed_sync);
      return failed("sync");
    }
    medium_.sync();
    return {};
  }
  Result<std::uint64_t> next_data(std::uint64_t offset) override {
    while (offset < medium_.current.size() && medium_.current[offset] == std::byte(0)) ++offset;
    return offset;
  }
  Result<void> punch(std::uint64_t offset, std::uint64_t bytes) override {
    if (!begin()) return failed("punch");
    medium_.write(offset, Bytes(bytes));
    return {};
  }

 private:
  bool begin() {
    const std::uint64_t number = medium_.operations++;
    if (number == medium_.crash_at) throw Crash{};
    return number != medium_.fail_at;
  }
  static tl::unexpected<Error> failed(const char* operation) {
    return fail(error_from_errno(EIO, operation, "the test's file"));
  }

  Medium& medium_;
};

inline std::unique_ptr<StateFile> file_on(Medium& medium) {
  return std::make_unique<VolatileFile>(medium);
}

}  // namespace blockferry::test
