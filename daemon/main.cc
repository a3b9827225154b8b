// SPDX-License-Identifier: Apache-2.0
// ferryd: options, one claimed state directory, the manager, the API; then waits for signals.
//
// Threads: this one (signals, watchdog), the API's, the manager's keeper, one a run, and one a commit of
// durable state.
#include <cstdio>
#include <filesystem>

#include <fcntl.h>
#include <signal.h>
#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>
#include <sys/file.h>
#include <sys/resource.h>
#include <unistd.h>

#include "bitmap/storage.h"
#include "blockio/base/file_descriptor.h"
#include "daemon/api_server.h"
#include "daemon/config.h"
#include "daemon/manager.h"
#include "daemon/service.h"

namespace blockferry {

namespace {

constexpr Nanoseconds stop_patience = std::chrono::seconds(5);

void set_up_log(const std::string& level) {
  auto logger = spdlog::stderr_logger_mt("ferryd");
  // Under systemd the journal keeps the time.
  logger->set_pattern(::getenv("JOURNAL_STREAM") != nullptr ? "%l: %v" : "%Y-%m-%d %H:%M:%S.%e %l: %v");
  logger->set_level(spdlog::level::from_str(level));
  logger->flush_on(spdlog::level::info);
  spdlog::set_default_logger(std::move(logger));
}

/// The limits that a daemon with many devices and registered buffers needs; as far as they are granted.
void raise_limits() {
  for (const auto resource : {RLIMIT_NOFILE, RLIMIT_MEMLOCK}) {
    rlimit limit{};
    if (::getrlimit(resource, &limit) != 0) continue;
    limit.rlim_cur = limit.rlim_max;
    ::setrlimit(resource, &limit);
  }
}

/// Held as long as the process lives: two ferryds on one state directory would undo each other's work.
Result<FileDescriptor> claim_state_directory(const std::string& path) {
  FileDescriptor lock(::open((path + "/lock").c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
  if (!lock.valid()) return fail(error_from_errno(errno, "open", path + "/lock"));
  if (::flock(lock.get(), LOCK_EX | LOCK_NB) != 0) {
    return fail(make_error(ErrorCode::busy, "use state directory", path,
                           "another ferryd uses it; give this one a --state-dir of its own"));
  }
  return lock;
}

void log_ended(const RunStatus& status) {
  const std::string targets = status.targets.empty() ? "" : status.targets.front().uri;
  if (status.state == RunState::failed) {
    spdlog::error("run {} ({} to {}) failed: {}", status.id, status.source_uri, targets,
                  status.error ? status.error->message() : "");
  } else {
    spdlog::info(
        "run {} ({} to {}) {}: {} copied, {} mismatches", status.id, status.source_uri, targets,
        run_state_ended(status.state) ? run_state_name(status.state) : "stopped, to be taken up again",
        format_size(status.bytes_copied), status.granules_mismatched);
  }
}

ManagerOptions manager_options(const Config& config) {
  ManagerOptions options;
  options.runs_max = config.runs_max;
  options.tls_certificates = config.tls_certificates;
  options.tls_psk_file = config.tls_psk_file;
  options.memory_bytes_max = config.memory_bytes_max;
  options.io_engine = config.io_engine;
  options.runtime_directory = std::filesystem::path(config.socket_path).parent_path();
  options.limits.checkpoint_interval = config.checkpoint_interval;
  options.limits.stall_warning = config.stall_warning;
  options.on_run_ended = log_ended;
  return options;
}

/// Until SIGTERM or SIGINT; meanwhile the watchdog is told that the manager answers.
void wait_for_end(const sigset_t& signals, Manager& manager) {
  const Nanoseconds interval = watchdog_interval();
  const auto pause = interval.count() > 0 ? interval : Nanoseconds(std::chrono::hours(1));
  const timespec timeout{std::chrono::duration_cast<std::chrono::seconds>(pause).count(),
                         (pause % std::chrono::seconds(1)).count()};
  for (;;) {
    const int signal = ::sigtimedwait(&signals, nullptr, &timeout);
    if (signal == SIGTERM || signal == SIGINT) return;
    manager.run_count();
    notify_alive();
  }
}

int failed(const Error& error) {
  std::fprintf(stderr, "ferryd: %s\n", error.message().c_str());
  return error.code == ErrorCode::invalid_argument ? 2 : 1;
}

int run(const Config& config) {
  set_up_log(config.log_level);
  raise_limits();
  // Blocked before any thread starts, so that every thread inherits it and only this one takes them.
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  ::pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  ::signal(SIGPIPE, SIG_IGN);

  auto state = open_state_directory(config.state_dir, true);
  if (!state) return failed(state.error());
  auto lock = claim_state_directory(config.state_dir);
  if (!lock) return failed(lock.error());
  auto manager = Manager::create(**state, manager_options(config));
  if (!manager) return failed(manager.error());

  ApiServerOptions server_options;
  server_options.socket_path = config.socket_path;
  server_options.metrics_listen = config.metrics_listen;
  server_options.group = config.group;
  auto activated = activated_socket();
  if (!activated) return failed(activated.error());
  server_options.socket_fd = *activated;
  auto server = ApiServer::create(server_options, **manager);
  if (!server) return failed(server.error());

  (*manager)->start();
  (*server)->start();
  spdlog::info("ferryd " BLOCKFERRY_VERSION " ready on {}, state in {}, metrics on {}", config.socket_path,
               config.state_dir, (*server)->metrics_address());
  notify_ready();
  wait_for_end(signals, **manager);

  notify_stopping();
  spdlog::info("stopping: runs make a checkpoint and go on when ferryd is back");
  const bool api_stopped = (*server)->stop();
  if (!(*manager)->stop(stop_patience) || !api_stopped) {
    spdlog::warn("a device still does not answer: leaving without it");
    std::fflush(nullptr);
    ::_exit(0);
  }
  return 0;
}

}  // namespace

}  // namespace blockferry

int main(int argc, char** argv) {
  auto config = blockferry::read_config(argc, argv);
  if (!config) return blockferry::failed(config.error());
  if (!*config) return 0;
  return blockferry::run(**config);
}
