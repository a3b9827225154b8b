// SPDX-License-Identifier: Apache-2.0
#include "daemon/guarded_quiescer.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <set>

#include <fcntl.h>
#include <limits.h>
#include <linux/fs.h>
#include <poll.h>
#include <spawn.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <unistd.h>

#include "blockio/base/file_descriptor.h"
#include "blockio/block_identity.h"
#include "guard/protocol.h"

extern char** environ;

namespace blockferry {

namespace {

constexpr auto answer_patience = std::chrono::seconds(45);  // beyond the limit: for the resume command
constexpr Nanoseconds targets_patience = std::chrono::seconds(1);

/// The volume's own number and its partitions', or its disk's.
std::vector<dev_t> devices_of(const VolumeNode& source) {
  std::vector<dev_t> devices{source.device};
  const auto partitions = partitions_of(source.device);
  devices.insert(devices.end(), partitions.begin(), partitions.end());
  if (const dev_t disk = whole_disk_of(source.device); disk != source.device) devices.push_back(disk);
  return devices;
}

bool one_of(const std::string& text, std::initializer_list<const char*> list) {
  return std::any_of(list.begin(), list.end(), [&](const char* each) { return text == each; });
}

bool can_be_frozen(const std::string& type) {
  return one_of(type, {"ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "jfs", "nilfs2", "reiserfs"});
}
bool can_be_fenced(const std::string& type) {
  return one_of(type, {"ext2", "ext3", "ext4", "xfs", "f2fs"});
}

bool has_option(const std::string& options, const std::string& wanted) {
  return ("," + options + ",").find("," + wanted + ",") != std::string::npos;
}

/// Swap files go on being written on a frozen filesystem (attack I).
std::string swap_file_on(const std::vector<Mount>& mounts) {
  std::ifstream file("/proc/swaps");
  std::string line;
  std::getline(file, line);
  while (std::getline(file, line)) {
    const std::string path = unescape_octal(line.substr(0, line.find_first_of(" \t")));
    struct statx status {};
    if (::statx(AT_FDCWD, path.c_str(), 0, STATX_MNT_ID, &status) != 0 || !S_ISREG(status.stx_mode)) continue;
    const bool here = std::any_of(mounts.begin(), mounts.end(), [&](const Mount& mount) {
      return std::uint64_t(mount.id) == status.stx_mnt_id;
    });
    if (here) return path;
  }
  return "";
}

std::string refused_mount(const Mount& mount, const QuiescerOptions& options) {
  const std::string where = mount.type + " on " + mount.point;
  if (one_of(mount.type, {"gfs2", "ocfs2"})) return where + " is used by other machines too: stop it there";
  if (has_option(mount.options, "dax") || has_option(mount.options, "dax=always"))
    return where + " is mounted with dax: it is written past the device; mount it without";
  if (!can_be_frozen(mount.type))
    return where + " cannot be frozen: give a --quiesce-cmd that unmounts it, and a --resume-cmd";
  if (options.hands_over && !can_be_fenced(mount.type)) {
    return where +
           " cannot be fenced against its writers: give a --quiesce-cmd that stops them and unmounts it, "
           "and a --resume-cmd";
  }
  return "";
}

}  // namespace

QuiescerOptions quiescer_options_for(const RunRequest& request) {
  QuiescerOptions options;
  options.sources = {request.source};
  options.targets = request.targets;
  options.quiesce_cmd = request.quiesce_cmd;
  options.resume_cmd = request.resume_cmd;
  options.cutover_cmd = request.cutover_cmd;
  options.hands_over = request.kind == RunKind::migrate;
  return options;
}

std::string quiescing_refused(const std::string& path, const VolumeNode& source,
                              const QuiescerOptions& options) {
  const VolumeUse below = use_below(source);
  if (below.may_be_written())
    return "what it lies on is " + below.reason() + ", where its writes are not seen; release that";
  if (!options.quiesce_cmd.empty()) return "";
  const VolumeUse use = settled_use_of(source);
  if (!use.holders.empty()) {
    return "it is " +
           std::string(use.holders.front() == "swap" ? "in use as swap" : "held by " + use.holders.front()) +
           ": release that, name the volume above it, or give a --quiesce-cmd and a --resume-cmd";
  }
  if (!use.writers.empty()) {
    return "it is open for writing in " + use.writers.front() +
           ", which no filesystem can hold still: give a --quiesce-cmd and a --resume-cmd";
  }
  const auto devices = devices_of(source);
  for (const dev_t device : devices) {
    if (btrfs_members(device).size() > 1)
      return "its btrfs lies on several devices, and one of them alone is no copy of it";
  }
  const auto mounts = mounts_of(devices);
  for (const auto& mount : mounts) {
    if (auto why = refused_mount(mount, options); !why.empty()) return why;
  }
  if (const std::string swap = swap_file_on(mounts); !swap.empty())
    return "the swap file " + swap + " on it is written even while it is frozen: swapoff it";
  if (mounts.empty() && held_exclusively(path))
    return "it is held by a program or the kernel in a way that cannot be looked into; release it";
  return "";
}

namespace {

Error cannot(const std::string& operation, const std::string& where, const std::string& why) {
  return make_error(ErrorCode::refused, operation, where, why);
}

std::string all_of(const std::vector<std::string>& sources) {
  std::string text;
  for (const auto& source : sources) text += (text.empty() ? "" : ", ") + source;
  return text;
}

class GuardedQuiescer : public Quiescer {
 public:
  explicit GuardedQuiescer(const QuiescerOptions& options) : options_(options) {}
  ~GuardedQuiescer() override;

  Result<void> open();
  Result<void> sync_ahead() override;
  Result<void> quiesce(Nanoseconds limit) override;
  Result<bool> release() override { return finish(GuardRequest::thaw); }
  Result<bool> hand_over() override;
  Nanoseconds quiesced_at() const override { return quiesced_at_; }
  Nanoseconds released_at() const override { return released_at_; }
  bool handed_over() const override { return handed_over_; }
  Nanoseconds command_time() const override { return command_time_; }

 private:
  Result<void> open_source(const std::string& path);
  Result<void> open_filesystems(const VolumeNode& source);
  Result<void> open_nodes(const VolumeNode& source);
  Result<void> open_mark();
  Result<void> start_guard();
  Result<bool> finish(GuardRequest::Kind kind);
  Result<GuardAnswer> ask(GuardRequest request, Nanoseconds patience);
  Error failure(const GuardAnswer& answer) const;
  void thaw_without_guard();
  void wait_for_targets() const;

  const QuiescerOptions options_;
  std::vector<FileDescriptor> filesystems_;
  std::vector<std::string> points_;
  std::set<dev_t> superblocks_;        ///< of filesystems_
  std::vector<FileDescriptor> nodes_;  ///< of the sources and their partitions
  FileDescriptor mark_, socket_;
  pid_t guard_ = 0;
  bool handed_over_ = false;
  Nanoseconds quiesced_at_{0}, released_at_{0}, command_time_{0};
};

GuardedQuiescer::~GuardedQuiescer() {
  socket_.reset();  // upon which the guard lets go and ends
  if (guard_ != 0) ::waitpid(guard_, nullptr, 0);
}

Result<void> GuardedQuiescer::open() {
  for (const auto& path : options_.sources) {
    if (auto done = open_source(path); !done) return done;
  }
  Result<void> done = open_mark();
  if (done) done = start_guard();
  return done;
}

Result<void> GuardedQuiescer::open_source(const std::string& path) {
  VolumeNode source;
  if (!node_of_path(path, source)) return fail(error_from_errno(errno, "look at", path));
  if (const std::string why = quiescing_refused(path, source, options_); !why.empty())
    return fail(cannot("cut over", path, why));
  Result<void> done = open_nodes(source);
  // With commands the filesystems are theirs: a descriptor of ours would keep them from being unmounted.
  if (done && options_.quiesce_cmd.empty()) done = open_filesystems(source);
  return done;
}

Result<void> GuardedQuiescer::open_filesystems(const VolumeNode& source) {
  std::set<dev_t> missed;
  std::string unreached;
  for (const auto& mount : mounts_of(devices_of(source))) {
    if (superblocks_.contains(mount.superblock)) continue;
    FileDescriptor fd(::open(mount.reach.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
    struct statx status {};
    // Another filesystem may be mounted over it.
    if (!fd.valid() || ::statx(fd.get(), "", AT_EMPTY_PATH, STATX_MNT_ID, &status) != 0 ||
        status.stx_mnt_id != std::uint64_t(mount.id)) {
      missed.insert(mount.superblock);
      unreached = mount.point;
      continue;
    }
    superblocks_.insert(mount.superblock);
    points_.push_back(mount.point);
    filesystems_.push_back(std::move(fd));
  }
  for (const dev_t superblock : missed) {
    if (!superblocks_.contains(superblock))
      return fail(
          cannot("freeze", unreached, "another filesystem is mounted over it, so it cannot be reached"));
  }
  return {};
}

Result<void> GuardedQuiescer::open_nodes(const VolumeNode& source) {
  for (const dev_t device : devices_of(source)) {
    const std::string path = device_node(device);
    FileDescriptor fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
    if (!fd.valid()) return fail(error_from_errno(errno, "open", path));
    nodes_.push_back(std::move(fd));
  }
  return {};
}

Result<void> GuardedQuiescer::open_mark() {
  mark_ = FileDescriptor(options_.mark_directory.empty()
                             ? ::open("/dev/null", O_RDONLY | O_CLOEXEC)
                             : ::open(options_.mark_directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!mark_.valid()) return fail(error_from_errno(errno, "open", options_.mark_directory));
  // Of an earlier cutover of this run, which is on record.
  if (!options_.mark_directory.empty()) ::unlinkat(mark_.get(), guard_mark, AT_REMOVEDIR);
  return {};
}

/// It lies beside this program.
std::string guard_path() {
  char path[PATH_MAX];
  const ssize_t length = ::readlink("/proc/self/exe", path, sizeof path);
  const std::string self(path, length > 0 ? std::size_t(length) : 0);
  return self.substr(0, self.rfind('/') + 1) + "ferryd-guard";
}

Result<void> GuardedQuiescer::start_guard() {
  int pair[2];
  if (::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) != 0)
    return fail(error_from_errno(errno, "make a socket for", "the guard"));
  socket_ = FileDescriptor(pair[0]);
  const FileDescriptor theirs(pair[1]);
  std::vector<int> descriptors{theirs.get(), mark_.get()};
  for (const auto& fd : filesystems_) descriptors.push_back(fd.get());
  posix_spawn_file_actions_t files;
  posix_spawn_file_actions_init(&files);
  // Twice, so that no descriptor is overwritten before it has been copied.
  const int beyond = 1 + *std::max_element(descriptors.begin(), descriptors.end());
  const int base = std::max(beyond, guard_socket_fd + int(descriptors.size()));
  for (int i = 0; i < int(descriptors.size()); ++i)
    posix_spawn_file_actions_adddup2(&files, descriptors[std::size_t(i)], base + i);
  for (int i = 0; i < int(descriptors.size()); ++i)
    posix_spawn_file_actions_adddup2(&files, base + i, guard_socket_fd + i);
  posix_spawn_file_actions_addclosefrom_np(&files, guard_socket_fd + int(descriptors.size()));
  for (const int standard : {0, 1, 2})  // the log may be frozen
    posix_spawn_file_actions_addopen(&files, standard, "/dev/null", O_RDWR, 0);
  const std::string path = guard_path();
  const char* const arguments[] = {"ferryd-guard",
                                   options_.quiesce_cmd.c_str(),
                                   options_.resume_cmd.c_str(),
                                   options_.cutover_cmd.c_str(),
                                   options_.hands_over ? "fence" : "",
                                   nullptr};
  std::vector<char*> variables;
  for (const auto& variable : options_.environment) variables.push_back(const_cast<char*>(variable.c_str()));
  for (char** variable = environ; *variable != nullptr; ++variable) variables.push_back(*variable);
  variables.push_back(nullptr);
  const int error = ::posix_spawn(&guard_, path.c_str(), &files, nullptr, const_cast<char* const*>(arguments),
                                  variables.data());
  posix_spawn_file_actions_destroy(&files);
  if (error == 0) return {};
  guard_ = 0;
  return fail(error_from_errno(error, "start", path));
}

Result<void> GuardedQuiescer::sync_ahead() {
  for (std::size_t i = 0; i < filesystems_.size(); ++i) {
    if (::syncfs(filesystems_[i].get()) != 0) return fail(error_from_errno(errno, "sync", points_[i]));
  }
  return {};
}

Result<GuardAnswer> GuardedQuiescer::ask(GuardRequest request, Nanoseconds patience) {
  const auto gone = [&] {
    thaw_without_guard();
    return fail(make_error(ErrorCode::internal, "talk to", "the guard", "it has ended, or does not answer"));
  };
  if (::send(socket_.get(), &request, sizeof request, MSG_NOSIGNAL) != ssize_t(sizeof request)) return gone();
  GuardAnswer answer{};
  pollfd event{socket_.get(), POLLIN, 0};
  const auto milliseconds = std::chrono::duration_cast<std::chrono::milliseconds>(patience).count();
  if (::poll(&event, 1, int(milliseconds)) <= 0) return gone();
  if (::recv(socket_.get(), &answer, sizeof answer, 0) != ssize_t(sizeof answer)) return gone();
  answer.detail[sizeof answer.detail - 1] = '\0';
  return answer;
}

/// Somebody killed it. It may have frozen something.
void GuardedQuiescer::thaw_without_guard() {
  for (const auto& filesystem : filesystems_) ::ioctl(filesystem.get(), FITHAW, 0);
}

Error GuardedQuiescer::failure(const GuardAnswer& answer) const {
  const std::string sources = all_of(options_.sources);
  const std::string where = answer.filesystem < points_.size() ? points_[answer.filesystem] : sources;
  switch (answer.step) {
    case GuardAnswer::freezing: {
      Error error = error_from_errno(answer.errno_value, "freeze", where);
      if (answer.errno_value == EBUSY) error.hint = "somebody else has frozen it";
      return error;
    }
    case GuardAnswer::quiesce_command:
      return make_error(ErrorCode::conflict, "quiesce", sources,
                        std::string("the --quiesce-cmd ") + answer.detail);
    case GuardAnswer::cutover_command:
      return make_error(ErrorCode::conflict, "cut over", sources,
                        std::string("the --cutover-cmd ") + answer.detail);
    case GuardAnswer::marking:
      return error_from_errno(answer.errno_value, "mark the hand-over in", options_.mark_directory);
    case GuardAnswer::fencing:
      return error_from_errno(answer.errno_value, "shut down", where);
  }
  return make_error(ErrorCode::internal, "cut over", where, "the guard failed");
}

/// Block devices' own page cache too: not all that is written goes through a filesystem.
Result<void> GuardedQuiescer::quiesce(Nanoseconds limit) {
  const auto limit_ms = std::chrono::duration_cast<std::chrono::milliseconds>(limit).count();
  const auto answer = ask({GuardRequest::freeze, std::uint32_t(limit_ms)}, limit + answer_patience);
  if (!answer) return fail(answer.error());
  if (answer->kind == GuardAnswer::failed) return fail(failure(*answer));
  if (answer->kind != GuardAnswer::frozen) {
    return fail(make_error(ErrorCode::busy, "quiesce", all_of(options_.sources),
                           "it took longer than --max-freeze allows, and was given up"));
  }
  quiesced_at_ = Nanoseconds(answer->at_ns);
  for (const auto& node : nodes_) {
    if (::fsync(node.get()) != 0) return fail(error_from_errno(errno, "flush", all_of(options_.sources)));
  }
  return {};
}

/// They have been closed, but the kernel gives up a file that a ring has flushed some moments after it has
/// told of the flush, and until then nobody can mount it. Whoever else holds one: the command will say so.
void GuardedQuiescer::wait_for_targets() const {
  const Nanoseconds deadline = system_clock().now() + targets_patience;
  for (const auto& target : options_.targets) {
    while (system_clock().now() < deadline) {
      const FileDescriptor fd(::open(target.c_str(), O_RDONLY | O_EXCL | O_CLOEXEC | O_NONBLOCK));
      if (fd.valid() || errno != EBUSY) break;
      system_clock().sleep_for(std::chrono::milliseconds(1));
    }
  }
}

Result<bool> GuardedQuiescer::hand_over() {
  if (!options_.cutover_cmd.empty()) wait_for_targets();
  return finish(GuardRequest::hand_over);
}

Result<bool> GuardedQuiescer::finish(GuardRequest::Kind kind) {
  const auto answer = ask({kind, 0}, answer_patience);
  if (!answer) return fail(answer.error());
  released_at_ = Nanoseconds(answer->at_ns);
  command_time_ = Nanoseconds(answer->command_ns);
  if (answer->kind == GuardAnswer::failed) return fail(failure(*answer));
  handed_over_ = kind == GuardRequest::hand_over && answer->kind == GuardAnswer::released;
  return answer->kind == GuardAnswer::released;
}

}  // namespace

Result<std::unique_ptr<Quiescer>> make_guarded_quiescer(const QuiescerOptions& options) {
  auto quiescer = std::make_unique<GuardedQuiescer>(options);
  if (auto done = quiescer->open(); !done) return fail(done.error());
  return quiescer;
}

}  // namespace blockferry
