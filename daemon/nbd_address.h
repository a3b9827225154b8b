// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>

#include "blockio/nbd_connection.h"
#include "daemon/messages/messages.h"

namespace blockferry {

/// How a run talks to the NBD server of one of its volumes.
inline NbdAddress nbd_address(const RunRequest& request, const std::string& uri) {
  NbdAddress address;
  address.uri = uri;
  address.tls_certificates = request.tls_certificates;
  address.tls_psk_file = request.tls_psk_file;
  return address;
}

}  // namespace blockferry
