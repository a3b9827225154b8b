// SPDX-License-Identifier: Apache-2.0
// Proof while live. Between two passes of a source in use, granules that are thought clean are read again, a
// few at a time, and compared with their recorded checksums. One that differs was written since, and then the
// tracker knows: its mark stands, or the write's record does (collect() gives both). If the next gathering
// does not bring it, the tracker has missed a write: that is reported, and everything is compared.
#include <algorithm>

#include "daemon/run_core.h"

namespace blockferry {

namespace {

constexpr std::uint64_t audit_bytes_per_second = 32 * MiB;
constexpr std::uint64_t audit_read_bytes = 256 * KiB;

}  // namespace

void RunCore::start_audit() {
  audit_ = {};
  audit_.limiter.set_rate(audit_bytes_per_second, clock_.now());
  // Not always from the start: most runs are over before the whole volume was looked at.
  audit_.next = std::uint64_t(clock_.wall_seconds() * 1e6) %
                std::max<std::uint64_t>(1, volume_->geometry().granule_count());
}

/// One read at a time: it must not be in the way of anything.
void RunCore::audit_more() {
  const Nanoseconds now = clock_.now();
  if (engine_->jobs_in_flight() > 0 || !audit_.limiter.may_start(now) ||
      !may_start(engine_options_.granule_bytes))
    return;
  const auto& geometry = volume_->geometry();
  const std::uint64_t count_max =
      std::max<std::uint64_t>(1, std::min(audit_read_bytes, engine_->room()) / geometry.granule_bytes);
  const auto dirty = volume_->dirty().find(audit_.next, UINT64_MAX);
  if (dirty && dirty->first == audit_.next) {
    audit_.next = dirty->end() % geometry.granule_count();
    return;
  }
  const std::uint64_t end = std::min(
      {dirty ? dirty->first : geometry.granule_count(), geometry.granule_count(), audit_.next + count_max});
  const ByteRange bytes = geometry.bytes_of({audit_.next, end - audit_.next});
  audit_.next = end % geometry.granule_count();
  audit_.limiter.spend(bytes.bytes);
  limiter_.spend(bytes.bytes);
  engine_->start_checksum(*devices_.source, bytes);
}

/// What cannot be read says nothing; a pass that has to read it will tell.
void RunCore::finished_audit(const JobResult& result) {
  if (result.read_error || !result.unreadable.empty()) return;
  const GranuleRange range = volume_->geometry().granules_of(result.range);
  std::vector<std::uint64_t> recorded(range.count);
  if (auto done = volume_->checksums().read(range.first, recorded); !done) return fail_run(done.error());
  for (std::uint64_t i = 0; i < range.count; ++i) {
    if (recorded[i] != result.checksums[i]) audit_.suspects.push_back(range.first + i);
  }
  record_.status.audited_granules += range.count;
}

/// Of what was just gathered.
void RunCore::judge_suspects() {
  std::uint64_t missed = 0;
  for (const std::uint64_t granule : audit_.suspects) missed += volume_->dirty().test(granule) ? 0 : 1;
  audit_.suspects.clear();
  if (missed == 0) return;
  record_.status.audit_misses += missed;
  live_.missed = true;
  if (limits_.metrics != nullptr) limits_.metrics->add_audit_misses(missed);
}

}  // namespace blockferry
