// SPDX-License-Identifier: Apache-2.0
// ferryd's options: the same names on the command line and in the configuration file (`name = value` lines).
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "blockio/base/error.h"
#include "blockio/io_queue.h"

namespace blockferry {

struct Config {
  std::string state_dir = "/var/lib/blockferry";
  std::string socket_path;                        ///< default_socket_path
  std::string metrics_listen = "127.0.0.1:9753";  ///< or "none"
  std::string group = "blockferry";
  unsigned runs_max = 16;
  std::uint64_t memory_bytes_max = 0;
  Nanoseconds checkpoint_interval{0};
  Nanoseconds stall_warning{0};
  IoEngine io_engine = IoEngine::automatic;
  std::string tls_certificates, tls_psk_file;  ///< of nbds volumes whose request does not say
  std::string log_level = "info";
};

/// The command line goes before the file. Nothing: --help or --version was asked for and has been printed.
Result<std::optional<Config>> read_config(int argc, const char* const* argv);

}  // namespace blockferry
