// SPDX-License-Identifier: Apache-2.0
// What a run reads and writes, top to bottom: start_work() hands ranges to the engine as the phase asks,
// finished_job() takes the results into the volume's state. The engine's side is blockio/copy_engine.cc.
#include <algorithm>

#include "blockio/base/check.h"
#include "blockio/base/checksum.h"
#include "daemon/run_core.h"

namespace blockferry {

namespace {

constexpr std::uint64_t hole_bytes_max =
    1 * GiB;  // one zero job: bounded, so that cancel and checkpoints stay quick
constexpr std::size_t bad_ranges_max = 65536;  // beyond it the source is not worth skipping over

}  // namespace

void RunCore::start_work() {
  if (winding_down() || phase_done_) return;
  if (resting()) return audit_more();
  switch (record_.phase) {
    case RunPhase::collecting:
      return collect_more();
    case RunPhase::copying:
      return copy_more();
    case RunPhase::verifying:
      return verify_more();
  }
}

/// Whether a job of `bytes` may be started now: there is a buffer, what is in flight stays within its bound,
/// and the rate allows it.
bool RunCore::may_start(std::uint64_t bytes) {
  const std::uint64_t in_flight = engine_->bytes_in_flight();
  return engine_->can_start() && engine_->room() >= bytes &&
         (in_flight == 0 || in_flight + bytes <= in_flight_bytes_max_) &&
         (quiesced() || limiter_.may_start(clock_.now()));
}

// Collecting: the tracker says what it wants read; holes of the source are answered without reading.

void RunCore::collect_more() {
  const std::uint64_t count_max = engine_options_.io_bytes / engine_options_.granule_bytes;
  const auto& geometry = volume_->geometry();
  unsigned holes = 0;
  while (may_start(engine_options_.io_bytes)) {
    const auto range = scan_->next_read(count_max);
    if (!range) return;
    if (collect_hole(*range)) {
      if (ending_ != Ending::none || ++holes == 4096) return;  // the caller's other duties come round
      continue;
    }
    const ByteRange bytes = geometry.bytes_of(*range);
    limiter_.spend(bytes.bytes);
    engine_->start_checksum(*devices_.source, bytes);
  }
}

/// A range inside a hole is read without any I/O: it holds zeroes.
bool RunCore::collect_hole(GranuleRange range) {
  if (hole_granules(*devices_.source, range.first) < range.count) return false;
  const auto& geometry = volume_->geometry();
  std::vector<std::uint64_t> checksums(range.count, crc64_of_zeroes(geometry.granule_bytes));
  if (range.end() == geometry.granule_count())
    checksums.back() = crc64_of_zeroes(geometry.granule_length(range.end() - 1));
  if (auto done = scan_->on_read(range, checksums); !done) {
    fail_run(done.error());
    return true;
  }
  collect_marked_end_ = std::max(collect_marked_end_, range.end());
  work_done_ += geometry.bytes_of(range).bytes;
  return true;
}

// Copying: claims of dirty granules, in order and round again.

void RunCore::copy_more() {
  while (may_start(0)) {
    const auto claim = next_claim();
    if (!claim) return;
    const ByteRange bytes = volume_->geometry().bytes_of(claim->range);
    copy_cursor_ = claim->range.end();
    if (claim->hole) {
      engine_->start_zero(bytes);
    } else {
      limiter_.spend(bytes.bytes);
      engine_->start_copy(bytes);
    }
  }
}

/// Invariant 1: the dirty bit is cleared here, before anything is read. Nothing: all is clean, or what comes
/// next must wait for a larger buffer.
std::optional<RunCore::Claim> RunCore::next_claim() {
  const std::uint64_t count_max = engine_options_.io_bytes / engine_options_.granule_bytes;
  auto found = volume_->dirty().find(copy_cursor_, count_max);
  if (!found && copy_cursor_ > 0) found = volume_->dirty().find(0, count_max);
  if (!found) return std::nullopt;
  const std::uint64_t hole = hole_granules(*devices_.source, found->first);
  const std::uint64_t count = hole > 0 ? hole : std::min(found->count, data_granules(found->first));
  if (hole == 0 && !may_start(count * engine_options_.granule_bytes)) return std::nullopt;
  const auto range = volume_->claim(found->first, count);
  BLOCKFERRY_CHECK(range && range->first == found->first, "a dirty granule was claimed by somebody else");
  return Claim{*range, hole > 0};
}

/// How many whole granules from this one on lie in a hole large enough to be worth a zero request; 0: it is
/// data. Where the device does not answer it is data, and the read will tell why.
std::uint64_t RunCore::hole_granules(Device& device, std::uint64_t granule) {
  const auto& geometry = volume_->geometry();
  const std::uint64_t offset = granule * geometry.granule_bytes;
  if (region_.device != &device || offset < region_.begin || offset >= region_.region.end) {
    const auto region = device.region_at(offset);
    region_ = {
        &device, offset,
        region && region->end > offset ? *region : DeviceRegion{false, offset + engine_options_.io_bytes}};
  }
  if (!region_.region.hole) return 0;
  const std::uint64_t end = std::min({region_.region.end, geometry.bytes, offset + hole_bytes_max});
  if (end - offset < device.info().zero_run_bytes_min && end < geometry.bytes) return 0;
  return end == geometry.bytes ? geometry.granule_count() - granule : (end - offset) / geometry.granule_bytes;
}

/// How many granules one read takes from this one on, which is data: no more than there is data of, since
/// holes are cheaper.
std::uint64_t RunCore::data_granules(std::uint64_t granule) const {
  const auto& geometry = volume_->geometry();
  const std::uint64_t count_max = engine_options_.io_bytes / geometry.granule_bytes;
  if (region_.region.hole) return count_max;  // a small one, not worth its own request
  const std::uint64_t data_end = divide_up(region_.region.end, geometry.granule_bytes);
  return std::clamp<std::uint64_t>(data_end - granule, 1, count_max);
}

// Verifying: each target that did not fail, from its first granule to its last.

void RunCore::verify_more() {
  const auto& geometry = volume_->geometry();
  const std::uint64_t count_max = engine_options_.io_bytes / engine_options_.granule_bytes;
  unsigned holes = 0;
  while (verify_next_ < geometry.granule_count() && may_start(engine_options_.io_bytes)) {
    if (engine_->target_dropped(record_.verify_target)) return;
    if (verify_hole()) {
      if (ending_ != Ending::none || ++holes == 64) return;
      continue;
    }
    const GranuleRange range{verify_next_, std::min(count_max, geometry.granule_count() - verify_next_)};
    verify_next_ = range.end();
    limiter_.spend(geometry.bytes_of(range).bytes);
    engine_->start_checksum(*devices_.targets[record_.verify_target], geometry.bytes_of(range));
  }
}

/// A hole of the target agrees with records of zeroes without being read. Only the part before the first
/// other record is taken; what follows is read.
bool RunCore::verify_hole() {
  const std::uint64_t hole = hole_granules(*devices_.targets[record_.verify_target], verify_next_);
  if (hole == 0) return false;
  const auto nonzero = volume_->checksums().next_nonzero(verify_next_);
  if (!nonzero || *nonzero == verify_next_) return false;
  const GranuleRange range{verify_next_, std::min(hole, *nonzero - verify_next_)};
  verify_next_ = range.end();
  record_.status.granules_verified += range.count;
  work_done_ += volume_->geometry().bytes_of(range).bytes;
  if (limits_.metrics != nullptr) limits_.metrics->add_verified(volume_->geometry().bytes_of(range).bytes, 0);
  return true;
}

// Results.

void RunCore::finished_job(JobResult& result) {
  if (record_.phase == RunPhase::copying && result.kind == JobKind::checksum) return finished_audit(result);
  const GranuleRange range = volume_->geometry().granules_of(result.range);
  work_done_ += result.range.bytes;
  switch (record_.phase) {
    case RunPhase::collecting:
      return finished_collecting(result, range);
    case RunPhase::copying:
      return finished_copying(result, range);
    case RunPhase::verifying:
      return finished_verifying(result, range);
  }
}

void RunCore::finished_collecting(const JobResult& result, GranuleRange range) {
  if (result.read_error) return fail_run(*result.read_error);
  add_bad_ranges(result.unreadable);
  if (auto done = scan_->on_read(range, result.checksums); !done) return fail_run(done.error());
  collect_marked_end_ = std::max(collect_marked_end_, range.end());
}

void RunCore::finished_copying(const JobResult& result, GranuleRange range) {
  for (std::size_t i = 0; i < result.target_errors.size(); ++i) {
    if (result.target_errors[i]) target_failed(i, *result.target_errors[i]);
  }
  const auto tainted = std::find_if(tainted_.begin(), tainted_.end(),
                                    [&range](const auto& each) { return each.first == range.first; });
  const bool again = tainted != tainted_.end();
  if (again) tainted_.erase(tainted);
  if (again || result.read_error || ending_ == Ending::failed) {
    volume_->give_back(range);
    if (result.read_error) fail_run(*result.read_error);
    return;
  }
  if (auto done = volume_->record_copied(range, result.checksums); !done) return fail_run(done.error());
  if (result.unreadable.empty()) {
    forget_bad_range(result.range);
  } else {
    add_bad_ranges(result.unreadable);
  }
  record_.status.bytes_copied += result.range.bytes;
  record_.status.bytes_zeroed += result.bytes_zeroed;
  current_pass().granules += range.count;
  current_pass().bytes += result.range.bytes;
}

void RunCore::finished_verifying(const JobResult& result, GranuleRange range) {
  if (result.read_error || !result.unreadable.empty()) {
    Error error = result.read_error ? *result.read_error
                                    : make_error(ErrorCode::io, "read back",
                                                 devices_.targets[record_.verify_target]->info().uri,
                                                 "the target cannot be read");
    volume_->mark_mismatched(range);
    return target_failed(record_.verify_target, error);
  }
  compare_with_records(range, result.checksums);
}

void RunCore::compare_with_records(GranuleRange range, std::span<const std::uint64_t> checksums) {
  std::vector<std::uint64_t> recorded(range.count);
  if (auto done = volume_->checksums().read(range.first, recorded); !done) return fail_run(done.error());
  std::uint64_t mismatches = 0;
  const bool ahead = live() && !record_.cut_over;
  for (std::uint64_t i = 0; i < range.count; ++i) {
    if (recorded[i] == checksums[i]) continue;
    // Verified ahead of a cutover: what is dirty is still to be copied, and its record promises nothing.
    if (ahead && volume_->dirty().test(range.first + i)) continue;
    ++mismatches;
    mismatched_target_ = record_.verify_target;
    volume_->mark_mismatched({range.first + i, 1});
  }
  record_.status.granules_verified += range.count;
  record_.status.granules_mismatched += mismatches;
  if (limits_.metrics != nullptr) {
    limits_.metrics->add_verified(volume_->geometry().bytes_of(range).bytes, mismatches);
  }
}

// What could not be read, and targets that failed.

void RunCore::add_bad_ranges(const std::vector<ByteRange>& unreadable) {
  auto& bad = record_.status.bad_ranges;
  for (const auto& range : unreadable) {
    forget_bad_range(range);
    const auto at =
        std::lower_bound(bad.begin(), bad.end(), range.offset,
                         [](const ByteRange& have, std::uint64_t offset) { return have.end() < offset; });
    if (at != bad.end() && at->end() == range.offset) {
      at->bytes += range.bytes;
    } else {
      bad.insert(at, range);
    }
    // What ended out of order may have left a neighbour just behind.
    for (std::size_t i = 1; i < bad.size(); ++i) {
      if (bad[i - 1].end() != bad[i].offset) continue;
      bad[i - 1].bytes += bad[i].bytes;
      bad.erase(bad.begin() + std::ptrdiff_t(i--));
    }
  }
  if (bad.size() > bad_ranges_max) {
    fail_run(
        make_error(ErrorCode::io, "read", record_.status.source_uri, "too many unreadable ranges to skip"));
  }
}

/// The range was read well (or is about to be listed anew).
void RunCore::forget_bad_range(ByteRange copied) {
  auto& bad = record_.status.bad_ranges;
  if (bad.empty()) return;
  std::vector<ByteRange> kept;
  for (const auto& range : bad) {
    if (range.end() <= copied.offset || range.offset >= copied.end()) {
      kept.push_back(range);
      continue;
    }
    if (range.offset < copied.offset) kept.push_back({range.offset, copied.offset - range.offset});
    if (range.end() > copied.end()) kept.push_back({copied.end(), range.end() - copied.end()});
  }
  bad = std::move(kept);
}

/// The others go on; what this one may lack is written down, so that it can be taken back later: all that is
/// not synced, in flight, or among the results of this step, which stand between the two.
void RunCore::target_failed(std::size_t index, const Error& error) {
  if (record_.status.targets[index].error) return;
  if (quiesced()) {  // what it lacks is written down after the release
    engine_->drop_target(index);
    cutover_.failures.emplace_back(index, error);
    return;
  }
  record_.status.targets[index].error = error;
  engine_->drop_target(index);
  if (limits_.metrics != nullptr) limits_.metrics->add_error(error.code);
  std::size_t left = 0;
  for (const auto& target : record_.status.targets) left += target.error ? 0 : 1;
  if (left == 0) {
    volume_->copied_to_dirty();
    return fail_run(error);
  }
  auto lacking = engine_->ranges_in_flight();
  for (const auto& result : results_) lacking.push_back(result.range);
  const auto saved =
      volume_->save_lag(environment_.state(), lag_file_name(record_.volume_id, index), lacking);
  if (!saved) return fail_run(saved.error());
  record_.target_lags[index] = true;
  lag_unsaved_ = true;
  if (ending_ == Ending::completed) fail_run(error);  // in the last flush
}

}  // namespace blockferry
