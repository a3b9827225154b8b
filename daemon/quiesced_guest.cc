// SPDX-License-Identifier: Apache-2.0
#include "daemon/quiesced_guest.h"

#include <algorithm>
#include <cerrno>

#include <fcntl.h>
#include <nlohmann/json.hpp>

#include "daemon/qemu_agent.h"

namespace blockferry {

namespace {

using nlohmann::json;

/// As the guard takes it: a command's members, to which it adds an id.
std::string members_of(const json& command) {
  const std::string text = command.dump(-1, ' ', false, json::error_handler_t::replace);
  return text.substr(1, text.size() - 2);
}

json switch_to(const std::string& device, const std::string& node) {
  return {{"execute", "qom-set"}, {"arguments", {{"path", device}, {"property", "drive"}, {"value", node}}}};
}

/// All that is written is on both already: it only gives one's users the other one.
json mirror(const std::string& job, const std::string& from, const std::string& to) {
  return {{"execute", "blockdev-mirror"},
          {"arguments",
           {{"job-id", job},
            {"device", from},
            {"target", to},
            {"sync", "none"},
            {"copy-mode", "write-blocking"},
            {"on-target-error", "report"},
            {"auto-dismiss", false}}}};
}

/// Of all guests: what the guard asks of two that are held together must not wait for one that holds the
/// other.
std::recursive_mutex& talking() {
  static std::recursive_mutex mutex;
  return mutex;
}

class QuiescedGuest : public QuiescedVolume {
 public:
  QuiescedGuest(std::shared_ptr<QemuDisk> disk, const GuestOptions& options)
      : disk_(std::move(disk)), options_(options) {}
  ~QuiescedGuest() override {
    // One that the guest has been moved to is in use, and stays.
    if (has_target_) static_cast<void>(disk_->remove_target());
  }

  Result<void> open();
  std::vector<GuardHold> holds() const override;
  Result<void> sync_ahead() override { return {}; }
  Result<void> settle() override { return {}; }
  void release_without_guard() override;
  void guard_talks(bool begins) override;

 private:
  GuardHold hold_of(const std::string& kind, const FileDescriptor& fd) const;

  const std::shared_ptr<QemuDisk> disk_;
  const GuestOptions options_;
  QemuNode node_;
  FileDescriptor qmp_, agent_;
  bool runs_ = false, has_target_ = false;
};

Result<void> QuiescedGuest::open() {
  auto node = disk_->look();
  if (!node) return fail(node.error());
  node_ = std::move(*node);
  const auto why = quiescing_guest_refused(disk_->client(), node_, options_);
  if (!why) return fail(why.error());
  if (!why->empty()) return fail(make_error(ErrorCode::refused, "cut over", disk_->client().socket(), *why));
  const auto runs = qemu_guest_runs(disk_->client());
  if (!runs) return fail(runs.error());
  runs_ = runs->value_or(false);
  const auto qmp = disk_->client().descriptor();
  if (!qmp) return fail(qmp.error());
  // The client may make its connection anew; the guard's is this one.
  qmp_ = FileDescriptor(::fcntl(*qmp, F_DUPFD_CLOEXEC, 3));
  if (!qmp_.valid())
    return fail(error_from_errno(errno, "duplicate the connection to", disk_->client().socket()));
  if (!options_.by_command && !disk_->uri().agent.empty()) {
    auto agent = connect_to_agent(disk_->uri().agent);
    if (!agent) return fail(agent.error());
    agent_ = std::move(*agent);
  }
  if (options_.target.empty()) return {};
  Result<void> done = disk_->remove_target();  // of an earlier process
  if (done) done = disk_->add_target(options_.target, node_);
  has_target_ = done.has_value();
  return done;
}

GuardHold QuiescedGuest::hold_of(const std::string& kind, const FileDescriptor& fd) const {
  GuardHold hold;
  hold.kind = kind;
  hold.descriptors = {fd.get()};
  hold.take_verb = "stop";
  hold.hand_over_verb = "hand over";
  hold.where = "the guest at " + disk_->client().socket();
  hold.key = kind + ":" + disk_->client().socket();
  return hold;
}

std::vector<GuardHold> QuiescedGuest::holds() const {
  std::vector<GuardHold> holds;
  if (agent_.valid()) {
    holds.push_back(hold_of("guest-agent", agent_));
    holds.back().take_verb = "freeze the filesystems of";
  }
  if (!options_.by_command) holds.push_back(hold_of(options_.stays ? "guest-for-good" : "guest", qmp_));
  if (has_target_ && node_.device.empty()) {
    const std::string job = disk_->move_job(), there = disk_->target_node();
    GuardHold hold = hold_of("node", qmp_);
    hold.words = {members_of(mirror(job, node_.name, there)), members_of(mirror(job, there, node_.name)),
                  job};
    hold.hand_over_verb = "give " + options_.target + " to those who use " + node_.name + " of";
    hold.where = "QEMU at " + disk_->client().socket();
    hold.key += ":" + node_.name;
    holds.push_back(std::move(hold));
  } else if (has_target_) {
    GuardHold hold = hold_of("guest-disk", qmp_);
    hold.words = {members_of(switch_to(node_.device, disk_->target_node())),
                  members_of(switch_to(node_.device, node_.name))};
    hold.hand_over_verb = "give " + options_.target + " to";
    hold.key += ":" + node_.device;
    holds.push_back(std::move(hold));
  }
  return holds;
}

/// Where the guest runs it was released before, and writes to the disk that it has.
void QuiescedGuest::release_without_guard() {
  QmpClient& client = disk_->client();
  const auto runs = qemu_guest_runs(client);
  if (options_.by_command || !runs_ || !runs || runs->value_or(true)) return;
  if (has_target_) {
    const json back = switch_to(node_.device, node_.name);
    static_cast<void>(client.execute("qom-set", back.at("arguments")));
  }
  static_cast<void>(client.execute("cont"));
}

void QuiescedGuest::guard_talks(bool begins) {
  if (begins) {
    talking().lock();
    disk_->client().mutex().lock();
  } else {
    disk_->client().mutex().unlock();
    talking().unlock();
  }
}

}  // namespace

Result<std::string> quiescing_guest_refused(QmpClient& client, const QemuNode& node,
                                            const GuestOptions& options) {
  if (!options.target.empty() && node.device.empty()) {
    const auto exports = list_qemu_exports(client);
    if (!exports) return fail(exports.error());
    if (std::none_of(exports->begin(), exports->end(),
                     [&](const QemuExport& each) { return each.node == node.name && !each.ours(); })) {
      return "the node " + node.name +
             " is no device's of a guest, and QEMU exports it to nobody, so there is nothing to be moved; "
             "`clone` "
             "copies it, and with --handover cmd a --cutover-cmd hands over";
    }
  }
  if (options.by_command) return "";
  const auto runs = qemu_guest_runs(client);
  if (!runs) return fail(runs.error());
  if (!*runs) {
    return "it is a storage daemon, in which there is no guest to stop: give a --quiesce-cmd that stops "
           "whoever "
           "writes, and a --resume-cmd";
  }
  const auto exports = list_qemu_exports(client);
  if (!exports) return fail(exports.error());
  for (const auto& each : *exports) {
    if (each.node == node.name && !each.ours()) {
      return "QEMU exports it as " + each.id +
             ", and whoever writes that way is not stopped with the guest: remove the export, or give a "
             "--quiesce-cmd and a --resume-cmd";
    }
  }
  return "";
}

Result<std::unique_ptr<QuiescedVolume>> open_quiesced_guest(std::shared_ptr<QemuDisk> disk,
                                                            const GuestOptions& options) {
  auto guest = std::make_unique<QuiescedGuest>(std::move(disk), options);
  if (auto done = guest->open(); !done) return fail(done.error());
  return guest;
}

}  // namespace blockferry
