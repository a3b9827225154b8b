// SPDX-License-Identifier: Apache-2.0
// tracker_cost DEVICE TOGGLES: attaches and detaches the tracker while somebody writes to the device, a
// second each; prints the writes a second of both, pair by pair.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <thread>

#include "bitmap/ebpf_tracker.h"

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

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  const auto range = tracked_range_of(argv[1]);
  if (!range) {
    std::fprintf(stderr, "%s\n", range.error().message().c_str());
    return 1;
  }
  for (int i = 0; i < std::atoi(argv[2]); ++i) {
    const double off = writes_per_second(*range);
    const auto tracker = EbpfTracker::attach(*range);
    if (!tracker) {
      std::fprintf(stderr, "%s\n", tracker.error().message().c_str());
      return 1;
    }
    std::printf("%.0f %.0f\n", off, writes_per_second(*range));
  }
}
