// SPDX-License-Identifier: Apache-2.0
#include "daemon/tracker_pins.h"

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <mutex>
#include <random>

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/file.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <unistd.h>

#include "bitmap/ebpf_tracker.h"
#include "blockio/base/file_descriptor.h"
#include "daemon/device_mapper.h"
#include "guard/protocol.h"

namespace blockferry {

namespace {

namespace fs = std::filesystem;

constexpr const char* bpf_filesystem = "/sys/fs/bpf";
constexpr const char* id_file = "tracker-id";

bool is_bpf_filesystem() {
  struct statfs status {};
  return ::statfs(bpf_filesystem, &status) == 0 && status.f_type == BPF_FS_MAGIC;
}

std::string why_tracking_is_missing() {
  // systemd mounts it; other machines may not have.
  if (!is_bpf_filesystem() &&
      ::mount("bpf", bpf_filesystem, "bpf", MS_NOSUID | MS_NODEV | MS_NOEXEC, "mode=700") != 0) {
    return std::string("there is no bpf filesystem, and it cannot be mounted (") + std::strerror(errno) +
           "): mount -t bpf bpf " + bpf_filesystem;
  }
  const std::string directory = std::string(bpf_filesystem) + "/blockferry";
  if (::mkdir(directory.c_str(), 0700) != 0 && errno != EEXIST)
    return directory + " cannot be made: " + std::strerror(errno);
  if (::access(directory.c_str(), W_OK) != 0) return directory + " cannot be written";
  const auto loaded = EbpfTracker::probe();
  return loaded ? "" : loaded.error().message();
}

std::string new_id() {
  static constexpr char letters[] = "0123456789abcdefghjkmnpqrstvwxyz";
  std::random_device random;
  std::string id;
  for (int i = 0; i < 16; ++i) id += letters[random() % 32];
  return id;
}

}  // namespace

std::string live_tracking_missing() {
  static std::mutex mutex;
  static bool found = false;  // guarded by mutex
  const std::lock_guard lock(mutex);
  std::string why = found ? "" : why_tracking_is_missing();
  found = why.empty();
  return why;
}

Result<std::unique_ptr<TrackerPins>> TrackerPins::create(StateDirectory& state) {
  std::string id;
  if (const auto content = state.read_all(id_file, 64)) {
    id.assign(reinterpret_cast<const char*>(content->data()), content->size());
  }
  if (id.size() != 16 || id.find_first_not_of("0123456789abcdefghjkmnpqrstvwxyz") != std::string::npos) {
    id = new_id();
    if (auto done = state.replace(id_file, std::as_bytes(std::span(id))); !done) return fail(done.error());
  }
  return std::unique_ptr<TrackerPins>(new TrackerPins(std::string(bpf_filesystem) + "/blockferry/" + id));
}

std::string TrackerPins::directory_of(const RunRecord& record) const {
  return directory_ + "/" + record.volume_id;
}

Result<std::unique_ptr<LiveTracker>> TrackerPins::attach(const RunRecord& record) {
  if (!live_tracking_missing().empty()) {
    return fail(make_error(ErrorCode::unsupported, "track writes to", record.status.source_uri,
                           live_tracking_missing()));
  }
  const std::string directory = directory_of(record);
  EbpfTracker::remove_pins(directory);
  if (::mkdir(directory_.c_str(), 0700) != 0 && errno != EEXIST)
    return fail(error_from_errno(errno, "make", directory_));
  const auto range = tracked_range_of(record.status.source_uri);
  if (!range) return fail(range.error());
  EbpfTrackerOptions options;
  options.granule_bytes = record.status.granule_bytes;
  auto tracker = EbpfTracker::attach(*range, options);
  if (!tracker) return fail(tracker.error());
  if (auto pinned = (*tracker)->pin(directory); !pinned) return fail(pinned.error());
  return tracker;
}

Result<std::unique_ptr<LiveTracker>> TrackerPins::adopt(const RunRecord& record) {
  const auto range = tracked_range_of(record.status.source_uri);
  if (!range) return fail(range.error());
  auto tracker = EbpfTracker::adopt(directory_of(record), *range, record.status.granule_bytes);
  if (!tracker) return fail(tracker.error());
  return tracker;
}

void TrackerPins::remove(const RunRecord& record) {
  EbpfTracker::remove_pins(directory_of(record));
  ::rmdir(directory_.c_str());  // if it was the last one
}

void TrackerPins::remove_all_but(const std::set<std::string>& names) {
  std::error_code code;
  std::vector<std::string> forgotten;
  for (const auto& entry : fs::directory_iterator(directory_, code)) {
    if (!names.contains(entry.path().filename())) forgotten.push_back(entry.path());
  }
  for (const auto& directory : forgotten) EbpfTracker::remove_pins(directory);
  ::rmdir(directory_.c_str());
}

std::string TrackerPins::map_name(const std::string& run, const char* which) const {
  return "blockferry-" + fs::path(directory_).filename().string() + "-" + run + "-" + which;
}

void TrackerPins::remove_maps_but(const std::set<std::string>& runs) const {
  const std::string prefix = map_name("", "").substr(0, map_name("", "").size() - 1);
  for (const auto& name : private_maps(prefix)) {
    const std::string rest = name.substr(prefix.size());
    if (!runs.contains(rest.substr(0, rest.find('-')))) remove_private_map(name);
  }
}

std::string TrackerPins::mark_directory_of(const RunRecord& record) const {
  return record.status.group.empty() ? directory_of(record) : directory_ + "/" + group_name(record);
}

Result<std::string> TrackerPins::make_mark_directory(const RunRecord& record) {
  const std::string directory = mark_directory_of(record);
  // Of a volume that is tracked elsewhere nothing was pinned before.
  for (const auto& each : {fs::path(directory_).parent_path().string(), directory_, directory}) {
    if (::mkdir(each.c_str(), 0700) != 0 && errno != EEXIST)
      return fail(error_from_errno(errno, "make", each));
  }
  return directory;
}

bool TrackerPins::is_guarded(const RunRecord& record) const {
  const FileDescriptor mark(::open(mark_directory_of(record).c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  return mark.valid() && ::flock(mark.get(), LOCK_EX | LOCK_NB) != 0;
}

void TrackerPins::forget_hand_over(const RunRecord& record) {
  ::rmdir((mark_directory_of(record) + "/" + guard_mark).c_str());
}

std::optional<bool> TrackerPins::handed_over(const RunRecord& record) {
  const std::string directory = mark_directory_of(record);
  if (::access(directory.c_str(), F_OK) != 0) return std::nullopt;
  return ::access((directory + "/" + guard_mark).c_str(), F_OK) == 0;
}

}  // namespace blockferry
