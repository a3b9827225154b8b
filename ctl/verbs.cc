// SPDX-License-Identifier: Apache-2.0
#include "ctl/verbs.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include <nlohmann/json.hpp>
#include <unistd.h>

#include "blockio/base/check.h"
#include "ctl/client.h"
#include "ctl/follow.h"
#include "ctl/progress.h"
#include "ctl/render.h"

namespace blockferry {

namespace {

using nlohmann::json;

constexpr int interrupted_status = 130;
constexpr std::size_t any = SIZE_MAX;

void print(const std::string& text) {
  std::fputs(text.c_str(), stdout);
}
void print_json(const json& object) {
  print(object.dump(2) + "\n");
}

std::string run_path(const std::string& run, const char* verb = nullptr) {
  return "/runs/" + percent_encode(run) + (verb != nullptr ? std::string("/") + verb : "");
}

/// How a run that ended is told of, and what it means for the exit status.
int report_end(const json& run, bool as_json) {
  const std::string state = text_of(run, "state"), id = text_of(run, "id");
  if (as_json) print_json(run);
  if (state == "completed") {
    if (!as_json) print(summary_line(run) + "\n");
    return 0;
  }
  Error error;
  const auto told = run.find("error");
  if (told != run.end() && told->is_object()) {
    error = error_from_json(json{{"error", *told}});
  } else {
    error = make_error(ErrorCode::conflict, "run " + id, "", state);
  }
  if (state == "failed") {
    error.hint += (error.hint.empty() ? "" : "; ") + std::string("`ferryctl resume ") + id +
                  "` goes on once the cause is gone";
  }
  report_error(error, as_json);
  return 1;
}

/// Follows a run that was just begun or asked for.
int follow_to_end(Client& client, const Command& command, const json& begun) {
  const std::string id = text_of(begun, "id");
  if (command.detach) {
    command.json ? print_json(begun) : print(id + "\n");
    return 0;
  }
  auto end = follow_run(client, id, command.json ? FollowOutput::silent : FollowOutput::progress);
  if (!end) return report_error(end.error(), command.json);
  if (end->detached) {
    std::fprintf(stderr,
                 "detached; run %s goes on: `ferryctl watch %s` shows it, `ferryctl cancel %s` ends it\n",
                 id.c_str(), id.c_str(), id.c_str());
    return interrupted_status;
  }
  return report_end(end->run, command.json);
}

int do_clone(Client& client, const Command& command) {
  auto begun = client.request("POST", "/runs", to_json(command.request));
  if (!begun) return report_error(begun.error(), command.json);
  return follow_to_end(client, command, *begun);
}

int do_check(Client& client, const Command& command) {
  auto report = client.request("POST", "/check", to_json(command.request));
  if (!report) return report_error(report.error(), command.json);
  command.json ? print_json(*report) : print(render_check(*report));
  return report->value("ok", false) ? 0 : 4;
}

int show_answer(const Result<json>& answer, const Command& command, std::string (*render)(const json&)) {
  if (!answer) return report_error(answer.error(), command.json);
  command.json ? print_json(*answer) : print(render(*answer));
  return 0;
}

std::string short_line(const json& run) {
  return "run " + text_of(run, "id") + " is " + text_of(run, "state") + "\n";
}
std::string forgotten_line(const json& run) {
  return "run " + text_of(run, "id") + " is forgotten\n";
}

int do_list(Client& client, const Command& command) {
  return show_answer(client.get("/runs"), command, render_list);
}
int do_devices(Client& client, const Command& command) {
  return show_answer(client.get("/devices"), command, render_devices);
}
int do_show(Client& client, const Command& command) {
  return show_answer(client.get(run_path(command.words[0])), command, render_run);
}

int do_watch(Client& client, const Command& command) {
  auto end =
      follow_run(client, command.words[0], command.json ? FollowOutput::lines : FollowOutput::progress);
  if (!end) return report_error(end.error(), command.json);
  if (end->detached) return interrupted_status;
  if (!command.json) return report_end(end->run, false);
  return text_of(end->run, "state") == "completed" ? 0 : 1;
}

int do_map(Client& client, const Command& command) {
  MapStyle style;
  const char* terminal = std::getenv("TERM");
  const bool dumb = terminal == nullptr || std::strcmp(terminal, "dumb") == 0;
  style.columns = std::min<std::size_t>(terminal_columns(STDOUT_FILENO), 200);
  style.colour = ::isatty(STDOUT_FILENO) == 1 && std::getenv("NO_COLOR") == nullptr && !dumb;
  auto map = client.get(run_path(command.words[0], "map") + "?cells=" + std::to_string(map_cells(style)));
  if (!map) return report_error(map.error(), command.json);
  command.json ? print_json(*map) : print(render_map(*map, style));
  return 0;
}

/// The verbs that are a word on a run: they answer at once.
int do_run_verb(Client& client, const Command& command) {
  return show_answer(
      client.request("POST", run_path(command.words[0], info_of(command.verb).name), nullptr), command,
      short_line);
}

/// sync and verify: the run goes on, and is followed.
int do_run_again(Client& client, const Command& command) {
  auto begun = client.request("POST", run_path(command.words[0], info_of(command.verb).name), nullptr);
  if (!begun) return report_error(begun.error(), command.json);
  return follow_to_end(client, command, *begun);
}

int do_forget(Client& client, const Command& command) {
  return show_answer(client.request("DELETE", run_path(command.words[0]), nullptr), command, forgotten_line);
}

int do_set(Client& client, const Command& command) {
  return show_answer(client.request("PATCH", run_path(command.words[0]), to_json(command.change)), command,
                     short_line);
}

int do_version(Client& client, const Command& command) {
  auto server = client.get("/version");
  const std::string theirs = server ? text_of(*server, "version") : "";
  if (command.json) {
    print_json({{"ferryctl", BLOCKFERRY_VERSION}, {"ferryd", server ? json(theirs) : json(nullptr)}});
  } else {
    print("ferryctl " BLOCKFERRY_VERSION "\nferryd " + (server ? theirs : std::string("cannot be reached")) +
          "\n");
  }
  return 0;
}

int do_help(Client&, const Command& command) {
  if (command.words.empty()) {
    print(help_text());
    return 0;
  }
  for (const auto& info : verb_infos()) {
    if (command.words[0] != info.name) continue;
    print(help_text(info.verb));
    return 0;
  }
  return report_error(
      make_error(ErrorCode::invalid_argument, "explain", command.words[0], "there is no such verb"),
      command.json);
}

using Action = int (*)(Client&, const Command&);

Action action_of(Verb verb) {
  switch (verb) {
    case Verb::clone:
    case Verb::migrate:
      return do_clone;
    case Verb::check:
      return do_check;
    case Verb::list:
      return do_list;
    case Verb::show:
      return do_show;
    case Verb::watch:
      return do_watch;
    case Verb::map:
      return do_map;
    case Verb::pause:
    case Verb::resume:
    case Verb::cancel:
    case Verb::cutover:
    case Verb::rollback:
    case Verb::commit:
      return do_run_verb;
    case Verb::sync:
    case Verb::verify:
      return do_run_again;
    case Verb::forget:
      return do_forget;
    case Verb::set:
      return do_set;
    case Verb::devices:
      return do_devices;
    case Verb::version:
      return do_version;
    case Verb::help:
      return do_help;
  }
  return do_help;
}

}  // namespace

const std::vector<VerbInfo>& verb_infos() {
  static const std::vector<VerbInfo> infos{
      {Verb::clone, "clone", "SRC DST [DST…]",
       "copy a volume to one or more others; shows progress until the end",
       "  ferryctl clone /dev/sdb /dev/sdc\n"
       "  ferryctl clone --rate 200M --name nightly /dev/sdb /srv/sdb.img\n"
       "  ferryctl clone --mode incremental /dev/sdb /srv/sdb.img\n",
       2, any},
      {Verb::migrate, "migrate", "SRC DST", "the same, and hand the volume over",
       "  ferryctl migrate /dev/vg/old /dev/sdc\n", 2, 2},
      {Verb::check, "check", "SRC DST [DST…]", "preflight alone: what would happen, what stands against it",
       "  ferryctl check /dev/sdb /dev/sdc\n  ferryctl check --mode incremental /dev/sdb /srv/sdb.img\n", 2,
       any},
      {Verb::list, "list", "", "all runs", "  ferryctl list\n  ferryctl list --json | jq '.[].id'\n", 0, 0},
      {Verb::show, "show", "RUN", "all that is known of a run", "  ferryctl show nightly\n", 1, 1},
      {Verb::watch, "watch", "RUN", "live progress until the run ends",
       "  ferryctl watch nightly\n  ferryctl watch --json nightly\n", 1, 1},
      {Verb::map, "map", "RUN", "a picture of the volume: synced, dirty, zero, bad",
       "  ferryctl map nightly\n", 1, 1},
      {Verb::pause, "pause", "RUN", "stop reading and writing until `resume`", "  ferryctl pause nightly\n",
       1, 1},
      {Verb::resume, "resume", "RUN", "go on with a paused, failed or cancelled run",
       "  ferryctl resume nightly\n", 1, 1},
      {Verb::cancel, "cancel", "RUN", "end a run; what it copied stays on the target",
       "  ferryctl cancel nightly\n", 1, 1},
      {Verb::forget, "forget", "RUN", "remove an ended run and its state", "  ferryctl forget nightly\n", 1,
       1},
      {Verb::set, "set", "RUN --rate RATE", "change a run while it goes on",
       "  ferryctl set nightly --rate 100M\n  ferryctl set nightly --rate none\n", 1, 1},
      {Verb::sync, "sync", "RUN", "bring the target up to date: copy only what differs",
       "  ferryctl sync nightly\n", 1, 1},
      {Verb::cutover, "cutover", "RUN", "hand over now (live sources)",
       "  ferryctl cutover --rehearse nightly\n", 1, 1},
      {Verb::rollback, "rollback", "RUN", "return to the old volume after a swap",
       "  ferryctl rollback nightly\n", 1, 1},
      {Verb::commit, "commit", "RUN", "settle a swap for good", "  ferryctl commit nightly\n", 1, 1},
      {Verb::verify, "verify", "RUN", "read the target back against the recorded checksums",
       "  ferryctl verify nightly\n", 1, 1},
      {Verb::devices, "devices", "", "what can be moved", "  ferryctl devices\n", 0, 0},
      {Verb::version, "version", "", "of ferryctl and ferryd", "  ferryctl version\n", 0, 0},
      {Verb::help, "help", "[VERB]", "this help, or a verb's", "  ferryctl help clone\n", 0, 1},
  };
  return infos;
}

const VerbInfo& info_of(Verb verb) {
  const auto& infos = verb_infos();
  const auto at =
      std::find_if(infos.begin(), infos.end(), [&](const auto& info) { return info.verb == verb; });
  BLOCKFERRY_CHECK(at != infos.end(), "a verb without an entry");
  return *at;
}

int report_error(const Error& error, bool as_json) {
  if (as_json) {
    std::fprintf(stderr, "%s\n", error_to_json(error).dump().c_str());
  } else {
    std::fprintf(stderr, "ferryctl: %s\n", error.message().c_str());
  }
  switch (error.code) {
    case ErrorCode::refused:
      return 4;
    case ErrorCode::unreachable:
      return 3;
    case ErrorCode::invalid_argument:
    case ErrorCode::not_found:
      return 2;
    default:
      return 1;
  }
}

int run_command(const Command& command) {
  if (command.help) {
    print(help_text(command.verb));
    return 0;
  }
  Client client(command.socket_path);
  return action_of(command.verb)(client, command);
}

}  // namespace blockferry
