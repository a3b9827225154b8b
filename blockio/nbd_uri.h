// SPDX-License-Identifier: Apache-2.0
// URIs of NBD servers, read strictly: a parameter mistyped must not mean a connection without certificates.
//
//   nbd://HOST[:PORT]/EXPORT            nbds://[USER@]HOST[:PORT]/EXPORT
//   nbd+unix:///EXPORT?socket=PATH      nbds+unix://[USER@]/EXPORT?socket=PATH
//                                       …with tls-certificates=DIRECTORY or tls-psk-file=PATH
#pragma once

#include <string>

#include "blockio/base/error.h"

namespace blockferry {

struct NbdUri {
  bool tls = false;
  std::string user;         ///< of a pre-shared key
  std::string host, port;   ///< empty for a UNIX socket; lower case, "10809" where none is given
  std::string socket_path;  ///< empty for TCP
  std::string export_name;  ///< may be empty: the server's default
  std::string tls_certificates, tls_psk_file;
};

/// Whether a volume's name means an NBD server at all.
bool is_nbd_uri(const std::string& text);

/// invalid_argument, with what is wrong, where it is no sound URI.
Result<NbdUri> parse_nbd_uri(const std::string& text);

/// Names server and export, however the URI is spelled and whether or not TLS is spoken: the volume's
/// identity over restarts.
std::string nbd_identity(const NbdUri& uri);

}  // namespace blockferry
