// SPDX-License-Identifier: Apache-2.0
// One connection to an NBD server, over libnbd: connecting within a time limit, what the server can do, and a
// few synchronous requests. The device (nbd_device.h) drives many requests at once over the same class.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "blockio/base/clock.h"
#include "blockio/base/error.h"
#include "blockio/base/units.h"
#include "blockio/nbd_uri.h"

struct nbd_handle;

namespace blockferry {

constexpr const char* allocation_context = "base:allocation";

/// Where a server is and how to talk to it.
struct NbdAddress {
  std::string uri;  ///< as in nbd_uri.h
  // For nbds; what the URI itself says (tls-certificates=, tls-psk-file=) goes before these.
  std::string tls_certificates;  ///< a directory: ca-cert.pem, client-cert.pem, client-key.pem
  std::string tls_psk_file;      ///< lines of USER:KEY; the user is the URI's
  std::vector<std::string> contexts = {allocation_context};  ///< meta contexts to ask for
};

/// What the server says of the export.
struct NbdExport {
  std::uint64_t bytes = 0;
  bool read_only = false;
  bool can_flush = false, can_fua = false, can_zero = false, can_fast_zero = false, can_trim = false;
  bool can_multi_conn = false;
  bool tells_holes = false;  ///< base:allocation
  bool tls = false;
  // Limits of a request; powers of two but for block_bytes_max.
  std::uint64_t block_bytes_min = 1, block_bytes_preferred = 4096, block_bytes_max = 32 * MiB;
};

/// A run of equal status, of one meta context.
struct NbdExtent {
  std::uint64_t bytes = 0;
  std::uint32_t flags = 0;
};

class NbdConnection {
 public:
  /// Bounded by `timeout`, but for a slow resolver.
  static Result<NbdConnection> connect(const NbdAddress& address, Nanoseconds timeout);

  const NbdExport& about() const { return about_; }
  bool has_context(const std::string& context) const;

  Result<void> read(std::span<std::byte> data, std::uint64_t offset, Nanoseconds timeout);
  /// From the range's start on; may cover less than the range, or go beyond it. Never empty.
  Result<std::vector<NbdExtent>> block_status(const std::string& context, ByteRange range,
                                              Nanoseconds timeout);

  /// Waits until the server sends, takes what is to be sent, or `wake_fd` (-1: none) is readable; then moves
  /// the handle on. False: the time is over, and nothing happened.
  bool poll(int wake_fd, Nanoseconds timeout);
  // The same for those who wait themselves, with events of poll(2).
  int fd() const;
  short events_wanted() const;
  void move_on(short happened);
  bool alive() const;  ///< false: it broke, or a request's time was over; it takes nothing any more
  nbd_handle* handle() const { return handle_.get(); }

 private:
  struct Closer {
    void operator()(nbd_handle* handle) const;
  };

  NbdConnection(std::unique_ptr<nbd_handle, Closer> handle, std::string uri)
      : handle_(std::move(handle)), uri_(std::move(uri)) {}
  Result<void> connect_within(Nanoseconds timeout);
  void learn();

  std::unique_ptr<nbd_handle, Closer> handle_;
  std::string uri_;
  NbdExport about_;
};

}  // namespace blockferry
