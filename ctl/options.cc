// SPDX-License-Identifier: Apache-2.0
#include "ctl/options.h"

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <sstream>

#include <boost/program_options.hpp>
#include <unistd.h>

#include "blockio/base/units.h"

namespace blockferry {

namespace {

namespace options = boost::program_options;

Error usage(const std::string& what, const std::string& why) {
  return make_error(ErrorCode::invalid_argument, "understand", what, why);
}

/// How many letters one must change, add or drop.
std::size_t distance(const std::string& one, const std::string& other) {
  std::vector<std::size_t> row(other.size() + 1);
  for (std::size_t i = 0; i <= other.size(); ++i) row[i] = i;
  for (std::size_t i = 1; i <= one.size(); ++i) {
    std::size_t diagonal = row[0];
    row[0] = i;
    for (std::size_t j = 1; j <= other.size(); ++j) {
      const std::size_t above = row[j];
      row[j] = std::min({above + 1, row[j - 1] + 1, diagonal + (one[i - 1] == other[j - 1] ? 0 : 1)});
      diagonal = above;
    }
  }
  return row.back();
}

std::string nearest_verb(const std::string& word) {
  const auto& infos = verb_infos();
  const auto best = std::min_element(infos.begin(), infos.end(), [&](const auto& one, const auto& other) {
    return distance(word, one.name) < distance(word, other.name);
  });
  return distance(word, best->name) <= 3 ? std::string("did you mean `ferryctl ") + best->name + "`?"
                                         : "`ferryctl --help` lists the verbs";
}

bool takes_volumes(Verb verb) {
  return verb == Verb::clone || verb == Verb::migrate || verb == Verb::check;
}

options::options_description describe(Verb verb) {
  options::options_description description("Options");
  auto add = description.add_options();
  const auto text = [] { return options::value<std::string>(); };
  if (takes_volumes(verb)) {
    add("name", text(), "a name for the run, to be used in place of its id");
    add("mode", text(), "full, incremental (only what differs since the last run) or hybrid");
    add("tracker", text(), "auto, ebpf, qemu, checksum or none");
    add("rate", text(), "bytes a second at most, as 500M; none for no limit");
    add("queue-depth", text(), "requests in flight (chosen by itself)");
    add("io-size", text(), "bytes a request, as 1M (chosen by itself)");
    add("granule", text(), "the unit of checksums, as 4K (chosen by volume size)");
    add("io-engine", text(), "auto, uring or aio");
    add("no-verify", "do not read the targets back at the end");
    add("overwrite", "replace what the target holds");
    add("force", "go on where ferryd would rather not; `check` says where that is");
    add("on-read-error", text(), "fail, or skip what cannot be read and list it");
    add("keep", "keep tracking after the run, for `sync` (live sources)");
    add("max-downtime", text(), "the longest pause at cutover, as 300ms (live sources)");
    add("max-passes", text(), "ask after so many passes (live sources)");
    add("cutover", text(), "auto, or manual: wait for `ferryctl cutover` (live sources)");
    add("handover", text(), "fs, dm-swap, qemu or cmd (live sources)");
    add("quiesce-cmd", text(), "stops the source's writers (live sources)");
    add("resume-cmd", text(), "lets them go on (live sources)");
    add("cutover-cmd", text(), "runs while the source is quiesced; exit 0 hands over (live sources)");
    add("max-freeze", text(), "the longest freeze, as 10s (live sources)");
    add("sync-every", text(), "bring the target up to date so often, as 15m (live sources)");
  }
  if (verb == Verb::set) {
    add("rate", text(), "bytes a second at most, as 500M; none for no limit");
    add("max-downtime", text(), "the longest pause at cutover, as 300ms (live sources)");
  }
  if (verb == Verb::clone || verb == Verb::migrate || verb == Verb::sync || verb == Verb::verify) {
    add("detach", "print the run's id and leave; the run goes on");
  }
  if (verb == Verb::cutover) add("rehearse", "do all but the hand-over, and report the pause");
  add("socket", text(), "ferryd's control socket (or $BLOCKFERRY_SOCKET)");
  add("json", "JSON on stdout and for errors");
  add("help", "show this help");
  return description;
}

template <typename Number>
Result<Number> number_of(const std::string& option, const std::string& text) {
  Number value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size())
    return fail(usage("--" + option, text + " is not a number"));
  return value;
}

/// Fills the request from the options given; what is checked by ferryd is left to ferryd.
class Reader {
 public:
  explicit Reader(const options::variables_map& values) : values_(values) {}

  bool has(const char* name) const { return values_.count(name) > 0; }
  std::string text(const char* name) const {
    return has(name) ? values_[name].as<std::string>() : std::string();
  }

  template <typename Target>
  void size(const char* name, Target& target, bool none_is_zero = false) {
    if (!has(name)) return;
    if (none_is_zero && text(name) == "none") {
      target = 0;
      return;
    }
    const auto bytes = parse_size(text(name));
    if (!bytes) return note(usage(std::string("--") + name, bytes.error().message()));
    target = *bytes;
  }
  template <typename Target>
  void time(const char* name, Target& target) {
    if (!has(name)) return;
    const auto duration = parse_duration(text(name));
    if (!duration) return note(usage(std::string("--") + name, duration.error().message()));
    target = std::uint64_t(duration->count());
  }
  void number(const char* name, std::uint32_t& target) {
    if (!has(name)) return;
    const auto value = number_of<std::uint32_t>(name, text(name));
    if (!value) return note(value.error());
    target = *value;
  }
  /// One of `choices`, by position.
  template <typename Enum>
  void choice(const char* name, std::initializer_list<std::pair<const char*, Enum>> choices, Enum& target) {
    if (!has(name)) return;
    std::string known;
    for (const auto& [word, value] : choices) {
      if (text(name) == word) {
        target = value;
        return;
      }
      known += (known.empty() ? "" : ", ") + std::string(word);
    }
    note(usage(std::string("--") + name, "it is one of " + known));
  }
  void note(const Error& error) {
    if (!error_) error_ = error;
  }
  const std::optional<Error>& error() const { return error_; }

 private:
  const options::variables_map& values_;
  std::optional<Error> error_;
};

void read_request(Reader& reader, RunRequest& request) {
  request.name = reader.text("name");
  reader.choice("mode",
                {{"full", RunMode::full}, {"incremental", RunMode::incremental}, {"hybrid", RunMode::hybrid}},
                request.mode);
  reader.choice("tracker",
                {{"auto", TrackerChoice::automatic},
                 {"ebpf", TrackerChoice::ebpf},
                 {"qemu", TrackerChoice::qemu},
                 {"checksum", TrackerChoice::checksum},
                 {"none", TrackerChoice::none}},
                request.tracker);
  reader.size("rate", request.rate_bytes_per_second, true);
  reader.number("queue-depth", request.queue_depth);
  reader.size("io-size", request.io_size_bytes);
  reader.size("granule", request.granule_bytes);
  if (reader.has("io-engine")) request.io_engine = reader.text("io-engine");
  request.verify = !reader.has("no-verify");
  request.overwrite = reader.has("overwrite");
  request.force = reader.has("force");
  request.keep = reader.has("keep");
  reader.choice("on-read-error", {{"fail", OnReadError::fail}, {"skip", OnReadError::skip}},
                request.on_read_error);
  reader.time("max-downtime", request.max_downtime_ms);
  reader.number("max-passes", request.max_passes);
  reader.choice("cutover", {{"auto", CutoverChoice::automatic}, {"manual", CutoverChoice::manual}},
                request.cutover);
  request.handover = reader.text("handover");
  request.quiesce_cmd = reader.text("quiesce-cmd");
  request.resume_cmd = reader.text("resume-cmd");
  request.cutover_cmd = reader.text("cutover-cmd");
  reader.time("max-freeze", request.max_freeze_ms);
  reader.time("sync-every", request.sync_every_ms);
}

void read_change(Reader& reader, RunChange& change) {
  std::uint64_t value = 0;
  if (reader.has("rate")) {
    reader.size("rate", value, true);
    change.rate_bytes_per_second = value;
  }
  if (reader.has("max-downtime")) {
    reader.time("max-downtime", value);
    change.max_downtime_ms = value;
  }
  if (!reader.has("rate") && !reader.has("max-downtime"))
    reader.note(usage("set", "say what to set: --rate or --max-downtime"));
}

Result<void> check_words(const Command& command, const VerbInfo& info) {
  const std::string form = std::string("ferryctl ") + info.name + " " + info.arguments;
  if (command.words.size() < info.words_min)
    return fail(usage(info.name, "too few arguments; it is `" + form + "`"));
  if (command.words.size() > info.words_max)
    return fail(usage(info.name, "too many arguments; it is `" + form + "`"));
  return {};
}

Result<void> read_options(const std::vector<std::string>& rest, Command& command) {
  auto description = describe(command.verb);
  options::options_description all;
  all.add(description);
  all.add_options()("words", options::value<std::vector<std::string>>());
  options::positional_options_description positional;
  positional.add("words", -1);
  options::variables_map values;
  try {
    options::store(
        options::command_line_parser(rest)
            .options(all)
            .positional(positional)
            .style(options::command_line_style::unix_style & ~options::command_line_style::allow_guessing)
            .run(),
        values);
  } catch (const options::error& error) {
    return fail(usage(info_of(command.verb).name, std::string(error.what()) + "; see `ferryctl " +
                                                      info_of(command.verb).name + " --help`"));
  }
  Reader reader(values);
  if (values.count("words") > 0) command.words = values["words"].as<std::vector<std::string>>();
  command.json = command.json || reader.has("json");
  command.help = reader.has("help");
  command.detach = reader.has("detach");
  command.rehearse = reader.has("rehearse");
  if (reader.has("socket")) command.socket_path = reader.text("socket");
  if (command.help) return {};
  if (takes_volumes(command.verb)) read_request(reader, command.request);
  if (command.verb == Verb::set) read_change(reader, command.change);
  if (reader.error()) return fail(*reader.error());
  return {};
}

}  // namespace

std::string absolute_path(const std::string& path) {
  if (path.starts_with("/") || path.find("://") != std::string::npos || path.starts_with("qemu:"))
    return path;
  char directory[4096];
  if (::getcwd(directory, sizeof directory) == nullptr) return path;
  return (std::string(directory) == "/" ? "" : directory) + ("/" + path);
}

Result<Command> parse_command(const std::vector<std::string>& arguments) {
  Command command;
  const char* from_environment = std::getenv("BLOCKFERRY_SOCKET");
  command.socket_path =
      from_environment != nullptr && *from_environment != '\0' ? from_environment : default_socket_path;
  std::size_t at = 0;
  for (; at < arguments.size() && arguments[at].starts_with("-"); ++at) {
    const std::string& word = arguments[at];
    if (word == "--json") {
      command.json = true;
    } else if (word == "--help" || word == "-h") {
      return command;
    } else if (word == "--version") {
      command.verb = Verb::version;
      return command;
    } else if (word == "--socket" && at + 1 < arguments.size()) {
      command.socket_path = arguments[++at];
    } else if (word.starts_with("--socket=")) {
      command.socket_path = word.substr(9);
    } else {
      return fail(usage(word, "it is not an option of ferryctl itself; see `ferryctl --help`"));
    }
  }
  if (at == arguments.size())
    return fail(usage("ferryctl", "a verb is missing; `ferryctl --help` lists them"));
  const auto& infos = verb_infos();
  const auto info =
      std::find_if(infos.begin(), infos.end(), [&](const auto& item) { return arguments[at] == item.name; });
  if (info == infos.end())
    return fail(usage(arguments[at], "there is no such verb; " + nearest_verb(arguments[at])));
  command.verb = info->verb;
  if (auto done = read_options({arguments.begin() + std::ptrdiff_t(at) + 1, arguments.end()}, command);
      !done) {
    return fail(done.error());
  }
  if (command.help) return command;
  if (auto done = check_words(command, *info); !done) return fail(done.error());
  if (!takes_volumes(command.verb)) return command;
  command.request.kind = command.verb == Verb::migrate ? RunKind::migrate : RunKind::clone;
  command.request.source = absolute_path(command.words.front());
  for (std::size_t i = 1; i < command.words.size(); ++i)
    command.request.targets.push_back(absolute_path(command.words[i]));
  return command;
}

std::string help_text() {
  std::ostringstream text;
  text << "ferryctl moves block volumes through a running ferryd.\n\n"
          "Usage: ferryctl [--socket PATH] [--json] VERB …\n\nVerbs\n";
  for (const auto& info : verb_infos()) {
    std::string form = std::string("  ") + info.name + " " + info.arguments;
    form.resize(std::max<std::size_t>(form.size() + 1, 28), ' ');
    text << form << info.summary << "\n";
  }
  text << "\nExamples\n"
          "  ferryctl check /dev/sdb /dev/sdc         what would happen, what stands against it\n"
          "  ferryctl clone /dev/sdb /dev/sdc         copy, verify, report\n"
          "  ferryctl clone /dev/sdb /srv/sdb.img     back up into a sparse file\n"
          "  ferryctl clone --mode incremental /dev/sdb /srv/sdb.img\n"
          "                                           later: only what differs\n\n"
          "`ferryctl VERB --help` tells more. Sizes take K, M, G, T (powers of 1024); times take ms, s, m, "
          "h.\n"
          "Exit status: 0 done; 1 the run failed or was cancelled; 2 usage; 3 ferryd cannot be reached or "
          "refused the\n"
          "caller; 4 preflight refused.\n";
  return text.str();
}

std::string help_text(Verb verb) {
  const VerbInfo& info = info_of(verb);
  std::ostringstream text;
  text << "Usage: ferryctl " << info.name << " " << info.arguments << " [OPTIONS]\n\n"
       << info.summary << "\n\n"
       << describe(verb) << "\nExamples\n"
       << info.examples;
  return text.str();
}

}  // namespace blockferry
