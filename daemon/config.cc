// SPDX-License-Identifier: Apache-2.0
#include "daemon/config.h"

#include <fstream>
#include <iostream>

#include <boost/program_options.hpp>

#include "blockio/base/units.h"
#include "daemon/messages/messages.h"

namespace blockferry {

namespace {

namespace options = boost::program_options;

constexpr const char* examples = R"(
Examples:
  ferryd --config /etc/blockferry/ferryd.conf
  ferryd --state-dir /tmp/ferry --socket /tmp/ferry.sock --metrics-listen none
)";

struct Texts {
  std::string config, memory_budget, checkpoint_interval, stall_warning, io_engine;
};

options::options_description describe(Config& config, Texts& texts) {
  options::options_description description(
      "ferryd moves block volumes; people drive it with ferryctl.\n\nOptions");
  auto add = description.add_options();
  add("help", "show this help");
  add("version", "show the version");
  add("config", options::value(&texts.config), "read further options from this file, `name = value` a line");
  add("state-dir", options::value(&config.state_dir)->default_value(config.state_dir),
      "where runs are remembered; one ferryd each");
  add("socket", options::value(&config.socket_path)->default_value(default_socket_path),
      "the control socket");
  add("metrics-listen", options::value(&config.metrics_listen)->default_value(config.metrics_listen),
      "ADDR:PORT for Prometheus, or none");
  add("group", options::value(&config.group)->default_value(config.group),
      "members may operate; they are as good as root on the volumes");
  add("max-runs", options::value(&config.runs_max)->default_value(config.runs_max),
      "runs at once; others wait");
  add("memory-budget", options::value(&texts.memory_budget)->default_value("512M"),
      "for the buffers of all runs");
  add("checkpoint-interval", options::value(&texts.checkpoint_interval)->default_value("5s"),
      "at most this much copying is repeated after a crash");
  add("stall-warning", options::value(&texts.stall_warning)->default_value("10s"),
      "report a device that has not answered for so long");
  add("io-engine", options::value(&texts.io_engine)->default_value("auto"), "auto, uring or aio");
  add("tls-certificates", options::value(&config.tls_certificates),
      "of nbds volumes: a directory with ca-cert.pem, client-cert.pem, client-key.pem");
  add("tls-psk-file", options::value(&config.tls_psk_file), "of nbds volumes: a file of USER:KEY lines");
  add("log-level", options::value(&config.log_level)->default_value(config.log_level),
      "error, warning, info or debug");
  return description;
}

Error usage(const std::string& option, const std::string& why) {
  return make_error(ErrorCode::invalid_argument, "read options", option, why + "; see ferryd --help");
}

Result<void> convert(const Texts& texts, Config& config) {
  const auto memory = parse_size(texts.memory_budget);
  if (!memory) return fail(usage("--memory-budget", memory.error().hint));
  const auto interval = parse_duration(texts.checkpoint_interval);
  if (!interval) return fail(usage("--checkpoint-interval", interval.error().hint));
  const auto stall = parse_duration(texts.stall_warning);
  if (!stall) return fail(usage("--stall-warning", stall.error().hint));
  const auto engine = parse_io_engine(texts.io_engine);
  if (!engine) return fail(usage("--io-engine", "it is auto, uring or aio"));
  if (config.runs_max == 0) return fail(usage("--max-runs", "it is at least 1"));
  if (interval->count() == 0) return fail(usage("--checkpoint-interval", "it is more than 0"));
  if (config.log_level != "error" && config.log_level != "warning" && config.log_level != "info" &&
      config.log_level != "debug") {
    return fail(usage("--log-level", "it is error, warning, info or debug"));
  }
  for (const auto* path : {&config.tls_certificates, &config.tls_psk_file}) {
    if (!path->empty() && !path->starts_with('/')) return fail(usage(*path, "an absolute path is needed"));
  }
  config.memory_bytes_max = *memory;
  config.checkpoint_interval = *interval;
  config.stall_warning = *stall;
  config.io_engine = *engine;
  return {};
}

}  // namespace

Result<std::optional<Config>> read_config(int argc, const char* const* argv) {
  Config config;
  Texts texts;
  const auto description = describe(config, texts);
  try {
    options::variables_map values;
    options::store(
        options::command_line_parser(argc, argv)
            .options(description)
            .style(options::command_line_style::unix_style & ~options::command_line_style::allow_guessing)
            .positional({})
            .run(),
        values);
    if (values.count("help") > 0) {
      std::cout << description << examples;
      return std::optional<Config>();
    }
    if (values.count("version") > 0) {
      std::cout << "ferryd " BLOCKFERRY_VERSION "\n";
      return std::optional<Config>();
    }
    if (values.count("config") > 0) {
      const auto path = values["config"].as<std::string>();
      std::ifstream file(path);
      if (!file) return fail(error_from_errno(errno, "read configuration", path));
      options::store(options::parse_config_file(file, description), values);
    }
    options::notify(values);
  } catch (const options::error& error) {
    return fail(usage("", error.what()));
  }
  if (auto done = convert(texts, config); !done) return fail(done.error());
  return std::optional<Config>(config);
}

}  // namespace blockferry
