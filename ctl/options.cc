// SPDX-License-Identifier: Apache-2.0
#include "ctl/options.h"

#include <algorithm>
#include <cctype>
#include <charconv>
#include <cstdlib>
#include <sstream>
#include <utility>

#include <boost/program_options.hpp>
#include <unistd.h>

#include "blockio/base/units.h"
#include "ctl/nearest.h"

namespace blockferry {

namespace {

namespace options = boost::program_options;

/// "--rate fast: not a size; …": `where` is an option or a verb, `what` was given.
Error usage(const std::string& where, const std::string& what, const std::string& why) {
  return make_error(ErrorCode::invalid_argument, where, what, why);
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
    add("tls-certificates", text(),
        "a directory: ca-cert.pem, client-cert.pem, client-key.pem (nbds volumes)");
    add("tls-psk-file", text(), "a file of USER:KEY lines (nbds volumes)");
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
    add("sync-unfrozen",
        "without freezing the source for it: no pause, but not of one moment (live sources)");
  }
  if (verb == Verb::set) {
    add("rate", text(), "bytes a second at most, as 500M; none for no limit");
    add("max-downtime", text(), "the longest pause at cutover, as 300ms (live sources)");
  }
  if (verb == Verb::clone || verb == Verb::migrate || verb == Verb::sync || verb == Verb::verify ||
      verb == Verb::cutover) {
    add("detach", "print the run's id and leave; the run goes on");
  }
  if (verb == Verb::sync)
    add("unfrozen", "without freezing the source: no pause, but not of one moment (live sources)");
  if (verb == Verb::cutover) add("rehearse", "do all but the hand-over, and report the pause");
  add("socket", text(), "ferryd's control socket (or $BLOCKFERRY_SOCKET)");
  add("json", "JSON on stdout and for errors");
  add("help,h", "show this help");
  return description;
}

template <typename Number>
Result<Number> number_of(const std::string& option, const std::string& text) {
  Number value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size())
    return fail(usage("--" + option, text, "not a whole number, or too large"));
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
    if (!bytes) return note(usage(std::string("--") + name, text(name), bytes.error().hint));
    target = *bytes;
  }
  template <typename Target>
  void time(const char* name, Target& target) {
    if (!has(name)) return;
    const auto duration = parse_duration(text(name));
    if (!duration) return note(usage(std::string("--") + name, text(name), duration.error().hint));
    target = std::uint64_t(duration->count());
  }
  void number(const char* name, std::uint32_t& target) {
    if (!has(name)) return;
    const auto value = number_of<std::uint32_t>(name, text(name));
    if (!value) return note(value.error());
    target = *value;
  }
  /// One of `choices`, by its word.
  template <typename Enum>
  void choice(const char* name, std::initializer_list<std::pair<const char*, Enum>> choices, Enum& target) {
    if (!has(name)) return;
    std::string known;
    std::vector<std::string> words;
    for (const auto& [word, value] : choices) {
      if (text(name) == word) {
        target = value;
        return;
      }
      words.emplace_back(word);
      known += (known.empty() ? "" : ", ") + words.back();
    }
    const std::string near = nearest(text(name), words);
    note(usage(std::string("--") + name, text(name),
               "it is one of " + known + (near.empty() ? "" : "; did you mean " + near + "?")));
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
  reader.choice("io-engine", {{"auto", "auto"}, {"uring", "uring"}, {"aio", "aio"}}, request.io_engine);
  if (reader.has("tls-certificates"))
    request.tls_certificates = absolute_path(reader.text("tls-certificates"));
  if (reader.has("tls-psk-file")) request.tls_psk_file = absolute_path(reader.text("tls-psk-file"));
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
  reader.choice("handover", {{"fs", "fs"}, {"dm-swap", "dm-swap"}, {"qemu", "qemu"}, {"cmd", "cmd"}},
                request.handover);
  request.quiesce_cmd = reader.text("quiesce-cmd");
  request.resume_cmd = reader.text("resume-cmd");
  request.cutover_cmd = reader.text("cutover-cmd");
  reader.time("max-freeze", request.max_freeze_ms);
  reader.time("sync-every", request.sync_every_ms);
  request.sync_freeze = !reader.has("sync-unfrozen");
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
    reader.note(usage("set", "", "say what to set: --rate or --max-downtime"));
}

Result<void> check_words(const Command& command, const VerbInfo& info) {
  const std::string form = std::string("ferryctl ") + info.name + " " + info.arguments;
  if (command.words.size() < info.words_min)
    return fail(usage(info.name, "", "too few arguments; it is `" + form + "`"));
  if (command.words.size() > info.words_max)
    return fail(usage(info.name, command.words[info.words_max], "too many arguments; it is `" + form + "`"));
  for (const auto& word : command.words) {
    if (word.empty()) return fail(usage(info.name, "", "an argument is empty; it is `" + form + "`"));
  }
  return {};
}

bool is_uri(const std::string& path) {
  if (path.starts_with("qemu:")) return true;
  const auto colon = path.find("://");
  if (colon == std::string::npos || colon == 0) return false;
  return std::all_of(path.begin(), path.begin() + std::ptrdiff_t(colon), [](unsigned char letter) {
    return letter < 0x80 && (std::isalnum(letter) != 0 || letter == '+' || letter == '-' || letter == '.');
  });
}

/// Where a = may stand between two volumes. Those of a URI's parameters do not (elsewhere in a URI one is
/// %3D); whoever has a path with one gives it a link.
std::vector<std::size_t> pair_separators(const std::string& word) {
  std::vector<std::size_t> found;
  bool parameter = false, uri = is_uri(word);
  for (std::size_t i = 0; i < word.size(); ++i) {
    if (uri && (word[i] == '?' || word[i] == '&')) {
      parameter = true;
    } else if (word[i] == '=' && !std::exchange(parameter, false)) {
      found.push_back(i);
      uri = is_uri(word.substr(i + 1));
    }
  }
  return found;
}

/// SRC=DST ….
bool are_pairs(const Command& command) {
  return takes_volumes(command.verb) && !command.words.empty() &&
         std::all_of(command.words.begin(), command.words.end(),
                     [](const auto& word) { return !pair_separators(word).empty(); });
}

Result<void> read_pairs(Command& command) {
  for (const auto& word : command.words) {
    const auto separators = pair_separators(word);
    const auto at = separators.front();
    if (at == 0 || at + 1 == word.size() || separators.size() > 1)
      return fail(usage(info_of(command.verb).name, word, "SRC=DST is expected, for each of the volumes"));
    command.pairs.push_back({absolute_path(word.substr(0, at)), absolute_path(word.substr(at + 1))});
  }
  if (command.pairs.size() > 1) return {};
  command.request.source = command.pairs.front().source;
  command.request.targets = {command.pairs.front().target};
  command.pairs.clear();
  return {};
}

Error unknown_option(Verb verb, const std::string& option, const options::options_description& known) {
  std::vector<std::string> names;
  for (const auto& each : known.options()) names.push_back("--" + each->long_name());
  const std::string near = nearest(option, names), name = info_of(verb).name;
  return usage(name, option,
               "there is no such option; " +
                   (near.empty() ? "see `ferryctl " + name + " --help`" : "did you mean " + near + "?"));
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
  } catch (const options::unknown_option& error) {
    return fail(unknown_option(command.verb, error.get_option_name(), description));
  } catch (const options::error& error) {
    const std::string name = info_of(command.verb).name;
    return fail(usage(name, "", std::string(error.what()) + "; see `ferryctl " + name + " --help`"));
  }
  Reader reader(values);
  if (values.count("words") > 0) command.words = values["words"].as<std::vector<std::string>>();
  command.json = command.json || reader.has("json");
  command.help = reader.has("help");
  command.detach = reader.has("detach");
  command.rehearse = reader.has("rehearse");
  command.unfrozen = reader.has("unfrozen");
  if (reader.has("socket")) command.socket_path = reader.text("socket");
  if (command.help) return {};
  if (takes_volumes(command.verb)) read_request(reader, command.request);
  if (command.verb == Verb::set) read_change(reader, command.change);
  if (reader.error()) return fail(*reader.error());
  return {};
}

/// JSON, in which all of this goes to ferryd, knows nothing else.
bool is_utf8(const std::string& text) {
  std::size_t i = 0;
  const auto byte = [&](std::size_t at) {
    return static_cast<unsigned char>(at < text.size() ? text[at] : 0);
  };
  while (i < text.size()) {
    const unsigned lead = byte(i), next = byte(i + 1);
    const std::size_t length = lead < 0x80   ? 1
                               : lead < 0xC2 ? 0
                               : lead < 0xE0 ? 2
                               : lead < 0xF0 ? 3
                               : lead < 0xF5 ? 4
                                             : 0;
    if (length == 0) return false;
    // Overlong forms, surrogates and what lies beyond the last code point show in the second byte.
    if ((lead == 0xE0 && next < 0xA0) || (lead == 0xED && next > 0x9F) || (lead == 0xF0 && next < 0x90) ||
        (lead == 0xF4 && next > 0x8F)) {
      return false;
    }
    for (std::size_t at = i + 1; at < i + length; ++at) {
      if ((byte(at) & 0xC0) != 0x80) return false;
    }
    i += length;
  }
  return true;
}

/// What stands before the verb. Answers where the verb is; nothing: there is no more to read.
Result<std::optional<std::size_t>> read_leading_options(const std::vector<std::string>& arguments,
                                                        Command& command) {
  std::size_t at = 0;
  for (; at < arguments.size() && arguments[at].starts_with("-"); ++at) {
    const std::string& word = arguments[at];
    if (word == "--json") {
      command.json = true;
    } else if (word == "--help" || word == "-h") {
      command.verb = Verb::help;
      return std::nullopt;
    } else if (word == "--version") {
      command.verb = Verb::version;
      return std::nullopt;
    } else if (word == "--socket" && at + 1 < arguments.size()) {
      command.socket_path = arguments[++at];
    } else if (word == "--socket") {
      return fail(usage("--socket", "", "a path is missing"));
    } else if (word.starts_with("--socket=")) {
      command.socket_path = word.substr(9);
    } else {
      const std::string near = nearest(word, {"--json", "--help", "--version", "--socket"});
      return fail(usage("ferryctl", word,
                        near.empty()
                            ? "there is no such option before the verb; see `ferryctl --help`"
                            : "there is no such option before the verb; did you mean " + near + "?"));
    }
  }
  if (at == arguments.size())
    return fail(usage("ferryctl", "", "a verb is missing; `ferryctl --help` lists them"));
  return at;
}

}  // namespace

std::string absolute_path(const std::string& path) {
  const std::string guest = "qemu:";
  if (path.starts_with(guest) && path.find('?') != guest.size() && !path.starts_with(guest + "/")) {
    std::string directory = absolute_path("");
    for (std::size_t i = 0; i < directory.size(); ++i) {
      if (directory[i] == '%' || directory[i] == '?')
        directory.replace(i, 1, directory[i] == '%' ? "%25" : "%3F");
    }
    return guest + directory + path.substr(guest.size());
  }
  if (path.starts_with("/") || is_uri(path)) return path;
  char directory[4096];
  if (::getcwd(directory, sizeof directory) == nullptr) return path;
  return (std::string(directory) == "/" ? "" : directory) + ("/" + path);
}

std::string verb_advice(const std::string& word) {
  std::vector<std::string> names;
  for (const auto& info : verb_infos()) names.emplace_back(info.name);
  const std::string near = nearest(word, names);
  return near.empty() ? "`ferryctl --help` lists the verbs" : "did you mean `ferryctl " + near + "`?";
}

Result<Command> parse_command(const std::vector<std::string>& arguments) {
  Command command;
  const char* from_environment = std::getenv("BLOCKFERRY_SOCKET");
  command.socket_path =
      from_environment != nullptr && *from_environment != '\0' ? from_environment : default_socket_path;
  for (const auto& word : arguments) {
    if (!is_utf8(word)) return fail(usage("ferryctl", "", "an argument is not UTF-8, as names must be here"));
  }
  const auto at = read_leading_options(arguments, command);
  if (!at) return fail(at.error());
  if (!*at) return command;
  const auto& infos = verb_infos();
  const auto info = std::find_if(infos.begin(), infos.end(),
                                 [&](const auto& item) { return arguments[**at] == item.name; });
  if (info == infos.end()) {
    return fail(usage("ferryctl", arguments[**at], "there is no such verb; " + verb_advice(arguments[**at])));
  }
  command.verb = info->verb;
  if (auto done = read_options({arguments.begin() + std::ptrdiff_t(**at) + 1, arguments.end()}, command);
      !done) {
    return fail(done.error());
  }
  if (command.help) return command;
  command.request.kind = command.verb == Verb::migrate ? RunKind::migrate : RunKind::clone;
  if (are_pairs(command)) {
    if (auto done = read_pairs(command); !done) return fail(done.error());
    return command;
  }
  if (auto done = check_words(command, *info); !done) return fail(done.error());
  if (!takes_volumes(command.verb)) return command;
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
          "RUN is a run's id or name. Sizes take K, M, G, T (powers of 1024); times take ms, s, m, h.\n"
          "--socket (or $BLOCKFERRY_SOCKET) names ferryd's control socket; --json prints JSON, and errors "
          "too.\n"
          "`ferryctl VERB --help` tells a verb's options.\n\n"
          "Exit status: 0 done; 1 the run failed, was cancelled or rolled back; 2 usage, or no such run; "
          "3 ferryd\n"
          "cannot be reached or refused the caller; 4 preflight refused; 130 left by Ctrl-C, and the run "
          "goes on.\n";
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
