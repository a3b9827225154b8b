// SPDX-License-Identifier: Apache-2.0
#include "daemon/lvm.h"

#include <algorithm>
#include <cerrno>
#include <filesystem>
#include <fstream>
#include <map>
#include <sstream>
#include <vector>

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <unistd.h>

#include "blockio/base/clock.h"

extern char** environ;

namespace blockferry {

namespace {

constexpr const char* program = "/sbin/lvm";
constexpr std::size_t group_id_length = 32, uuid_length = 4 + 64;
constexpr Nanoseconds patience = std::chrono::seconds(60), lock_patience = std::chrono::seconds(10);
constexpr Nanoseconds look_again = std::chrono::milliseconds(2);

std::string read_all(int fd) {
  std::string text(std::size_t(std::max<off_t>(0, ::lseek(fd, 0, SEEK_END))), '\0');
  const ssize_t length = ::pread(fd, text.data(), text.size(), 0);
  text.resize(std::size_t(std::max<ssize_t>(0, length)));
  return text;
}

int start(std::vector<std::string>& words, int output, pid_t& process) {
  std::vector<char*> arguments;
  arguments.reserve(words.size() + 1);
  for (auto& word : words) arguments.push_back(word.data());
  arguments.push_back(nullptr);
  posix_spawn_file_actions_t files;
  posix_spawn_file_actions_init(&files);
  posix_spawn_file_actions_addopen(&files, 0, "/dev/null", O_RDONLY, 0);
  posix_spawn_file_actions_adddup2(&files, output, 1);
  posix_spawn_file_actions_adddup2(&files, output, 2);
  const int error = ::posix_spawn(&process, program, &files, nullptr, arguments.data(), environ);
  posix_spawn_file_actions_destroy(&files);
  return error;
}

/// What it printed. The lock is ours where one is needed.
Result<std::string> run_lvm(std::vector<std::string> words) {
  words.insert(words.begin(), program);
  std::string line;
  for (const auto& word : words) line += (line.empty() ? "" : " ") + word;
  const FileDescriptor output(::memfd_create("output", MFD_CLOEXEC));
  pid_t process = 0;
  if (const int error = start(words, output.get(), process); error != 0)
    return fail(error_from_errno(error, "run", program));
  const Nanoseconds give_up = system_clock().now() + patience;
  int status = 0;
  while (::waitpid(process, &status, WNOHANG) == 0) {
    if (system_clock().now() >= give_up) ::kill(process, SIGKILL);
    system_clock().sleep_for(look_again);
  }
  std::string said = read_all(output.get());
  if (WIFEXITED(status) && WEXITSTATUS(status) == 0) return said;
  std::replace(said.begin(), said.end(), '\n', ' ');
  return fail(make_error(ErrorCode::conflict, "run", line, "it failed: " + said));
}

/// Rows of fields of a report command.
Result<std::vector<std::vector<std::string>>> report(const char* command, const std::string& fields,
                                                     const std::string& what) {
  std::vector<std::string> words{command,       "--nolocking", "--noheadings", "--units", "s", "--nosuffix",
                                 "--separator", "|",           "--options",    fields};
  if (!what.empty()) words.push_back(what);
  const auto text = run_lvm(std::move(words));
  if (!text) return fail(text.error());
  const auto columns = std::size_t(1 + std::count(fields.begin(), fields.end(), ','));
  std::vector<std::vector<std::string>> rows;
  std::istringstream lines(*text);
  for (std::string line; std::getline(lines, line);) {
    std::vector<std::string> row;
    std::istringstream parts(line);
    for (std::string part; std::getline(parts, part, '|');)
      row.push_back(part.substr(std::min(part.size(), part.find_first_not_of(' '))));
    if (row.size() == columns) rows.push_back(std::move(row));  // others are warnings
  }
  return rows;
}

std::uint64_t number(const std::string& text) {
  return std::strtoull(text.c_str(), nullptr, 10);
}

/// "data--x" stands for "data-x" in the names of maps.
std::vector<std::string> parts_of_map_name(const std::string& name) {
  std::vector<std::string> parts{""};
  for (std::size_t i = 0; i < name.size(); ++i) {
    if (name[i] != '-') {
      parts.back() += name[i];
    } else if (i + 1 < name.size() && name[i + 1] == '-') {
      parts.back() += name[i++];
    } else {
      parts.emplace_back();
    }
  }
  return parts;
}

struct Span {
  std::size_t begin = 0, end = 0;
};

/// From "segment_count" to the end of the volume's section. Nothing: there is none.
std::optional<Span> segments_of(std::string_view text, const std::string& volume) {
  const auto volumes = text.find("logical_volumes {");
  if (volumes == std::string_view::npos) return std::nullopt;
  const auto section = text.find("\t" + volume + " {", volumes);
  if (section == std::string_view::npos) return std::nullopt;
  std::size_t depth = 0, end = section;
  for (; end < text.size(); ++end) {
    if (text[end] == '{') ++depth;
    if (text[end] == '}' && --depth == 0) break;
  }
  const auto begin = text.find("segment_count", section);
  if (begin == std::string_view::npos || begin > end) return std::nullopt;
  return Span{begin, end};
}

}  // namespace

std::optional<LvmVolume> lvm_volume_of(dev_t device) {
  const std::string uuid = map_uuid(device);
  const auto parts = parts_of_map_name(map_name(device));
  if (!uuid.starts_with("LVM-") || uuid.size() != uuid_length || parts.size() != 2) return std::nullopt;
  return LvmVolume{parts[0], parts[1]};
}

std::string lvm_group_id(dev_t device) {
  const std::string uuid = map_uuid(device);
  return uuid.starts_with("LVM-") ? uuid.substr(4, group_id_length) : "";
}

Result<MapTable> lvm_table(const LvmVolume& volume) {
  const auto segments =
      report("lvs", "seg_start,seg_size,segtype,devices,vg_extent_size", volume.group + "/" + volume.name);
  if (!segments) return fail(segments.error());
  const auto disks = report("pvs", "pv_name,pe_start", "");
  if (!disks) return fail(disks.error());
  std::map<std::string, std::uint64_t> data_begin;
  for (const auto& disk : *disks) data_begin[disk[0]] = number(disk[1]);
  MapTable table;
  for (const auto& segment : *segments) {
    const std::string& where = segment[3];  // "/dev/sdb(17)": of this disk, from this extent on
    const auto bracket = where.find('(');
    const std::string disk = where.substr(0, bracket);
    struct stat status {};
    if (bracket == std::string::npos || !data_begin.contains(disk) || ::stat(disk.c_str(), &status) != 0)
      return fail(make_error(ErrorCode::unsupported, "find", volume.group + "/" + volume.name,
                             "it is not a plain logical volume on disks"));
    const std::uint64_t offset = data_begin[disk] + number(where.substr(bracket + 1)) * number(segment[4]);
    table.push_back({number(segment[0]), number(segment[1]), segment[2],
                     std::to_string(major(status.st_rdev)) + ":" + std::to_string(minor(status.st_rdev)) +
                         " " + std::to_string(offset)});
  }
  return table;
}

Result<void> lvm_refresh(const LvmVolume& volume) {
  const auto done = run_lvm({"lvchange", "--refresh", volume.group + "/" + volume.name});
  return done ? Result<void>() : fail(done.error());
}

Result<std::string> exchange_segments(std::string_view metadata, const std::string& one,
                                      const std::string& other) {
  auto first = segments_of(metadata, one), second = segments_of(metadata, other);
  if (!first || !second) {
    return fail(make_error(ErrorCode::conflict, "find", "LVM's metadata of " + (first ? other : one),
                           "the volume has been renamed or removed"));
  }
  if (first->begin > second->begin) std::swap(first, second);
  std::string text(metadata.substr(0, first->begin));
  text += metadata.substr(second->begin, second->end - second->begin);
  text += metadata.substr(first->end, second->begin - first->end);
  text += metadata.substr(first->begin, first->end - first->begin);
  text += metadata.substr(second->end);
  return text;
}

/// Its files lie in memory: nothing else may be needed while the volume is still.
LvmExchange::LvmExchange(std::string group, std::string one, std::string other, const std::string& key)
    : group_(std::move(group)),
      one_(std::move(one)),
      other_(std::move(other)),
      directory_("/run/blockferry-lvm-" + key) {}

LvmExchange::~LvmExchange() {
  std::error_code none;
  std::filesystem::remove_all(directory_, none);
}

/// LVM looks at no disks but the group's own: another may lie on what is still, and would not answer. Nor
/// does it write its own archive, which may lie there, too.
std::vector<std::string> LvmExchange::restore_words(const char* file) const {
  return {"vgcfgrestore",
          "--yes",
          "--nolocking",
          "--devices",
          disks_,
          "--config",
          "backup{backup=0 archive=0}",
          "--file",
          directory_ + "/" + file,
          group_};
}

std::string LvmExchange::restore_command(const char* file) const {
  std::string command = program;
  for (const auto& word : restore_words(file))
    command += " '" + word + "'";  // no name of LVM's holds a quote
  return command;
}

Result<void> LvmExchange::change() const {
  const auto done = run_lvm(restore_words("new"));
  return done ? Result<void>() : fail(done.error());
}

Result<void> LvmExchange::find_disks() {
  const auto disks = report("vgs", "pv_name", group_);
  if (!disks) return fail(disks.error());
  disks_.clear();
  for (const auto& disk : *disks) disks_ += (disks_.empty() ? "" : ",") + disk[0];
  return {};
}

/// The same lock as LVM's commands take for the group: a file that whoever lets go of it removes.
Result<void> LvmExchange::lock() {
  std::error_code none;
  std::filesystem::create_directories("/run/lock/lvm", none);
  const std::string path = "/run/lock/lvm/V_" + group_;
  const Nanoseconds give_up = system_clock().now() + lock_patience;
  for (;;) {
    FileDescriptor fd(::open(path.c_str(), O_CREAT | O_RDWR | O_APPEND | O_CLOEXEC, 0600));
    if (!fd.valid()) return fail(error_from_errno(errno, "open", path));
    struct stat opened {
    }, named{};
    if (::flock(fd.get(), LOCK_EX | LOCK_NB) == 0 && ::fstat(fd.get(), &opened) == 0 &&
        ::stat(path.c_str(), &named) == 0 && opened.st_ino == named.st_ino) {
      lock_ = std::move(fd);
      return {};
    }
    if (system_clock().now() >= give_up) {
      return fail(make_error(ErrorCode::busy, "lock", "the volume group " + group_,
                             "another LVM command holds it; end that one"));
    }
    system_clock().sleep_for(look_again);
  }
}

Result<void> LvmExchange::prepare() {
  std::error_code none;
  std::filesystem::remove_all(directory_, none);
  if (::mkdir(directory_.c_str(), 0700) != 0) return fail(error_from_errno(errno, "make", directory_));
  if (auto done = find_disks(); !done) return done;
  const std::string old_file = directory_ + "/old";
  if (auto done = run_lvm({"vgcfgbackup", "--nolocking", "--file", old_file, group_}); !done)
    return fail(done.error());
  std::ifstream in(old_file);
  const std::string metadata{std::istreambuf_iterator<char>(in), {}};
  const auto exchanged = exchange_segments(metadata, one_, other_);
  if (!exchanged) return fail(exchanged.error());
  std::ofstream out(directory_ + "/new");
  out << *exchanged << std::flush;
  if (!out) return fail(error_from_errno(EIO, "write", directory_ + "/new"));
  const Nanoseconds begun = system_clock().now();
  auto words = restore_words("new");
  words.emplace_back("--test");
  const auto tried = run_lvm(std::move(words));
  expected_time_ = system_clock().now() - begun;
  return tried ? Result<void>() : fail(tried.error());
}

}  // namespace blockferry
