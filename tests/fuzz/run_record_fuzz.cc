// SPDX-License-Identifier: Apache-2.0
// The run record's parser: whatever lies in the state directory, it is decoded whole or refused. The checksum
// line is made right for half of the inputs, so that the JSON behind it is reached.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "blockio/base/checksum.h"
#include "daemon/run_record.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace blockferry;
  const auto bytes = std::as_bytes(std::span(data, size));
  static_cast<void>(decode_record(bytes, "fuzz"));

  char line[96];
  const int length = std::snprintf(line, sizeof line, "blockferry-run 1 %016llx %zu\n",
                                   static_cast<unsigned long long>(crc64(bytes)), size);
  std::vector<std::byte> sealed(std::size_t(length) + size);
  std::copy_n(reinterpret_cast<const std::byte*>(line), length, sealed.begin());
  std::copy(bytes.begin(), bytes.end(), sealed.begin() + length);
  const auto record = decode_record(sealed, "fuzz");
  if (!record) return 0;
  // What was accepted must survive a round trip unchanged.
  const auto again = encode_record(*record);
  const auto decoded = decode_record(again, "fuzz");
  if (!decoded || encode_record(*decoded) != again) std::abort();
  return 0;
}
