// SPDX-License-Identifier: Apache-2.0
// engine_bench SOURCE TARGET ROUNDS: the bare engine copies SOURCE to TARGET with and without checksums in
// turns, and prints the medians as JSON: what checksums cost. OVERWRITES THE TARGET; tests/bench/compare
// gives it one.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "blockio/base/clock.h"
#include "blockio/copy_engine.h"
#include "blockio/file_device.h"
#include "blockio/io_queue.h"
#include "daemon/buffer_pool.h"

namespace blockferry {

namespace {

template <typename T>
T must(Result<T> result) {
  if (result) return std::move(*result);
  std::fprintf(stderr, "engine_bench: %s\n", result.error().message().c_str());
  std::exit(1);
}

void must_have_worked(const JobResult& result) {
  const bool failed =
      result.read_error || std::any_of(result.target_errors.begin(), result.target_errors.end(),
                                       [](const std::optional<Error>& error) { return error.has_value(); });
  if (!failed) return;
  std::fprintf(stderr, "engine_bench: a job failed\n");
  std::exit(1);
}

void copy_all(CopyEngine& engine, std::uint64_t volume_bytes, std::uint64_t io_bytes) {
  std::vector<JobResult> results;
  std::uint64_t next = 0;
  while (next < volume_bytes || engine.jobs_in_flight() > 0) {
    while (next < volume_bytes && engine.can_start()) {
      const std::uint64_t bytes = std::min(io_bytes, volume_bytes - next);
      engine.start_copy({next, bytes});
      next += bytes;
    }
    results.clear();
    engine.poll(std::chrono::seconds(1), results);
    for (const auto& result : results) must_have_worked(result);
  }
  engine.start_flush();
  while (!engine.take_flush_result()) engine.poll(std::chrono::seconds(1), results);
}

/// Seconds from opening the devices to their being flushed.
double measure(const char* source_path, const char* target_path, bool checksums) {
  CopyEngineOptions options;
  options.io_bytes = 2 * MiB;  // as ferryd does it on quick devices
  options.depth = 4;
  options.checksums = checksums;
  const auto queue = must(make_file_queue(IoEngine::automatic, options.depth * 3));
  FileDeviceOptions target_options;
  target_options.role = DeviceRole::target;
  const auto source = must(open_file_device(*queue, source_path, {}));
  const auto target = must(open_file_device(*queue, target_path, target_options));
  BufferPool pool;
  const auto buffers = must(pool.take(round_up(CopyEngine::memory_bytes(options), 4096)));
  const auto span = buffers->memory();
  std::fill(span.begin(), span.end(), std::byte{0});
  if (auto done = queue->register_memory(span); !done) must(Result<int>(fail(done.error())));

  const auto started = std::chrono::steady_clock::now();
  CopyEngine engine(*queue, system_clock(), *source, {target.get()}, span, options);
  copy_all(engine, source->info().bytes, options.io_bytes);
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

}  // namespace

}  // namespace blockferry

int main(int argc, char** argv) {
  if (argc != 4) {
    std::fprintf(stderr, "usage: engine_bench SOURCE TARGET ROUNDS; overwrites TARGET\n");
    return 2;
  }
  std::vector<double> with, without;
  const int rounds = std::max(1, std::atoi(argv[3]));
  blockferry::measure(argv[1], argv[2], true);  // warms up: page tables, the devices' workers
  for (int round = 0; round < rounds; ++round) {
    // Which goes first changes, so that neither always finds the other's leavings.
    for (const bool checksums : {round % 2 == 0, round % 2 != 0}) {
      (checksums ? with : without).push_back(blockferry::measure(argv[1], argv[2], checksums));
    }
  }
  std::printf("{\"with_seconds\": %.4f, \"without_seconds\": %.4f}\n", blockferry::median(with),
              blockferry::median(without));
  return 0;
}
