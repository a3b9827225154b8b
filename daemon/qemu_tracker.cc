// SPDX-License-Identifier: Apache-2.0
#include "daemon/qemu_tracker.h"

#include <algorithm>

#include "blockio/base/check.h"

namespace blockferry {

namespace {

constexpr std::uint64_t granularity_max = 2 * GiB;  // QEMU's
constexpr Nanoseconds read_patience = std::chrono::seconds(10);

/// What is read must be what is tracked.
Error another_node(const QemuDisk& disk, const std::string& now, const std::string& was) {
  return make_error(ErrorCode::device_gone, "track the guest's writes at", disk.client().socket(),
                    "its disk is the node " + now + " now, and was " + was +
                        " (a snapshot?): `ferryctl resume` compares everything");
}

Error damaged(const QemuDisk& disk, const std::string& why) {
  return make_error(ErrorCode::state_damaged, "take up bitmaps in QEMU at", disk.client().socket(), why);
}

}  // namespace

QemuTracker::QemuTracker(std::shared_ptr<QemuDisk> disk, const QemuNode& node, std::uint64_t granule_bytes,
                         ReadQemuBitmap read)
    : disk_(std::move(disk)),
      node_(node.name),
      bytes_(node.bytes),
      granule_bytes_(granule_bytes),
      granularity_(std::min(granule_bytes, granularity_max)),
      read_(std::move(read)) {}

Result<std::unique_ptr<QemuTracker>> QemuTracker::attach(std::shared_ptr<QemuDisk> disk,
                                                         std::uint64_t granule_bytes, ReadQemuBitmap read,
                                                         std::optional<std::uint64_t> last) {
  const auto node = disk->look();
  if (!node) return fail(node.error());
  if (!disk->exported_node().empty() && disk->exported_node() != node->name)
    return fail(another_node(*disk, node->name, disk->exported_node()));
  std::unique_ptr<QemuTracker> tracker(new QemuTracker(disk, *node, granule_bytes, std::move(read)));
  tracker->first_ = tracker->given_ = tracker->recording_ = last ? *last + 1 : 0;
  Result<void> done = disk->remove_bitmaps();
  if (done) {
    done = disk->add_bitmap(tracker->node_, disk->bitmap_name(tracker->recording_), tracker->granularity_);
  }
  if (!done) return fail(done.error());
  return tracker;
}

Result<std::unique_ptr<QemuTracker>> QemuTracker::adopt(std::shared_ptr<QemuDisk> disk,
                                                        std::uint64_t granule_bytes, ReadQemuBitmap read,
                                                        std::uint64_t position) {
  const auto node = disk->look();
  if (!node) return fail(node.error());
  std::vector<std::uint64_t> numbers;
  for (const auto& bitmap : node->bitmaps) {
    if (const auto number = disk->bitmap_number(bitmap.name)) numbers.push_back(*number);
  }
  if (numbers.empty()) {
    return fail(damaged(*disk, disk->keeps_bitmaps() ? "the image holds none of this copy's"
                                                     : "there are none: QEMU was started anew"));
  }
  std::unique_ptr<QemuTracker> tracker(new QemuTracker(disk, *node, granule_bytes, std::move(read)));
  std::sort(numbers.begin(), numbers.end());
  tracker->first_ = tracker->given_ = position;
  tracker->recording_ = numbers.back();
  const auto sound = tracker->vouches(*node);
  if (!sound) return fail(sound.error());
  if (!*sound || numbers.back() < position) {
    return fail(
        damaged(*disk, disk->keeps_bitmaps()
                           ? "QEMU was killed, or somebody has changed them, or the image is an earlier one"
                           : "somebody has changed them"));
  }
  // An export of an earlier process keeps its bitmap from being removed, and is of no use.
  if (auto done = disk->remove_bitmap_exports(); !done) return fail(done.error());
  // Committed, and not released any more. One that stays costs nothing but its place.
  for (const auto number : numbers) {
    if (number < position) static_cast<void>(disk->remove_bitmap(node->name, disk->bitmap_name(number)));
  }
  return tracker;
}

/// Whether every bitmap is there and as this class left it. An error: the guest's disk is another node now.
Result<bool> QemuTracker::vouches(const QemuNode& node) const {
  if (node.name != node_ || node.bytes != bytes_) return fail(another_node(*disk_, node.name, node_));
  for (std::uint64_t number = first_; number <= recording_; ++number) {
    const QemuBitmap* bitmap = node.bitmap(disk_->bitmap_name(number));
    if (bitmap == nullptr || bitmap->inconsistent || bitmap->granularity > granule_bytes_ ||
        bitmap->recording != (number == recording_) || bitmap->persistent != disk_->keeps_bitmaps())
      return false;
  }
  return true;
}

Result<void> QemuTracker::rotate() {
  const std::string old = disk_->bitmap_name(recording_), next = disk_->bitmap_name(recording_ + 1);
  if (auto done = disk_->rotate_bitmaps(node_, old, next, granularity_); !done) return done;
  ++recording_;
  return {};
}

/// Over NBD. A write that the granularity cannot split marks all that it touches.
Result<void> QemuTracker::take(std::uint64_t number, ChangeBitmap& dirty) {
  const auto uri = disk_->export_bitmap(node_, number);
  if (!uri) return fail(uri.error());
  const auto mark = [&](ByteRange range) {
    const std::uint64_t first = range.offset / granule_bytes_;
    dirty.set({first, divide_up(range.end(), granule_bytes_) - first});
  };
  const auto done = read_(*uri, disk_->bitmap_name(number), bytes_, mark, read_patience);
  const auto removed = disk_->remove_bitmap_export(number);
  return done ? removed : done;
}

Result<void> QemuTracker::collect(ChangeBitmap& dirty) {
  BLOCKFERRY_CHECK(dirty.granule_count() == divide_up(bytes_, granule_bytes_), "a bitmap of another volume");
  const auto node = disk_->look();
  if (!node) return fail(node.error());
  const auto sound = vouches(*node);
  if (!sound) return fail(sound.error());
  if (!*sound) {
    ++losses_.interruptions;
    return {};
  }
  const auto any = written(*node);
  if (!any) return fail(any.error());
  if (*any) {
    if (auto done = rotate(); !done) return done;
  }
  for (; given_ < recording_; ++given_) {
    if (auto done = take(given_, dirty); !done) return done;
  }
  return {};
}

/// Whether the one that is recording has marks. Of a guest that is idle it goes on recording: nothing is
/// committed for it, and what is not committed may not be removed.
Result<bool> QemuTracker::written(const QemuNode& node) const {
  const auto marked = [this](const QemuNode& seen) {
    const QemuBitmap* bitmap = seen.bitmap(disk_->bitmap_name(recording_));
    return bitmap == nullptr || bitmap->count > 0;
  };
  if (marked(node)) return true;
  if (auto done = disk_->wait_for_writes(); !done) return fail(done.error());
  const auto later = disk_->look();
  if (!later) return fail(later.error());
  return marked(*later);
}

/// A bitmap that cannot be removed now is given again by a later process: that costs time and no data.
void QemuTracker::release() {
  while (first_ < given_) {
    if (!disk_->remove_bitmap(node_, disk_->bitmap_name(first_))) return;
    ++first_;
  }
}

}  // namespace blockferry
