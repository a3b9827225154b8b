// SPDX-License-Identifier: Apache-2.0
// The command line, understood: one struct for all verbs, and which verb takes which options.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "blockio/base/error.h"
#include "daemon/messages/messages.h"

namespace blockferry {

enum class Verb : std::uint8_t {
  clone,
  migrate,
  check,
  list,
  show,
  watch,
  map,
  pause,
  resume,
  cancel,
  forget,
  set,
  sync,
  cutover,
  rollback,
  commit,
  verify,
  devices,
  version,
  help
};

struct VolumePair {
  std::string source, target;
};

struct Command {
  Verb verb = Verb::help;
  std::string socket_path;
  bool json = false;
  bool help = false;               ///< --help after a verb
  std::vector<std::string> words;  ///< what is neither verb nor option: volumes, a run
  RunRequest request;              ///< clone, migrate, check
  std::vector<VolumePair> pairs;   ///< the same of several volumes, given as SRC=DST
  RunChange change;                ///< set
  bool detach = false;
  bool rehearse = false;
  bool unfrozen = false;
};

struct Session;  ///< verbs.cc

/// A row of the table of verbs.
struct VerbInfo {
  Verb verb;
  const char* name;
  const char* arguments;  ///< "SRC DST [DST…]"
  const char* summary;
  const char* examples;  ///< whole lines
  std::size_t words_min, words_max;
  int (*run)(const Session&);  ///< answers the exit status
};
const std::vector<VerbInfo>& verb_infos();
const VerbInfo& info_of(Verb verb);

/// invalid_argument with one line that names what is wrong and the nearest that would be right.
Result<Command> parse_command(const std::vector<std::string>& arguments);

/// "; did you mean `ferryctl list`?" or where the verbs are listed.
std::string verb_advice(const std::string& word);

/// `ferryctl --help` and `ferryctl VERB --help`.
std::string help_text();
std::string help_text(Verb verb);

/// A path as ferryd must see it: absolute, symlinks kept; URIs as they are.
std::string absolute_path(const std::string& path);

}  // namespace blockferry
