// SPDX-License-Identifier: Apache-2.0
#include "daemon/handover.h"

namespace blockferry {

namespace {

Result<SwapPlan> plan_for(const RunRequest& request, const VolumeNode& source) {
  const auto no = [](const char* why) {
    return fail(make_error(ErrorCode::unsupported, "swap", "the volume", why));
  };
  VolumeNode target;
  if (request.targets.size() != 1) return no("it needs exactly one target");
  if (!request.cutover_cmd.empty() || !request.quiesce_cmd.empty())
    return no("it leaves nothing to do for --cutover-cmd and --quiesce-cmd");
  if (!node_of_path(request.targets[0], target) || !target.block) return no("the target is no block device");
  return plan_swap(source.device, target.device);
}

std::string what_a_swap_leaves(const SwapPlan& plan, const std::string& target) {
  if (!plan.lvm())
    return "its map lasts until the next reboot: from the swap on, what makes it at boot must make it on " +
           target;
  return "with the swap LVM's metadata changes too: " + plan.group + "/" + plan.volume + " and " +
         plan.group + "/" + plan.target_volume +
         " exchange their extents; `lvremove` the latter after `ferryctl commit`";
}

}  // namespace

Handover choose_handover(const RunRequest& request, const VolumeNode& source) {
  Handover handover;
  handover.how = request.quiesce_cmd.empty() ? "fs" : "cmd";
  const bool asked = request.handover == "dm-swap";
  if (!asked && !request.handover.empty()) return handover;
  if (!asked && map_name(source.device).empty()) return handover;
  auto plan = plan_for(request, source);
  if (plan) {
    handover.how = "dm-swap";
    handover.warning = what_a_swap_leaves(*plan, request.targets[0]);
    handover.swap = std::move(*plan);
    return handover;
  }
  const std::string why = plan.error().hint.empty() ? plan.error().message() : plan.error().hint;
  if (asked) {
    handover.refused = "--handover dm-swap: " + why;
  } else {
    handover.warning = "it cannot be swapped onto the target while it is in use: " + why +
                       "; what uses it is cut off at the cutover";
  }
  return handover;
}

}  // namespace blockferry
