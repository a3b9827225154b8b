// SPDX-License-Identifier: Apache-2.0
// As much of QEMU as answers QMP: one block node with its bitmaps, exports, a guest that runs or not. It can
// be told to misbehave at any command.
#pragma once

#include <algorithm>
#include <atomic>
#include <filesystem>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include <nlohmann/json.hpp>
#include <poll.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "blockio/base/check.h"
#include "blockio/base/file_descriptor.h"

namespace blockferry::fake_qemu {

using nlohmann::json;

struct Bitmap {
  bool recording = true, busy = false, inconsistent = false, persistent = false;
  std::uint64_t granularity = 0;
  std::vector<std::pair<std::uint64_t, std::uint64_t>> dirty;  ///< offset and length
};

class FakeQemu {
 public:
  /// What is sent in place of an answer, without the line's end; nothing sent: it hangs. "close": the
  /// connection ends.
  using Trick = std::function<std::string(const json& request)>;

  FakeQemu() {
    char path[] = "/tmp/blockferry-qemu-XXXXXX";
    BLOCKFERRY_CHECK(::mkdtemp(path) != nullptr, "no directory for a test");
    directory = path;
    listener_ = listening(socket());
    thread_ = std::thread([this] { serve(); });
  }

  ~FakeQemu() {
    ended_ = true;
    thread_.join();
    std::filesystem::remove_all(directory);
  }

  std::string socket() const { return directory + "/qmp"; }
  std::string uri() const { return "qemu:" + socket() + "?node=disk"; }

  /// Commands that were carried out or played a trick on, in order.
  std::vector<std::string> commands() {
    const std::lock_guard lock(mutex);
    return commands_;
  }
  std::size_t count(const std::string& command) {
    const auto all = commands();
    return std::size_t(std::count(all.begin(), all.end(), command));
  }
  void write(std::uint64_t offset, std::uint64_t length) {
    const std::lock_guard lock(mutex);
    mark({offset, length});
  }

  /// The only way to look at what follows, or to change it: it is the server's thread's as well.
  template <typename Action>
  auto locked(Action&& action) {
    const std::lock_guard lock(mutex);
    return action();
  }
  void play(const std::string& command, Trick trick) {
    locked([&] { tricks[command] = std::move(trick); });
  }
  void behave() {
    locked([&] { tricks.clear(); });
  }
  bool runs() {
    return locked([&] { return running; });
  }

  std::string directory;
  std::mutex mutex;
  std::map<std::string, Bitmap> bitmaps;
  std::vector<std::string> exports;
  std::vector<std::pair<std::uint64_t, std::uint64_t>> on_its_way;  ///< until a transaction waits for it
  std::map<std::string, Trick> tricks;                              ///< by command
  std::string node = "disk", drive = "disk", greeting = R"({"QMP":{"version":{},"capabilities":[]}})";
  std::uint64_t bytes = 1 << 20;
  std::string job;  ///< of a move: "ready", "moved", "failed"
  std::string exported_node = "disk";
  bool running = true, read_only = false, storage_daemon = false, server = false;

 private:
  void serve() {
    while (!ended_) {
      pollfd event{listener_.get(), POLLIN, 0};
      if (::poll(&event, 1, 5) <= 0) continue;
      const FileDescriptor client(::accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC));
      if (client.valid()) serve_one(client.get());
    }
  }

  void serve_one(int client) {
    std::string first;
    {
      const std::lock_guard lock(mutex);
      first = greeting;
    }
    if (!first.empty()) say(client, first);
    std::string received;
    while (!ended_) {
      pollfd event{client, POLLIN, 0};
      if (::poll(&event, 1, 5) <= 0) continue;
      char part[4096];
      const ssize_t length = ::recv(client, part, sizeof part, 0);
      if (length <= 0) return;
      received.append(part, std::size_t(length));
      for (auto end = received.find('\n'); end != std::string::npos; end = received.find('\n')) {
        const json request = json::parse(received.substr(0, end));
        received.erase(0, end + 1);
        const std::string answer = answer_to(request);
        if (answer == "close") return;
        if (!answer.empty()) say(client, answer);
      }
    }
  }

  static void say(int client, const std::string& line) {
    const std::string whole = line + "\r\n";
    static_cast<void>(::send(client, whole.data(), whole.size(), MSG_NOSIGNAL));
  }

  std::string answer_to(const json& request) {
    const std::lock_guard lock(mutex);
    const std::string command = request.at("execute");
    commands_.push_back(command);
    if (const auto trick = tricks.find(command); trick != tricks.end()) return trick->second(request);
    json answer;
    try {
      answer = {{"return", carried_out(command, request.value("arguments", json::object()))}};
    } catch (const std::string& refusal) {
      const bool unknown = refusal.find("has not been found") != std::string::npos;
      answer = {{"error", {{"class", unknown ? "CommandNotFound" : "GenericError"}, {"desc", refusal}}}};
    }
    answer["id"] = request.at("id");
    return answer.dump();
  }

  json carried_out(const std::string& command, const json& arguments) {
    if (command == "qmp_capabilities") return json::object();
    if (command == "query-block") return devices();
    if (command == "query-named-block-nodes") return nodes();
    if (command == "query-block-exports") return list_exports();
    if (command == "query-status" && !storage_daemon) return {{"running", running}, {"status", "x"}};
    if (command == "stop" && !storage_daemon) return set_running(false);
    if (command == "cont" && !storage_daemon) return set_running(true);
    if (command == "nbd-server-start") return start_server(arguments.at("addr").at("data").at("path"));
    if (command == "nbd-server-stop") return stop_server();
    if (command == "block-export-add") return add_export(arguments);
    if (command == "block-export-del") return remove_export(arguments.at("id"));
    if (command == "block-dirty-bitmap-add") return add_bitmap(arguments);
    if (command == "block-dirty-bitmap-remove") return remove_bitmap(arguments.at("name"));
    if (command == "transaction") return transaction(arguments.at("actions"));
    if (command == "blockdev-add") return json::object();
    if (command == "blockdev-del") throw std::string("Failed to find node with node-name");
    if (command == "blockdev-mirror") return begin_job(arguments);
    if (command == "query-jobs") return list_jobs();
    if (command.starts_with("job-")) return about_job(command, arguments.at("id"));
    if (command == "qom-set") return drive = arguments.at("value"), json::object();
    throw "The command " + command + " has not been found";
  }

  void mark(std::pair<std::uint64_t, std::uint64_t> range) {
    for (auto& [name, bitmap] : bitmaps) {
      if (bitmap.recording) bitmap.dirty.push_back(range);
    }
  }

  json set_running(bool now) {
    running = now;
    return json::object();
  }

  json devices() const {
    if (storage_daemon) return json::array();
    return json::array({{{"device", ""},
                         {"qdev", "/machine/peripheral/vd0/virtio-backend"},
                         {"inserted", {{"node-name", drive}}}}});
  }

  json nodes() const {
    json list = json::array();
    json marks = json::array();
    for (const auto& [name, bitmap] : bitmaps) {
      std::uint64_t dirty = 0;
      for (const auto& range : bitmap.dirty) dirty += range.second;
      marks.push_back({{"name", name},
                       {"granularity", bitmap.granularity},
                       {"count", dirty},
                       {"recording", bitmap.recording},
                       {"busy", bitmap.busy},
                       {"persistent", bitmap.persistent},
                       {"inconsistent", bitmap.inconsistent}});
    }
    for (const auto& each : drive == node ? std::vector{node} : std::vector{node, drive}) {
      list.push_back({{"node-name", each},
                      {"drv", "raw"},
                      {"ro", read_only},
                      {"detect_zeroes", "off"},
                      {"image", {{"filename", "/srv/" + each}, {"virtual-size", bytes}}},
                      {"cache", {{"direct", true}, {"no-flush", false}}},
                      {"dirty-bitmaps", each == node ? marks : json::array()}});
    }
    return list;
  }

  json list_exports() const {
    json list = json::array();
    for (const auto& id : exports) list.push_back({{"id", id}, {"node-name", node}});
    return list;
  }

  /// Whoever connects waits, and is not waited for.
  json start_server(const std::string& path) {
    if (server) throw std::string("NBD server already running");
    nbd_ = listening(path);
    server = true;
    return json::object();
  }

  json stop_server() {
    nbd_.reset();
    server = false;
    return json::object();
  }

  static FileDescriptor listening(const std::string& path) {
    FileDescriptor fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    path.copy(address.sun_path, sizeof address.sun_path - 1);
    ::unlink(path.c_str());
    BLOCKFERRY_CHECK(::bind(fd.get(), reinterpret_cast<sockaddr*>(&address), sizeof address) == 0 &&
                         ::listen(fd.get(), SOMAXCONN) == 0,
                     "no socket for a test");
    return fd;
  }

  json add_export(const json& arguments) {
    if (!server) throw std::string("NBD server not running");
    for (const auto& name : arguments.value("bitmaps", json::array())) {
      if (bitmaps.at(name).recording) throw std::string("Enabled bitmap incompatible with readonly export");
      bitmaps.at(name).busy = true;
      exported_[arguments.at("id")] = name;
    }
    exports.push_back(arguments.at("id"));
    return json::object();
  }

  json remove_export(const std::string& id) {
    if (std::erase(exports, id) == 0) throw "Export '" + id + "' is not found";
    if (const auto bitmap = bitmaps.find(exported_[id]); bitmap != bitmaps.end()) bitmap->second.busy = false;
    return json::object();
  }

  json add_bitmap(const json& arguments) {
    const std::string name = arguments.at("name");
    if (bitmaps.contains(name)) throw "Bitmap already exists: " + name;
    bitmaps[name].granularity = arguments.at("granularity");
    bitmaps[name].persistent = arguments.value("persistent", false);
    return json::object();
  }

  json remove_bitmap(const std::string& name) {
    if (!bitmaps.contains(name)) throw "Dirty bitmap '" + name + "' not found";
    if (bitmaps[name].busy) throw "Bitmap '" + name + "' is currently in use by another operation";
    bitmaps.erase(name);
    return json::object();
  }

  json begin_job(const json& arguments) {
    if (!job.empty()) throw std::string("Job ID '" + job_id_ + "' already in use");
    job = "ready";
    job_id_ = arguments.at("job-id");
    job_target_ = arguments.at("target");
    return json::object();
  }

  json list_jobs() const {
    if (job.empty()) return json::array();
    json object = {{"id", job_id_}, {"status", job == "ready" ? "ready" : "concluded"}, {"type", "mirror"}};
    if (job == "failed") object["error"] = "Operation canceled";
    return json::array({object});
  }

  json about_job(const std::string& command, const std::string& id) {
    if (job.empty() || id != job_id_) throw std::string("Job not found");
    if ((command == "job-dismiss") == (job == "ready"))
      throw "Job '" + id + "' cannot accept command " + command;
    if (command == "job-complete") exported_node = job_target_;
    job = command == "job-complete" ? "moved" : command == "job-cancel" ? "failed" : "";
    return json::object();
  }

  json transaction(const json& actions) {
    for (const auto& range : on_its_way) mark(range);
    on_its_way.clear();
    for (const auto& action : actions) {
      const json& data = action.at("data");
      if (action.at("type") == "block-dirty-bitmap-add") {
        add_bitmap(data);
      } else {
        bitmaps.at(data.at("name")).recording = false;
      }
    }
    return json::object();
  }

  FileDescriptor listener_, nbd_;
  std::vector<std::string> commands_;
  std::string job_id_, job_target_;
  std::map<std::string, std::string> exported_;  ///< bitmap by export
  std::atomic<bool> ended_ = false;
  std::thread thread_;
};

}  // namespace blockferry::fake_qemu
