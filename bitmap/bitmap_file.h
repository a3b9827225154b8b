// SPDX-License-Identifier: Apache-2.0
// The bitmap's own file: versioned, checksummed, two generations (format drawn in bitmap_file.cc).
//
// A commit writes only the pages that changed, each into the slot that the last committed generation does not
// use, then syncs, then writes and syncs the new generation's index. A crash at any point leaves one whole
// generation.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "bitmap/change_bitmap.h"
#include "bitmap/storage.h"
#include "blockio/base/error.h"

namespace blockferry {

/// One page's content at the moment of a checkpoint.
struct BitmapPage {
  std::uint64_t index = 0;
  std::uint64_t words[512] = {};
};

class BitmapFile {
 public:
  /// A new file, generation 1, all bits set or all clear. Durable with its first commit, not before: nothing
  /// is lost with it till then.
  static Result<std::unique_ptr<BitmapFile>> create(std::unique_ptr<StateFile> file,
                                                    std::uint64_t granule_count, std::uint64_t granule_bytes,
                                                    bool all_set);

  /// Opens and checks the newest whole generation. state_damaged where none is whole, where it is older than
  /// `generation_min` (the generation that the run's record knows was committed), or where the geometry
  /// differs; state_newer for a later format version. A damaged index of the newest generation looks like a
  /// commit that a crash cut short: only `generation_min` tells one from the other.
  static Result<std::unique_ptr<BitmapFile>> open(std::unique_ptr<StateFile> file,
                                                  std::uint64_t granule_count, std::uint64_t granule_bytes,
                                                  std::uint64_t generation_min);

  /// ORs the committed bits into `bitmap` (same granule count). Checks every page.
  Result<void> load(ChangeBitmap& bitmap);

  /// Commits these pages as the next generation; pages not named keep their content. Durable when it returns;
  /// on an error the last generation stands and the same commit may be tried again.
  Result<void> commit(const std::vector<BitmapPage>& pages);

  std::uint64_t generation() const { return generation_; }

 private:
  BitmapFile(std::unique_ptr<StateFile> file, std::uint64_t granule_count, std::uint64_t granule_bytes);
  std::vector<std::byte> make_index(std::uint64_t generation) const;
  Result<void> write_index(std::uint64_t generation);
  Result<std::uint64_t> read_index(unsigned slot, std::vector<std::uint64_t>& entries);
  Result<void> revoke_index();
  std::uint64_t place_page(const BitmapPage& page, std::uint64_t committed_kind);
  void give_space_back(const std::vector<BitmapPage>& pages, const std::vector<std::uint64_t>& before);
  std::uint64_t index_bytes() const;
  std::uint64_t page_offset(std::uint64_t page, unsigned slot) const;

  const std::unique_ptr<StateFile> file_;
  const std::uint64_t granule_count_, granule_bytes_, page_count_;
  std::uint64_t generation_ = 0;
  /// The next generation's index may be on disk though its commit failed.
  bool index_doubtful_ = false;
  /// Two words a page: where it is (PageKind in bitmap_file.cc) and its CRC-64.
  std::vector<std::uint64_t> entries_;
};

}  // namespace blockferry
