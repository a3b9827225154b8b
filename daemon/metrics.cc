// SPDX-License-Identifier: Apache-2.0
#include "daemon/metrics.h"

#include <array>
#include <cmath>
#include <sstream>
#include <utility>

#include <prometheus/counter.h>
#include <prometheus/family.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>
#include <prometheus/text_serializer.h>

#include "daemon/process_facts.h"

namespace blockferry {
namespace {

using prometheus::ClientMetric;
using prometheus::MetricFamily;
using prometheus::MetricType;

constexpr std::size_t code_count = static_cast<std::size_t>(ErrorCode::internal) + 1;
constexpr std::size_t state_count = static_cast<std::size_t>(RunState::rolled_back) + 1;
constexpr std::size_t pass_kind_count = static_cast<std::size_t>(PassKind::final) + 1;

using prometheus::Counter;
using prometheus::Histogram;

/// The engine's buckets: bucket i ends at 2^i × 8 µs, the last has no end.
Histogram::BucketBoundaries latency_bounds() {
  Histogram::BucketBoundaries bounds;
  for (std::size_t i = 0; i + 1 < Latencies::buckets; ++i)
    bounds.push_back(std::ldexp(8e-6, static_cast<int>(i)));
  return bounds;
}

const Histogram::BucketBoundaries checkpoint_bounds{0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1,
                                                    0.25,  0.5,    1,     2.5,  5,     10,   30};

void add_latencies(Histogram& histogram, const Latencies& before, const Latencies& now) {
  std::vector<double> increments;
  for (std::size_t i = 0; i < Latencies::buckets; ++i)
    increments.push_back(static_cast<double>(now.counts[i] - before.counts[i]));
  histogram.ObserveMultiple(increments, now.seconds_sum - before.seconds_sum);
}

void add(Counter& counter, std::uint64_t before, std::uint64_t now) {
  counter.Increment(static_cast<double>(now - before));
}

MetricFamily family(const char* name, const char* help, MetricType type) {
  MetricFamily made;
  made.name = name;
  made.help = help;
  made.type = type;
  return made;
}

MetricFamily gauges(const char* name, const char* help) {
  return family(name, help, MetricType::Gauge);
}

ClientMetric gauge(double value, std::vector<ClientMetric::Label> labels = {}) {
  ClientMetric metric;
  metric.label = std::move(labels);
  metric.gauge.value = value;
  return metric;
}

std::vector<ClientMetric::Label> run_labels(const RunStatus& run) {
  return {{"run", run.id}, {"name", run.request.name}};
}

/// What a run is, as labels; the value says nothing.
ClientMetric description_of(const RunStatus& run) {
  auto labels = run_labels(run);
  labels.push_back({"mode", run.mode});
  labels.push_back({"tracker", run.tracker});
  return gauge(1, std::move(labels));
}

MetricFamily runs_by_state(const std::vector<RunStatus>& runs) {
  std::array<unsigned, state_count> counts{};
  for (const auto& run : runs) ++counts[static_cast<std::size_t>(run.state)];
  auto result = gauges("blockferry_runs", "Runs that ferryd knows, by state.");
  for (std::size_t i = 0; i < state_count; ++i)
    result.metric.push_back(gauge(counts[i], {{"state", run_state_name(static_cast<RunState>(i))}}));
  return result;
}

/// Of runs that have not ended: ended ones would pile up series that never change again.
void append_run_gauges(const std::vector<RunStatus>& runs, std::vector<MetricFamily>& families) {
  auto dirty = gauges("blockferry_run_dirty_granules", "Granules that still are to be copied.");
  auto granule = gauges("blockferry_run_granule_bytes", "The size of a run's granule.");
  auto in_flight = gauges("blockferry_run_io_in_flight", "Requests that the kernel has not given back.");
  auto progress = gauges("blockferry_run_progress_ratio", "The part of the work known now that is done.");
  auto bad = gauges("blockferry_run_bad_ranges", "Unreadable ranges of the source that were skipped.");
  auto dirty_rate = gauges("blockferry_run_dirty_bytes_per_second",
                           "How fast a live source was written between the last passes.");
  auto predicted =
      gauges("blockferry_run_predicted_pause_seconds",
             "The pause of a live source that a cutover at the end of the last pass would take.");
  auto pause = gauges("blockferry_run_last_pause_seconds",
                      "The pause of a live source in its last cutover or rehearsal.");
  auto info = gauges("blockferry_run_info", "A run's mode, and the tracker that serves it; always 1.");
  auto passes =
      gauges("blockferry_run_passes", "Passes that a run has begun; of very many, the last are one.");
  for (const auto& run : runs) {
    // A run that is kept tells its last pause as long as it stands.
    if (run.downtime_ms) pause.metric.push_back(gauge(*run.downtime_ms / 1000, run_labels(run)));
    if (run_state_ended(run.state)) continue;
    info.metric.push_back(description_of(run));
    passes.metric.push_back(gauge(static_cast<double>(run.passes.size()), run_labels(run)));
    if (run.dirty_bytes_per_second)
      dirty_rate.metric.push_back(gauge(static_cast<double>(*run.dirty_bytes_per_second), run_labels(run)));
    if (run.predicted_downtime_ms)
      predicted.metric.push_back(gauge(*run.predicted_downtime_ms / 1000, run_labels(run)));
    dirty.metric.push_back(gauge(static_cast<double>(run.granules_dirty), run_labels(run)));
    granule.metric.push_back(gauge(static_cast<double>(run.granule_bytes), run_labels(run)));
    in_flight.metric.push_back(gauge(run.io_in_flight, run_labels(run)));
    progress.metric.push_back(gauge(run.progress, run_labels(run)));
    bad.metric.push_back(gauge(static_cast<double>(run.bad_ranges.size()), run_labels(run)));
  }
  for (auto* made :
       {&info, &passes, &dirty, &granule, &in_flight, &progress, &bad, &dirty_rate, &predicted, &pause})
    if (!made->metric.empty()) families.push_back(std::move(*made));
}

void append_process(std::vector<MetricFamily>& families) {
  const ProcessFacts facts = read_process_facts();
  const auto append = [&](MetricFamily made, double value) {
    made.metric.push_back(gauge(value));
    families.push_back(std::move(made));
  };
  auto cpu =
      family("process_cpu_seconds_total", "User and system CPU time spent, in seconds.", MetricType::Counter);
  cpu.metric.emplace_back().counter.value = facts.cpu_seconds;
  families.push_back(std::move(cpu));
  append(gauges("process_resident_memory_bytes", "Resident memory size in bytes."),
         static_cast<double>(facts.resident_bytes));
  append(gauges("process_start_time_seconds", "Start time of the process since the Unix epoch, in seconds."),
         facts.start_time_seconds);
  append(gauges("process_open_fds", "Number of open file descriptors."), facts.open_descriptors);
  auto build = gauges("blockferry_build_info", "The version that runs; always 1.");
  build.metric.push_back(gauge(1, {{"version", blockferry_version()}}));
  families.push_back(std::move(build));
}

}  // namespace

struct Metrics::Parts {
  prometheus::Registry registry;

  Counter& counter(const char* name, const char* help) {
    return prometheus::BuildCounter().Name(name).Help(help).Register(registry).Add({});
  }
  prometheus::Family<Counter>& counters(const char* name, const char* help) {
    return prometheus::BuildCounter().Name(name).Help(help).Register(registry);
  }

  Counter& read =
      counter("blockferry_read_bytes_total", "Bytes read: from sources, and from targets when verifying.");
  Counter& written = counter("blockferry_written_bytes_total", "Bytes of data written to targets.");
  Counter& zeroed = counter("blockferry_zeroed_bytes_total", "Bytes zeroed on targets without writing data.");
  Counter& verified = counter("blockferry_verified_bytes_total", "Bytes read back and compared.");
  Counter& mismatches =
      counter("blockferry_checksum_mismatches_total", "Granules whose content was not as recorded.");
  Counter& audit_misses = counter("blockferry_audit_misses_total",
                                  "Granules of live sources written without the tracker's knowing.");
  Counter& tracker_losses =
      counter("blockferry_tracker_losses_total",
              "Events that a tracker could not see; each time everything was compared.");
  Counter& retries = counter("blockferry_io_retries_total", "Requests that were tried again.");

  prometheus::Family<Counter>& io_errors = counters("blockferry_io_errors_total", "Requests that failed.");
  Counter& read_errors = io_errors.Add({{"operation", "read"}});
  Counter& write_errors = io_errors.Add({{"operation", "write"}});

  prometheus::Family<Histogram>& latency = prometheus::BuildHistogram()
                                               .Name("blockferry_io_latency_seconds")
                                               .Help("From a request's submission to its completion.")
                                               .Register(registry);
  Histogram& read_latency = latency.Add({{"operation", "read"}}, latency_bounds());
  Histogram& write_latency = latency.Add({{"operation", "write"}}, latency_bounds());
  Histogram& checkpoint = prometheus::BuildHistogram()
                              .Name("blockferry_checkpoint_seconds")
                              .Help("Flushing the targets and making the state durable.")
                              .Register(registry)
                              .Add({}, checkpoint_bounds);

  // Each series from the start at 0: a rate over the first increment would miss it otherwise.
  std::vector<Counter*> passes, errors, ended;

  Parts() {
    auto& pass_family = counters("blockferry_passes_total", "Passes finished, by kind.");
    for (std::size_t i = 0; i < pass_kind_count; ++i)
      passes.push_back(&pass_family.Add({{"kind", pass_kind_name(static_cast<PassKind>(i))}}));
    auto& error_family = counters("blockferry_errors_total", "Errors that ended a run or a target, by code.");
    for (std::size_t i = 0; i < code_count; ++i)
      errors.push_back(&error_family.Add({{"code", error_code_name(static_cast<ErrorCode>(i))}}));
    auto& ended_family = counters("blockferry_runs_ended_total", "Runs that ended, by their last state.");
    for (std::size_t i = 0; i < state_count; ++i) {
      const auto state = static_cast<RunState>(i);
      ended.push_back(run_state_ended(state) ? &ended_family.Add({{"state", run_state_name(state)}})
                                             : nullptr);
    }
  }
};

Metrics::Metrics() : parts_(std::make_unique<Parts>()) {}
Metrics::~Metrics() = default;

void Metrics::add_io(const CopyEngineStats& before, const CopyEngineStats& now) {
  add(parts_->read, before.bytes_read, now.bytes_read);
  add(parts_->written, before.bytes_written, now.bytes_written);
  add(parts_->zeroed, before.bytes_zeroed, now.bytes_zeroed);
  add(parts_->read_errors, before.read_errors, now.read_errors);
  add(parts_->write_errors, before.write_errors, now.write_errors);
  add(parts_->retries, before.retries, now.retries);
  add_latencies(parts_->read_latency, before.reads, now.reads);
  add_latencies(parts_->write_latency, before.writes, now.writes);
}

void Metrics::add_verified(std::uint64_t bytes, std::uint64_t mismatches) {
  add(parts_->verified, 0, bytes);
  add(parts_->mismatches, 0, mismatches);
}

void Metrics::add_tracker_losses(std::uint64_t count) {
  add(parts_->tracker_losses, 0, count);
}

void Metrics::add_audit_misses(std::uint64_t granules) {
  add(parts_->audit_misses, 0, granules);
}

void Metrics::add_pass(PassKind kind) {
  parts_->passes[static_cast<std::size_t>(kind)]->Increment();
}

void Metrics::add_checkpoint(double seconds) {
  parts_->checkpoint.Observe(seconds);
}

void Metrics::add_run_ended(RunState state) {
  if (Counter* counter = parts_->ended[static_cast<std::size_t>(state)]) counter->Increment();
}

void Metrics::add_error(ErrorCode code) {
  parts_->errors[static_cast<std::size_t>(code)]->Increment();
}

std::string Metrics::text(const std::vector<RunStatus>& runs, bool can_track_live) const {
  auto families = parts_->registry.Collect();
  families.push_back(runs_by_state(runs));
  auto live =
      gauges("blockferry_live_tracking_available",
             "Whether writes to volumes in use can be tracked here; `ferryctl devices` says why not.");
  live.metric.push_back(gauge(can_track_live ? 1 : 0));
  families.push_back(std::move(live));
  append_run_gauges(runs, families);
  append_process(families);
  std::ostringstream out;
  prometheus::TextSerializer().Serialize(out, families);
  return out.str();
}

}  // namespace blockferry
