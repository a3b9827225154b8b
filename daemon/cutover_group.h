// SPDX-License-Identifier: Apache-2.0
// Volumes that are cut over together: all of them or none, at one moment. Each has a run of its own, with its
// own thread; here they meet. Thread-safe.
//
// All wait until each is ready; then one quiescer, with one guard, serves them all:
//
//   caught_up        every volume is nearly in step, and its passes go on until all are
//   still            no run writes to a file any more: now, and only now, all are quiesced, by whoever comes
//   first copied           the last of every volume is on its targets, flushed targets_closed   and nobody
//   holds them any more: now all are released, or handed over
//
// A run that gives up on the way breaks the attempt: everything is released, and the others try again once
// all are ready.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "daemon/quiescer.h"

namespace blockferry {

class CutoverGroup : public std::enable_shared_from_this<CutoverGroup> {
 public:
  using MakeQuiescer = std::function<Result<std::unique_ptr<Quiescer>>()>;
  /// `make` makes one for all members' volumes.
  CutoverGroup(std::vector<std::string> members, Clock& clock, MakeQuiescer make);

  /// Says whether this member could be cut over now. Answers the members that are not ready, by name; empty:
  /// all are, and each should join.
  std::string waits_for(const std::string& member, bool ready);
  /// One attempt. A rehearsal of one member is one of all.
  Result<std::unique_ptr<Quiescer>> join(const std::string& member, bool rehearsal);
  /// Its run is over: the others wait until it is taken up again.
  void leave(const std::string& member);

 private:
  class Attempt;
  class Member;

  const std::vector<std::string> members_;
  Clock& clock_;
  const MakeQuiescer make_;
  std::mutex mutex_;
  std::map<std::string, bool> ready_;  // guarded by mutex_
  std::weak_ptr<Attempt> attempt_;     // guarded by mutex_: the last one; its members own it
};

}  // namespace blockferry
