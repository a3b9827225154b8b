// SPDX-License-Identifier: Apache-2.0
// Preflight: what stands against a run, what would happen, and what refers to the old disk. Opens nothing for
// writing and changes nothing.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include <nlohmann/json_fwd.hpp>

#include "blockio/base/error.h"
#include "daemon/messages/messages.h"
#include "daemon/swap_plan.h"

namespace blockferry {

struct PreflightFinding {
  std::string device;
  std::string message;  ///< one line: what stands against it, and what to do
};

struct PreflightVolume {
  std::string path;      ///< as asked, absolute
  std::string resolved;  ///< symlinks followed; of a URI: its identity
  std::string kind;      ///< "block", "file", "nbd", "missing"
  std::string identity;
  std::uint64_t bytes = 0;
  std::uint32_t logical_block_bytes = 0;
  std::uint64_t granule_bytes_min = 0;  ///< what is copied at a time must be at least so much
  std::vector<std::string> mounts;      ///< mount points, in any mount namespace
  std::vector<std::string> holders;     ///< dm/md names, "swap", "process 123 (name)", "loop3"
  std::vector<std::string> abilities;   ///< of the server behind a URI, in people's words
  std::string content;                  ///< "ext4", "gpt", "LVM2_member", … or empty
  bool in_use = false;                  ///< mounted, held, or open for writing elsewhere
};

struct PreflightReport {
  PreflightVolume source;
  std::vector<PreflightVolume> targets;
  std::vector<PreflightFinding> refusals;  ///< in the order of importance; empty: the run may start
  std::vector<PreflightFinding> warnings;
  /// What refers to the source's disk by name: fstab and crypttab lines, LVM, multipath, by-id links, UUIDs
  /// the clone doubles.
  std::vector<PreflightFinding> references;
  std::string mode;      ///< "full", "incremental", "hybrid": what it would be
  std::string tracker;   ///< "ebpf", "checksum" or "none": what would serve
  std::string handover;  ///< of a live source, by migrate: "dm-swap", "fs", "qemu" or "cmd"; else empty
  std::optional<SwapPlan> swap;  ///< of "dm-swap"
};

/// A volume that another run of this ferryd uses, by device number or file identity.
struct VolumeInUse {
  std::string path;
  std::string run_id;  ///< empty: of the same request
  bool as_target = false;
};

/// invalid_argument where the request itself makes no sense; everything about the volumes becomes a refusal
/// in the report.
Result<PreflightReport> preflight(const RunRequest& request, const std::vector<VolumeInUse>& in_use);

/// The first refusal as an error of code refused; "" operation forms are made for one line.
Error refusal_error(const PreflightReport& report);

nlohmann::json to_json(const PreflightReport& report);

/// Every volume that can be moved: disks, partitions, dm, md, loop with a backing file.
Result<nlohmann::json> list_devices();

}  // namespace blockferry
