// SPDX-License-Identifier: Apache-2.0
#include "bitmap/ebpf_tracker.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <span>
#include <thread>

#include <bpf/bpf.h>
#include <bpf/libbpf.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>

#include "bitmap/change_tracker.h"
#include "blockio/base/check.h"
#include "blockio/base/clock.h"
#include "blockio/base/file_descriptor.h"
#include "change_tracker.skel.h"  // made from change_tracker.bpf.c

namespace blockferry {

namespace {

constexpr std::uint64_t sector_bytes = 512;
constexpr std::size_t page_bytes = 4096;
constexpr std::uint64_t page_words = ChangeBitmap::page_bits / 64;

/// Room for three times as many: some buckets are full long before others.
unsigned buckets_for(unsigned queued_writes_max) {
  return std::bit_ceil(queued_writes_max);
}

Result<std::uint64_t> number_in(const std::filesystem::path& file, const std::string& device) {
  std::ifstream in(file);
  std::uint64_t value = 0;
  if (in >> value) return value;
  return fail(make_error(ErrorCode::unsupported, "read " + file.string(), device,
                         "this kernel does not tell what tracking needs (5.15 and later do)"));
}

/// Of a disk that is written in zones.
std::uint64_t zone_bytes_of(const std::filesystem::path& disk) {
  std::string model;
  std::uint64_t sectors = 0;
  std::ifstream(disk / "queue/zoned") >> model;
  if (model.empty() || model == "none") return 0;
  std::ifstream(disk / "queue/chunk_sectors") >> sectors;
  return sectors * sector_bytes;
}

/// Such a kernel does not say so: it does not know the functions any more that read its memory.
bool keeps_its_memory_confidential() {
  std::string modes;
  std::getline(std::ifstream("/sys/kernel/security/lockdown"), modes);
  return modes.find("[confidentiality]") != std::string::npos;
}

Error kernel_error(int errno_value, const char* operation) {
  Error error = error_from_errno(errno_value, operation, "");
  error.code = ErrorCode::unsupported;
  if (keeps_its_memory_confidential())
    error.hint =
        "this kernel is locked down for confidentiality; tracking live volumes is possible up to integrity";
  else if (errno_value == EPERM || errno_value == EACCES)
    error.hint = "tracking live volumes needs CAP_BPF and CAP_PERFMON";
  else if (errno_value == ENOENT || errno_value == ESRCH || errno_value == EINVAL)
    error.hint = "tracking live volumes needs a kernel with BTF, 5.17 or later";
  return error;
}

}  // namespace

Result<TrackedRange> tracked_range_of(const std::string& device) {
  struct stat status {};
  if (::stat(device.c_str(), &status) != 0) return fail(error_from_errno(errno, "look at", device));
  if (!S_ISBLK(status.st_mode))
    return fail(make_error(ErrorCode::unsupported, "track writes to", device, "it is not a block device"));
  std::error_code code;
  const auto own = std::filesystem::canonical(
      "/sys/dev/block/" + std::to_string(major(status.st_rdev)) + ":" + std::to_string(minor(status.st_rdev)),
      code);
  if (code) return fail(error_from_errno(code.value(), "find in sysfs", device));
  const bool partition = std::filesystem::exists(own / "partition", code);
  const auto disk = partition ? own.parent_path() : own;
  const auto sequence = number_in(disk / "diskseq", device), sectors = number_in(own / "size", device);
  if (!sequence) return fail(sequence.error());
  if (!sectors) return fail(sectors.error());
  TrackedRange range{
      device, own.string(), disk.string(), 0, 0, *sequence, 0, *sectors * sector_bytes, zone_bytes_of(disk)};
  if (partition) {
    const auto start = number_in(own / "start", device);
    if (!start) return fail(start.error());
    range.offset = *start * sector_bytes;
  }
  std::ifstream in(disk / "dev");
  char colon = 0;
  if (!(in >> range.major >> colon >> range.minor))
    return fail(make_error(ErrorCode::unsupported, "find the disk of", device, "sysfs does not name it"));
  return range;
}

namespace {

// What a tracker consists of in the kernel, by the names of the pins.
enum : std::size_t { marks, held, records, counters, target, map_count };
constexpr const char* map_names[map_count] = {"marks", "held", "records", "counters", "target"};
constexpr const char* link_names[] = {"on_request_complete", "on_bio_complete", "on_split", "on_bio_queue"};
constexpr std::size_t link_count = std::size(link_names);

bpf_map_info info_of_map(int fd) {
  bpf_map_info info{};
  std::uint32_t length = sizeof info;
  ::bpf_obj_get_info_by_fd(fd, &info, &length);
  return info;
}

/// How often the kernel left out the program behind a link.
std::uint64_t skipped_by(int link) {
  bpf_link_info link_info{};
  std::uint32_t length = sizeof link_info;
  if (::bpf_obj_get_info_by_fd(link, &link_info, &length) != 0) return 1;  // nobody knows
  const FileDescriptor program(::bpf_prog_get_fd_by_id(link_info.prog_id));
  bpf_prog_info info{};
  length = sizeof info;
  if (!program.valid() || ::bpf_obj_get_info_by_fd(program.get(), &info, &length) != 0) return 1;
  return info.recursion_misses;
}

}  // namespace

/// Descriptors of the maps and links. Where those are not pinned, they go with it.
struct EbpfTracker::Kernel {
  Kernel() = default;
  ~Kernel() {
    for (std::uint64_t* const map : words) {
      if (map != nullptr) ::munmap(map, words_bytes());
    }
    if (buckets != nullptr) ::munmap(buckets, bucket_count * sizeof(TrackerBucket));
    if (counts != nullptr) ::munmap(counts, page_bytes);
  }
  Kernel(const Kernel&) = delete;
  Kernel& operator=(const Kernel&) = delete;

  std::size_t words_bytes() const { return pages * page_words * sizeof(std::uint64_t); }
  int load(const TrackerTarget& wanted);
  int take(change_tracker& skeleton);
  int map_memory();
  int open_pins(const std::string& directory);
  int pin(const std::string& directory) const;

  std::uint64_t pages = 0;
  std::size_t bucket_count = 0;
  FileDescriptor maps[map_count];
  FileDescriptor links[link_count];
  std::uint64_t* words[2] = {nullptr, nullptr};  ///< of `marks` and `held`
  TrackerBucket* buckets = nullptr;
  TrackerCounters* counts = nullptr;
};

namespace {

using Skeleton = std::unique_ptr<change_tracker, void (*)(change_tracker*)>;

Skeleton open_skeleton() {
  libbpf_set_print([](libbpf_print_level, const char*, va_list) { return 0; });  // errors are values here
  return {change_tracker__open(), change_tracker__destroy};
}

}  // namespace

int EbpfTracker::Kernel::load(const TrackerTarget& wanted) {
  const Skeleton skeleton = open_skeleton();
  if (skeleton == nullptr) return errno;
  skeleton->rodata->target = wanted;
  bpf_map__set_max_entries(skeleton->maps.marks, unsigned(pages * page_words));
  bpf_map__set_max_entries(skeleton->maps.held, unsigned(pages * page_words));
  bpf_map__set_max_entries(skeleton->maps.records, wanted.bucket_mask + 1);
  const int status = change_tracker__load(skeleton.get());
  return status != 0 ? -status : take(*skeleton);
}

/// Ends are attached first, beginnings last: a write that was seen to begin will be seen to end.
int EbpfTracker::Kernel::take(change_tracker& skeleton) {
  const auto& programs = skeleton.progs;
  const bpf_program* const ordered[link_count] = {programs.on_request_complete, programs.on_bio_complete,
                                                  programs.on_split, programs.on_bio_queue};
  const bpf_map* const made[map_count] = {skeleton.maps.marks, skeleton.maps.held, skeleton.maps.records,
                                          skeleton.maps.bss, skeleton.maps.rodata};
  for (std::size_t i = 0; i < map_count; ++i) {
    maps[i] = FileDescriptor(::fcntl(bpf_map__fd(made[i]), F_DUPFD_CLOEXEC, 3));
    if (!maps[i].valid()) return errno;
  }
  if (const int error = map_memory(); error != 0) return error;
  for (std::size_t i = 0; i < link_count; ++i) {
    bpf_link* const link = bpf_program__attach(ordered[i]);
    if (link == nullptr) return errno;
    links[i] = FileDescriptor(::fcntl(bpf_link__fd(link), F_DUPFD_CLOEXEC, 3));
    bpf_link__destroy(link);  // the duplicate keeps it
    if (!links[i].valid()) return errno;
  }
  return 0;
}

int EbpfTracker::Kernel::map_memory() {
  const auto map = [this]<typename Value>(std::size_t index, std::size_t bytes, Value*& mapped) {
    void* const memory = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, maps[index].get(), 0);
    if (memory == MAP_FAILED) return false;
    mapped = static_cast<Value*>(memory);
    return true;
  };
  bucket_count = info_of_map(maps[records].get()).max_entries;
  const bool done = map(marks, words_bytes(), words[marks]) && map(held, words_bytes(), words[held]) &&
                    map(records, bucket_count * sizeof(TrackerBucket), buckets) &&
                    map(counters, page_bytes, counts);
  return done ? 0 : errno;
}

int EbpfTracker::Kernel::pin(const std::string& directory) const {
  for (std::size_t i = 0; i < map_count; ++i) {
    if (::bpf_obj_pin(maps[i].get(), (directory + "/" + map_names[i]).c_str()) != 0) return errno;
  }
  for (std::size_t i = 0; i < link_count; ++i) {
    if (::bpf_obj_pin(links[i].get(), (directory + "/" + link_names[i]).c_str()) != 0) return errno;
  }
  return 0;
}

int EbpfTracker::Kernel::open_pins(const std::string& directory) {
  for (std::size_t i = 0; i < map_count; ++i) {
    maps[i] = FileDescriptor(::bpf_obj_get((directory + "/" + map_names[i]).c_str()));
    if (!maps[i].valid()) return errno;
  }
  for (std::size_t i = 0; i < link_count; ++i) {
    links[i] = FileDescriptor(::bpf_obj_get((directory + "/" + link_names[i]).c_str()));
    if (!links[i].valid()) return errno;
  }
  return 0;
}

namespace {

bool same(const TrackerTarget& left, const TrackerTarget& right) {
  return left.layout == right.layout && left.major == right.major && left.first_minor == right.first_minor &&
         left.disk_sequence == right.disk_sequence && left.first_sector == right.first_sector &&
         left.sectors == right.sectors && left.granule_shift == right.granule_shift &&
         left.zone_sectors == right.zone_sectors;
}

TrackerTarget target_of(const TrackedRange& range, std::uint64_t granule_bytes) {
  TrackerTarget made{};
  made.layout = TRACKER_LAYOUT;
  made.major = int(range.major);
  made.first_minor = int(range.minor);
  made.disk_sequence = range.disk_sequence;
  made.first_sector = range.offset / sector_bytes;
  made.sectors = range.bytes / sector_bytes;
  made.granule_shift = unsigned(std::countr_zero(granule_bytes / sector_bytes));
  made.zone_sectors = unsigned(range.zone_bytes / sector_bytes);
  return made;
}

/// By the kernel's own count.
bool nothing_on_its_way(const TrackedRange& range) {
  std::ifstream in(range.sysfs + "/inflight");
  std::uint64_t reads = 0, writes = 0;
  return !(in >> reads >> writes) || writes == 0;
}

}  // namespace

EbpfTracker::EbpfTracker(const TrackedRange& range, std::uint64_t granule_bytes)
    : kernel_(std::make_unique<Kernel>()),
      range_(range),
      granule_bytes_(granule_bytes),
      granule_count_((range.bytes + granule_bytes - 1) / granule_bytes) {
  BLOCKFERRY_CHECK(std::has_single_bit(granule_bytes) && granule_bytes >= 4096, "an odd granule");
  kernel_->pages =
      std::max<std::uint64_t>(1, (granule_count_ + ChangeBitmap::page_bits - 1) / ChangeBitmap::page_bits);
}

EbpfTracker::~EbpfTracker() = default;

Result<std::unique_ptr<EbpfTracker>> EbpfTracker::attach(const TrackedRange& range,
                                                         const EbpfTrackerOptions& options) {
  std::unique_ptr<EbpfTracker> made(new EbpfTracker(range, options.granule_bytes));
  auto wanted = target_of(range, options.granule_bytes);
  wanted.bucket_mask = buckets_for(options.queued_writes_max) - 1;
  if (const int error = made->kernel_->load(wanted); error != 0)
    return fail(kernel_error(error, "load and attach the tracker's programs"));
  made->wait_for_earlier_writes();
  return made;
}

/// Writes that were queued before the programs came end within moments, and nobody has read anything yet. On
/// devices without requests their ranges are not known: what ends later than this counts as a loss. There the
/// kernel's count is no proof: a task that has queued writes may be waiting for a processor. So no such end
/// may have been seen for a while, either.
void EbpfTracker::wait_for_earlier_writes() {
  using namespace std::chrono_literals;
  constexpr Nanoseconds pause = 2ms, quiet_enough = 100ms;
  std::error_code code;
  const bool has_requests = std::filesystem::exists(range_.disk_sysfs + "/mq", code);
  const Nanoseconds patience = has_requests ? 200ms : 2s;
  TrackerCounters& counts = *kernel_->counts;
  const auto unmatched = [&] { return std::atomic_ref(counts.ends_unmatched).load(); };
  Nanoseconds quiet{0};
  bool idle = false;
  std::uint64_t seen = unmatched();
  for (Nanoseconds waited{0}; waited < patience; waited += pause) {
    idle = idle || nothing_on_its_way(range_);
    if (idle && (has_requests || quiet >= quiet_enough)) break;
    std::this_thread::sleep_for(pause);
    const std::uint64_t now = unmatched();
    quiet = now == seen ? quiet + pause : Nanoseconds(0);
    seen = now;
  }
  counts.ends_unmatched_at_start = unmatched();
}

Result<void> EbpfTracker::probe() {
  const Skeleton skeleton = open_skeleton();
  const int error = skeleton == nullptr ? errno : -change_tracker__load(skeleton.get());
  if (error != 0) return fail(kernel_error(error, "load the tracker's programs"));
  return {};
}

Result<void> EbpfTracker::pin(const std::string& directory) {
  // Another tracker's pins may be there: those are not ours to remove.
  if (::mkdir(directory.c_str(), 0700) != 0)
    return fail(error_from_errno(errno, "pin the tracker in", directory));
  if (const int error = kernel_->pin(directory); error != 0) {
    remove_pins(directory);
    return fail(error_from_errno(error, "pin the tracker in", directory));
  }
  return {};
}

void EbpfTracker::remove_pins(const std::string& directory) {
  std::error_code nothing_there;
  std::filesystem::remove_all(directory, nothing_there);
}

Result<std::unique_ptr<EbpfTracker>> EbpfTracker::adopt(const std::string& directory,
                                                        const TrackedRange& range,
                                                        std::uint64_t granule_bytes) {
  std::unique_ptr<EbpfTracker> made(new EbpfTracker(range, granule_bytes));
  Kernel& kernel = *made->kernel_;
  const auto foreign = [&](const char* why) {
    return fail(make_error(ErrorCode::state_damaged, "take up the tracker in", directory, why));
  };
  if (const int error = kernel.open_pins(directory); error != 0) {
    Error gone = error_from_errno(error, "take up the tracker in", directory);
    gone.code = ErrorCode::state_damaged;
    return fail(std::move(gone));
  }
  const std::uint32_t key = 0;
  TrackerTarget found{};
  const auto wanted = target_of(range, granule_bytes);
  if (info_of_map(kernel.maps[target].get()).value_size != sizeof found ||
      ::bpf_map_lookup_elem(kernel.maps[target].get(), &key, &found) != 0 || found.layout != TRACKER_LAYOUT)
    return foreign("another version of Blockferry made it");
  if (!same(found, wanted)) return foreign("it tracks another volume");
  for (const std::size_t index : {marks, held}) {
    if (info_of_map(kernel.maps[index].get()).max_entries != kernel.pages * page_words)
      return foreign("its marks are not those of this volume");
  }
  if (info_of_map(kernel.maps[records].get()).max_entries != found.bucket_mask + 1)
    return foreign("its records are not those of this volume");
  made->give_again_ = true;
  if (const int error = kernel.map_memory(); error != 0)
    return fail(kernel_error(error, "map the tracker's marks"));
  return made;
}

namespace {

bool all_zero(std::span<const std::uint64_t> words) {
  return std::all_of(words.begin(), words.end(), [](std::uint64_t word) { return word == 0; });
}

}  // namespace

/// Held first, cleared then: a crash in between leaves a mark in both. Exactly the bits that were held are
/// cleared, whatever the programs set meanwhile (attack D); their granules are read later than that.
void EbpfTracker::take_marks(std::uint64_t page, ChangeBitmap& dirty) {
  std::uint64_t taken[page_words];
  for (std::uint64_t i = 0; i < page_words; ++i) {
    const std::uint64_t word = page * page_words + i;
    taken[i] = std::atomic_ref(kernel_->words[marks][word]).load();
    if (taken[i] == 0) continue;
    std::atomic_ref(kernel_->words[held][word]).fetch_or(taken[i]);
    std::atomic_ref(kernel_->words[marks][word]).fetch_and(~taken[i]);
  }
  dirty.or_page(page, taken);
}

Result<void> EbpfTracker::collect(ChangeBitmap& dirty) {
  BLOCKFERRY_CHECK(dirty.granule_count() == granule_count_, "a bitmap of another volume");
  const auto now = tracked_range_of(range_.device);
  if (!now || *now != range_) {
    return fail(make_error(ErrorCode::device_gone, "track writes to", range_.device,
                           "it has another size now, or another disk has its name"));
  }
  for (std::uint64_t page = 0; page < kernel_->pages; ++page) {
    const std::uint64_t* const kept = kernel_->words[held] + page * page_words;
    if (give_again_ && !all_zero({kept, page_words}))
      dirty.or_page(page, *reinterpret_cast<const std::uint64_t(*)[page_words]>(kept));
    if (!all_zero({kernel_->words[marks] + page * page_words, page_words})) take_marks(page, dirty);
  }
  give_again_ = false;
  for (const auto& range : queued()) dirty.set(range);
  return {};
}

void EbpfTracker::release() {
  for (std::uint64_t& word : std::span(kernel_->words[held], kernel_->pages * page_words)) {
    if (word != 0) word = 0;
  }
}

std::vector<GranuleRange> EbpfTracker::queued() {
  const std::uint64_t begin = range_.offset / sector_bytes, end = begin + range_.bytes / sector_bytes;
  std::vector<GranuleRange> ranges;
  const auto add = [&](std::uint64_t first_sector, std::uint32_t sectors) {
    const std::uint64_t first = std::max(first_sector, begin);
    const std::uint64_t last = sectors == TRACKER_TO_THE_END ? end : std::min(first_sector + sectors, end);
    if (first >= last) return;
    const std::uint64_t granule = (first - begin) * sector_bytes / granule_bytes_;
    ranges.push_back({granule, ((last - begin) * sector_bytes - 1) / granule_bytes_ + 1 - granule});
  };
  for (TrackerBucket& bucket : std::span(kernel_->buckets, kernel_->bucket_count)) {
    for (std::size_t i = 0; i < TRACKER_BUCKET_RECORDS; ++i) {
      if (std::atomic_ref(bucket.bios[i]).load() != 0) add(bucket.first_sectors[i], bucket.sectors[i]);
    }
  }
  return ranges;
}

bool EbpfTracker::device_idle() {
  return nothing_on_its_way(range_);
}

TrackerLosses EbpfTracker::losses() {
  const TrackerCounters& counts = *kernel_->counts;
  TrackerLosses losses;
  losses.records_refused = counts.records_refused;
  losses.ranges_unknown = counts.ranges_unknown + counts.beyond_marks;
  losses.ends_unmatched = counts.ends_unmatched - counts.ends_unmatched_at_start;
  losses.ends_unseen = counts.ends_unseen;
  for (const auto& link : kernel_->links) losses.programs_skipped += skipped_by(link.get());
  return losses;
}

}  // namespace blockferry
