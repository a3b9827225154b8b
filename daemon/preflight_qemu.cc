// SPDX-License-Identifier: Apache-2.0
// Preflight of disks of QEMU guests: QEMU is asked, and changed in nothing.
#include <algorithm>
#include <cerrno>
#include <cstring>

#include "daemon/preflight_rules.h"
#include "daemon/qemu_sources.h"
#include "daemon/quiesced_guest.h"

namespace blockferry {

namespace {

std::string words_of(const Error& error) {
  if (error.code == ErrorCode::io && error.hint.empty()) return std::strerror(error.errno_value);
  return error.hint.empty() ? error.message() : error.hint;
}

GuestOptions guest_options(const RunRequest& request) {
  GuestOptions options;
  options.by_command = !request.quiesce_cmd.empty();
  if (request.kind == RunKind::migrate && request.handover != "cmd") options.target = request.targets.front();
  return options;
}

}  // namespace

bool Preflight::examine_qemu(const std::string& text, Examined& examined, bool as_target) {
  PreflightVolume& volume = examined.volume;
  volume.kind = "qemu";
  volume.resolved = text;
  if (as_target) {
    refuse(text, "a guest's disk is no target: name its image, with the guest switched off");
    return false;
  }
  if (!check_other_runs(examined, as_target)) return false;
  const auto uri = parse_qemu_uri(text);
  if (!uri) {
    refuse(text, uri.error().hint);
    return false;
  }
  examined.client = shared_qmp_client(uri->socket);
  auto node = find_qemu_node(*examined.client, *uri);
  if (!node) {
    refuse(text, words_of(node.error()));
    return false;
  }
  auto identity = qemu_identity(*examined.client, *uri);
  if (!identity) {
    refuse(text, words_of(identity.error()));
    return false;
  }
  volume.bytes = node->bytes;
  volume.identity = std::move(*identity);
  volume.in_use = true;
  // Where QEMU's file is one of this machine's names, too, it is no target.
  if (node->filename.starts_with("/")) node_of_path(node->filename, examined.node);
  volume.holders = {node->device.empty() ? "QEMU" : "the guest's " + node->device};
  examined.guest_node = std::move(*node);
  return true;
}

/// Bitmaps that outlive the run, by the name that the user gave.
void Preflight::check_bitmap_of_guest(const Examined& source) {
  const std::string& uri = source.volume.path;
  const std::string name = bitmap_named_by(uri);
  if (name.empty()) return;
  const QemuNode& node = source.guest_node;
  if (request_.kind == RunKind::migrate) {
    refuse(uri, "bitmap= goes with clone: a guest that is moved leaves its bitmaps behind");
  } else if (node.driver != "qcow2") {
    refuse(uri,
           "the node is of the format " + node.driver + ", and only qcow2 keeps bitmaps: leave bitmap= out");
  } else if (node.bitmap(name) != nullptr) {
    refuse(uri,
           "the image has a bitmap " + name +
               " already that is another program's, and nobody can tell what it covers: choose another name");
  }
}

/// A guest's disk is live, always.
void Preflight::check_qemu_source(const Examined& source) {
  const std::string& uri = source.volume.path;
  if (request_.mode == RunMode::full || request_.tracker == TrackerChoice::checksum ||
      request_.tracker == TrackerChoice::none || request_.tracker == TrackerChoice::ebpf)
    return refuse(uri,
                  "a guest writes to it: only --mode hybrid with --tracker qemu gives a consistent copy");
  if (request_.handover == "fs" || request_.handover == "dm-swap")
    return refuse(uri, "--handover " + request_.handover + " is for volumes of this machine");
  if (request_.handover == "cmd" && request_.cutover_cmd.empty())
    return refuse(uri, "--handover cmd needs a --cutover-cmd");
  const auto unsafe = qemu_export_unsafe(*source.client, source.guest_node);
  if (!unsafe) return refuse(uri, words_of(unsafe.error()));
  if (!unsafe->empty()) return refuse(uri, *unsafe);
  const auto why = quiescing_guest_refused(*source.client, source.guest_node, guest_options(request_));
  if (!why) return refuse(uri, words_of(why.error()));
  if (!why->empty()) return refuse(uri, *why);
  check_bitmap_of_guest(source);
  report_.tracker = "qemu";
  report_.handover = request_.handover == "cmd" ? "cmd" : "qemu";
  if (request_.mode != RunMode::incremental) report_.mode = "hybrid";
}

/// QEMU opens it itself, for its guest.
void Preflight::check_target_of_guest(const Examined& target) {
  if (request_.kind != RunKind::migrate || request_.handover == "cmd" || target.volume.kind != "nbd") return;
  refuse(
      target.volume.path,
      "a guest can be moved to files and block devices only; with --handover cmd a --cutover-cmd hands over");
}

}  // namespace blockferry
