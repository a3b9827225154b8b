// SPDX-License-Identifier: Apache-2.0
// tracker_cost DEVICE TOGGLES [TRACKED]: attaches and detaches the tracker while somebody writes to the
// device, a second each; prints the writes a second of both, pair by pair. Last comes what the programs take
// by the kernel's own statistics: nanoseconds a write. Those cost something too, hence apart from the pairs.
// With TRACKED the tracker is another device's: its programs are called, and find that there is nothing to
// do.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <set>
#include <thread>

#include <bpf/bpf.h>

#include "bitmap/ebpf_tracker.h"
#include "blockio/base/file_descriptor.h"

namespace {

using namespace blockferry;
using Seconds = std::chrono::duration<double>;

/// Writes completed, by the kernel's count.
double writes_done(const TrackedRange& range) {
  std::ifstream in(range.sysfs + "/stat");
  double value = 0;
  for (int field = 0; field < 5; ++field) in >> value;
  return value;
}

double writes_per_second(const TrackedRange& range) {
  std::this_thread::sleep_for(std::chrono::milliseconds(200));  // until it runs evenly again
  const auto begun = std::chrono::steady_clock::now();
  const double before = writes_done(range);
  std::this_thread::sleep_for(std::chrono::milliseconds(800));
  return (writes_done(range) - before) / Seconds(std::chrono::steady_clock::now() - begun).count();
}

std::set<std::uint32_t> programs() {
  std::set<std::uint32_t> ids;
  for (std::uint32_t id = 0; ::bpf_prog_get_next_id(id, &id) == 0;) ids.insert(id);
  return ids;
}

/// Since they were loaded.
double nanoseconds_of(const std::set<std::uint32_t>& ids) {
  double sum = 0;
  for (const std::uint32_t id : ids) {
    const FileDescriptor program(::bpf_prog_get_fd_by_id(id));
    bpf_prog_info info{};
    std::uint32_t length = sizeof info;
    if (program.valid() && ::bpf_obj_get_info_by_fd(program.get(), &info, &length) == 0)
      sum += double(info.run_time_ns);
  }
  return sum;
}

std::unique_ptr<EbpfTracker> attached(const TrackedRange& range) {
  auto tracker = EbpfTracker::attach(range);
  if (tracker) return std::move(*tracker);
  std::fprintf(stderr, "%s\n", tracker.error().message().c_str());
  std::exit(1);
}

/// Precondition: nobody else loads programs meanwhile.
double nanoseconds_a_write(const TrackedRange& range, const TrackedRange& tracked) {
  const FileDescriptor statistics(::bpf_enable_stats(BPF_STATS_RUN_TIME));
  const auto others = programs();
  const auto tracker = attached(tracked);
  auto own = programs();
  for (const std::uint32_t id : others) own.erase(id);
  const double writes = writes_done(range), nanoseconds = nanoseconds_of(own);
  std::this_thread::sleep_for(std::chrono::seconds(2));
  return (nanoseconds_of(own) - nanoseconds) / (writes_done(range) - writes);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3 && argc != 4) return 2;
  const auto range = tracked_range_of(argv[1]), tracked = tracked_range_of(argv[argc == 4 ? 3 : 1]);
  if (!range || !tracked) {
    std::fprintf(stderr, "%s\n", (range ? tracked : range).error().message().c_str());
    return 1;
  }
  for (int i = 0; i < std::atoi(argv[2]); ++i) {
    const double off = writes_per_second(*range);
    const auto tracker = attached(*tracked);
    std::printf("%.0f %.0f\n", off, writes_per_second(*range));
  }
  std::printf("%.0f\n", nanoseconds_a_write(*range, *tracked));
}
