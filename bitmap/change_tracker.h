// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0 OR BSD-2-Clause
// What change_tracker.bpf.c and its user share; plain C for both. Pins outlive a ferryd: a change here is a
// new tracker_layout.
#pragma once

#include <linux/types.h>

#define TRACKER_LAYOUT 5
#define TRACKER_BUCKET_RECORDS 3
#define TRACKER_TO_THE_END 0xffffffffU

/// Which writes count: those to a range of one disk. The sequence number tells a disk from another one that
/// bears its name later.
struct TrackerTarget {
  __u32 layout;
  int major;
  int first_minor;
  __u64 disk_sequence;
  __u64 first_sector;  // of 512 bytes
  __u64 sectors;
  __u32 granule_shift;  // a granule has 1 << granule_shift sectors
  __u32 zone_sectors;   // of a zone; 0: the disk has none
  __u32 bucket_mask;    // of records: one less than their number, a power of two
};

/// Records of writes that were queued and whose end was not seen: one line of the cache, so that either end
/// of a write has to fetch no more than that.
struct TrackerBucket {
  __u64 bios[TRACKER_BUCKET_RECORDS];  // their addresses; 0: a free place
  __u64 first_sectors[TRACKER_BUCKET_RECORDS];
  __u32 sectors[TRACKER_BUCKET_RECORDS];  // TRACKER_TO_THE_END: all that follow
  __u32 overflowed;                       // a record found no room here, and went to the next bucket
};

struct TrackerCounters {
  __u64 records_refused;          // the table of records was full
  __u64 beyond_marks;             // a granule without a place
  __u64 ranges_unknown;           // an operation whose range could not be told
  __u64 ends_unmatched;           // a write ended that was not seen to begin
  __u64 ends_unmatched_at_start;  // of those, what was queued before the tracker came; set by the user's side
  __u64 ends_unseen;              // for the record: a write whose end was not seen, of known range and marked
};
