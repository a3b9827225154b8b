// SPDX-License-Identifier: Apache-2.0
#include "daemon/messages/messages.h"

#include <algorithm>
#include <cctype>
#include <cstring>
#include <initializer_list>
#include <utility>

#include <nlohmann/json.hpp>

#include "blockio/base/units.h"

namespace blockferry {
namespace {

using nlohmann::json;

constexpr std::size_t path_bytes_max = 4096;
constexpr std::size_t command_bytes_max = 64 * KiB;
constexpr std::size_t name_chars_max = 64;
constexpr std::size_t nesting_max = 64;
constexpr std::uint64_t rate_max = 1024 * TiB;
constexpr std::uint64_t io_bytes_max = 64 * MiB;
constexpr std::uint64_t granule_bytes_min = 4 * KiB;
constexpr std::uint64_t time_ms_max = 366ULL * 24 * 3600 * 1000;

template <typename E>
struct Named {
  E value;
  const char* name;
};

constexpr Named<RunKind> kinds[] = {{RunKind::clone, "clone"}, {RunKind::migrate, "migrate"}};
constexpr Named<RunMode> modes[] = {{RunMode::automatic, "auto"},
                                    {RunMode::full, "full"},
                                    {RunMode::incremental, "incremental"},
                                    {RunMode::hybrid, "hybrid"}};
constexpr Named<TrackerChoice> trackers[] = {{TrackerChoice::automatic, "auto"},
                                             {TrackerChoice::ebpf, "ebpf"},
                                             {TrackerChoice::qemu, "qemu"},
                                             {TrackerChoice::checksum, "checksum"},
                                             {TrackerChoice::none, "none"}};
constexpr Named<OnReadError> read_error_choices[] = {{OnReadError::fail, "fail"},
                                                     {OnReadError::skip, "skip"}};
constexpr Named<CutoverChoice> cutovers[] = {{CutoverChoice::automatic, "auto"},
                                             {CutoverChoice::manual, "manual"}};
constexpr Named<RunVerb> verbs[] = {
    {RunVerb::pause, "pause"},       {RunVerb::resume, "resume"},
    {RunVerb::cancel, "cancel"},     {RunVerb::sync, "sync"},
    {RunVerb::verify, "verify"},     {RunVerb::cutover, "cutover"},
    {RunVerb::rehearse, "rehearse"}, {RunVerb::sync_unfrozen, "sync-unfrozen"},
    {RunVerb::rollback, "rollback"}, {RunVerb::commit, "commit"}};

template <typename E, std::size_t N>
const char* name_in(const Named<E> (&table)[N], E value) {
  for (const auto& entry : table)
    if (entry.value == value) return entry.name;
  return "unknown";
}

/// Foreign text for an error message: one line of printable ASCII, not long.
std::string printable(std::string_view text) {
  std::string out;
  for (const char c : text.substr(0, 40)) out += c >= 0x20 && c < 0x7f ? c : '?';
  if (text.size() > 40) out += "...";
  return out;
}

Error invalid(std::string what) {
  return make_error(ErrorCode::invalid_argument, "understand the request", "", std::move(what));
}

/// Takes members out of one object by name. The first thing wrong is kept; whatever was not asked for by the
/// time of finish() is an unknown member.
class MemberReader {
 public:
  explicit MemberReader(const json& object) : object_(object) {
    if (!object.is_object()) complain("a JSON object is expected");
  }

  template <typename T>
  void number(const char* member, T& out, std::uint64_t max) {
    const json* value = take(member);
    if (value == nullptr) return;
    if (value->is_number_integer() && !value->is_number_unsigned() && value->get<std::int64_t>() < 0)
      return complain(std::string(member) + ": must not be negative");
    if (!value->is_number_integer()) return complain(std::string(member) + ": a whole number is expected");
    const auto taken = value->get<std::uint64_t>();
    if (taken > max) return complain(std::string(member) + ": must be at most " + std::to_string(max));
    out = static_cast<T>(taken);
  }

  template <typename T>
  void number(const char* member, std::optional<T>& out, std::uint64_t max) {
    T value{};
    const auto before = taken_present_;
    number(member, value, max);
    if (taken_present_ != before) out = value;
  }

  void flag(const char* member, bool& out) {
    const json* value = take(member);
    if (value == nullptr) return;
    if (!value->is_boolean()) return complain(std::string(member) + ": true or false is expected");
    out = value->get<bool>();
  }

  void text(const char* member, std::string& out, std::size_t bytes_max) {
    const json* value = take(member);
    if (value == nullptr) return;
    if (const auto wrong = wrong_text(*value, bytes_max))
      return complain(std::string(member) + ": " + *wrong);
    out = value->get<std::string>();
  }

  void texts(const char* member, std::vector<std::string>& out, std::size_t count_max,
             std::size_t bytes_max) {
    const json* value = take(member);
    if (value == nullptr) return;
    if (!value->is_array()) return complain(std::string(member) + ": an array of strings is expected");
    if (value->size() > count_max)
      return complain(std::string(member) + ": at most " + std::to_string(count_max) + " are possible");
    for (const auto& item : *value) {
      if (const auto wrong = wrong_text(item, bytes_max))
        return complain(std::string(member) + ": " + *wrong);
      out.push_back(item.get<std::string>());
    }
  }

  template <typename E, std::size_t N>
  void choice(const char* member, E& out, const Named<E> (&table)[N]) {
    std::string name;
    const auto before = taken_present_;
    text(member, name, 32);
    if (taken_present_ == before || failed()) return;
    std::string expected;
    for (const auto& entry : table) {
      if (name == entry.name) {
        out = entry.value;
        return;
      }
      expected += (expected.empty() ? "" : ", ") + std::string(entry.name);
    }
    complain(std::string(member) + ": " + printable(name) + " is none of " + expected);
  }

  void text_choice(const char* member, std::string& out, std::initializer_list<const char*> allowed) {
    std::string value = out;
    text(member, value, 32);
    if (failed()) return;
    std::string expected;
    for (const char* one : allowed) {
      if (value == one) {
        out = value;
        return;
      }
      if (*one != '\0') expected += (expected.empty() ? "" : ", ") + std::string(one);
    }
    complain(std::string(member) + ": " + printable(value) + " is none of " + expected);
  }

  void complain(std::string what) {
    if (!error_) error_ = invalid(std::move(what));
  }
  bool failed() const { return error_.has_value(); }

  /// What was wrong, unknown members included.
  std::optional<Error> finish() {
    if (object_.is_object()) {
      for (const auto& [key, value] : object_.items())
        if (std::find(asked_.begin(), asked_.end(), key) == asked_.end())
          complain("unknown member " + printable(key));
    }
    return error_;
  }

 private:
  /// The member, or nothing where it is absent or null, or where something was wrong before.
  const json* take(const char* member) {
    asked_.emplace_back(member);
    if (failed()) return nullptr;
    const auto found = object_.find(member);
    if (found == object_.end() || found->is_null()) return nullptr;
    ++taken_present_;
    return &*found;
  }

  static std::optional<std::string> wrong_text(const json& value, std::size_t bytes_max) {
    if (!value.is_string()) return "a string is expected";
    const auto& text = value.get_ref<const std::string&>();
    if (text.size() > bytes_max) return "longer than " + std::to_string(bytes_max) + " bytes";
    if (text.find('\0') != std::string::npos) return "holds a zero byte";
    return std::nullopt;
  }

  const json& object_;
  std::vector<std::string> asked_;
  unsigned taken_present_ = 0;
  std::optional<Error> error_;
};

bool is_absolute_path_or_uri(const std::string& text) {
  if (text.empty()) return false;
  if (text.front() == '/') return true;
  if (text.starts_with("qemu:/")) return true;
  const auto colon = text.find("://");
  if (colon == std::string::npos || colon == 0) return false;
  return std::all_of(text.begin(), text.begin() + static_cast<std::ptrdiff_t>(colon), [](unsigned char c) {
    return std::isalnum(c) != 0 || c == '+' || c == '-' || c == '.';
  });
}

bool is_power_of_two(std::uint64_t value) {
  return value != 0 && (value & (value - 1)) == 0;
}

std::optional<std::string> wrong_volumes(const RunRequest& request) {
  if (request.source.empty()) return "source: missing";
  if (!is_absolute_path_or_uri(request.source)) return "source: an absolute path or a URI is expected";
  if (request.targets.empty()) return "targets: at least one is needed";
  for (const auto& target : request.targets)
    if (!is_absolute_path_or_uri(target)) return "targets: absolute paths or URIs are expected";
  return std::nullopt;
}

std::optional<std::string> wrong_sizes(const RunRequest& request) {
  const auto granule = request.granule_bytes;
  if (granule != 0 && (granule < granule_bytes_min || !is_power_of_two(granule)))
    return "granule_bytes: must be a power of two, at least 4096";
  const auto io = request.io_size_bytes;
  if (io != 0 && io % granule_bytes_min != 0) return "io_size_bytes: must be a multiple of 4096";
  if (io != 0 && granule != 0 && io % granule != 0)
    return "io_size_bytes: must be a multiple of granule_bytes";
  return std::nullopt;
}

std::optional<std::uint64_t> unsigned_member(const json& object, const char* member) {
  const auto found = object.find(member);
  if (found == object.end() || !found->is_number_integer()) return std::nullopt;
  if (!found->is_number_unsigned() && found->get<std::int64_t>() < 0) return std::nullopt;
  return found->get<std::uint64_t>();
}

std::string string_member(const json& object, const char* member) {
  const auto found = object.find(member);
  return found != object.end() && found->is_string() ? found->get<std::string>() : std::string();
}

bool nests_too_deep(std::string_view text) {
  std::size_t depth = 0;
  bool in_string = false;
  for (std::size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (in_string) {
      if (c == '\\')
        ++i;
      else if (c == '"')
        in_string = false;
    } else if (c == '"') {
      in_string = true;
    } else if (c == '[' || c == '{') {
      if (++depth > nesting_max) return true;
    } else if ((c == ']' || c == '}') && depth > 0) {
      --depth;
    }
  }
  return false;
}

}  // namespace

const char* blockferry_version() {
  return BLOCKFERRY_VERSION;
}

bool is_run_name(std::string_view name) {
  if (name.empty() || name.size() > name_chars_max || name == "." || name == "..") return false;
  return std::all_of(name.begin(), name.end(), [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '.' ||
           c == '_' || c == '-';
  });
}

json to_json(const RunRequest& r) {
  return json{{"kind", name_in(kinds, r.kind)},
              {"source", r.source},
              {"targets", r.targets},
              {"name", r.name},
              {"mode", name_in(modes, r.mode)},
              {"tracker", name_in(trackers, r.tracker)},
              {"rate_bytes_per_second", r.rate_bytes_per_second},
              {"queue_depth", r.queue_depth},
              {"io_size_bytes", r.io_size_bytes},
              {"granule_bytes", r.granule_bytes},
              {"verify", r.verify},
              {"overwrite", r.overwrite},
              {"force", r.force},
              {"keep", r.keep},
              {"on_read_error", name_in(read_error_choices, r.on_read_error)},
              {"io_engine", r.io_engine},
              {"tls_certificates", r.tls_certificates},
              {"tls_psk_file", r.tls_psk_file},
              {"max_downtime_ms", r.max_downtime_ms},
              {"max_passes", r.max_passes},
              {"cutover", name_in(cutovers, r.cutover)},
              {"quiesce_cmd", r.quiesce_cmd},
              {"resume_cmd", r.resume_cmd},
              {"cutover_cmd", r.cutover_cmd},
              {"handover", r.handover},
              {"max_freeze_ms", r.max_freeze_ms},
              {"sync_every_ms", r.sync_every_ms},
              {"sync_freeze", r.sync_freeze}};
}

Result<RunRequest> run_request_from_json(const json& object) {
  MemberReader reader(object);
  RunRequest r;
  reader.choice("kind", r.kind, kinds);
  reader.text("source", r.source, path_bytes_max);
  reader.texts("targets", r.targets, targets_max, path_bytes_max);
  reader.text("name", r.name, name_chars_max);
  reader.choice("mode", r.mode, modes);
  reader.choice("tracker", r.tracker, trackers);
  reader.number("rate_bytes_per_second", r.rate_bytes_per_second, rate_max);
  reader.number("queue_depth", r.queue_depth, 4096);
  reader.number("io_size_bytes", r.io_size_bytes, io_bytes_max);
  reader.number("granule_bytes", r.granule_bytes, io_bytes_max);
  reader.flag("verify", r.verify);
  reader.flag("overwrite", r.overwrite);
  reader.flag("force", r.force);
  reader.flag("keep", r.keep);
  reader.choice("on_read_error", r.on_read_error, read_error_choices);
  reader.text_choice("io_engine", r.io_engine, {"auto", "uring", "aio"});
  reader.text("tls_certificates", r.tls_certificates, path_bytes_max);
  reader.text("tls_psk_file", r.tls_psk_file, path_bytes_max);
  reader.number("max_downtime_ms", r.max_downtime_ms, time_ms_max);
  reader.number("max_passes", r.max_passes, 1000000);
  reader.choice("cutover", r.cutover, cutovers);
  reader.text("quiesce_cmd", r.quiesce_cmd, command_bytes_max);
  reader.text("resume_cmd", r.resume_cmd, command_bytes_max);
  reader.text("cutover_cmd", r.cutover_cmd, command_bytes_max);
  reader.text_choice("handover", r.handover, {"", "fs", "dm-swap", "qemu", "cmd"});
  reader.number("max_freeze_ms", r.max_freeze_ms, time_ms_max);
  reader.number("sync_every_ms", r.sync_every_ms, time_ms_max);
  reader.flag("sync_freeze", r.sync_freeze);
  if (auto error = reader.finish()) return fail(std::move(*error));
  if (!r.name.empty() && !is_run_name(r.name))
    return fail(invalid("name: only letters, digits, '.', '_' and '-' are possible"));
  if (auto wrong = wrong_volumes(r)) return fail(invalid(std::move(*wrong)));
  if (auto wrong = wrong_sizes(r)) return fail(invalid(std::move(*wrong)));
  for (const auto* path : {&r.tls_certificates, &r.tls_psk_file}) {
    if (!path->empty() && !path->starts_with('/'))
      return fail(invalid("tls_certificates and tls_psk_file: an absolute path is expected"));
  }
  return r;
}

Result<std::vector<RunRequest>> group_request_from_json(const json& object) {
  if (!object.is_object()) return fail(invalid("a JSON object is expected"));
  for (const char* member : {"source", "targets"}) {
    if (object.contains(member))
      return fail(invalid(std::string(member) + ": it is one of each of the volumes"));
  }
  const json volumes = object.value("volumes", json(nullptr));
  if (!volumes.is_array() || volumes.size() < 2 || volumes.size() > volumes_max)
    return fail(invalid("volumes: an array of 2 to " + std::to_string(volumes_max) + " objects is expected"));
  json common = object;
  common.erase("volumes");
  std::vector<RunRequest> requests;
  for (const auto& volume : volumes) {
    MemberReader reader(volume);
    RunRequest pair;
    reader.text("source", pair.source, path_bytes_max);
    reader.texts("targets", pair.targets, targets_max, path_bytes_max);
    if (auto error = reader.finish()) return fail(std::move(*error));
    common["source"] = pair.source;
    common["targets"] = pair.targets;
    auto request = run_request_from_json(common);
    if (!request) return fail(request.error());
    requests.push_back(std::move(*request));
    RunRequest& named = requests.back();
    if (named.name.empty()) continue;
    named.name += "-" + std::to_string(requests.size());
    if (!is_run_name(named.name)) return fail(invalid("name: longer than a group's name may be"));
  }
  return requests;
}

json to_json(const RunChange& change) {
  json object = json::object();
  if (change.rate_bytes_per_second) object["rate_bytes_per_second"] = *change.rate_bytes_per_second;
  if (change.max_downtime_ms) object["max_downtime_ms"] = *change.max_downtime_ms;
  return object;
}

Result<RunChange> run_change_from_json(const json& object) {
  MemberReader reader(object);
  RunChange change;
  reader.number("rate_bytes_per_second", change.rate_bytes_per_second, rate_max);
  reader.number("max_downtime_ms", change.max_downtime_ms, time_ms_max);
  if (auto error = reader.finish()) return fail(std::move(*error));
  if (!change.rate_bytes_per_second && !change.max_downtime_ms)
    return fail(invalid("nothing to change: rate_bytes_per_second or max_downtime_ms is needed"));
  return change;
}

const char* run_verb_name(RunVerb verb) {
  return name_in(verbs, verb);
}

std::optional<RunVerb> run_verb_from_name(const std::string& name) {
  for (const auto& entry : verbs)
    if (name == entry.name) return entry.value;
  return std::nullopt;
}

json error_to_json(const Error& error) {
  json body{{"code", error_code_name(error.code)},
            {"message", error.message()},
            {"operation", error.operation},
            {"device", error.device},
            {"offset", nullptr},
            {"errno", error.errno_value},
            {"hint", error.hint}};
  if (error.offset) body["offset"] = *error.offset;
  return json{{"error", std::move(body)}};
}

Error error_from_json(const json& object) {
  const json* body = &object;
  if (object.is_object() && object.contains("error")) body = &object["error"];
  const auto shapeless = [] {
    return make_error(ErrorCode::internal, "understand the answer", "", "it is not an error of the API");
  };
  if (!body->is_object()) return shapeless();
  const auto code = error_code_from_name(string_member(*body, "code"));
  if (!code) return shapeless();
  Error error;
  error.code = *code;
  error.operation = string_member(*body, "operation");
  error.device = string_member(*body, "device");
  error.offset = unsigned_member(*body, "offset");
  const auto errno_value = unsigned_member(*body, "errno").value_or(0);
  // A number that this libc has no words for says nothing here.
  if (errno_value < 4096 && ::strerrordesc_np(static_cast<int>(errno_value)) != nullptr)
    error.errno_value = static_cast<int>(errno_value);
  error.hint = string_member(*body, "hint");
  // A sender that gives the finished line alone: keep that line.
  if (error.operation.empty() && error.hint.empty()) error.hint = string_member(*body, "message");
  return error;
}

int http_status_of(ErrorCode code) {
  switch (code) {
    case ErrorCode::invalid_argument:
      return 400;
    case ErrorCode::unreachable:
      return 403;
    case ErrorCode::not_found:
      return 404;
    case ErrorCode::conflict:
    case ErrorCode::busy:
      return 409;
    case ErrorCode::refused:
      return 412;
    case ErrorCode::unsupported:
      return 501;
    case ErrorCode::no_space:
      return 507;
    case ErrorCode::io:
    case ErrorCode::device_gone:
    case ErrorCode::state_damaged:
    case ErrorCode::state_newer:
    case ErrorCode::internal:
      return 500;
  }
  return 500;
}

Result<json> parse_json(std::string_view text) {
  if (text.size() > json_bytes_max)
    return fail(invalid("JSON longer than " + std::to_string(json_bytes_max) + " bytes"));
  // Before the parser runs, which builds and destroys nested values by recursion.
  if (nests_too_deep(text))
    return fail(invalid("JSON nested deeper than " + std::to_string(nesting_max) + " levels"));
  // The parser takes a zero byte for the end, whatever follows.
  if (text.find('\0') != std::string_view::npos) return fail(invalid("a zero byte in the text"));
  json value = json::parse(text, nullptr, false);
  if (value.is_discarded()) return fail(invalid("the text is not one JSON value"));
  return value;
}

}  // namespace blockferry
