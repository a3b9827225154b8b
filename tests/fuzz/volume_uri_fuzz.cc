// SPDX-License-Identifier: Apache-2.0
// URIs of NBD servers and of QEMU's disks: what is accepted is sound, and spelled out anew from its parts it
// means the same.
#include <cstdint>
#include <cstdlib>
#include <string>

#include "blockio/base/percent_encoding.h"
#include "blockio/nbd_uri.h"
#include "daemon/qemu_node.h"

namespace {

using namespace blockferry;

void expect(bool sound) {
  if (!sound) std::abort();
}

/// These go to libraries that take a zero byte for the end.
void expect_whole(const std::string& part) {
  expect(part.find('\0') == std::string::npos);
}

std::string spelled(const NbdUri& uri) {
  std::string text = std::string(uri.tls ? "nbds" : "nbd") + (uri.socket_path.empty() ? "" : "+unix") + "://";
  if (!uri.user.empty()) text += percent_encoded(uri.user) + "@";
  const bool numeric = uri.host.starts_with("[");
  if (uri.socket_path.empty()) text += percent_encoded(uri.host, numeric ? "[]:" : "") + ":" + uri.port;
  text += "/" + percent_encoded(uri.export_name);
  char before = '?';
  const auto add = [&](const char* name, const std::string& value) {
    if (value.empty()) return;
    text += before + std::string(name) + "=" + percent_encoded(value);
    before = '&';
  };
  add("socket", uri.socket_path);
  add("tls-certificates", uri.tls_certificates);
  add("tls-psk-file", uri.tls_psk_file);
  return text;
}

void try_nbd(const std::string& text) {
  const auto uri = parse_nbd_uri(text);
  if (!uri) return;
  expect(is_nbd_uri(text));
  expect(uri->host.empty() != uri->socket_path.empty());
  for (const auto* part : {&uri->user, &uri->host, &uri->port, &uri->socket_path, &uri->export_name,
                           &uri->tls_certificates, &uri->tls_psk_file})
    expect_whole(*part);
  for (const auto* path : {&uri->socket_path, &uri->tls_certificates, &uri->tls_psk_file})
    expect(path->empty() || path->starts_with("/"));
  expect(uri->tls || (uri->user.empty() && uri->tls_certificates.empty() && uri->tls_psk_file.empty()));
  const auto again = parse_nbd_uri(spelled(*uri));
  expect(again && again->tls == uri->tls && again->user == uri->user &&
         again->tls_certificates == uri->tls_certificates && again->tls_psk_file == uri->tls_psk_file &&
         nbd_identity(*again) == nbd_identity(*uri));
}

void try_qemu(const std::string& text) {
  const auto uri = parse_qemu_uri(text);
  if (!uri) return;
  expect(is_qemu_uri(text) && !is_nbd_uri(text));
  for (const auto* part : {&uri->socket, &uri->node, &uri->device, &uri->agent, &uri->bitmap})
    expect_whole(*part);
  expect(uri->socket.starts_with("/") && uri->node.empty() != uri->device.empty());
  std::string anew = "qemu:" + percent_encoded(uri->socket) + "?";
  anew +=
      (uri->node.empty() ? "device=" + percent_encoded(uri->device) : "node=" + percent_encoded(uri->node));
  if (!uri->agent.empty()) anew += "&agent=" + percent_encoded(uri->agent);
  if (!uri->bitmap.empty()) anew += "&bitmap=" + percent_encoded(uri->bitmap);
  const auto again = parse_qemu_uri(anew);
  expect(again && again->socket == uri->socket && again->node == uri->node && again->device == uri->device &&
         again->agent == uri->agent && bitmap_named_by(anew) == bitmap_named_by(text));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string text(reinterpret_cast<const char*>(data), size);
  try_nbd(text);
  try_qemu(text);
  return 0;
}
