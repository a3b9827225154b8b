// SPDX-License-Identifier: Apache-2.0
// How long the change bitmap takes: to scan 64 TiB that are nearly clean, and to hand out a volume that is
// all dirty. Medians of several rounds. No test: it prints, and judges nothing.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <functional>
#include <vector>

#include "bitmap/change_bitmap.h"
#include "blockio/base/units.h"

namespace {

using namespace blockferry;
using Seconds = std::chrono::duration<double>;

constexpr std::uint64_t granule_bytes = 4 * KiB;

double median_seconds(const std::function<void()>& prepare, const std::function<void()>& measured) {
  std::vector<double> times;
  for (int round = 0; round < 9; ++round) {
    prepare();
    const auto start = std::chrono::steady_clock::now();
    measured();
    times.push_back(Seconds(std::chrono::steady_clock::now() - start).count());
  }
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

void scan_nearly_empty() {
  constexpr std::uint64_t granules = 64 * TiB / granule_bytes;
  ChangeBitmap bitmap(granules);
  for (const std::uint64_t count : {0, 1, 10, 100, 1000}) {
    const auto mark = [&] {
      for (std::uint64_t i = 0; i < count; ++i) bitmap.set({(2 * i + 1) * (granules / (2 * count)), 1});
    };
    const auto claim_all = [&] {
      std::uint64_t at = 0;
      while (const auto range = bitmap.claim(at, UINT64_MAX)) at = range->end();
    };
    std::printf("64 TiB, %5llu granules dirty: claimed in %9.2f us\n", static_cast<unsigned long long>(count),
                median_seconds(mark, claim_all) * 1e6);
  }
}

void claim_dense() {
  constexpr std::uint64_t volume_bytes = 1 * TiB;
  ChangeBitmap bitmap(volume_bytes / granule_bytes);
  for (const std::uint64_t run_bytes : {64 * KiB, 1 * MiB, 64 * MiB}) {
    const double seconds = median_seconds([&] { bitmap.set_all(); },
                                          [&] {
                                            while (bitmap.claim(0, run_bytes / granule_bytes)) {
                                            }
                                          });
    std::printf("1 TiB all dirty, in runs of %8s: %8.2f ms, %6.1f GB of volume per ms\n",
                format_size(run_bytes).c_str(), seconds * 1e3, double(volume_bytes) / 1e9 / (seconds * 1e3));
  }
  const auto nothing = [] {};
  std::printf("1 TiB set at once: %.2f ms\n",
              median_seconds([&] { bitmap.clear_all(); }, [&] { bitmap.set_all(); }) * 1e3);
  std::printf("1 TiB set again: %.2f ms\n", median_seconds(nothing, [&] { bitmap.set_all(); }) * 1e3);
}

}  // namespace

int main() {
  scan_nearly_empty();
  claim_dense();
  return 0;
}
