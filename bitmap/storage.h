// SPDX-License-Identifier: Apache-2.0
// Where durable state lives. Injected, so that the simulator can lose and tear what was not synced.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "blockio/base/error.h"

namespace blockferry {

/// A file of durable state. Reads past the end give zeroes: see read().
class StateFile {
 public:
  virtual ~StateFile() = default;
  virtual Result<std::uint64_t> size() = 0;
  /// Sparse growth or a cut.
  virtual Result<void> resize(std::uint64_t bytes) = 0;
  /// Fills the whole buffer, with zeroes beyond the end.
  virtual Result<void> read(std::uint64_t offset, std::span<std::byte> buffer) = 0;
  virtual Result<void> write(std::uint64_t offset, std::span<const std::byte> data) = 0;
  /// All completed writes and resizes are durable after.
  virtual Result<void> sync() = 0;
  /// The first offset at or after `offset` that may hold other than zeroes, or size(): SEEK_DATA.
  virtual Result<std::uint64_t> next_data(std::uint64_t offset) = 0;
  /// Makes the range read as zeroes and gives its space back.
  virtual Result<void> punch(std::uint64_t offset, std::uint64_t bytes) = 0;
};

/// A flat directory of state files. Names hold no slash.
class StateDirectory {
 public:
  virtual ~StateDirectory() = default;
  /// The name of a file that is made here is durable before any later replace() takes effect: nothing speaks
  /// of the file before that.
  virtual Result<std::unique_ptr<StateFile>> open(const std::string& name, bool create) = 0;
  /// Replaces the file's whole content: after a crash it is the old or the new one, and durable when this
  /// returns.
  virtual Result<void> replace(const std::string& name, std::span<const std::byte> content) = 0;
  /// The whole file; ErrorCode::not_found where there is none. Refuses more than `bytes_max`.
  virtual Result<std::vector<std::byte>> read_all(const std::string& name, std::uint64_t bytes_max) = 0;
  virtual Result<void> remove(const std::string& name) = 0;
  virtual Result<std::vector<std::string>> list() = 0;  ///< sorted
};

/// A directory of the filesystem. `create`: made, with mode 0700, where it is missing. Thread-safe.
Result<std::unique_ptr<StateDirectory>> open_state_directory(const std::string& path, bool create);

}  // namespace blockferry
