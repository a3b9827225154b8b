// SPDX-License-Identifier: Apache-2.0
// An ApiServer with a FakeControl behind it, in a directory of its own.
#pragma once

#include <filesystem>
#include <memory>
#include <string>

#include <gtest/gtest.h>
#include <stdlib.h>

#include "daemon/api_server.h"
#include "tests/unit/daemon/fake_control.h"
#include "tests/unit/daemon/http_client.h"

namespace blockferry {

class ApiServerTest : public testing::Test {
 protected:
  ApiServerTest() {
    std::string name = std::filesystem::temp_directory_path() / "blockferry-api-XXXXXX";
    directory_ = ::mkdtemp(name.data());
    options_.socket_path = directory_ + "/control.sock";
    options_.metrics_listen = "127.0.0.1:0";
    options_.group = "";
  }
  ~ApiServerTest() override {
    control_.release();
    server_.reset();
    std::filesystem::remove_all(directory_);
  }

  void start() {
    auto made = ApiServer::create(options_, control_);
    ASSERT_TRUE(made) << made.error().message();
    server_ = std::move(*made);
    server_->start();
  }
  HttpClient client() const { return HttpClient::unix_socket(options_.socket_path); }
  HttpClient metrics_client() const { return HttpClient::tcp(server_->metrics_address()); }

  std::string directory_;
  ApiServerOptions options_;
  FakeControl control_;
  std::unique_ptr<ApiServer> server_;
};

}  // namespace blockferry
