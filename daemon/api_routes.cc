// SPDX-License-Identifier: Apache-2.0
#include "daemon/api_routes.h"

#include <algorithm>
#include <charconv>
#include <exception>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include "blockio/base/percent_encoding.h"

namespace blockferry {
namespace {

using nlohmann::json;

constexpr ApiRoute routes[] = {
    {"GET", "/", "", ApiCall::index, ApiPace::here, 200, true},
    {"GET", "/metrics", "", ApiCall::metrics, ApiPace::quick, 200, true},
    {"GET", "/v1/version", "", ApiCall::version, ApiPace::here, 200, false},
    {"GET", "/v1/openapi", "", ApiCall::openapi, ApiPace::here, 200, false},
    {"GET", "/v1/devices", "", ApiCall::list_devices, ApiPace::slow, 200, false},
    {"POST", "/v1/check", "", ApiCall::check, ApiPace::slow, 200, false},
    {"POST", "/v1/runs", "", ApiCall::create_run, ApiPace::slow, 201, false},
    {"POST", "/v1/groups", "", ApiCall::create_group, ApiPace::slow, 201, false},
    {"GET", "/v1/runs", "", ApiCall::list_runs, ApiPace::quick, 200, false},
    {"GET", "/v1/runs/{id}", "wait_ms", ApiCall::show_run, ApiPace::quick, 200, false},
    {"PATCH", "/v1/runs/{id}", "", ApiCall::change_run, ApiPace::quick, 200, false},
    {"DELETE", "/v1/runs/{id}", "", ApiCall::forget_run, ApiPace::slow, 200, false},
    {"GET", "/v1/runs/{id}/map", "cells", ApiCall::map_run, ApiPace::slow, 200, false},
    {"POST", "/v1/runs/{id}/{verb}", "", ApiCall::command_run, ApiPace::slow, 200, false},
};

/// Paths hold text of any encoding; an answer is UTF-8 all the same.
std::string dump(const json& value) {
  return value.dump(-1, ' ', false, json::error_handler_t::replace) + "\n";
}

std::vector<std::string_view> segments_of(std::string_view path) {
  std::vector<std::string_view> segments;
  while (!path.empty()) {
    path.remove_prefix(1);  // the slash
    const auto end = path.find('/');
    segments.push_back(path.substr(0, end));
    path = end == std::string_view::npos ? std::string_view() : path.substr(end);
  }
  return segments;
}

bool is_parameter(std::string_view segment) {
  return !segment.empty() && segment.front() == '{';
}

bool path_fits(const std::vector<std::string_view>& pattern, const std::vector<std::string_view>& given) {
  return std::equal(pattern.begin(), pattern.end(), given.begin(), given.end(),
                    [](auto wanted, auto segment) { return is_parameter(wanted) || wanted == segment; });
}

tl::unexpected<ApiResponse> no_such(const char* operation, std::string hint) {
  return tl::unexpected(error_response(make_error(ErrorCode::not_found, operation, "", std::move(hint))));
}

tl::unexpected<ApiResponse> bad_request(std::string hint) {
  return tl::unexpected(
      error_response(make_error(ErrorCode::invalid_argument, "understand the request", "", std::move(hint))));
}

/// Fills in what stands in braces; an answer where that cannot name anything.
std::optional<ApiResponse> take_parameters(const std::vector<std::string_view>& pattern,
                                           const std::vector<std::string_view>& given, ApiRequest& request) {
  for (std::size_t i = 0; i < pattern.size(); ++i) {
    if (!is_parameter(pattern[i])) continue;
    const auto value = percent_decoded(given[i]);
    if (!value || !is_run_name(*value))
      return no_such("find what the path names", "that is no run's id or name").value();
    if (pattern[i] == "{verb}") {
      request.verb = run_verb_from_name(*value);
      if (!request.verb) return no_such("find the verb", *value + " is no verb of a run").value();
    } else {
      request.run = *value;
    }
  }
  return std::nullopt;
}

std::optional<std::uint64_t> whole_number(std::string_view text) {
  std::uint64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return value;
}

std::optional<ApiResponse> take_query(std::string_view query, ApiRequest& request) {
  // Scrapers may be set up with parameters of their own.
  if (query.empty() || request.route->on_metrics_address) return std::nullopt;
  const auto equals = query.find('=');
  const auto name = query.substr(0, equals);
  const std::string_view known = request.route->query;
  if (known.empty() || name != known || equals == std::string_view::npos)
    return bad_request(known.empty() ? "this path takes no query"
                                     : "the query must be " + std::string(known) + "=N")
        .value();
  const auto value = whole_number(query.substr(equals + 1));
  const bool is_wait = request.route->call == ApiCall::show_run;
  const std::uint64_t low = is_wait ? 0 : 1, high = is_wait ? wait_ms_max : map_cells_max;
  if (!value || *value < low || *value > high)
    return bad_request(std::string(known) + ": a whole number from " + std::to_string(low) + " to " +
                       std::to_string(high) + " is expected")
        .value();
  if (is_wait)
    request.wait_ms = *value;
  else
    request.cells = static_cast<std::uint32_t>(*value);
  return std::nullopt;
}

bool takes_body(ApiCall call) {
  return call == ApiCall::check || call == ApiCall::create_run || call == ApiCall::create_group ||
         call == ApiCall::change_run;
}

ApiResponse json_response(unsigned status, const json& value) {
  ApiResponse response;
  response.status = status;
  response.body = dump(value);
  return response;
}

ApiResponse to_response(unsigned status, const Result<json>& result) {
  return result ? json_response(status, *result) : error_response(result.error());
}

ApiResponse plain(std::string content_type, std::string body) {
  ApiResponse response;
  response.content_type = std::move(content_type);
  response.body = std::move(body);
  return response;
}

Result<json> call_with_body(const ApiRequest& request, Control& control) {
  const auto body = parse_json(request.body);
  if (!body) return fail(body.error());
  if (request.route->call == ApiCall::change_run) {
    const auto change = run_change_from_json(*body);
    if (!change) return fail(change.error());
    return control.change_run(request.run, *change);
  }
  if (request.route->call == ApiCall::create_group) {
    const auto volumes = group_request_from_json(*body);
    if (!volumes) return fail(volumes.error());
    return control.create_group(*volumes);
  }
  const auto wanted = run_request_from_json(*body);
  if (!wanted) return fail(wanted.error());
  return request.route->call == ApiCall::check ? control.check(*wanted) : control.create_run(*wanted);
}

ApiResponse dispatch(const ApiRequest& request, Control& control) {
  const unsigned status = request.route->status;
  switch (request.route->call) {
    case ApiCall::index:
      return plain("text/plain; charset=utf-8",
                   "Blockferry " + std::string(blockferry_version()) + ": the metrics are at /metrics\n");
    case ApiCall::metrics:
      return plain("text/plain; version=0.0.4; charset=utf-8", control.metrics_text());
    case ApiCall::version:
      return json_response(status, {{"version", blockferry_version()}, {"api", "v1"}});
    case ApiCall::openapi:
      return plain("application/json", std::string(openapi_text()));
    case ApiCall::list_runs:
      return json_response(status, control.list_runs());
    case ApiCall::list_devices:
      return to_response(status, control.list_devices());
    case ApiCall::check:
    case ApiCall::create_run:
    case ApiCall::create_group:
    case ApiCall::change_run:
      return to_response(status, call_with_body(request, control));
    case ApiCall::show_run:
      return to_response(status, control.show_run(request.run));
    case ApiCall::forget_run:
      return to_response(status, control.forget_run(request.run));
    case ApiCall::command_run:
      return to_response(status, control.command(request.run, *request.verb));
    case ApiCall::map_run:
      return to_response(status, control.map_run(request.run, request.cells));
  }
  return error_response(500, ErrorCode::internal, "answer the request", "the route leads nowhere");
}

}  // namespace

std::span<const ApiRoute> api_routes() {
  return routes;
}

ApiPace ApiRequest::pace() const {
  // These two must work while devices hang.
  if (verb == RunVerb::pause || verb == RunVerb::cancel) return ApiPace::quick;
  return route->pace;
}

tl::expected<ApiRequest, ApiResponse> route_request(std::string_view method, std::string_view target,
                                                    std::string body, bool metrics_address) {
  const auto query_at = target.find('?');
  const auto path = target.substr(0, query_at);
  if (path.empty() || path.front() != '/') return bad_request("the path must begin with a slash");
  const auto given = segments_of(path);
  std::string allow;
  for (const ApiRoute& route : routes) {
    if (metrics_address && !route.on_metrics_address) continue;
    const auto pattern = segments_of(route.path);
    if (!path_fits(pattern, given)) continue;
    if (method != route.method) {
      allow += (allow.empty() ? "" : ", ") + std::string(route.method);
      continue;
    }
    ApiRequest request;
    request.route = &route;
    request.body = std::move(body);
    if (auto answer = take_parameters(pattern, given, request)) return tl::unexpected(std::move(*answer));
    const auto query = query_at == std::string_view::npos ? std::string_view() : target.substr(query_at + 1);
    if (auto answer = take_query(query, request)) return tl::unexpected(std::move(*answer));
    if (!takes_body(route.call) && !request.body.empty()) return bad_request("this request takes no body");
    return request;
  }
  if (allow.empty()) return no_such("find the path", "the API has no such path");
  auto answer =
      error_response(405, ErrorCode::invalid_argument, "understand the request", "this path takes " + allow);
  answer.allow = allow;
  return tl::unexpected(std::move(answer));
}

ApiResponse answer_request(const ApiRequest& request, Control& control) {
  try {
    return dispatch(request, control);
  } catch (const std::exception& exception) {
    return error_response(500, ErrorCode::internal, "answer the request", exception.what());
  } catch (...) {
    return error_response(500, ErrorCode::internal, "answer the request", "an exception without a name");
  }
}

ApiResponse error_response(const Error& error) {
  return json_response(static_cast<unsigned>(http_status_of(error.code)), error_to_json(error));
}

ApiResponse error_response(unsigned status, ErrorCode code, std::string operation, std::string hint) {
  return json_response(status, error_to_json(make_error(code, std::move(operation), "", std::move(hint))));
}

}  // namespace blockferry
