// SPDX-License-Identifier: Apache-2.0
// What the API answers, without sockets: the table of routes, and one request's way to Control and back.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "blockio/base/error.h"
#include "daemon/control.h"

namespace blockferry {

enum class ApiCall : std::uint8_t {
  index,
  metrics,
  version,
  openapi,
  check,
  create_run,
  create_group,
  list_runs,
  show_run,
  change_run,
  forget_run,
  command_run,
  map_run,
  list_devices
};

/// Where a call into Control runs, so that one device that never answers stops nobody else.
enum class ApiPace : std::uint8_t {
  here,   ///< touches no Control
  quick,  ///< takes a lock at most
  slow,   ///< may touch devices
};

struct ApiRoute {
  const char* method;
  const char* path;   ///< segments in braces match any name
  const char* query;  ///< the one parameter it takes, or ""
  ApiCall call;
  ApiPace pace;
  unsigned status;  ///< of success
  bool on_metrics_address;
};
std::span<const ApiRoute> api_routes();

constexpr std::uint64_t wait_ms_max = 60000;
constexpr std::uint32_t map_cells_default = 1024;
constexpr std::uint32_t map_cells_max = 65536;

/// A request that fits a route.
struct ApiRequest {
  const ApiRoute* route = nullptr;
  std::string run;              ///< {id}: always a possible name
  std::optional<RunVerb> verb;  ///< {verb}
  std::uint64_t wait_ms = 0;
  std::uint32_t cells = map_cells_default;
  std::string body;

  ApiPace pace() const;
};

struct ApiResponse {
  unsigned status = 200;
  std::string content_type = "application/json";
  std::string body;
  std::string allow;  ///< of a 405: the methods that the path takes
};

/// The request, or the answer that refuses it. `metrics_address`: only what is served there.
tl::expected<ApiRequest, ApiResponse> route_request(std::string_view method, std::string_view target,
                                                    std::string body, bool metrics_address);

/// Calls Control; never throws.
ApiResponse answer_request(const ApiRequest& request, Control& control);

ApiResponse error_response(const Error& error);
/// For what HTTP itself has a status for: `status` stands in place of the code's own.
ApiResponse error_response(unsigned status, ErrorCode code, std::string operation, std::string hint);

}  // namespace blockferry
