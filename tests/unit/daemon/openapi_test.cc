// SPDX-License-Identifier: Apache-2.0
// Holds the OpenAPI file and the server against each other, both ways.
#include <algorithm>
#include <cctype>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "daemon/api_routes.h"
#include "daemon/preflight.h"
#include "tests/unit/daemon/api_server_fixture.h"

namespace blockferry {
namespace {

using nlohmann::json;

const json& document() {
  static const json parsed = json::parse(openapi_text());
  return parsed;
}

const json& resolved(const json& node) {
  if (!node.contains("$ref")) return node;
  return document().at(json::json_pointer(node["$ref"].get<std::string>().substr(1)));
}

const json& schema_named(const std::string& name) {
  return document()["components"]["schemas"].at(name);
}

bool is_of_type(const std::string& type, const json& value) {
  if (type == "object") return value.is_object();
  if (type == "array") return value.is_array();
  if (type == "string") return value.is_string();
  if (type == "boolean") return value.is_boolean();
  if (type == "integer") return value.is_number_integer();
  return type == "number" && value.is_number();
}

/// The part of JSON Schema that the file uses. What does not fit is told with its place.
void expect_fits(const json& schema_or_ref, const json& value, const std::string& where) {
  const json& schema = resolved(schema_or_ref);
  if (value.is_null()) {
    EXPECT_TRUE(schema.value("nullable", false)) << where << " is null";
    return;
  }
  if (schema.contains("allOf"))
    for (const auto& part : schema["allOf"]) expect_fits(part, value, where);
  if (!schema.contains("type")) return;
  ASSERT_TRUE(is_of_type(schema["type"], value)) << where << ": " << value.dump().substr(0, 200);
  if (schema.contains("enum")) {
    EXPECT_NE(std::find(schema["enum"].begin(), schema["enum"].end(), value), schema["enum"].end())
        << where << ": " << value.dump();
  }
  if (schema.contains("minimum")) {
    EXPECT_GE(value.get<double>(), schema["minimum"].get<double>()) << where;
  }
  if (schema.contains("maximum")) {
    EXPECT_LE(value.get<double>(), schema["maximum"].get<double>()) << where;
  }
  if (value.is_array())
    for (const auto& item : value) expect_fits(schema["items"], item, where + "[]");
  if (!value.is_object()) return;
  for (const auto& name : schema.value("required", json::array()))
    EXPECT_TRUE(value.contains(name.get<std::string>())) << where << " lacks " << name;
  if (!schema.contains("properties")) return;
  for (const auto& [name, member] : value.items()) {
    ASSERT_TRUE(schema["properties"].contains(name))
        << where << " has a member the file does not know: " << name;
    expect_fits(schema["properties"][name], member, std::string(where).append(".").append(name));
  }
}

std::string upper(std::string text) {
  for (char& c : text) c = static_cast<char>(std::toupper(static_cast<unsigned char>(c)));
  return text;
}

struct Operation {
  std::string method, path;
  const json* node;
};

std::vector<Operation> operations() {
  std::vector<Operation> all;
  for (const auto& [path, item] : document()["paths"].items())
    for (const auto& [method, node] : item.items())
      if (method != "parameters") all.push_back({upper(method), path, &node});
  return all;
}

std::string filled_in(std::string path, const std::string& run, const std::string& verb) {
  for (const auto& [mark, text] : {std::pair<std::string, std::string>{"{id}", run}, {"{verb}", verb}})
    if (const auto at = path.find(mark); at != std::string::npos) path.replace(at, mark.size(), text);
  return path;
}

void expect_listed(const Operation& operation, const HttpAnswer& answer) {
  const std::string where = operation.method + " " + operation.path;
  const json& responses = (*operation.node)["responses"];
  ASSERT_TRUE(responses.contains(std::to_string(answer.status))) << where << " answered " << answer.status;
  const json& content = resolved(responses[std::to_string(answer.status)])["content"];
  const auto type = answer.field("Content-Type");
  const auto plain_type = type.substr(0, type.find(';'));
  ASSERT_TRUE(content.contains(plain_type)) << where << " answered with " << type;
  if (plain_type == "application/json")
    expect_fits(content[plain_type]["schema"], json::parse(answer.body), where);
}

using Openapi = ApiServerTest;

TEST_F(Openapi, TheServerAnswersWhatTheFileSays) {
  start();
  auto http = client();
  const std::string request = R"({"source":"/dev/a","targets":["/dev/b"]})";
  const std::string volumes = R"({"volumes":[)" + request + "," + request + "]}";
  ASSERT_GE(operations().size(), 14U);
  for (const auto& operation : operations()) {
    const std::string body = !operation.node->contains("requestBody") ? ""
                             : operation.method == "PATCH"            ? R"({"rate_bytes_per_second":1})"
                             : operation.path == "/v1/groups"         ? volumes
                                                                      : request;
    const auto answer = http.ask(operation.method, filled_in(operation.path, "known", "pause"), body);
    EXPECT_LT(answer.status, 300) << operation.method << " " << operation.path;
    expect_listed(operation, answer);
    if (operation.path.find("{id}") != std::string::npos) {
      const auto unknown = http.ask(operation.method, filled_in(operation.path, "unknown", "pause"), body);
      EXPECT_EQ(unknown.status, 404);
      expect_listed(operation, unknown);
    }
    const auto malformed = http.ask(operation.method, filled_in(operation.path, "known", "pause"), "{\"x\":");
    EXPECT_EQ(malformed.status, 400) << operation.method << " " << operation.path;
    expect_listed(operation, malformed);
  }
}

TEST_F(Openapi, TheFileListsEveryRouteOfTheServer) {
  std::set<std::string> in_file, in_server;
  for (const auto& operation : operations()) in_file.insert(operation.method + " " + operation.path);
  for (const auto& route : api_routes()) {
    in_server.insert(std::string(route.method) + " " + route.path);
    const json& node = document()["paths"][route.path];
    std::string method = route.method;
    for (char& c : method) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
    ASSERT_TRUE(node.contains(method)) << route.method << " " << route.path;
    EXPECT_TRUE(node[method]["responses"].contains(std::to_string(route.status))) << route.path;
    const json parameters = node[method].value("parameters", json::array());
    ASSERT_EQ(parameters.size(), *route.query == '\0' ? 0U : 1U) << route.path;
    if (!parameters.empty()) {
      EXPECT_EQ(parameters[0]["name"], route.query);
    }
  }
  EXPECT_EQ(in_file, in_server);
}

TEST_F(Openapi, TheLimitsAreTheServers) {
  const auto& wait = document()["paths"]["/v1/runs/{id}"]["get"]["parameters"][0]["schema"];
  EXPECT_EQ(wait["maximum"], wait_ms_max);
  const auto& cells = document()["paths"]["/v1/runs/{id}/map"]["get"]["parameters"][0]["schema"];
  EXPECT_EQ(cells["maximum"], map_cells_max);
  EXPECT_EQ(cells["default"], map_cells_default);
  EXPECT_EQ(schema_named("RunRequest")["properties"]["targets"]["maxItems"], targets_max);
}

TEST_F(Openapi, RequestsHaveTheMembersOfTheFile) {
  const json& properties = schema_named("RunRequest")["properties"];
  const json defaults = to_json(RunRequest{});
  for (const auto& [name, schema] : properties.items()) {
    ASSERT_TRUE(defaults.contains(name)) << name;
    if (schema.contains("default")) {
      EXPECT_EQ(schema["default"], defaults[name]) << name;
    }
  }
  EXPECT_EQ(properties.size(), defaults.size());
  json request = {{"source", "/a"}, {"targets", {"/b"}}};
  for (const auto& [name, schema] : properties.items()) {
    for (const auto& choice : schema.value("enum", json::array())) {
      json with_choice = request;
      with_choice[name] = choice;
      EXPECT_TRUE(run_request_from_json(with_choice)) << name << " " << choice;
    }
    if (!schema.contains("maximum") || name == "io_size_bytes") continue;
    json with_maximum = request;
    with_maximum[name] = schema["maximum"];
    EXPECT_TRUE(run_request_from_json(with_maximum)) << name;
    with_maximum[name] = schema["maximum"].get<std::uint64_t>() + 1;
    EXPECT_FALSE(run_request_from_json(with_maximum)) << name;
  }
  EXPECT_EQ(schema_named("RunChange")["properties"].size(), to_json(RunChange{1, 1}).size());
}

TEST_F(Openapi, EnumsHaveEveryName) {
  std::set<std::string> states, codes, verbs;
  for (int i = 0; i <= static_cast<int>(RunState::rolled_back); ++i)
    states.insert(run_state_name(static_cast<RunState>(i)));
  for (int i = 0; i <= static_cast<int>(ErrorCode::internal); ++i)
    codes.insert(error_code_name(static_cast<ErrorCode>(i)));
  for (int i = 0; i <= static_cast<int>(RunVerb::commit); ++i)
    verbs.insert(run_verb_name(static_cast<RunVerb>(i)));
  EXPECT_EQ(schema_named("Run")["properties"]["state"]["enum"].get<std::set<std::string>>(), states);
  EXPECT_EQ(schema_named("ErrorDetail")["properties"]["code"]["enum"].get<std::set<std::string>>(), codes);
  const auto& parameters = document()["paths"]["/v1/runs/{id}/{verb}"]["parameters"];
  EXPECT_EQ(parameters[1]["schema"]["enum"].get<std::set<std::string>>(), verbs);
}

TEST_F(Openapi, ReportsAndDevicesAreAsTheFileSays) {
  PreflightReport report;
  report.targets.resize(2);
  report.source.kind = report.targets[0].kind = "block";
  report.targets[1].kind = "missing";
  report.refusals = report.warnings = report.references = {{"/dev/a", "mounted"}};
  expect_fits(schema_named("CheckReport"), to_json(report), "report");
  const auto devices = list_devices();
  ASSERT_TRUE(devices) << devices.error().message();
  for (const auto& device : *devices) expect_fits(schema_named("Device"), device, "device");
}

}  // namespace
}  // namespace blockferry
