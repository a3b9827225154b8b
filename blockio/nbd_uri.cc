// SPDX-License-Identifier: Apache-2.0
#include "blockio/nbd_uri.h"

#include <algorithm>
#include <cctype>
#include <optional>
#include <string_view>

#include <arpa/inet.h>

#include "blockio/base/percent_encoding.h"

namespace blockferry {

namespace {

constexpr const char* default_port = "10809";

Error unsound(const std::string& text, const std::string& why) {
  return make_error(ErrorCode::invalid_argument, "read", text, why);
}

/// What stands before the first of `ends`, which stays in `rest`.
std::string_view take_until(std::string_view& rest, const char* ends) {
  const std::string_view taken = rest.substr(0, rest.find_first_of(ends));
  rest.remove_prefix(taken.size());
  return taken;
}

struct Scheme {
  const char* name;
  bool tls, unix_socket;
};
constexpr Scheme schemes[] = {
    {"nbd", false, false}, {"nbds", true, false}, {"nbd+unix", false, true}, {"nbds+unix", true, true}};

const Scheme* scheme_of(const std::string& text) {
  const auto colon = text.find("://");
  if (colon == std::string::npos) return nullptr;
  for (const auto& scheme : schemes) {
    if (text.compare(0, colon, scheme.name) == 0) return &scheme;
  }
  return nullptr;
}

/// An IPv6 address, with the name of an interface after a '%' where it needs one.
bool is_bracketed_address(std::string_view text) {
  if (text.find(']') != text.size() - 1) return false;
  const std::string address(text.substr(1, text.find_first_of("%]") - 1));
  in6_addr read{};
  return ::inet_pton(AF_INET6, address.c_str(), &read) == 1;
}

/// HOST, HOST:PORT, [IPv6], [IPv6]:PORT. False where it is none of these.
bool read_host(std::string_view text, NbdUri& uri) {
  const auto close = text.starts_with("[") ? text.find(']') : std::string_view::npos;
  if (text.starts_with("[") && close == std::string_view::npos) return false;
  const auto colon = text.find(':', close == std::string_view::npos ? 0 : close);
  const auto host = percent_decoded(text.substr(0, colon));
  if (!host || host->empty() || (text.starts_with("[") && !is_bracketed_address(*host))) return false;
  uri.host = *host;
  for (char& letter : uri.host) letter = char(std::tolower(static_cast<unsigned char>(letter)));
  uri.port = colon == std::string_view::npos ? default_port : std::string(text.substr(colon + 1));
  return !uri.port.empty() && uri.port.size() <= 5 &&
         std::all_of(uri.port.begin(), uri.port.end(),
                     [](char digit) { return digit >= '0' && digit <= '9'; });
}

Result<void> read_authority(std::string_view authority, const Scheme& scheme, const std::string& text,
                            NbdUri& uri) {
  if (const auto at = authority.find('@'); at != std::string_view::npos) {
    const auto user = percent_decoded(authority.substr(0, at));
    if (!user || user->empty()) return fail(unsound(text, "the user's name before the @ is not sound"));
    if (user->find(':') != std::string::npos)
      return fail(unsound("the URI", "no password may stand in it: a key belongs in --tls-psk-file"));
    if (!scheme.tls) return fail(unsound(text, "a user is named, but without TLS there are none: nbds"));
    uri.user = *user;
    authority.remove_prefix(at + 1);
  }
  if (!scheme.unix_socket) {
    if (!read_host(authority, uri)) return fail(unsound(text, "HOST or HOST:PORT is expected after the //"));
  } else if (!authority.empty()) {
    return fail(
        unsound(text, std::string("a UNIX socket has no host: ") + scheme.name + ":///EXPORT?socket=PATH"));
  }
  return {};
}

Result<void> read_parameter(std::string_view parameter, const Scheme& scheme, const std::string& text,
                            NbdUri& uri) {
  const auto equals = parameter.find('=');
  const std::string name(parameter.substr(0, equals));
  const auto value =
      equals == std::string_view::npos ? std::nullopt : percent_decoded(parameter.substr(equals + 1));
  std::string* const place = name == "socket" && scheme.unix_socket     ? &uri.socket_path
                             : name == "tls-certificates" && scheme.tls ? &uri.tls_certificates
                             : name == "tls-psk-file" && scheme.tls     ? &uri.tls_psk_file
                                                                        : nullptr;
  if (place == nullptr) {
    return fail(unsound(text, "the parameter " + name + " means nothing here; " + scheme.name + " knows " +
                                  (scheme.unix_socket ? "socket" : "") +
                                  (scheme.unix_socket && scheme.tls ? ", " : "") +
                                  (scheme.tls ? "tls-certificates, tls-psk-file" : "") +
                                  (!scheme.unix_socket && !scheme.tls ? "none" : "")));
  }
  if (!value || value->empty()) return fail(unsound(text, "the parameter " + name + " has no sound value"));
  if (!place->empty()) return fail(unsound(text, "the parameter " + name + " stands there twice"));
  if (!value->starts_with('/')) return fail(unsound(text, "the path in " + name + "= must be absolute"));
  *place = *value;
  return {};
}

}  // namespace

bool is_nbd_uri(const std::string& text) {
  return scheme_of(text) != nullptr;
}

Result<NbdUri> parse_nbd_uri(const std::string& text) {
  const Scheme* const scheme = scheme_of(text);
  if (scheme == nullptr)
    return fail(unsound(text, "nbd://, nbds://, nbd+unix:// or nbds+unix:// is expected"));
  if (std::any_of(text.begin(), text.end(),
                  [](unsigned char c) { return c <= 0x20 || c == 0x7f || c == '#'; }))
    return fail(unsound(text, "spaces, control characters and # are written as %20, %23, … in a URI"));
  NbdUri uri;
  uri.tls = scheme->tls;
  std::string_view rest = std::string_view(text).substr(text.find("://") + 3);
  const auto authority = take_until(rest, "/?");
  if (auto done = read_authority(authority, *scheme, text, uri); !done) return fail(done.error());
  const auto path = percent_decoded(take_until(rest, "?"));
  if (!path) return fail(unsound(text, "an escape in the export's name is not sound"));
  uri.export_name = path->empty() ? "" : path->substr(1);
  while (!rest.empty()) {
    rest.remove_prefix(1);
    if (auto done = read_parameter(take_until(rest, "&"), *scheme, text, uri); !done)
      return fail(done.error());
  }
  if (scheme->unix_socket && uri.socket_path.empty())
    return fail(
        unsound(text, std::string("where is the socket? ") + scheme->name + ":///EXPORT?socket=PATH"));
  return uri;
}

std::string nbd_identity(const NbdUri& uri) {
  const std::string server = uri.socket_path.empty() ? uri.host + ":" + uri.port : "unix:" + uri.socket_path;
  return "nbd:" + server + "/" + uri.export_name;
}

}  // namespace blockferry
