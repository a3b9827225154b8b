// SPDX-License-Identifier: Apache-2.0
#include "ctl/verbs.h"

#include <algorithm>
#include <cstdio>
#include <exception>

#include <nlohmann/json.hpp>
#include <unistd.h>

#include "blockio/base/check.h"
#include "blockio/base/clock.h"
#include "blockio/base/percent_encoding.h"
#include "blockio/base/units.h"
#include "ctl/client.h"
#include "ctl/interrupt.h"
#include "ctl/nearest.h"
#include "ctl/progress.h"
#include "ctl/render.h"
#include "ctl/terminal.h"
#include "ctl/text.h"

namespace blockferry {

struct Session {
  Client& client;
  const Command& command;
  const FollowPatience& patience;
};

namespace {

using nlohmann::json;

constexpr std::size_t any = SIZE_MAX;

void print(const std::string& text) {
  std::fputs(text.c_str(), stdout);
}
void print_json(const json& object) {
  print(object.dump(2) + "\n");
}

std::string run_path(const std::string& run, const char* verb = nullptr) {
  return "/runs/" + percent_encoded(run) + (verb != nullptr ? std::string("/") + verb : "");
}

// Errors.

/// The error of a request about a run; where there is no such run, with the nearest one there is.
int report_run_error(const Session& session, Error error) {
  if (error.code == ErrorCode::not_found) {
    std::vector<std::string> names;
    if (const auto runs = session.client.get("/runs"); runs && runs->is_array()) {
      for (const auto& run : *runs) {
        names.push_back(text_of(run, "id"));
        names.push_back(text_of(run, "name"));
      }
    }
    if (const std::string near = nearest(session.command.words[0], names); !near.empty())
      error.hint += (error.hint.empty() ? "did you mean " : "; did you mean ") + near + "?";
  }
  return report_error(error, session.command.json);
}

/// Why a run that ended did not complete.
Error end_error(const json& run) {
  const std::string state = text_of(run, "state"), id = text_of(run, "id");
  const std::string resume = "`ferryctl resume " + id + "` goes on";
  const json& told = object_of(run, "error");
  if (state == "failed") {
    Error error = told.empty() ? make_error(ErrorCode::internal, "run", id, "failed") : error_from_json(told);
    error.hint += (error.hint.empty() ? "" : "; ") + resume + " once the cause is gone";
    return error;
  }
  if (!told.empty()) return error_from_json(told);
  const std::string end = state == "cancelled" ? "it was cancelled; " + resume : "it is " + state;
  return make_error(ErrorCode::conflict, "run", id, end);
}

bool swapped(const json& run) {
  return run.value("swapped", false);
}

std::string swapped_line(const json& run) {
  const std::string id = text_of(run, "id");
  if (run_ended(run)) return "run " + id + " is settled: the volume stays on its new disk\n";
  return "swapped; " + pause_line(run) + "; the old disk is kept in step: `ferryctl commit " + id +
         "` settles it, `ferryctl rollback " + id + "` returns\n";
}

/// Of a run that ended, and was printed if it had to be. The exit status is 0 or 1, whatever the error.
int report_end(const json& run, bool as_json) {
  if (text_of(run, "state") == "completed" || (!run_ended(run) && swapped(run))) return 0;
  report_error(end_error(run), as_json);
  return 1;
}

// Runs that are followed.

json one_or_all(const std::vector<json>& runs) {
  return runs.size() == 1 ? runs.front() : json(runs);
}

int report_detached(const std::vector<json>& runs, bool as_json) {
  if (as_json) {
    print_json(one_or_all(runs));
    return interrupted_status;
  }
  for (const auto& run : runs) {
    const std::string id = text_of(run, "id");
    std::fprintf(stderr,
                 "detached; run %s goes on: `ferryctl watch %s` shows it, `ferryctl cancel %s` ends it\n",
                 id.c_str(), id.c_str(), id.c_str());
  }
  return interrupted_status;
}

/// Runs that were just begun, to their end. Under a guard of the caller's.
int follow_to_end(const Session& session, std::vector<json> runs) {
  const Command& command = session.command;
  if (command.detach) {
    if (command.json) print_json(one_or_all(runs));
    for (const auto& run : runs) print(command.json ? "" : text_of(run, "id") + "\n");
    return 0;
  }
  const Nanoseconds begun = system_clock().now();
  const auto output = command.json ? FollowOutput::silent : FollowOutput::progress;
  const auto end = follow_runs(session.client, runs, output, session.patience, FollowUntil::swapped);
  if (!end) return report_error(end.error(), command.json);
  if (*end == FollowEnd::detached) return report_detached(runs, command.json);
  if (command.json) print_json(one_or_all(runs));
  const double seconds = std::chrono::duration<double>(system_clock().now() - begun).count();
  for (const auto& run : runs) {
    if (!command.json && swapped(run) && !run_ended(run)) print(swapped_line(run));
    if (command.json || text_of(run, "state") != "completed") continue;
    if (runs.size() > 1) print(text_of(object_of(run, "source"), "uri") + ": ");
    print((command.verb == Verb::verify ? verify_summary_line(run, seconds) : summary_line(run)) + "\n");
  }
  // Of volumes that are cut over together the first tells what became of all; `show` has the rest.
  for (const auto& run : runs) {
    if (const int status = report_end(run, command.json); status != 0) return status;
  }
  return 0;
}

/// "volumes" in place of source and targets.
json group_request(const Command& command) {
  json request = to_json(command.request), volumes = json::array();
  for (const auto& pair : command.pairs)
    volumes.push_back({{"source", pair.source}, {"targets", json::array({pair.target})}});
  request.erase("source");
  request.erase("targets");
  request["volumes"] = std::move(volumes);
  return request;
}

int do_clone(const Session& session) {
  const Command& command = session.command;
  // From here on, for Ctrl-C must not leave the user in doubt whether a run was begun.
  const InterruptGuard guard;
  auto begun = command.pairs.empty() ? session.client.request("POST", "/runs", to_json(command.request))
                                     : session.client.request("POST", "/groups", group_request(command));
  if (begun && command.pairs.empty()) return follow_to_end(session, {std::move(*begun)});
  if (begun) return follow_to_end(session, begun->get<std::vector<json>>());
  const int status = report_error(begun.error(), command.json);
  return interrupted() ? interrupted_status : status;
}

/// sync and verify: the run goes on, and is followed.
int do_run_again(const Session& session) {
  const Command& command = session.command;
  const InterruptGuard guard;
  const char* verb = command.unfrozen ? "sync-unfrozen" : info_of(command.verb).name;
  auto begun = session.client.request("POST", run_path(command.words[0], verb), nullptr);
  if (begun) return follow_to_end(session, {std::move(*begun)});
  const int status = report_run_error(session, begun.error());
  return interrupted() ? interrupted_status : status;
}

int do_watch(const Session& session) {
  const Command& command = session.command;
  const InterruptGuard guard;
  auto run = session.client.get(run_path(command.words[0]));
  if (!run) return report_run_error(session, run.error());
  const auto output = command.json ? FollowOutput::lines : FollowOutput::progress;
  std::vector<json> runs{std::move(*run)};
  const auto end = follow_runs(session.client, runs, output, session.patience);
  if (!end) return report_error(end.error(), command.json);
  if (*end == FollowEnd::detached) return command.json ? interrupted_status : report_detached(runs, false);
  if (!command.json && text_of(runs[0], "state") == "completed") print(summary_line(runs[0]) + "\n");
  return report_end(runs[0], command.json);
}

// Verbs that are answered at once.

int print_answer(const Session& session, const Result<json>& answer, std::string (*render)(const json&)) {
  if (!answer) return report_run_error(session, answer.error());
  session.command.json ? print_json(*answer) : print(render(*answer));
  return 0;
}

std::string state_line(const json& run) {
  return "run " + text_of(run, "id") + " is " + text_of(run, "state") + "\n";
}
std::string forgotten_line(const json& run) {
  return "run " + text_of(run, "id") + " is forgotten\n";
}
std::string changed_line(const json& run) {
  const std::string rate = count_of(run, "rate_bytes_per_second") > 0
                               ? "at most " + size_text(run, "rate_bytes_per_second") + "/s"
                               : "no limit";
  return "run " + text_of(run, "id") + " is " + text_of(run, "state") + ", rate: " + rate + "\n";
}

std::string pause_lines(const json& run) {
  return pause_line(run) + "\n";
}

/// What came of a rehearsal, once it is over: another pause than before, or a word why there was none.
Result<json> rehearsed(const Session& session, const std::string& path, double pause_before) {
  constexpr Nanoseconds patience = std::chrono::minutes(10), between = std::chrono::milliseconds(50);
  const Nanoseconds give_up = system_clock().now() + patience;
  while (!interrupted() && system_clock().now() < give_up) {
    auto run = session.client.get(path);
    if (!run || number_of(*run, "downtime_ms") != pause_before) return run;
    if (const json& error = object_of(*run, "cutover_error"); !error.empty())
      return fail(error_from_json(error));
    if (run_ended(*run)) {
      return fail(make_error(ErrorCode::conflict, "rehearse the cutover of run", text_of(*run, "id"),
                             "it has ended"));
    }
    system_clock().sleep_for(between);
  }
  return fail(make_error(ErrorCode::conflict, "rehearse the cutover of run", session.command.words[0],
                         "it goes on; `ferryctl show` tells its pause"));
}

/// Followed to the run's end, a rehearsal to its own.
int do_cutover(const Session& session) {
  const Command& command = session.command;
  if (!command.rehearse) return do_run_again(session);
  const InterruptGuard guard;
  const std::string path = run_path(command.words[0]);
  const auto before = session.client.get(path);
  if (!before) return report_run_error(session, before.error());
  const auto asked = session.client.request("POST", path + "/rehearse", nullptr);
  if (!asked) return report_run_error(session, asked.error());
  return print_answer(session, rehearsed(session, path, number_of(*before, "downtime_ms")), pause_lines);
}

/// Followed until the volume lies on its old disk again, or it is known why not.
int do_rollback(const Session& session) {
  const Command& command = session.command;
  const InterruptGuard guard;
  const std::string path = run_path(command.words[0]);
  auto begun = session.client.request("POST", path + "/rollback", nullptr);
  if (!begun) return report_run_error(session, begun.error());
  std::vector<json> runs{std::move(*begun)};
  constexpr Nanoseconds between = std::chrono::milliseconds(50);
  while (!interrupted() && !run_ended(runs[0])) {
    if (const json& error = object_of(runs[0], "cutover_error"); !error.empty())
      return report_error(error_from_json(error), command.json);
    system_clock().sleep_for(between);
    auto run = session.client.get(path);
    if (!run) return report_run_error(session, run.error());
    runs[0] = std::move(*run);
  }
  if (!run_ended(runs[0])) return report_detached(runs, command.json);
  if (command.json) print_json(runs[0]);
  if (text_of(runs[0], "state") != "rolled-back") return report_end(runs[0], command.json);
  if (!command.json) print("rolled back; " + pause_line(runs[0]) + "\n");
  return 0;
}

/// Volumes that are cut over together are checked one by one: each must be live.
int do_check(const Session& session) {
  const Command& command = session.command;
  std::vector<RunRequest> requests(std::max<std::size_t>(1, command.pairs.size()), command.request);
  for (std::size_t i = 0; i < command.pairs.size(); ++i) {
    requests[i].source = command.pairs[i].source;
    requests[i].targets = {command.pairs[i].target};
    requests[i].mode = RunMode::hybrid;
    if (requests[i].handover.empty()) requests[i].handover = "fs";
  }
  std::vector<json> reports;
  bool ok = true;
  for (auto& request : requests) {
    if (!request.handover.empty()) request.kind = RunKind::migrate;  // nothing else hands over
    auto report = session.client.request("POST", "/check", to_json(request));
    if (!report) return report_error(report.error(), command.json);
    ok = ok && report->value("ok", false);
    if (!command.json) print(render_check(*report));
    reports.push_back(std::move(*report));
  }
  if (command.json) print_json(one_or_all(reports));
  return ok ? 0 : 4;
}

int do_list(const Session& session) {
  const auto runs = session.client.get("/runs");
  if (!runs) return report_error(runs.error(), session.command.json);
  return print_answer(session, runs, render_list);
}

int do_devices(const Session& session) {
  const auto devices = session.client.get("/devices");
  if (!devices) return report_error(devices.error(), session.command.json);
  return print_answer(session, devices, render_devices);
}

int do_show(const Session& session) {
  return print_answer(session, session.client.get(run_path(session.command.words[0])), render_run);
}

int do_map(const Session& session) {
  const Command& command = session.command;
  constexpr std::size_t columns_max = 200, rows_max = 24, rows_beside = 4;  // title, legend, prompt
  MapStyle style;
  style.columns = std::min(terminal_columns(STDOUT_FILENO), columns_max);
  const std::size_t rows = terminal_rows(STDOUT_FILENO);
  style.rows = std::clamp<std::size_t>(rows > rows_beside ? rows - rows_beside : 1, 1, rows_max);
  style.colour = wants_colour(STDOUT_FILENO) && speaks_utf8();
  const std::string path = run_path(command.words[0], "map");
  // JSON is not for this terminal: as many cells as ferryd likes.
  auto map = session.client.get(command.json ? path : path + "?cells=" + std::to_string(map_cells(style)));
  if (!map) return report_run_error(session, map.error());
  if (command.json) {
    print_json(*map);
    return 0;
  }
  print(render_map(*map, style));
  const auto run = session.client.get(run_path(command.words[0]));
  const std::string live = run ? live_line(*run) : "";
  if (!live.empty()) print(live + "\n");
  return 0;
}

int do_run_verb(const Session& session) {
  const Command& command = session.command;
  const std::string path = run_path(command.words[0], info_of(command.verb).name);
  return print_answer(session, session.client.request("POST", path, nullptr), state_line);
}

int do_forget(const Session& session) {
  const std::string path = run_path(session.command.words[0]);
  return print_answer(session, session.client.request("DELETE", path, nullptr), forgotten_line);
}

int do_set(const Session& session) {
  const std::string path = run_path(session.command.words[0]);
  return print_answer(session, session.client.request("PATCH", path, to_json(session.command.change)),
                      changed_line);
}

int do_version(const Session& session) {
  const auto server = session.client.get("/version");
  const std::string ours = blockferry_version(), theirs = server ? text_of(*server, "version") : "";
  if (session.command.json) {
    print_json({{"ferryctl", ours}, {"ferryd", server ? json(theirs) : json(nullptr)}});
  } else {
    print("ferryctl " + ours + "\nferryd " + (server ? theirs : "unknown: " + server.error().message()) +
          "\n");
  }
  return 0;
}

int do_help(const Session& session) {
  const Command& command = session.command;
  if (command.words.empty()) {
    print(help_text());
    return 0;
  }
  for (const auto& info : verb_infos()) {
    if (command.words[0] != info.name) continue;
    print(help_text(info.verb));
    return 0;
  }
  return report_error(make_error(ErrorCode::invalid_argument, "help", command.words[0],
                                 "there is no such verb; " + verb_advice(command.words[0])),
                      command.json);
}

int run_command(const Command& command, const FollowPatience& patience) {
  if (command.help) {
    print(help_text(command.verb));
    return 0;
  }
  Client client(command.socket_path);
  return info_of(command.verb).run({client, command, patience});
}

}  // namespace

const std::vector<VerbInfo>& verb_infos() {
  static const std::vector<VerbInfo> infos{
      {Verb::clone, "clone", "SRC DST [DST…] | SRC=DST …",
       "copy a volume to one or more others; shows progress until the end",
       "  ferryctl clone /dev/sdb /dev/sdc\n"
       "  ferryctl clone --rate 200M --name nightly /dev/sdb /srv/sdb.img\n"
       "  ferryctl clone --mode incremental /dev/sdb /srv/sdb.img\n",
       2, any, do_clone},
      {Verb::migrate, "migrate", "SRC DST | SRC=DST …",
       "the same, and hand the volume over, or several at one moment (live sources)",
       "  ferryctl migrate /dev/vg/old /dev/sdc\n"
       "  ferryctl migrate --cutover manual /dev/vg/old /dev/sdc\n"
       "  ferryctl migrate /dev/vg/data=/dev/sdc /dev/vg/log=/dev/sdd\n",
       2, 2, do_clone},
      {Verb::check, "check", "SRC DST [DST…]", "preflight alone: what would happen, what stands against it",
       "  ferryctl check /dev/sdb /dev/sdc\n  ferryctl check --mode incremental /dev/sdb /srv/sdb.img\n", 2,
       any, do_check},
      {Verb::list, "list", "", "all runs", "  ferryctl list\n  ferryctl list --json | jq '.[].id'\n", 0, 0,
       do_list},
      {Verb::show, "show", "RUN", "all that is known of a run",
       "  ferryctl show nightly\n  ferryctl show --json nightly | jq .verify\n", 1, 1, do_show},
      {Verb::watch, "watch", "RUN", "live progress until the run ends",
       "  ferryctl watch nightly\n  ferryctl watch --json nightly\n", 1, 1, do_watch},
      {Verb::map, "map", "RUN", "a picture of the volume: synced, dirty, zero, bad",
       "  ferryctl map nightly\n", 1, 1, do_map},
      {Verb::pause, "pause", "RUN", "stop reading and writing until `resume`", "  ferryctl pause nightly\n",
       1, 1, do_run_verb},
      {Verb::resume, "resume", "RUN", "go on with a paused, failed or cancelled run",
       "  ferryctl resume nightly\n", 1, 1, do_run_verb},
      {Verb::cancel, "cancel", "RUN", "end a run; what it copied stays on the target",
       "  ferryctl cancel nightly\n", 1, 1, do_run_verb},
      {Verb::forget, "forget", "RUN", "remove an ended run and its state", "  ferryctl forget nightly\n", 1,
       1, do_forget},
      {Verb::set, "set", "RUN --rate RATE", "change a run while it goes on",
       "  ferryctl set nightly --rate 100M\n  ferryctl set nightly --rate none\n", 1, 1, do_set},
      {Verb::sync, "sync", "RUN", "bring the target up to date: copy only what differs",
       "  ferryctl sync nightly\n  ferryctl sync --unfrozen nightly\n", 1, 1, do_run_again},
      {Verb::cutover, "cutover", "RUN", "hand over now (live sources)",
       "  ferryctl cutover nightly\n  ferryctl cutover --rehearse nightly\n", 1, 1, do_cutover},
      {Verb::rollback, "rollback", "RUN", "return to the old disk after a swap (device-mapper volumes)",
       "  ferryctl rollback nightly\n", 1, 1, do_rollback},
      {Verb::commit, "commit", "RUN", "settle a swap for good (device-mapper volumes)",
       "  ferryctl commit nightly\n", 1, 1, do_run_verb},
      {Verb::verify, "verify", "RUN", "read the target back against the recorded checksums",
       "  ferryctl verify nightly\n", 1, 1, do_run_again},
      {Verb::devices, "devices", "", "what can be moved", "  ferryctl devices\n", 0, 0, do_devices},
      {Verb::version, "version", "", "of ferryctl and ferryd", "  ferryctl version\n", 0, 0, do_version},
      {Verb::help, "help", "[VERB]", "this help, or a verb's", "  ferryctl help clone\n", 0, 1, do_help},
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
    const std::string text = error_to_json(error).dump(-1, ' ', false, json::error_handler_t::replace);
    std::fprintf(stderr, "%s\n", text.c_str());
  } else {
    std::fprintf(stderr, "ferryctl: %s\n", printable(error.message()).c_str());
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

int run_ferryctl(const std::vector<std::string>& arguments, const FollowPatience& patience) {
  // Also where the command line cannot be understood.
  const bool json_asked = std::find(arguments.begin(), arguments.end(), "--json") != arguments.end();
  int status = 0;
  try {
    const auto command = parse_command(arguments);
    status = command ? run_command(*command, patience) : report_error(command.error(), json_asked);
  } catch (const std::exception& exception) {
    // An answer of a shape that nobody promised.
    status = report_error(make_error(ErrorCode::internal, "understand ferryd's answer", "", exception.what()),
                          json_asked);
  }
  if (std::fflush(stdout) == 0 && std::ferror(stdout) == 0) return status;
  std::clearerr(stdout);
  const int write_status = report_error(error_from_errno(errno, "write to", "standard output"), json_asked);
  return status != 0 ? status : write_status;
}

}  // namespace blockferry
