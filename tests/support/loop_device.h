// SPDX-License-Identifier: Apache-2.0
// Real volumes for tests: files in RAM, loop devices over them, mounts, swap, and helper processes that use
// them. Each owns what it made and undoes it when destroyed; declare what stands on another after it.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include <sys/types.h>

namespace blockferry::test {

/// Why no loop device, mount or swap can be had here; empty where they can.
std::string volumes_missing();

/// A program's exit status (its output goes nowhere); 127 where there is no such program.
int run_program(const std::vector<std::string>& words);

/// A directory in /dev/shm, removed with all that it holds.
class ScratchDirectory {
 public:
  ScratchDirectory();
  ~ScratchDirectory();
  ScratchDirectory(const ScratchDirectory&) = delete;
  ScratchDirectory& operator=(const ScratchDirectory&) = delete;

  const std::string& path() const { return path_; }
  std::string path(const std::string& name) const { return path_ + "/" + name; }
  /// A sparse file; `content` is written at its start.
  std::string file(const std::string& name, std::uint64_t bytes, const std::string& content = "") const;
  std::string directory(const std::string& name) const;

 private:
  std::string path_;
};

struct LoopOptions {
  unsigned sector_bytes = 512;
  bool read_only = false;
  std::uint64_t offset = 0;  ///< in the backing file
  std::uint64_t bytes = 0;   ///< at most; 0: to the file's end
};

/// A loop device. Not valid() where none is to be had.
class LoopDevice {
 public:
  explicit LoopDevice(const std::string& backing, const LoopOptions& options = {});
  ~LoopDevice();
  LoopDevice(const LoopDevice&) = delete;
  LoopDevice& operator=(const LoopDevice&) = delete;

  bool valid() const { return attached_; }
  const std::string& path() const { return path_; }     ///< "/dev/loop3"
  std::string name() const { return path_.substr(5); }  ///< "loop3"
  /// Tells the kernel of a partition, whatever a table says; the path of its node, "" where that is not
  /// there.
  std::string add_partition(int number, std::uint64_t offset, std::uint64_t bytes);

 private:
  std::string path_;
  bool attached_ = false;
  std::vector<int> partitions_;
};

/// A filesystem mounted on a directory that exists.
class MountedVolume {
 public:
  MountedVolume(const std::string& device, const std::string& point, const char* type = "ext4");
  ~MountedVolume();
  MountedVolume(const MountedVolume&) = delete;
  MountedVolume& operator=(const MountedVolume&) = delete;
  bool valid() const { return mounted_; }

 private:
  std::string point_;
  bool mounted_ = false;
};

/// A volume that `mkswap` prepared, in use as swap.
class SwapArea {
 public:
  explicit SwapArea(const std::string& path);
  ~SwapArea();
  SwapArea(const SwapArea&) = delete;
  SwapArea& operator=(const SwapArea&) = delete;
  bool valid() const { return on_; }

 private:
  std::string path_;
  bool on_ = false;
};

/// A process that has done `prepare`, and then waits until it is ended. It dies with the test.
class HelperProcess {
 public:
  /// `prepare` runs in the child; false: it did not work, and the process is not valid().
  explicit HelperProcess(const std::function<bool()>& prepare);
  ~HelperProcess();
  HelperProcess(const HelperProcess&) = delete;
  HelperProcess& operator=(const HelperProcess&) = delete;
  bool valid() const { return ready_; }
  pid_t pid() const { return pid_; }

 private:
  pid_t pid_ = -1;
  bool ready_ = false;
};

/// A process that has the path open with these flags of open(2).
std::unique_ptr<HelperProcess> open_elsewhere(const std::string& path, int flags);

/// A process in a mount namespace of its own, with the device mounted there and nowhere else.
std::unique_ptr<HelperProcess> mounted_elsewhere(const std::string& device, const std::string& point);

}  // namespace blockferry::test
