// SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause
// Marks what is written to one range of one disk. A record stands for every write that was queued and whose
// end was not seen; it is removed only by marking its range. The user's side is bitmap/ebpf_tracker.h.
//
//   block_bio_queue, block_split ──> a record: bio, range
//   block_rq_complete, block_bio_complete ──> mark the range, then clear the record
//
// A bio is matched by its address and never by its device: on its way down it may change that (the heads of
// multipath disks do so). Marks are atomic ORs, always: testing first would lose a mark to a concurrent
// clear.
#include "bitmap/change_tracker.h"

#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>
#include <linux/bpf.h>
#include <linux/types.h>
#include <stdbool.h>
#include <stddef.h>

char LICENSE[] SEC("license") = "Dual BSD/GPL";

// The kernel's structures as far as they are used; libbpf finds the members where the running kernel has
// them.
#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)
struct gendisk {
  int major;
  int first_minor;
  __u64 diskseq;
};
struct block_device {
  struct gendisk* bd_disk;
};
struct bvec_iter {
  __u64 bi_sector;
  unsigned int bi_size;
} __attribute__((packed));
struct bio {
  struct bio* bi_next;
  struct block_device* bi_bdev;
  unsigned int bi_opf;
  struct bvec_iter bi_iter;
  void* bi_private;
};
struct request_queue {
  struct gendisk* disk;
};
struct request {
  struct request_queue* q;
  unsigned int cmd_flags;
  struct bio* bio;
};
enum req_op { REQ_OP_ZONE_RESET_ALL = 17 };
#pragma clang attribute pop

#define OPERATION_MASK 0xff
// Numbered alike by all kernels. Between WRITE_ZEROES and the drivers' own, and at 7, are operations on
// zones.
#define WRITE 1
#define DISCARD 3
#define SECURE_ERASE 5
#define WRITE_ZEROES 9
#define FIRST_DRIVER_OPERATION 34
#define BIOS_IN_REQUEST_MAX 4096
#define BUCKETS_TRIED 8
#define BIO_SHIFT 8  // a bio has this many bytes, or some more

const volatile struct TrackerTarget target;
struct TrackerCounters counters;

/// One bit a granule, in words of 64. The user's side clears exactly those bits that it has taken over
/// (`held`), before it reads what they stand for.
struct {
  __uint(type, BPF_MAP_TYPE_ARRAY);
  __uint(map_flags, BPF_F_MMAPABLE);
  __uint(max_entries, 1);
  __type(key, __u32);
  __type(value, __u64);
} marks SEC(".maps"), held SEC(".maps");

/// A hash table without locks: the kernel's own takes four of them a write, and moves its elements from
/// processor to processor. Of one bio nobody but its owner tells, one thing after the other; so it takes
/// atomic operations only where two bios meet, at a free place.
struct {
  __uint(type, BPF_MAP_TYPE_ARRAY);
  __uint(map_flags, BPF_F_MMAPABLE);
  __uint(max_entries, 1);
  __type(key, __u32);
  __type(value, struct TrackerBucket);
} records SEC(".maps");

static void count(__u64* counter) {
  __sync_fetch_and_add(counter, 1);
}

struct sector_range {
  __u64 sector, end;
};

struct mark_context {
  __u64 first, last;  // granules
};

static long mark_word(__u32 index, void* data) {
  struct mark_context* context = data;
  const __u32 word = context->first / 64 + index;
  const __u64 start = (__u64)word * 64;
  __u64 mask = ~0ULL;
  if (context->first > start) mask &= ~0ULL << ((context->first - start) & 63);
  if (context->last < start + 63) mask &= ~0ULL >> ((start + 63 - context->last) & 63);
  __u64* bits = bpf_map_lookup_elem(&marks, &word);
  if (!bits) {
    count(&counters.beyond_marks);
    return 1;
  }
  // Its result is used, so that it is the fetching OR: that one is ordered before what follows, on every
  // processor (whoever then finds no record finds the mark).
  const __u64 before = __sync_fetch_and_or(bits, mask);
  asm volatile("" ::"r"(before));
  return 0;
}

static void mark(struct sector_range range) {
  const __u64 begin = target.first_sector, end = begin + target.sectors;
  if (range.sector < begin) range.sector = begin;
  if (range.end > end) range.end = end;
  if (range.sector >= range.end) return;
  struct mark_context context = {
      .first = (range.sector - begin) >> target.granule_shift,
      .last = (range.end - 1 - begin) >> target.granule_shift,
  };
  const __u32 words = context.last / 64 - context.first / 64 + 1;
  if (words == 1)
    mark_word(0, &context);
  else
    bpf_loop(words, mark_word, &context, 0);
}

static bool changes_data(unsigned int flags) {
  return flags & 1;  // that is how the kernel numbers its operations: odd ones carry data to the device
}

static bool is_target(const struct gendisk* disk) {
  return disk->major == target.major && disk->first_minor == target.first_minor &&
         disk->diskseq == target.disk_sequence;
}

static bool resets_all_zones(unsigned int operation, __u64 sector) {
  if (bpf_core_enum_value_exists(enum req_op, REQ_OP_ZONE_RESET_ALL))
    return operation == bpf_core_enum_value(enum req_op, REQ_OP_ZONE_RESET_ALL);
  return sector == 0;
}

/// What the operation may change. Of a zone only its start is told: where an append will come to lie is known
/// when it has ended, and a reset has no length.
static struct sector_range range_of(unsigned int flags, __u64 sector, unsigned int bytes) {
  const unsigned int operation = flags & OPERATION_MASK;
  if (operation == WRITE || operation == DISCARD || operation == SECURE_ERASE || operation == WRITE_ZEROES)
    return (struct sector_range){sector, sector + (bytes >> 9)};
  if (operation >= FIRST_DRIVER_OPERATION || !target.zone_sectors) {
    count(&counters.ranges_unknown);
    return (struct sector_range){sector, sector + (bytes >> 9)};
  }
  if (bytes == 0 && resets_all_zones(operation, sector)) return (struct sector_range){0, ~0ULL};
  return (struct sector_range){sector, sector + target.zone_sectors};
}

/// Bios of one slab lie side by side, and so do their records: few pages of the table are in use, whose
/// addresses the processor has at hand. A hash that scatters took a walk through page tables for each.
static struct TrackerBucket* bucket_of(__u64 bio, __u32 step) {
  __u32 low;  // a number: the verifier lets nobody shift pointers
  asm("%0 = %1" : "=w"(low) : "w"((__u32)bio));
  const __u32 index = ((low >> BIO_SHIFT) + step) & target.bucket_mask;
  return bpf_map_lookup_elem(&records, &index);
}

struct place {
  struct TrackerBucket* bucket;
  int number;
};

/// Where the bio's record stands, or no bucket.
static __always_inline struct place find(__u64 bio) {
  for (__u32 step = 0; step < BUCKETS_TRIED; ++step) {
    struct TrackerBucket* bucket = bucket_of(bio, step);
    if (!bucket) break;
    for (int i = 0; i < TRACKER_BUCKET_RECORDS; ++i) {
      if (bucket->bios[i] == bio) return (struct place){bucket, i};
    }
    if (!bucket->overflowed) break;
  }
  return (struct place){NULL, 0};
}

static __always_inline struct sector_range recorded_at(struct place place) {
  const __u64 first = place.bucket->first_sectors[place.number];
  const __u32 sectors = place.bucket->sectors[place.number];
  return (struct sector_range){first, sectors == TRACKER_TO_THE_END ? ~0ULL : first + sectors};
}

static __always_inline void record_at(struct place place, struct sector_range range) {
  const __u64 sectors = range.end - range.sector;
  place.bucket->first_sectors[place.number] = range.sector;
  place.bucket->sectors[place.number] = sectors < TRACKER_TO_THE_END ? sectors : TRACKER_TO_THE_END;
}

/// Whoever reads the address and not yet the range takes the write for one that is queued later.
static __always_inline bool insert(__u64 bio, struct sector_range range) {
  for (__u32 step = 0; step < BUCKETS_TRIED; ++step) {
    struct TrackerBucket* bucket = bucket_of(bio, step);
    if (!bucket) break;
    for (int i = 0; i < TRACKER_BUCKET_RECORDS; ++i) {
      if (bucket->bios[i] || __sync_val_compare_and_swap(&bucket->bios[i], 0, bio)) continue;
      record_at((struct place){bucket, i}, range);
      return true;
    }
    bucket->overflowed = 1;
  }
  return false;
}

static __always_inline bool covers(struct sector_range range, struct sector_range other) {
  return range.sector <= other.sector && range.end >= other.end;
}

/// `part`: of a bio that is being split. device-mapper goes on with the remainder as the very bio that was
/// queued, and tells of one end only, that of all its parts: so what the bio was queued with stays on record.
static void remember(struct bio* bio, bool part) {
  const struct sector_range range = range_of(bio->bi_opf, bio->bi_iter.bi_sector, bio->bi_iter.bi_size);
  const struct place place = find((__u64)bio);
  if (!place.bucket) {
    if (!insert((__u64)bio, range)) count(&counters.records_refused);
    return;
  }
  const struct sector_range old = recorded_at(place);
  if (part && covers(old, range)) return;
  mark(old);  // its end was not seen, and the bio serves again
  count(&counters.ends_unseen);
  record_at(place, range);
}

/// Marked first, cleared then: whoever finds no record finds the mark.
static __always_inline void end(struct place place, bool whole) {
  mark(recorded_at(place));
  if (whole) *(volatile __u64*)&place.bucket->bios[place.number] = 0;
}

SEC("tp_btf/block_bio_queue")
int BPF_PROG(on_bio_queue, struct bio* bio) {
  if (changes_data(bio->bi_opf) && is_target(bio->bi_bdev->bd_disk)) remember(bio, false);
  return 0;
}

/// A part that is split off is a bio of its own, of which no queueing is told.
SEC("tp_btf/block_split")
int BPF_PROG(on_split, struct bio* bio) {
  if (changes_data(bio->bi_opf) && is_target(bio->bi_bdev->bd_disk)) remember(bio, true);
  return 0;
}

struct walk_context {
  struct bio* bio;
  unsigned int flags, bytes_left;
  bool is_target;
};

/// The end of the request's next bio, or of a part of it.
static void end_one(struct walk_context* context, __u64 bio, __u64 sector, unsigned int bytes) {
  const struct place place = find(bio);
  if (place.bucket) {
    end(place, bytes <= context->bytes_left);
  } else if (context->is_target) {  // queued before the tracker came
    mark(range_of(context->flags, sector, bytes));
  }
  context->bytes_left -= bytes < context->bytes_left ? bytes : context->bytes_left;
}

/// A request may end in parts, and holds many bios, which need not lie side by side (discards).
static long end_of_bio(__u32 index, void* data) {
  struct walk_context* context = data;
  struct bio* bio = context->bio;
  if (!bio || !context->bytes_left) return 1;
  end_one(context, (__u64)bio, BPF_CORE_READ(bio, bi_iter.bi_sector), BPF_CORE_READ(bio, bi_iter.bi_size));
  context->bio = BPF_CORE_READ(bio, bi_next);
  if (index == BIOS_IN_REQUEST_MAX - 1 && context->bio && context->bytes_left)
    count(&counters.ranges_unknown);
  return 0;
}

SEC("tp_btf/block_rq_complete")
int BPF_PROG(on_request_complete, struct request* request, int error, unsigned int bytes) {
  const unsigned int flags = request->cmd_flags;
  if (!changes_data(flags)) return 0;
  const struct gendisk* disk = request->q->disk;
  struct walk_context context = {.flags = flags, .bytes_left = bytes};
  context.is_target = disk && is_target(disk);
  if ((flags & OPERATION_MASK) >= FIRST_DRIVER_OPERATION) {
    if (context.is_target) count(&counters.ranges_unknown);
    return 0;
  }
  struct bio* const first = request->bio;
  if (!first) return 0;
  // Most have but one.
  end_one(&context, (__u64)first, first->bi_iter.bi_sector, first->bi_iter.bi_size);
  context.bio = first->bi_next;
  if (context.bio && context.bytes_left) bpf_loop(BIOS_IN_REQUEST_MAX, end_of_bio, &context, 0);
  return 0;
}

/// A part that nobody told of the splitting of (md's) leads to the whole, which ends after all its parts.
static bool whole_stands(const struct bio* part) {
  return part->bi_private && find((__u64)part->bi_private).bucket;
}

/// Of devices without requests. By now the bio has forgotten its range.
SEC("tp_btf/block_bio_complete")
int BPF_PROG(on_bio_complete, struct request_queue* queue, struct bio* bio) {
  if (!changes_data(bio->bi_opf)) return 0;
  const struct place place = find((__u64)bio);
  if (place.bucket)
    end(place, true);
  else if (bio->bi_bdev && is_target(bio->bi_bdev->bd_disk) && !whole_stands(bio))
    count(&counters.ends_unmatched);
  return 0;
}
