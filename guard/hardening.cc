// SPDX-License-Identifier: Apache-2.0
#include "guard/hardening.h"

#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include <signal.h>
#include <sys/mman.h>

namespace blockferry {

namespace {

/// Where the hierarchies of cgroups are mounted. A line of mountinfo: numbers, root, mount point, options, a
/// lone dash, type, …
std::vector<std::string> cgroup_mounts() {
  std::vector<std::string> points;
  std::ifstream file("/proc/self/mountinfo");
  for (std::string line; std::getline(file, line);) {
    std::istringstream fields(line);
    std::string skipped, point, word;
    fields >> skipped >> skipped >> skipped >> skipped >> point;
    while (fields >> word && word != "-") {
    }
    if (fields >> word && (word == "cgroup" || word == "cgroup2")) points.push_back(point);
  }
  return points;
}

/// The topmost one of each: a cgroup below ferryd's would share its fate, and one beside it would be the
/// service manager's to make.
void leave_cgroups() {
  for (const auto& point : cgroup_mounts()) std::ofstream(point + "/cgroup.procs") << 0 << std::flush;
}

}  // namespace

void harden() {
  for (const int signal :
       {SIGTERM, SIGINT, SIGHUP, SIGABRT, SIGQUIT, SIGPIPE, SIGUSR1, SIGUSR2, SIGTSTP, SIGTTIN, SIGTTOU})
    ::signal(signal, SIG_IGN);
  leave_cgroups();
  static_cast<void>(::mlockall(MCL_CURRENT | MCL_FUTURE));
  std::ofstream("/proc/self/oom_score_adj") << -1000;
}

}  // namespace blockferry
