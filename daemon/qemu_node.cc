// SPDX-License-Identifier: Apache-2.0
#include "daemon/qemu_node.h"

#include <algorithm>
#include <cctype>

#include <nlohmann/json.hpp>

#include "blockio/base/percent_encoding.h"

namespace blockferry {

namespace {

using nlohmann::json;

constexpr const char* scheme = "qemu:";

Error invalid(const std::string& uri, const std::string& why) {
  return make_error(ErrorCode::invalid_argument, "read", uri, why);
}

/// The member of the URI that a parameter sets; null: there is no such parameter.
std::string* parameter(QemuUri& uri, const std::string& name) {
  if (name == "node") return &uri.node;
  if (name == "device") return &uri.device;
  if (name == "agent") return &uri.agent;
  if (name == "bitmap") return &uri.bitmap;
  return nullptr;
}

/// It becomes a part of names in the image and in QEMU.
bool is_bitmap_name(const std::string& name) {
  constexpr std::size_t bytes_max = 64;
  const auto plain = [](unsigned char letter) {
    return std::isalnum(letter) != 0 || letter == '-' || letter == '_' || letter == '.';
  };
  return name.size() <= bytes_max && std::isalpha(static_cast<unsigned char>(name.front())) != 0 &&
         std::all_of(name.begin(), name.end(), plain);
}

Error senseless(const QmpClient& client, const std::string& command) {
  return make_error(ErrorCode::io, "talk to QEMU at", client.socket(),
                    "its answer to " + command + " is not what was expected");
}

/// What `read` makes of the answer; an answer of another shape than it takes for granted is an error.
template <typename Read>
auto asked(QmpClient& client, const std::string& command, const json& arguments, Read&& read)
    -> Result<decltype(read(json()))> {
  const auto answer = client.execute(command, arguments);
  if (!answer) return fail(answer.error());
  try {
    return read(*answer);
  } catch (const json::exception&) {
    return fail(senseless(client, command));
  }
}

QemuBitmap bitmap_of(const json& object) {
  QemuBitmap bitmap;
  bitmap.name = object.value("name", "");
  bitmap.granularity = object.at("granularity").get<std::uint64_t>();
  bitmap.count = object.at("count").get<std::uint64_t>();
  bitmap.recording = object.at("recording").get<bool>();
  bitmap.busy = object.at("busy").get<bool>();
  bitmap.persistent = object.at("persistent").get<bool>();
  bitmap.inconsistent = object.value("inconsistent", false);
  return bitmap;
}

QemuNode node_of(const json& object) {
  QemuNode node;
  node.name = object.value("node-name", "");
  node.driver = object.at("drv").get<std::string>();
  node.filename = object.at("image").at("filename").get<std::string>();
  node.bytes = object.at("image").at("virtual-size").get<std::uint64_t>();
  node.read_only = object.at("ro").get<bool>();
  node.direct = object.at("cache").at("direct").get<bool>();
  node.no_flush = object.at("cache").at("no-flush").get<bool>();
  node.detect_zeroes = object.at("detect_zeroes").get<std::string>();
  for (const auto& bitmap : object.value("dirty-bitmaps", json::array()))
    node.bitmaps.push_back(bitmap_of(bitmap));
  return node;
}

struct GuestDevice {
  std::string name;  ///< a drive's id; mostly empty
  std::string path;  ///< the device's id, or its path in QEMU's tree of objects
  std::string node;  ///< empty: no medium
};

/// ID of `/machine/peripheral/ID/virtio-backend`.
std::string id_of(const std::string& path) {
  const std::string peripheral = "/machine/peripheral/";
  if (!path.starts_with(peripheral)) return path;
  return path.substr(peripheral.size(), path.find('/', peripheral.size()) - peripheral.size());
}

Result<std::vector<GuestDevice>> list_devices(QmpClient& client) {
  return asked(client, "query-block", json::object(), [](const json& answer) {
    std::vector<GuestDevice> list;
    for (const auto& each : answer) {
      const auto inserted = each.find("inserted");
      list.push_back({each.at("device").get<std::string>(), each.value("qdev", ""),
                      inserted != each.end() ? inserted->value("node-name", "") : ""});
    }
    return list;
  });
}

template <typename List>
std::string names_of(const List& list) {
  std::string names;
  for (const auto& each : list) {
    if (!each.name.empty()) names += (names.empty() ? "" : ", ") + each.name;
  }
  return names.empty() ? "none" : names;
}

std::string text_of(const QemuUri& uri) {
  return scheme + uri.socket + (uri.node.empty() ? "?device=" + uri.device : "?node=" + uri.node);
}

}  // namespace

bool is_qemu_uri(const std::string& uri) {
  return uri.starts_with(scheme);
}

Result<QemuUri> parse_qemu_uri(const std::string& uri) {
  constexpr const char* form = "it is qemu:/PATH/TO/QMP-SOCKET?node=NODE, or ?device=ID";
  if (!is_qemu_uri(uri)) return fail(invalid(uri, form));
  const std::size_t begin = std::string(scheme).size(), question = uri.find('?');
  QemuUri read;
  const auto socket =
      percent_decoded(uri.substr(begin, question == std::string::npos ? question : question - begin));
  if (!socket || !socket->starts_with("/")) return fail(invalid(uri, form));
  read.socket = *socket;
  for (std::size_t at = question; at != std::string::npos;) {
    const std::size_t next = uri.find('&', at + 1);
    const std::string word = uri.substr(at + 1, next == std::string::npos ? next : next - at - 1);
    at = next;
    const std::size_t equals = word.find('=');
    std::string* value = equals == std::string::npos ? nullptr : parameter(read, word.substr(0, equals));
    if (value == nullptr)
      return fail(
          invalid(uri, "there is no parameter " + word + "; there are node, device, agent and bitmap"));
    const auto plain = percent_decoded(word.substr(equals + 1));
    if (!plain || plain->empty() || plain->find('=') != std::string::npos || !value->empty())
      return fail(invalid(uri, "give " + word.substr(0, equals) + " once, with a value"));
    *value = *plain;
  }
  if (read.node.empty() == read.device.empty()) return fail(invalid(uri, form));
  if (!read.agent.empty() && !read.agent.starts_with("/"))
    return fail(invalid(uri, "the agent's socket needs an absolute path"));
  if (!read.bitmap.empty() && !is_bitmap_name(read.bitmap)) {
    return fail(
        invalid(uri,
                "a bitmap's name begins with a letter and holds letters, digits, '.', '-' and '_', 64 "
                "at most"));
  }
  return read;
}

std::string bitmap_named_by(const std::string& uri) {
  if (!is_qemu_uri(uri)) return "";
  const auto read = parse_qemu_uri(uri);
  return read ? read->bitmap : "";
}

const QemuBitmap* QemuNode::bitmap(const std::string& wanted) const {
  const auto at = std::find_if(bitmaps.begin(), bitmaps.end(),
                               [&](const QemuBitmap& each) { return each.name == wanted; });
  return at == bitmaps.end() ? nullptr : &*at;
}

Result<std::vector<QemuNode>> list_qemu_nodes(QmpClient& client) {
  return asked(client, "query-named-block-nodes", {{"flat", true}}, [](const json& answer) {
    std::vector<QemuNode> list;
    for (const auto& each : answer) list.push_back(node_of(each));
    return list;
  });
}

Result<QemuNode> find_qemu_node(QmpClient& client, const QemuUri& uri) {
  const auto devices = list_devices(client);
  if (!devices) return fail(devices.error());
  const auto refused = [&](const std::string& why) {
    return fail(make_error(ErrorCode::refused, "use", text_of(uri), why));
  };
  std::string wanted = uri.node;
  if (wanted.empty()) {
    const auto device = std::find_if(devices->begin(), devices->end(), [&](const GuestDevice& each) {
      return each.name == uri.device || each.path == uri.device || id_of(each.path) == uri.device;
    });
    if (device == devices->end()) {
      std::string names;
      for (const auto& each : *devices)
        names += (names.empty() ? "" : ", ") + (each.path.empty() ? each.name : id_of(each.path));
      return refused("the guest has no such block device; it has " + (names.empty() ? "none" : names));
    }
    if (device->node.empty()) return refused("the device has no medium");
    wanted = device->node;
  }
  const auto nodes = list_qemu_nodes(client);
  if (!nodes) return fail(nodes.error());
  const auto found =
      std::find_if(nodes->begin(), nodes->end(), [&](const QemuNode& each) { return each.name == wanted; });
  if (found == nodes->end()) return refused("QEMU has no such block node; it has " + names_of(*nodes));
  QemuNode node = *found;
  for (const auto& device : *devices) {
    if (device.node == node.name) node.device = device.path;
  }
  if (node.read_only) {
    return refused(
        "the node is read-only: a snapshot has moved the guest's writes to another one; name the "
        "device, as ?device=ID, which follows");
  }
  if (node.bytes == 0) return refused("the node is empty");
  return node;
}

Result<std::string> qemu_identity(QmpClient& client, const QemuUri& uri) {
  constexpr const char* none = "00000000-0000-0000-0000-000000000000";
  auto guest = asked(client, "query-uuid", json::object(),
                     [](const json& answer) { return answer.at("UUID").get<std::string>(); });
  if (!guest && guest.error().code != ErrorCode::unsupported) return guest;
  const std::string who = guest && *guest != none ? *guest : uri.socket;
  return "qemu:" + who + (uri.node.empty() ? "?device=" + uri.device : "?node=" + uri.node);
}

Result<std::string> qemu_export_unsafe(QmpClient& client, const QemuNode& node) {
  const auto version = asked(client, "query-version", json::object(), [](const json& answer) {
    const json& number = answer.at("qemu");
    return number.at("major").get<unsigned>() * 100 + number.at("minor").get<unsigned>();
  });
  if (!version) return fail(version.error());
  if (*version >= 802) return "";
  auto threads =
      asked(client, "query-iothreads", json::object(), [](const json& answer) { return answer.size(); });
  if (!threads && threads.error().code == ErrorCode::unsupported) return "";  // a storage daemon
  if (!threads) return fail(threads.error());
  if (*threads == 0 || node.device.empty()) return "";
  const auto own = asked(client, "qom-get", {{"path", node.device}, {"property", "iothread"}},
                         [](const json& answer) { return answer.get<std::string>(); });
  if (own && own->empty()) return "";
  if (!own && own.error().code != ErrorCode::conflict) return fail(own.error());  // else it does not tell
  return "this QEMU is older than 8.2, and dies when a reader of a disk that is served by an iothread goes "
         "away: "
         "take the iothread from the device, or update QEMU";
}

Result<std::optional<bool>> qemu_guest_runs(QmpClient& client) {
  auto running = asked(client, "query-status", json::object(), [](const json& answer) {
    return std::optional<bool>(answer.at("running").get<bool>());
  });
  if (!running && running.error().code == ErrorCode::unsupported) return std::optional<bool>();
  return running;
}

Result<std::vector<QemuExport>> list_qemu_exports(QmpClient& client) {
  return asked(client, "query-block-exports", json::object(), [](const json& answer) {
    std::vector<QemuExport> list;
    for (const auto& each : answer)
      list.push_back({each.at("id").get<std::string>(), each.at("node-name").get<std::string>()});
    return list;
  });
}

}  // namespace blockferry
