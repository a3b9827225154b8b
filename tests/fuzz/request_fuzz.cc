// SPDX-License-Identifier: Apache-2.0
// The JSON of requests and answers: any text is parsed or refused, and what is accepted means the same when
// sent again.
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include <nlohmann/json.hpp>

#include "daemon/messages/messages.h"

namespace {

void require(bool condition) {
  if (!condition) std::abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace blockferry;
  const auto parsed = parse_json({reinterpret_cast<const char*>(data), size});
  if (!parsed) {
    require(parsed.error().code == ErrorCode::invalid_argument);
    return 0;
  }
  if (const auto request = run_request_from_json(*parsed)) {
    const auto sent = to_json(*request);
    const auto again = run_request_from_json(sent);
    require(again && to_json(*again) == sent);
    require(!request->source.empty() && !request->targets.empty() && request->targets.size() <= targets_max);
  } else {
    // Whatever the text held, the error is JSON that can be sent, and one line.
    const auto answer = error_to_json(request.error());
    require(answer.dump().find('\n') == std::string::npos);
    require(error_from_json(answer).message() == request.error().message());
  }
  if (const auto change = run_change_from_json(*parsed)) require(!to_json(*change).empty());
  const Error error = error_from_json(*parsed);
  require(error_from_json(error_to_json(error)).code == error.code);
  return 0;
}
